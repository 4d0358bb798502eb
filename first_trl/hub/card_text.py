"""What a model card says, from facts to Markdown.

Pure: nothing is read, measured or uploaded here. The card tells the controls beside the student, and in words where a
control is better calibrated. Every value is escaped, since names and templates come from recipes, data and models.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

import yaml

ARMS = {
    "teacher": "the fine-tuned teacher",
    "teacher_recalibrated": "the teacher, its confidence recalibrated on validation",
    "base": "the student's base model, untrained",
    "fine_tuned": "the same base model, fine-tuned on the labels",
    "fine_tuned_post_hoc": "the same, its confidence recalibrated on validation",
    "distilled": "distilled, without recalibration",
    "distilled_post_hoc": "the same, its confidence recalibrated on validation",
    "first": "distilled from the recalibrated teacher",
}


@dataclass(frozen=True)
class CardFacts:
    """All that a card says, before it is put in words. Local paths are already reduced to names."""

    title: str
    arm: str
    base_model: str  # Hub id, or the name of a local folder
    base_is_local: bool
    is_adapter: bool
    metrics: dict  # {arm: {test set: metrics}}, shares in 0..1
    test_sets: dict[str, dict]  # test set -> {"hub_id", "config", "split", "revision", "out_of_domain"}
    recipe: dict  # the resolved recipe
    recalibration_method: str | None  # None for a student trained on the labels
    calibration: dict | None = None  # calibration.json
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


def build_card(facts: CardFacts) -> str:
    """The README.md of the repository: metadata for the Hub, then the card."""
    environment = _environment()
    template = environment.from_string((Path(__file__).parent / "model_card.md").read_text("utf-8"))
    recipe_yaml = yaml.safe_dump(facts.recipe, sort_keys=False, allow_unicode=True, width=100).rstrip()
    usage = usage_code(facts)
    body = template.render(
        title=facts.title,
        is_adapter=facts.is_adapter,
        base_model=facts.base_model,
        base_is_local=facts.base_is_local,
        base_url=f"https://huggingface.co/{quote(facts.base_model)}",
        made_by=_made_by(facts),
        usage=usage,
        usage_fence=_fence(usage),
        quantization="4-bit " + str(facts.quantization["bnb_4bit_quant_type"]).upper() if facts.quantization else None,
        choices=facts.recipe.get("task", {}).get("choices"),
        predict=f"first-trl predict {facts.repo_id or '.'} < questions.jsonl > answers.jsonl",
        thresholds=_thresholds(facts),
        seeds=facts.seeds,
        num_bins=facts.recipe.get("evaluate", {}).get("num_bins", 10),
        tables=[_table(facts, name) for name in facts.test_sets],
        diagrams=[quote(name) for name in facts.diagrams],
        recalibration=_recalibration(facts),
        provenance=_provenance(facts),
        recipe_yaml=recipe_yaml,
        recipe_fence=_fence(recipe_yaml),
    )
    return f"---\n{_metadata(facts).to_yaml()}\n---\n\n{body}"


def _environment():
    """Jinja with every value escaped for Markdown, but those marked `raw`."""
    from jinja2 import Environment, StrictUndefined

    class Raw(str):
        pass

    environment = Environment(
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=lambda value: value if isinstance(value, Raw) else escape_markdown(str(value)),
    )
    environment.filters["raw"] = Raw
    return environment


def escape_markdown(text: str) -> str:
    """Text that Markdown and HTML show as it is, on one line."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|~$!#])", r"\\\1", text)


def _fence(code: str) -> str:
    """Backticks that open and close a block of code: more of them than stand together inside."""
    return "`" * max(3, 1 + max(map(len, re.findall("`+", code)), default=0))


def _metadata(facts: CardFacts):
    from huggingface_hub import EvalResult, ModelCardData

    results = []
    for name, source in facts.test_sets.items():
        for metric, metric_name in (("accuracy", "Accuracy"), ("ece", "ECE"), ("trust_score", "Trust score")):
            measured = facts.metrics.get(facts.arm, {}).get(name, {}).get(metric)
            if measured is not None:
                result = EvalResult(
                    task_type="text-generation",
                    dataset_type=source["hub_id"] or name,
                    dataset_name=name,
                    dataset_config=source["config"],
                    dataset_split=source["split"],
                    dataset_revision=source["revision"],
                    metric_type=metric,
                    metric_name=metric_name,
                    metric_value=round(measured, 6),
                )
                results.append(result)
    known_base = not facts.base_is_local
    return ModelCardData(
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
    """Code that prints an answer with its confidence: imports, and five lines (six where the base is in 4 bits)."""
    repo = _literal(facts.repo_id or ".")
    loader = "AutoPeftModelForCausalLM" if facts.is_adapter else "AutoModelForCausalLM"
    options = f", dtype={_literal(facts.dtype)}" if facts.dtype else ""
    lines = [f"from {'peft' if facts.is_adapter else 'transformers'} import {loader}"]
    if facts.quantization is None:
        lines += ["from transformers import AutoTokenizer", ""]
    else:
        settings = "".join(f", {key}={value!r}" for key, value in facts.quantization.items() if value is not None)
        lines += ["from transformers import AutoTokenizer, BitsAndBytesConfig", ""]
        lines += [f"four_bit = BitsAndBytesConfig(load_in_4bit=True{settings})".replace("'", '"')]
        options += ", quantization_config=four_bit"
    if facts.prompt_example is not None:
        inputs = f'tokenizer({_literal(facts.prompt_example)}, return_tensors="pt")'
    else:
        kwargs = (facts.recipe.get("task") or {}).get("chat_template_kwargs") or {}
        extra = "".join(f", {key}={value!r}" for key, value in kwargs.items())
        lines += ['messages = [{"role": "user", "content": "..."}]']
        settings = f'add_generation_prompt=True, return_tensors="pt", return_dict=True{extra}'
        inputs = f"tokenizer.apply_chat_template(messages, {settings})"
    lines += [
        f"model = {loader}.from_pretrained({repo}{options})",
        f"tokenizer = AutoTokenizer.from_pretrained({repo})",
        f"inputs = {inputs}.to(model.device)",
        "confidence, answer = model(**inputs).logits[0, -1].float().softmax(-1).max(-1)",
        'print(tokenizer.decode(answer), f"{confidence:.1%}")',
    ]
    return "\n".join(lines)


def _thresholds(facts: CardFacts) -> list[dict]:
    """Target accuracy, threshold, and what it did on validation, as text; only targets that were reached."""
    return [
        {
            "target": f"{100 * fitted['target_accuracy']:.0f} %",
            "threshold": f"{fitted['threshold']:.3f}",
            "coverage": f"{100 * fitted['coverage']:.1f} %",
        }
        for fitted in facts.thresholds
        if fitted["threshold"] is not None
    ]


def _literal(text: str) -> str:
    """A Python literal in double quotes."""
    return json.dumps(text, ensure_ascii=False)


def _made_by(facts: CardFacts) -> str:
    if facts.recalibration_method is None:
        return "fine-tuned on labels by first-trl as a control for [FIRST](https://arxiv.org/abs/2408.12168)."
    if facts.recalibration_method == "none":
        return (
            "distilled by first-trl without recalibration, as a control for [FIRST](https://arxiv.org/abs/2408.12168)."
        )
    return "distilled from a larger, recalibrated teacher with [FIRST](https://arxiv.org/abs/2408.12168) by first-trl."


def _table(facts: CardFacts, test: str) -> dict:
    measured = {arm: sets[test] for arm, sets in facts.metrics.items() if test in sets}
    ordered = [arm for arm in ARMS if arm in measured] + [arm for arm in measured if arm not in ARMS]
    rows = [
        {
            "arm": arm,
            "what": ARMS.get(arm, "an arm of the recipe"),
            "pushed": arm == facts.arm,
            "nll": _number(measured[arm].get("nll")),
            "auroc": _number(measured[arm].get("auroc")),
            **{name: _percent(measured[arm], name) for name in ("accuracy", "ece", "trust_score")},
        }
        for arm in ordered
    ]
    return {
        "name": test,
        "out_of_domain": facts.test_sets[test]["out_of_domain"],
        "num_examples": measured.get(facts.arm, {}).get("num_examples", "no"),
        "rows": rows,
        "verdict": _verdict(facts.arm, measured),
    }


def _percent(measured: dict, name: str) -> str:
    if measured.get(name) is None:
        return "-"
    interval = (measured.get("ci") or {}).get(name)
    bounds = f" ({100 * interval[0]:.1f} to {100 * interval[1]:.1f})" if interval else ""
    return f"{100 * measured[name]:.1f} %{bounds}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _verdict(arm: str, measured: dict[str, dict]) -> str:
    """Who is better calibrated, in words: the controls that beat this student are named first."""
    controls = [name for name in measured if name not in (arm, "base") and not name.startswith("teacher")]
    if arm not in measured or not controls:
        return ""
    own = measured[arm]["ece"]
    better = [f"{name} ({100 * measured[name]['ece']:.1f} %)" for name in controls if measured[name]["ece"] < own]
    worse = [f"{name} ({100 * measured[name]['ece']:.1f} %)" for name in controls if measured[name]["ece"] >= own]
    parts = [f"better calibrated than {arm} here: {', '.join(better)}"] if better else []
    parts += [f"no better calibrated: {', '.join(worse)}"] if worse else []
    text = "; ".join(parts)
    text = f"{text[0].upper()}{text[1:]}. The ECE of {arm} is {100 * own:.1f} %"
    return f"{text}; differences inside the intervals mean little."


def _recalibration(facts: CardFacts) -> str:
    method = facts.recalibration_method
    if method is None:
        return "None: this student was trained on the labels, as a control."
    calibration = facts.calibration or {}
    family = (calibration.get("families") or {}).get(method)
    if method == "none" or family is None:
        return "None: the teacher's probabilities were used as they are."
    interval = family.get("interval")
    bounds = f" (95 % interval {interval[0]:.3g} to {interval[1]:.3g})" if interval else ""
    return (
        f"The teacher's probabilities were recalibrated by {method}, value {family['value']:.3g}{bounds}, chosen by "
        f"{calibration['criterion']} on {calibration['num_positions']} positions of the validation split. "
        f"There, the teacher's ECE went from {100 * family['ece_before']:.1f} % to {100 * family['ece_after']:.1f} %. "
        "The student was trained on the recalibrated probabilities and needs no correction at inference."
    )


def _provenance(facts: CardFacts) -> list[dict]:
    lines = [("Base model", facts.base_model + (" (a local folder)" if facts.base_is_local else ""))]
    if facts.cache is not None:
        teacher = facts.cache.get("teacher") or {}
        known = [teacher.get("base"), teacher.get("id"), teacher.get("revision"), teacher.get("weights_sha256")]
        lines += [
            ("Teacher", ", ".join(str(part) for part in known if part)),
            ("Teacher cache, SHA-256 of its manifest", facts.cache["manifest_sha256"]),
            ("Tokenizer, SHA-256", facts.cache["tokenizer_sha256"]),
            (
                "Cached positions",
                f"{facts.cache['totals']['supervised_positions']}, top {facts.cache['top_k']} tokens each",
            ),
        ]
        versions = facts.cache.get("library_versions") or {}
        lines.append(("Libraries", ", ".join(f"{name} {version}" for name, version in versions.items())))
    return [{"name": name, "value": value} for name, value in lines]
