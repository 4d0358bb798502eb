"""The folder that is uploaded for a student: its weights, its card, and the measurements behind it.

Everything in it comes from the run folder, is chosen by name, and is reduced to what a reader elsewhere may see. The
card repeats the report's table and verdict; what it says besides is in `model_card.md`. Every value is escaped, since
names and templates come from recipes, data and models.
"""

import json
import re
import shutil
import tempfile
from dataclasses import dataclass, field
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


@dataclass(frozen=True)
class CardFacts:
    """All that a card says, before it is put in words. Local paths are already reduced to names."""

    title: str
    arm: str
    base_model: str  # Hub id, or the name of a local folder
    base_is_local: bool
    is_adapter: bool
    figures: dict[str, dict]  # {test set: its metrics as shipped}
    test_sets: dict[str, dict]  # test set -> {"hub_id", "config", "split", "revision", "out_of_domain"}
    table: str  # report/table.md
    sentences: list[dict]  # the report's verdict on this student
    recipe: dict  # the resolved recipe
    recalibration_method: str | None  # None for a student trained on the labels
    recalibration_value: float | None = None  # the recipe's own; None for the one that calibrate found
    license: str | None = None
    closing: dict | None = None  # the student's calibration.json
    calibration: dict | None = None  # the teacher's
    cache: dict | None = None  # manifest of the training cache
    hub_datasets: list[str] = field(default_factory=list)
    diagrams: list[str] = field(default_factory=list)  # file names in the repository
    repo_id: str | None = None
    student: str = ""  # its folder below students/
    seeds: list[int] | None = None  # where the figures are means over several; the weights are the first one's
    thresholds: list[dict] = field(default_factory=list)  # those of predict.json
    prompt_example: str | None = None  # the prompt template with "..." for its fields; None for conversations
    dtype: str | None = None  # the type the student was measured in; None leaves it to the checkpoint
    quantization: dict | None = None  # arguments of BitsAndBytesConfig; strings, True, or None


def collect_facts(run_folder: Path, arm: str, recipe, plain: dict) -> CardFacts:
    """Read a run folder into the facts of a card.

    Args:
        plain: the resolved recipe as plain data, local paths already reduced.

    Raises:
        FirstTrlError: the arm is not finished or was not evaluated.
    """
    section, name = recipe.arm_section(arm), recipe.students_of(arm)[0]  # of several seeds, the first
    student, report = run_folder / "students" / name, _read_json(run_folder / "report/metrics.json", "evaluate")
    check_weights(student)
    if arm not in report["arms"]:
        known = ", ".join(report["arms"])
        raise FirstTrlError(f"push.arm = {arm!r} is not in the report, which has {known}; run evaluate again")
    closing = student / "calibration.json"
    shipped = report["arms"][arm]
    if closing.is_file():  # without it nobody ships `<arm>_post_hoc`: the report alone fitted its temperature
        shipped = report["arms"].get(arm + POST_HOC, shipped)
    view = "choices" if report.get("view") == "choices" else None
    calibration, manifest = (
        _read_json(run_folder / "calibration.json", "calibrate"),
        run_folder / "cache/train/manifest.json",
    )
    base, data = section["model_name_or_path"], recipe.datasets
    splits = [data.train, data.transfer, data.validation, *data.test.values()]
    base_is_local = is_local_path(base)
    dtype, four_bit = section.get("dtype", "float32"), section.get("load_in_4bit")
    value = section.get("recalibration_value")  # alone, it is a temperature
    method = section.get("recalibration_method") or (calibration["method"] if value is None else "temperature")
    return CardFacts(
        title=(recipe.push.hub_model_id or f"{recipe.name}-{arm}").rpartition("/")[2],
        arm=arm,
        base_model=path_name(base) if base_is_local else base,
        base_is_local=base_is_local,
        is_adapter=(student / "adapter_config.json").is_file(),
        figures={name: values[view] if view else values for name, values in shipped.items()},
        test_sets={name: _source(config) for name, config in data.test.items()},
        table=(run_folder / "report" / "table.md").read_text("utf-8"),
        sentences=report["verdicts"][arm],
        recipe=plain,
        recalibration_method=None if recipe.arm_trainer(arm) == "sft" else method,
        recalibration_value=value,
        license=recipe.push.license or _base_license(base),
        closing=_read_json(closing, "distill") if closing.is_file() and recipe.task.choices else None,
        calibration=calibration,
        cache=without_local_paths(json.loads(manifest.read_text("utf-8"))) if manifest.is_file() else None,
        hub_datasets=sorted({_source(one)["hub_id"] for one in splits if one} - {None}),
        diagrams=[file.name for file in sorted((run_folder / "report").glob("reliability*.png"))],
        repo_id=recipe.push.hub_model_id,
        student=name,
        seeds=recipe.seeds if len(recipe.students_of(arm)) > 1 else None,
        thresholds=_read_json(student / PREDICT_FILE, "distill")["thresholds"],
        prompt_example=_prompt_example(recipe.task.prompt),
        dtype=None if dtype == "auto" else dtype,
        quantization={
            "bnb_4bit_quant_type": section.get("bnb_4bit_quant_type", "nf4"),
            "bnb_4bit_use_double_quant": True if section.get("use_bnb_nested_quant") else None,
            "bnb_4bit_compute_dtype": dtype,
        }
        if four_bit
        else None,
    )


def check_weights(student: Path) -> None:
    """Refuse a student without weights that can be read.

    Raises:
        FirstTrlError: there is no safetensors file, or one of them is damaged; the message names it.
    """
    from safetensors import SafetensorError, safe_open

    files = sorted({*student.glob("adapter_model*.safetensors"), *student.glob("model*.safetensors")})
    if not files or not any((student / name).is_file() for name in ("adapter_config.json", "config.json")):
        raise FirstTrlError(f"there is no finished student in {student}; run the distill stage first, or set push.arm")
    for file in files:
        try:
            with safe_open(file, framework="numpy") as weights:
                whole = bool(weights.keys())
        except (SafetensorError, OSError) as error:
            raise FirstTrlError(f"{file} is damaged ({error}); run the distill stage again") from error
        if not whole:
            raise FirstTrlError(f"{file} holds no weights; run the distill stage again")


def _read_json(file: Path, stage: str) -> dict:
    if not file.is_file():
        raise FirstTrlError(f"there is no {file}; run the {stage} stage first")
    return json.loads(file.read_text("utf-8"))


def _source(config) -> dict:
    on_hub = config.path not in BUILDERS.values() and not is_local_path(config.path) and HUB_ID.fullmatch(config.path)
    known = {"config": config.name, "split": config.split, "revision": config.revision}
    return {"hub_id": config.path if on_hub else None, **known, "out_of_domain": config.out_of_domain}


def _prompt_example(template: str | None) -> str | None:
    if template is None:
        return None
    return "".join(piece.literal + ("..." if piece.column is not None else "") for piece in parse_template(template))


def _base_license(base: str) -> str | None:
    """The licence that the base model's own card names; None where it has none or cannot be reached."""
    from huggingface_hub import ModelCard
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    card = Path(base) / "README.md"
    try:
        loaded = ModelCard.load(card if Path(base).is_dir() else base, ignore_metadata_errors=True)
    except (OSError, ValueError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled):
        return None
    return loaded.data.to_dict().get("license")


def _fields(template: str | None) -> dict[str, object]:
    """A row as `predict` wants it, "..." for its texts; a conversation without a template."""
    if template is None:
        return {"messages": [{"role": "user", "content": "..."}]}
    return {piece.column: "..." for piece in parse_template(template) if piece.column is not None}


def check_license(facts: CardFacts) -> None:
    """Refuse an upload whose licence nobody knows, and a derivative of Llama under another name.

    Raises:
        FirstTrlError: with the setting that remedies it.
    """
    if facts.license is None:
        raise FirstTrlError(
            f"push.license is missing: the card of {facts.base_model} names none; set it, e.g. apache-2.0"
        )
    if facts.license.startswith("llama") and not facts.title.startswith("Llama"):
        raise FirstTrlError(
            f"push.hub_model_id = {facts.repo_id!r}: the licence {facts.license} wants names of derivatives to begin "
            f"with Llama; write e.g. {(facts.repo_id or 'me/').partition('/')[0]}/Llama-{facts.title}"
        )


# The card


def build_card(facts: CardFacts) -> str:
    """The README.md of the repository: metadata for the Hub, then the card."""

    class Raw(str):
        """Text that is Markdown already."""

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=lambda value: value if isinstance(value, Raw) else escape_markdown(str(value)),
    )
    environment.filters |= {"raw": Raw, "fence": lambda code: Raw(_fence(code)), "code": lambda text: Raw(_code(text))}
    environment.filters["url"] = lambda name: Raw(quote(name))
    family = ((facts.calibration or {}).get("families") or {}).get(facts.recalibration_method or "none")
    body = environment.get_template("model_card.md").render(
        vars(facts)
        | {
            "usage": usage_code(facts),
            "choices": facts.recipe.get("task", {}).get("choices"),
            "family": family if family and family.get("value") is not None else None,
            "reached": [fitted for fitted in facts.thresholds if fitted["threshold"] is not None],
            "num_bins": facts.recipe.get("evaluate", {}).get("num_bins", 10),
            "marked_table": facts.table.replace(f"| `{facts.arm}` |", f"| **`{facts.arm}`** |").strip(),
            "said": [one["text"] for one in facts.sentences if one["kind"] != "headline" and one["set"]],
            "arms": ARMS,
            "teacher": [str(part) for part in _teacher(facts) if part],
            "recipe_yaml": yaml.safe_dump(facts.recipe, sort_keys=False, allow_unicode=True, width=100).rstrip(),
        }
    )
    return f"---\n{_metadata(facts).to_yaml()}\n---\n\n{body}"


def escape_markdown(text: str) -> str:
    """Text that Markdown and HTML show as it is, on one line."""
    text = visible(" ".join(text.split())).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|~$!#])", r"\\\1", text)


def _code(text: str) -> str:
    """A sentence of the report: names between backticks as code, everything else escaped."""
    parts = re.split(r"(`[\w./-]+`)", text)
    return "".join(part if place % 2 else escape_markdown(f"x{part}x")[1:-1] for place, part in enumerate(parts))


def _fence(code: str) -> str:
    """Backticks that open and close a block of code: more of them than stand together inside."""
    return "`" * max(3, 1 + max(map(len, re.findall("`+", code)), default=0))


def _teacher(facts: CardFacts) -> list:
    teacher = (facts.cache or {}).get("teacher") or {}
    return [teacher.get(name) for name in ("base", "id", "revision", "weights_sha256")]


def _metadata(facts: CardFacts):
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
            metric_value=round(facts.figures[name][metric], 6),
        )
        for name, source in facts.test_sets.items()
        for metric, metric_name in (("accuracy", "Accuracy"), ("ece", "ECE"), ("trust_score", "Trust score"))
        if facts.figures.get(name, {}).get(metric) is not None
    ]
    known_base = not facts.base_is_local
    return ModelCardData(
        license=facts.license,
        library_name="peft" if facts.is_adapter else "transformers",
        base_model=facts.base_model if known_base else None,
        base_model_relation=("adapter" if facts.is_adapter else "finetune") if known_base else None,
        datasets=facts.hub_datasets or None,
        pipeline_tag="text-generation",
        tags=["trl", "first-trl", "calibration", "distillation"],
        model_name=facts.title if results else None,
        eval_results=results or None,
    )


def usage_code(facts: CardFacts) -> str:
    """Code that prints an answer with its confidence as shipped: imports, and a line for each step."""
    environment = Environment(trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    environment.filters["literal"] = lambda value: (
        json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)
    )
    task, closing = facts.recipe.get("task") or {}, facts.closing or {}
    whole_answers = bool(closing) and not closing.get("choice_token_ids")
    return (
        environment.from_string((Path(__file__).parent / "usage.jinja").read_text("utf-8"))
        .render(
            vars(facts)
            | {
                "repo": facts.repo_id or ".",
                "loader": "AutoPeftModelForCausalLM" if facts.is_adapter else "AutoModelForCausalLM",
                "chat": task.get("chat_template_kwargs") or {},
                "temperature": closing.get("temperature", 1.0),
                "choice_ids": closing.get("choice_token_ids"),
                "whole_answers": whole_answers,
                "fields": _fields(task.get("prompt")) if whole_answers else {},
            }
        )
        .strip()
    )


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
    if destination.exists() and not (destination / "recipe.resolved.yaml").is_file() and any(destination.iterdir()):
        raise FirstTrlError(f"{destination} holds something that is no prepared upload; move it away")
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=destination.parent, prefix=".push-") as temporary:
        folder = Path(temporary) / "upload"
        folder.mkdir()
        recipe.write_resolved(folder / "recipe.resolved.yaml")
        plain = without_local_paths(yaml.safe_load((folder / "recipe.resolved.yaml").read_text("utf-8")))
        _write_folder(folder, run_folder, collect_facts(run_folder, arm, recipe, plain))
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
            raise FirstTrlError(f"{file} is a link out of the run folder; replace it by the file itself")
        if file.suffix == ".json" and file.name != "tokenizer.json":
            _write_json(folder / file.name, without_local_paths(json.loads(file.read_text("utf-8")), MODEL_PATH_KEYS))
        else:
            shutil.copyfile(file, folder / file.name)
    _write_json(folder / PREDICT_FILE, without_local_paths(_read_json(student / PREDICT_FILE, "distill")))
    if facts.closing is not None:
        _write_json(folder / "calibration.json", facts.closing)
    metrics = _read_json(run_folder / "report" / "metrics.json", "evaluate")
    _write_json(folder / "metrics.json", without_local_paths(metrics))
    for diagram in facts.diagrams:
        shutil.copyfile(run_folder / "report" / diagram, folder / diagram)
    recipe_text = yaml.safe_dump(facts.recipe, sort_keys=False, allow_unicode=True, width=100)
    (folder / "recipe.resolved.yaml").write_text(recipe_text, "utf-8")
    (folder / "README.md").write_text(build_card(facts), "utf-8")


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
