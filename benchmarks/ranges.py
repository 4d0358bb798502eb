"""Constraints for the ends of the ranges in pyproject.toml: `python benchmarks/ranges.py oldest` (or `newest`).

`oldest` pins the libraries that the package is built on to the lower ends of their ranges; `newest` leaves them free,
so that pip takes the latest release in range. Torch is pinned as in constraints.txt both times: its build decides
whether gigabytes of CUDA packages come along.
"""

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
ENDS = ("transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes", "huggingface_hub")


def constraints(end: str) -> list[str]:
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch==")]
    if end == "newest":
        return pins
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    for dependency in dependencies:
        name, lower = re.fullmatch(r"([\w-]+)>=([\w.]+).*", dependency).groups()
        if name in ENDS:
            pins.append(f"{name}=={lower}.0" if lower.count(".") == 1 else f"{name}=={lower}")
    return pins


if __name__ == "__main__":
    if sys.argv[1:] not in (["oldest"], ["newest"]):
        sys.exit("usage: python benchmarks/ranges.py oldest|newest")
    print("\n".join(constraints(sys.argv[1])))
