"""The folder that is uploaded for a student: its weights, its card, and the measurements behind it.

Everything in it comes from the run folder, is chosen by name, and is reduced to what a reader elsewhere may see. What
the card says is `first_trl.hub.card_text`, uploading is `first_trl.hub.upload`; both are offered here too.
"""

import json
import re
import shutil
import tempfile
from pathlib import Path

import yaml

from ..redaction import MODEL_PATH_KEYS, is_local_path, path_name, refuse_leaks, without_local_paths
from ..templates import parse_template
from .card_text import CardFacts, build_card
from .upload import PushError, push_folder

__all__ = ["CardFacts", "PushError", "build_card", "collect_facts", "prepare_upload_folder", "push_folder"]

# What a model folder publishes, by name: no optimizer, no checkpoint, no pickle (training_args.bin, *.bin).
MODEL_FILES = (
    "adapter_config.json", "adapter_model*.safetensors*", "config.json", "generation_config.json",
    "model*.safetensors*", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model", "spiece.model", "chat_template.jinja",
)  # fmt: skip
TEXT_SUFFIXES = {".json", ".md", ".yaml", ".jinja", ".txt"}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_BUILDERS = {"json", "csv", "parquet", "text", "arrow", "imagefolder", "webdataset"}


def collect_facts(run_folder: Path, arm: str, recipe, recipe_plain: dict) -> CardFacts:
    """Read a run folder into the facts of a card.

    Args:
        recipe_plain: the resolved recipe as plain data, local paths already reduced.

    Raises:
        ValueError: the arm is not finished or was not evaluated.
    """
    section, name = recipe.arm_section(arm), recipe.students_of(arm)[0]  # of several seeds, the first
    student = Path(run_folder) / "students" / name
    if not (student / "adapter_config.json").is_file() and not (student / "config.json").is_file():
        raise ValueError(
            f"there is no finished student in {student}; run the distill stage first, or correct push.arm"
        )
    metrics = _read_json(run_folder, "report/metrics.json", "evaluate")["arms"]
    if arm not in metrics:
        raise ValueError(
            f"push.arm = {arm!r} is not in the report, which has {', '.join(metrics)}; run evaluate again"
        )
    manifest = Path(run_folder) / "cache" / "train" / "manifest.json"
    trained_on_labels = recipe.arm_trainer(arm) == "sft"
    base = section["model_name_or_path"]
    data, calibration = recipe.datasets, _read_json(run_folder, "calibration.json", "calibrate")
    everything = [data.train, data.transfer, data.validation, *data.test.values()]
    return CardFacts(
        title=(recipe.push.hub_model_id or f"{recipe.name}-{arm}").rpartition("/")[2],
        arm=arm,
        base_model=path_name(base) if is_local_path(base) else base,
        base_is_local=is_local_path(base),
        is_adapter=(student / "adapter_config.json").is_file(),
        metrics=metrics,
        test_sets={name: _source(config) for name, config in recipe.datasets.test.items()},
        recipe=recipe_plain,
        recalibration_method=None if trained_on_labels else section.get("recalibration_method", calibration["method"]),
        calibration=calibration,
        cache=without_local_paths(json.loads(manifest.read_text("utf-8"))) if manifest.is_file() else None,
        hub_datasets=sorted({_source(config)["hub_id"] for config in everything if config} - {None}),
        diagrams=[file.name for file in sorted((Path(run_folder) / "report").glob("reliability*.png"))],
        repo_id=recipe.push.hub_model_id,
        prompt_example=_prompt_example(recipe.task.prompt),
        thresholds=_read_json(run_folder, f"students/{name}/predict.json", "evaluate")["thresholds"],
        student=name,
        seeds=recipe.seeds if len(recipe.students_of(arm)) > 1 else None,
        dtype=None if section.get("dtype") == "auto" else section.get("dtype", "float32"),
        quantization=_quantization(section),
    )


def _read_json(run_folder: Path, name: str, stage: str) -> dict:
    file = Path(run_folder) / name
    if not file.is_file():
        raise ValueError(f"there is no {name} in {run_folder}; run the {stage} stage first")
    return json.loads(file.read_text("utf-8"))


def _source(config) -> dict:
    on_hub = config.path not in _BUILDERS and not is_local_path(config.path) and _HUB_ID.fullmatch(config.path)
    return {
        "hub_id": config.path if on_hub else None,
        "config": config.name,
        "split": config.split,
        "revision": config.revision,
        "out_of_domain": config.out_of_domain,
    }


def _prompt_example(template: str | None) -> str | None:
    if template is None:
        return None
    return "".join(piece.literal + ("..." if piece.column is not None else "") for piece in parse_template(template))


def _quantization(section: dict) -> dict | None:
    if not section.get("load_in_4bit"):
        return None
    return {
        "bnb_4bit_quant_type": section.get("bnb_4bit_quant_type", "nf4"),
        "bnb_4bit_use_double_quant": True if section.get("use_bnb_nested_quant") else None,
        "bnb_4bit_compute_dtype": section.get("dtype", "float32"),
    }


def prepare_upload_folder(run_folder: str | Path, arm: str, recipe, destination: str | Path) -> Path:
    """Write exactly what an upload would publish, and return the folder.

    The student's weights and tokenizer, README.md, predict.json, calibration.json, metrics.json, the reliability
    diagrams and the resolved recipe. Local paths in them are reduced to names. The folder appears whole or not at all;
    one that was prepared before is replaced.

    Raises:
        ValueError: something is missing in the run folder, a file would leak a path or a secret, or `destination`
            holds something else.
    """
    run_folder, destination = Path(run_folder), Path(destination)
    if destination.exists() and not (destination / "recipe.resolved.yaml").is_file() and any(destination.iterdir()):
        raise ValueError(f"{destination} holds something that is no prepared upload; move it away")
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=destination.parent, prefix=".push-") as temporary:
        folder = Path(temporary) / "upload"
        folder.mkdir()
        recipe.write_resolved(folder / "recipe.resolved.yaml")
        plain = without_local_paths(yaml.safe_load((folder / "recipe.resolved.yaml").read_text("utf-8")))
        facts = collect_facts(run_folder, arm, recipe, plain)
        _write_folder(folder, run_folder, facts)
        for file in sorted(folder.iterdir()):
            if file.suffix in TEXT_SUFFIXES:
                refuse_leaks(file.name, file.read_text("utf-8"))
        if destination.exists():
            shutil.rmtree(destination)
        folder.rename(destination)
    return destination


def _write_folder(folder: Path, run_folder: Path, facts: CardFacts) -> None:
    student = run_folder / "students" / facts.student
    for file in sorted({file for pattern in MODEL_FILES for file in student.glob(pattern)}):
        if not file.resolve().is_relative_to(student.resolve()):
            raise ValueError(f"{file} is a link out of the run folder; replace it by the file itself")
        if file.suffix == ".json" and file.name != "tokenizer.json":
            _write_json(folder / file.name, without_local_paths(json.loads(file.read_text("utf-8")), MODEL_PATH_KEYS))
        else:
            shutil.copyfile(file, folder / file.name)
    made = {f"students/{facts.student}/predict.json": "evaluate", "calibration.json": "calibrate"}
    for name, stage in {**made, "report/metrics.json": "evaluate"}.items():
        _write_json(folder / Path(name).name, without_local_paths(_read_json(run_folder, name, stage)))
    for diagram in facts.diagrams:
        shutil.copyfile(run_folder / "report" / diagram, folder / diagram)
    recipe_text = yaml.safe_dump(facts.recipe, sort_keys=False, allow_unicode=True, width=100)
    (folder / "recipe.resolved.yaml").write_text(recipe_text, "utf-8")
    (folder / "README.md").write_text(build_card(facts), "utf-8")


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
