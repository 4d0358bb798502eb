"""The embedded default: everything that the demo's recipe needs, made in place in about half a minute.

`prepare_demo` writes the task (`task.py`) and the two base models (`models.py`) and returns the recipe (`demo.yaml`),
which the ordinary stages then run. No stage knows that it is a demo.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path

from ..log import status

RECIPE = Path(__file__).parent / "demo.yaml"
INPUTS = "demo_inputs"


def prepare_demo(output_dir: str | Path, seed: int = 0) -> Path:
    """Makes `output_dir`/demo_inputs/{data,models}, unless they are there and current; returns the recipe's path.

    The recipe finds them through the variable FIRST_DEMO, which is set here for this process and those it starts.
    `seed` draws the task and the base models; the recipe's own `seed` is that of the training runs.
    """
    folder = Path(output_dir) / INPUTS
    os.environ["FIRST_DEMO"] = str(output_dir)
    sources = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    made_from = {"seed": seed, "sources": hashlib.sha256(sources).hexdigest()}
    stamp = folder / "made_from.json"
    if stamp.is_file() and json.loads(stamp.read_text(encoding="utf-8")) == made_from:
        return RECIPE
    status(f"demo: writing tickets and pre-training two tiny models in {folder}")
    shutil.rmtree(folder, ignore_errors=True)
    from .models import write_models
    from .task import write_task

    write_models(folder / "models", seed, seen=write_task(folder / "data", seed))
    stamp.write_text(json.dumps(made_from), encoding="utf-8")  # last: without it the folder is incomplete
    return RECIPE
