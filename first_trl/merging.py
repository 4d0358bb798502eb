"""A student without its adapter: merged into the base's weights, and measured again, because that moves probabilities.

    first-trl merge RECIPE [--arm first]                  measured on the recipe's test sets
    first-trl merge ADAPTER --data questions.jsonl        measured on labelled rows of your own
    first-trl merge ... --calibrated                      its logits divided by their closing temperature

The 4-bit base is dequantised, not replaced by its full-precision original: the adapter was trained against the rounded
weights. What is written is a whole model of the student's dtype that needs neither PEFT nor bitsandbytes. Confidences
still move, as merged weights are rounded to that dtype and 4-bit kernels round on their own (on CPUs they multiply in
bfloat16); `merge.json` and the table printed say by how much.
"""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from .constants import PREDICT_FILE
from .errors import FirstTrlError
from .failures import explain
from .log import status

LAST_NORMS = ("norm", "final_layernorm", "final_layer_norm", "ln_f", "final_norm")
MEASURED = ("accuracy", "ece", "trust_score", "nll")


def main(argv: list[str]) -> int:
    """The command; returns its exit status."""
    options = _parser().parse_args(argv)
    try:
        job = _recipe_job(options) if options.source.endswith((".yaml", ".yml")) else _folder_job(options)
        print(table(merge(**job, calibrated=options.calibrated)))
    except Exception as error:
        known = explain(error, "merge")
        if known is None:
            raise  # unexpected: there is no run's log to keep the traceback in
        print(f"[first-trl] merge failed: {known}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="first-trl merge",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="RECIPE|ADAPTER", help="a recipe, or the folder of a student")
    parser.add_argument("--arm", help="which student of the recipe (default: push.arm, or first)")
    parser.add_argument("--data", help="labelled rows to measure on; needed for an ADAPTER")
    parser.add_argument(
        "--calibrated",
        action="store_true",
        help="divide every logit by the closing temperature over the vocabulary, for vLLM and others that know none",
    )
    parser.add_argument("--output", help="folder to write; it must not be there yet (default: beside the student)")
    return parser


def _recipe_job(options: argparse.Namespace) -> dict[str, Any]:
    from .evaluation import test_task
    from .recipe import load_recipe

    recipe = load_recipe(options.source)
    arm = options.arm or ("first" if recipe.push.arm == "best" else recipe.push.arm)
    section = recipe.arm_section(arm)
    arm = arm if arm in recipe.students else recipe.students_of(arm)[0]  # of several seeds, the first
    tests = {name: (config, test_task(recipe.task, config.task)) for name, config in recipe.datasets.test.items()}
    return {
        "student": recipe.run_folder / "students" / arm,
        "loading": section,
        "tests": {"data": (_rows(options.data), recipe.task)} if options.data else tests,
        "output": Path(options.output or recipe.run_folder / "merged" / arm),
        "top_k": recipe.cache.top_k,
        "tokens_per_batch": recipe.evaluate.tokens_per_batch,
    }


def _folder_job(options: argparse.Namespace) -> dict[str, Any]:
    from .student import read_student

    student = Path(options.source)
    if not student.is_dir():
        raise FirstTrlError(f"there is no folder {student}; give a recipe, or a student's folder, e.g. students/first")
    if options.data is None:
        raise FirstTrlError("--data is missing: a merged student must be measured again; give a file of labelled rows")
    task, description = read_student(student)
    return {
        "student": student,
        "loading": description.loading.model_dump(exclude_none=True),
        "tests": {"data": (_rows(options.data), task)},
        "output": Path(options.output or student.with_name(f"{student.name}-merged")),
    }


def _rows(path: str):
    from .settings import DatasetConfig

    return DatasetConfig(path=path, split="train")


def merge(
    student: Path,
    loading: dict,
    tests: dict[str, tuple],
    output: Path,
    top_k: int = 5,
    tokens_per_batch: int = 8192,
    calibrated: bool = False,
) -> dict[str, dict]:
    """Merge an adapter, write the model, and measure it beside the adapter; returns what `merge.json` holds.

    Args:
        student: folder with the adapter and its tokenizer.
        loading: the settings of `trl.ModelConfig` that its base is loaded with.
        tests: {name: (DatasetConfig, TaskConfig)} to measure on.
        output: folder to write, whole or not at all.
        calibrated: divide the logits by the closing temperature that was fitted over the vocabulary.

    Raises:
        ValueError: `output` is there already, `student` is no adapter, or its logits cannot be divided.
    """
    from .data.loading import load_split
    from .modeling import load_model, load_tokenizer
    from .training import load_arguments

    if output.exists():
        raise FirstTrlError(f"{output} is there already; remove it, or give another folder with --output")
    if not (student / "adapter_config.json").is_file():
        raise FirstTrlError(
            f"{student} holds no adapter, so nothing is to be merged; give a student trained with LoRA"
        )
    arguments, tokenizer = load_arguments(loading), load_tokenizer(student)
    sets = {name: (load_split(config, "test"), task) for name, (config, task) in tests.items()}
    sizes = {"top_k": top_k, "tokens_per_batch": tokens_per_batch}
    before = _answers(load_model(str(student), **arguments), tokenizer, sets, **sizes)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".merge-") as temporary:
        folder = Path(temporary) / "model"
        content = (
            json.loads((student / PREDICT_FILE).read_text(encoding="utf-8"))
            if (student / PREDICT_FILE).is_file()
            else {}
        )
        temperature = vocabulary_temperature(student) if calibrated else 1.0
        merged_model(student, arguments, temperature).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if content:
            content["loading"] = {"dtype": arguments["dtype"]}
            content["temperature"] = content.get("temperature", 1.0) / temperature  # what `predict` still divides by
            (folder / PREDICT_FILE).write_text(json.dumps(content, indent=1), encoding="utf-8")
        after = _answers(load_model(str(folder), dtype=arguments["dtype"]), tokenizer, sets, **sizes)
        result = {name: compared(before[name], after[name]) for name in sets}
        exact = arguments["dtype"] == "float32" and arguments["quantization_config"] is None
        if not calibrated:
            refuse_other_answers(result, 1e-3 if exact else 0.03)
        (folder / "merge.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
        shutil.move(folder, output)
    status(f"merge: read {student}; wrote {output}, a whole model; next: first-trl predict {output}")
    return result


def vocabulary_temperature(student: Path) -> float:
    """The closing temperature of a student's probabilities over the vocabulary.

    Raises:
        FirstTrlError: it has none, or its answers are choices of several tokens.
    """
    from .student import CLOSING_FILE

    file = student / CLOSING_FILE
    closing = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if closing.get("scope") == "choices" and not closing.get("choice_token_ids"):
        raise FirstTrlError(
            f"--calibrated: the answers of {student} are of several tokens, and dividing every logit does not divide "
            "their logarithms; leave --calibrated out and use first-trl predict"
        )
    if not closing.get("vocabulary"):
        raise FirstTrlError(
            f"--calibrated: {file} has no temperature over the vocabulary; run `first-trl distill RECIPE` with "
            "distill.closing: true (a head with a bias, or with capped logits, has none)"
        )
    return closing["vocabulary"]["temperature"]


def merged_model(student: Path, arguments: dict, temperature: float = 1.0):
    """The adapter's base, dequantised, with the adapter added to its weights, in the dtype of the arguments."""
    import torch
    from peft import PeftConfig, PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    from .modeling import load_model

    config = PeftConfig.from_pretrained(str(student))
    pinned = {"revision": config.revision or arguments["revision"]}
    base = load_model(config.base_model_name_or_path, **{**arguments, **pinned})
    if arguments["quantization_config"] is not None:
        base = base.dequantize()
    dtype = base.dtype if arguments["dtype"] == "auto" else getattr(torch, arguments["dtype"])
    # Added in float32 and rounded once, so that nothing of the adapter is lost to a narrow type on the way.
    base = base.float()
    model = PeftModel.from_pretrained(base, str(student))
    embeddings, head = base.get_input_embeddings(), base.get_output_embeddings()
    if isinstance(embeddings, BaseTunerLayer) and head.weight is embeddings.weight:
        # The adapter changed what tokens are embedded as, and not the head that has the same weights
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
        base.config.tie_word_embeddings = base.config.get_text_config().tie_word_embeddings = False
    merged = model.merge_and_unload(safe_merge=True)
    if temperature != 1:
        divide_logits(merged, temperature)
    return merged.to(dtype)


def divide_logits(model, temperature: float) -> None:
    """Divide every logit of a model by `temperature`, by scaling its last norm: exact, or refused.

    The head is linear in what the last norm gives: (w x) / T = (w / T) x, or ((1 + w) / T - 1 + 1) x where the norm
    multiplies by 1 + w, as Gemma's. Which of the two it is, 8 tokens tell.

    Raises:
        FirstTrlError: the head has a bias or caps its logits, or no last norm is found that does it.
    """
    import torch

    from .modeling import language_model_head

    head, backbone = language_model_head(model), model.base_model
    norm = next((getattr(backbone, name) for name in LAST_NORMS if hasattr(backbone, name)), None)
    if head.bias is None and head.softcap is None and norm is not None:
        ids = torch.arange(8)[None] % head.weight.shape[0]
        own = {name: parameter.detach().clone() for name, parameter in norm.named_parameters()}
        with torch.no_grad():
            wanted = model(input_ids=ids).logits / temperature
            for shift in (0.0, 1.0):
                for name, parameter in norm.named_parameters():
                    offset = shift if name == "weight" else 0.0
                    parameter.copy_((own[name] + offset) / temperature - offset)
                if torch.allclose(model(input_ids=ids).logits, wanted, atol=1e-5, rtol=1e-5):
                    return
    raise FirstTrlError(
        f"--calibrated cannot divide the logits of {type(model).__name__} by {temperature:.3g}: its head has a "
        "bias or caps them, or its last norm is unknown; merge without it, and divide by predict.json's temperature."
    )


def _answers(model, tokenizer, sets: dict, **sizes) -> dict[str, dict]:
    """{set: answers as arrays, and the predictions they make}."""
    import numpy as np

    from .evaluation import answer_set, predictions

    found = {}
    for name, (dataset, task) in sets.items():
        rows = answer_set(model, dataset, task, tokenizer, **sizes)
        answers = {column: np.array(rows[column][:]) for column in rows.column_names}
        best = answers["log_probs"][:, :-1].argmax(axis=1)
        found[name] = predictions(answers) | {"answer": answers["token_ids"][np.arange(len(best)), best]}
    return found


def compared(before: dict, after: dict) -> dict[str, Any]:
    """What merging changed on one set: the measures of both, the share of equal answers, the moves of confidence."""
    import numpy as np

    from .metrics import summarize

    measured = {}
    for who, values in (("adapter", before), ("merged", after)):
        summary = summarize(values["confidence"], values["correct"], values["label_log_prob"], bootstrap=0)
        measured[who] = {name: summary[name] for name in MEASURED}
    moves = np.abs(after["confidence"] - before["confidence"])
    return {
        "num_examples": len(moves),
        **measured,
        "same_answer": float((before["answer"] == after["answer"]).mean()),
        "confidence_moved": {"mean": float(moves.mean()), "max": float(moves.max())},
    }


def refuse_other_answers(result: dict[str, dict], limit: float) -> None:
    """Raise where confidences moved, on average, by more than the rounding of merged weights can move them."""
    for name, measured in result.items():
        mean = measured["confidence_moved"]["mean"]
        if mean > limit:
            raise FirstTrlError(
                f"on {name} the merged model's confidence moves by {100 * mean:.2f} points on average, where rounding "
                f"moves it by {100 * limit:g} at most: it is another model than the student, and nothing was written. "
                "Use the adapter as it is."
            )


def table(result: dict[str, dict]) -> str:
    """The comparison for a screen, in per cent."""
    lines = ["| set | model | accuracy | ECE | trust score | same answer | confidence moved: mean, most |"]
    lines.append("|---|---|---:|---:|---:|---:|---:|")
    for name, measured in result.items():
        for who in ("adapter", "merged"):
            cells = [f"{100 * measured[who][metric]:.2f}" for metric in MEASURED[:3]]
            moved = measured["confidence_moved"]
            same = f"{100 * measured['same_answer']:.1f} | {100 * moved['mean']:.3f}, {100 * moved['max']:.3f}"
            lines.append(f"| {name} | {who} | {' | '.join(cells)} | {same if who == 'merged' else ' | '} |")
    return "\n".join(lines)
