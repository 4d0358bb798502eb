"""The folder that is uploaded for a student: its weights, its card, and the measurements behind it.

Everything in it comes from the run folder, is chosen by name, and is reduced to what a reader elsewhere may see. The
card repeats the report's table and verdict; its words are in `model_card.md` and `usage.jinja`. Every value is
escaped, since names and templates come from recipes, data and models.
"""

import json
import re
import shutil
import tempfile
from pathlib import Path
from urllib.parse import quote

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..constants import ARMS, BUILDERS, HUB_ID, POST_HOC, PREDICT_FILE
from ..errors import FirstTrlError
from ..redaction import MODEL_PATH_KEYS, is_local_path, path_name, refuse_leaks, visible, without_local_paths
from ..templates import parse_template

# What a model folder publishes, by name: no optimizer, no checkpoint, no pickle (training_args.bin, *.bin).
MODEL_FILES = (
    "adapter_config.json", "adapter_model*.safetensors*", "config.json", "generation_config.json",
    "model*.safetensors*", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model", "spiece.model", "chat_template.jinja",
)  # fmt: skip
TEXT_SUFFIXES = {".json", ".md", ".yaml", ".jinja", ".txt"}
RESOLVED = "recipe.resolved.yaml"


# What a card says


def collect_facts(run_folder: Path, arm: str, recipe, plain: dict) -> dict:
    """All that the card of a student says, from its run folder; local paths are reduced to names.

    Args:
        plain: the resolved recipe as plain data, local paths already reduced.

    Raises:
        FirstTrlError: the arm is not finished or was not evaluated.
    """
    section, name, data = recipe.arm_section(arm), recipe.students_of(arm)[0], recipe.datasets
    student, base = run_folder / "students" / name, section["model_name_or_path"]  # of several seeds, the first
    report = _read_json(run_folder / "report/metrics.json", "evaluate")
    check_weights(student)
    if arm not in report["arms"]:
        raise FirstTrlError(
            f"push.arm = {arm!r} is not in the report ({', '.join(report['arms'])}); run evaluate again"
        )
    closing, manifest = student / "calibration.json", run_folder / "cache/train/manifest.json"
    # without the closing file nobody ships `<arm>_post_hoc`: the report alone fitted its temperature
    shipped = report["arms"][arm] if not closing.is_file() else report["arms"].get(arm + POST_HOC, report["arms"][arm])
    view = "choices" if report["view"] == "choices" else None
    splits = [data.train, data.transfer, data.validation, *data.test.values()]
    return {
        "title": (recipe.push.hub_model_id or f"{recipe.name}-{arm}").rpartition("/")[2],
        "repo_id": recipe.push.hub_model_id,
        "arm": arm,
        "student": name,  # its folder below students/
        "seeds": recipe.seeds if len(recipe.students_of(arm)) > 1 else None,
        "base_model": path_name(base) if is_local_path(base) else base,
        "base_is_local": is_local_path(base),
        "is_adapter": (student / "adapter_config.json").is_file(),
        "loader": _loader(student, base, section.get("model_revision")),
        "license": recipe.push.license or _base_license(base),
        "figures": {test: figures[view] if view else figures for test, figures in shipped.items()},
        "test_sets": {test: _source(config) for test, config in data.test.items()},
        "hub_datasets": sorted({_source(config)["hub_id"] for config in splits if config} - {None}),
        "table": (run_folder / "report" / "table.md").read_text("utf-8"),
        "sentences": report["verdicts"][arm],
        "diagrams": [file.name for file in sorted((run_folder / "report").glob("reliability*.png"))],
        "described": _read_json(student / PREDICT_FILE, "distill"),  # how it is loaded, and its thresholds
        "closing": _read_json(closing, "distill") if closing.is_file() and recipe.task.choices else None,
        "cache": without_local_paths(_read_json(manifest, "cache")) if manifest.is_file() else None,
        "recipe": plain,
        "fields": _fields(recipe.task.prompt),
        **_recalibration(recipe, arm, _read_json(run_folder / "calibration.json", "calibrate")),
    }


def _recalibration(recipe, arm: str, calibration: dict) -> dict:
    """How an arm's teacher was recalibrated: its method (None on labels), the recipe's own value, or the one found."""
    section = recipe.arm_section(arm)
    method, value = section.get("recalibration_method"), section.get("recalibration_value")
    if method is None:  # a value alone is a temperature
        method = calibration["method"] if value is None else "temperature"
    on_labels = recipe.arm_trainer(arm) == "sft"
    return {"method": None if on_labels else method, "value": value, "calibration": calibration}


def check_weights(student: Path) -> None:
    """Refuse a student without weights, or with some that cannot be read."""
    from safetensors import SafetensorError, safe_open

    files = sorted({*student.glob("adapter_model*.safetensors"), *student.glob("model*.safetensors")})
    if not files or not any((student / name).is_file() for name in ("adapter_config.json", "config.json")):
        raise FirstTrlError(f"there is no finished student in {student}; run the distill stage first, or set push.arm")
    for file in files:
        try:
            with safe_open(file, framework="numpy") as weights:
                problem = "" if weights.keys() else "holds no weights"
        except (SafetensorError, OSError) as error:
            problem = f"is damaged ({error})"
        if problem:
            raise FirstTrlError(f"{file} {problem}; run the distill stage again")


def _read_json(file: Path, stage: str) -> dict:
    if not file.is_file():
        raise FirstTrlError(f"there is no {file}; run the {stage} stage first")
    return json.loads(file.read_text("utf-8"))


def _source(config) -> dict:
    on_hub = config.path not in BUILDERS.values() and not is_local_path(config.path) and HUB_ID.fullmatch(config.path)
    known = {"config": config.name, "split": config.split, "revision": config.revision}
    return {"hub_id": config.path if on_hub else None, **known, "out_of_domain": config.out_of_domain}


def _loader(student: Path, base: str, revision: str | None) -> str:
    """The class of transformers that `load_model` takes for a student, or for the base of its adapter."""
    from transformers import AutoConfig

    from ..modeling import class_of

    path, revision = (student, None) if (student / "config.json").is_file() else (base, revision)
    return class_of(AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False)).__name__


def _base_license(base: str) -> str | None:
    """The licence that the base model's own card names; None where it has none or cannot be reached."""
    from huggingface_hub import ModelCard

    card = Path(base) / "README.md"
    try:
        loaded = ModelCard.load(card if Path(base).is_dir() else base, ignore_metadata_errors=True)
    except (OSError, ValueError):  # every error of the Hub's client is one of the two
        return None
    return loaded.data.to_dict().get("license")


def _fields(template: str | None) -> dict:
    """ "prompt", the template with "..." for its fields, and "row", as `predict` wants it; a conversation without."""
    if template is None:
        return {"prompt": None, "row": {"messages": [{"role": "user", "content": "..."}]}}
    pieces = parse_template(template)
    row = {piece.column: "..." for piece in pieces if piece.column is not None}
    return {"prompt": "".join(piece.literal + "..." * (piece.column is not None) for piece in pieces), "row": row}


def check_license(facts: dict) -> None:
    """Refuse an upload of unknown licence, and a derivative of Llama under another name."""
    license, title, repo_id, base = (facts[name] for name in ("license", "title", "repo_id", "base_model"))
    if license is None:
        raise FirstTrlError(f"push.license is missing: the card of {base} names none; set it, e.g. apache-2.0")
    if license.startswith("llama") and not title.startswith("Llama"):
        raise FirstTrlError(
            f"push.hub_model_id = {repo_id!r}: the licence {license} wants names of derivatives to begin with Llama; "
            f"write e.g. {(repo_id or 'me/').partition('/')[0]}/Llama-{title}"
        )


# The card


class Raw(str):
    """Text that is Markdown already."""


def build_card(facts: dict) -> str:
    """The README.md of the repository: metadata for the Hub, then the card."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=lambda value: value if isinstance(value, Raw) else escape_markdown(str(value)),
    )
    environment.filters |= {"raw": Raw, "code": _code, "fence": _fence, "url": lambda name: Raw(quote(name))}
    recipe_yaml = yaml.safe_dump(facts["recipe"], sort_keys=False, allow_unicode=True, width=100).rstrip()
    more = {"usage": usage_code(facts), "arms": ARMS, "recipe_yaml": recipe_yaml}
    body = environment.get_template("model_card.md").render(facts | more)
    return f"---\n{_metadata(facts).to_yaml()}\n---\n\n{body}"


def escape_markdown(text: str) -> str:
    """Text that Markdown and HTML show as it is, on one line."""
    text = visible(" ".join(text.split())).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|~$!#])", r"\\\1", text)


def _code(text: str) -> Raw:
    """A sentence of the report: names between backticks as code, everything else escaped."""
    parts = re.split(r"(`[\w./-]+`)", text)
    return Raw("".join(part if place % 2 else escape_markdown(f"x{part}x")[1:-1] for place, part in enumerate(parts)))


def _fence(code: str) -> Raw:
    """Backticks that open and close a block of code: more of them than stand together inside."""
    return Raw("`" * max(3, 1 + max(map(len, re.findall("`+", code)), default=0)))


def _metadata(facts: dict):
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=source["hub_id"] or name,
            dataset_name=name,
            dataset_config=source["config"],
            dataset_split=source["split"],
            dataset_revision=source["revision"],
            metric_type=metric,
            metric_name=metric_name,
            metric_value=round(facts["figures"][name][metric], 6),
        )
        for name, source in facts["test_sets"].items()
        for metric, metric_name in (("accuracy", "Accuracy"), ("ece", "ECE"), ("trust_score", "Trust score"))
        if facts["figures"].get(name, {}).get(metric) is not None
    ]
    relation = "adapter" if facts["is_adapter"] else "finetune"
    return ModelCardData(
        license=facts["license"],
        library_name="peft" if facts["is_adapter"] else "transformers",
        base_model=None if facts["base_is_local"] else facts["base_model"],
        base_model_relation=None if facts["base_is_local"] else relation,
        datasets=facts["hub_datasets"] or None,
        pipeline_tag="text-generation",
        tags=["trl", "first-trl", "calibration", "distillation"],
        model_name=facts["title"] if results else None,
        eval_results=results or None,
    )


def usage_code(facts: dict) -> str:
    """Code that prints an answer with its confidence as shipped: imports, and a line for each step."""
    environment = Environment(trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    environment.filters["literal"] = lambda value: (
        json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)
    )
    return environment.from_string((Path(__file__).parent / "usage.jinja").read_text("utf-8")).render(facts).strip()


# The folder


def prepare_upload_folder(run_folder: str | Path, arm: str, recipe, destination: str | Path) -> Path:
    """Write exactly what an upload would publish, and return the folder.

    The student's weights and tokenizer, README.md, predict.json, calibration.json, metrics.json, the reliability
    diagrams and the resolved recipe. Local paths in them are reduced to names. The folder appears whole or not at all;
    one that was prepared before is replaced.

    Raises:
        FirstTrlError: something is missing in the run folder, a file would leak a path or a secret, or `destination`
            holds something else.
    """
    run_folder, destination = Path(run_folder), Path(destination)
    if destination.exists() and not (destination / RESOLVED).is_file() and any(destination.iterdir()):
        raise FirstTrlError(f"{destination} holds something that is no prepared upload; move it away")
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=destination.parent, prefix=".push-") as temporary:
        folder = Path(temporary) / "upload"
        folder.mkdir()
        plain = without_local_paths(yaml.safe_load(recipe.to_yaml()))
        _write_folder(folder, run_folder, collect_facts(run_folder, arm, recipe, plain))
        for file in sorted(folder.iterdir()):
            if file.suffix in TEXT_SUFFIXES:
                refuse_leaks(file.name, file.read_text("utf-8"))
        if destination.exists():
            shutil.rmtree(destination)
        folder.rename(destination)
    return destination


def _write_folder(folder: Path, run_folder: Path, facts: dict) -> None:
    student, report = run_folder / "students" / facts["student"], run_folder / "report"
    for file in sorted({file for pattern in MODEL_FILES for file in student.glob(pattern)}):
        if not file.resolve().is_relative_to(student.resolve()):
            raise FirstTrlError(f"{file} is a link out of the run folder; replace it by the file itself")
        if file.suffix == ".json" and file.name != "tokenizer.json":
            _write_json(folder / file.name, without_local_paths(_read_json(file, "distill"), MODEL_PATH_KEYS))
        else:
            shutil.copyfile(file, folder / file.name)
    for file, stage in ((student / PREDICT_FILE, "distill"), (report / "metrics.json", "evaluate")):
        _write_json(folder / file.name, without_local_paths(_read_json(file, stage)))
    if facts["closing"] is not None:
        _write_json(folder / "calibration.json", facts["closing"])
    for diagram in facts["diagrams"]:
        shutil.copyfile(report / diagram, folder / diagram)
    recipe_text = yaml.safe_dump(facts["recipe"], sort_keys=False, allow_unicode=True, width=100)
    (folder / RESOLVED).write_text(recipe_text, "utf-8")
    (folder / "README.md").write_text(build_card(facts), "utf-8")


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
