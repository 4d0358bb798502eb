"""A student without its adapter: merged into the base's weights, and measured again, because that moves probabilities.

The 4-bit base is dequantised, not replaced by its full-precision original: the adapter was trained against the rounded
weights. What is written is a whole model of the student's dtype that needs neither PEFT nor bitsandbytes. Confidences
still move, as merged weights are rounded to that dtype and 4-bit kernels round on their own (on CPUs they multiply in
bfloat16); `merge.json` and the table printed say by how much.
"""

import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer

from .constants import PREDICT_FILE
from .errors import FirstTrlError
from .evaluation import answer_set, predictions
from .files import read_json
from .metrics import summarize
from .modeling import language_model_head, load_model, load_tokenizer
from .student import CLOSING_FILE
from .training import load_arguments

LAST_NORMS = ("norm", "final_layernorm", "final_layer_norm", "ln_f", "final_norm")
MEASURED = ("accuracy", "ece", "trust_score", "nll")
# Mean move of a confidence that rounding explains: of a float32 sum taken in another order, of 16-bit or 4-bit weights
MOST_MOVED, MOST_MOVED_ROUNDED = 1e-3, 0.03


def merge(
    student: Path,
    loading: dict,
    sets: dict[str, tuple],
    output: Path,
    top_k: int = 5,
    tokens_per_batch: int = 8192,
    calibrated: bool = False,
) -> dict[str, dict]:
    """Merge an adapter, write the model, and measure it beside the adapter; returns what `merge.json` holds.

    Args:
        student: folder with the adapter and its tokenizer.
        loading: the settings of `trl.ModelConfig` that its base is loaded with.
        sets: {name: (labelled rows, their TaskConfig)} to measure on.
        output: folder to write, whole or not at all.
        calibrated: divide the logits by the closing temperature that was fitted over the vocabulary.

    Raises:
        FirstTrlError: `output` is there already, `student` is no adapter, its logits cannot be divided, or the merged
            model answers otherwise.
    """
    if output.exists():
        raise FirstTrlError(f"{output} is there already; remove it, or give another folder with --output")
    if not (student / "adapter_config.json").is_file():
        raise FirstTrlError(f"{student} holds no adapter; give a student trained with LoRA")
    description = read_json(student / PREDICT_FILE) or {}
    temperature = vocabulary_temperature(student) if calibrated else 1.0
    arguments, tokenizer = load_arguments(loading), load_tokenizer(student)

    def answers(path: Path, **how) -> dict[str, dict]:
        model, limits = load_model(path, **how), (top_k, tokens_per_batch)
        return {name: _answers(model, rows, task, tokenizer, *limits) for name, (rows, task) in sets.items()}

    before = answers(student, **arguments)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".merge-") as temporary:
        folder = Path(temporary) / "model"
        merged_model(student, arguments, temperature).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if description:
            description["loading"] = {"dtype": arguments["dtype"]}
            # What `predict` still divides by
            description["temperature"] = description.get("temperature", 1.0) / temperature
            (folder / PREDICT_FILE).write_text(json.dumps(description, indent=1), encoding="utf-8")
        after = answers(folder, dtype=arguments["dtype"])
        result = {name: compared(before[name], after[name]) for name in sets}
        exact = arguments["dtype"] == "float32" and arguments["quantization_config"] is None
        limit = MOST_MOVED if exact else MOST_MOVED_ROUNDED
        for name, measured in result.items():
            mean = measured["confidence_moved"]["mean"]
            if mean > limit and not calibrated:
                raise FirstTrlError(
                    f"on {name} the merged model's confidence moves by {100 * mean:.2f} points on average, where "
                    f"rounding moves it by {100 * limit:g} at most: nothing was written; use the adapter as it is"
                )
        (folder / "merge.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
        shutil.move(folder, output)
    return result


def vocabulary_temperature(student: Path) -> float:
    """The closing temperature of a student's probabilities over the vocabulary.

    Raises:
        FirstTrlError: it has none, or its answers are choices of several tokens.
    """
    closing = read_json(student / CLOSING_FILE) or {}
    if closing.get("scope") == "choices" and not closing.get("choice_token_ids"):
        raise FirstTrlError(
            f"--calibrated: the answers of {student} are of several tokens, and dividing every logit does not divide "
            "their logarithms; leave --calibrated out and use first-trl predict"
        )
    if not closing.get("vocabulary"):
        raise FirstTrlError(
            f"--calibrated: {student / CLOSING_FILE} has no temperature over the vocabulary; run `first-trl distill "
            "RECIPE` with distill.closing: true (a head with a bias, or with capped logits, has none)"
        )
    return closing["vocabulary"]["temperature"]


def merged_model(student: Path, arguments: dict, temperature: float = 1.0):
    """The adapter's base, dequantised, with the adapter added to its weights, in the dtype of the arguments."""
    config = PeftConfig.from_pretrained(str(student))
    pinned = {"revision": config.revision or arguments["revision"]}
    base = load_model(config.base_model_name_or_path, **arguments | pinned)
    if arguments["quantization_config"] is not None:
        base = base.dequantize()
    dtype = base.dtype if arguments["dtype"] == "auto" else getattr(torch, arguments["dtype"])
    # Added in float32 and rounded once, so that nothing of the adapter is lost to a narrow type on the way
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


@torch.no_grad()
def divide_logits(model, temperature: float) -> None:
    """Divide every logit of a model by `temperature`, by scaling its last norm: exact, or refused.

    The head is linear in what the last norm gives: (w x) / T = (w / T) x, or ((1 + w) / T - 1 + 1) x where the norm
    multiplies by 1 + w, as Gemma's. Which of the two it is, 8 tokens tell.

    Raises:
        FirstTrlError: the head has a bias or caps its logits, or no last norm is found that does it.
    """
    head, backbone = language_model_head(model), model.base_model
    norm = next((getattr(backbone, name) for name in LAST_NORMS if hasattr(backbone, name)), None)
    if head.bias is None and head.softcap is None and norm is not None:
        ids = torch.arange(8)[None] % head.weight.shape[0]
        own = {name: parameter.clone() for name, parameter in norm.named_parameters()}
        wanted = model(input_ids=ids).logits / temperature
        for shift in (0.0, 1.0):
            for name, parameter in norm.named_parameters():
                offset = shift if name == "weight" else 0.0
                parameter.copy_((own[name] + offset) / temperature - offset)
            if torch.allclose(model(input_ids=ids).logits, wanted, atol=1e-5, rtol=1e-5):
                return
    raise FirstTrlError(
        f"--calibrated cannot divide the logits of {type(model).__name__} by {temperature:.3g}: its head has a bias, "
        "a cap or an unknown last norm; leave it out, and divide by the temperature in predict.json"
    )


def _answers(model, rows, task, tokenizer, top_k: int, tokens_per_batch: int) -> dict[str, np.ndarray]:
    """The predictions that a model's answers make, and the answers themselves."""
    rows = answer_set(model, rows, task, tokenizer, top_k=top_k, tokens_per_batch=tokens_per_batch)
    answers = {name: np.array(rows[name][:]) for name in rows.column_names}
    best = answers["log_probs"][:, :-1].argmax(axis=1)
    return predictions(answers) | {"answer": answers["token_ids"][np.arange(len(best)), best]}


def compared(before: dict, after: dict) -> dict:
    """What merging changed on one set: the measures of both, the share of equal answers, the moves of confidence."""
    measured = {}
    for who, values in (("adapter", before), ("merged", after)):
        summary = summarize(values["confidence"], values["correct"], values["label_log_prob"], bootstrap=0)
        measured[who] = {name: summary[name] for name in MEASURED}
    moves = np.abs(after["confidence"] - before["confidence"])
    same = float((before["answer"] == after["answer"]).mean())
    moved = {"mean": float(moves.mean()), "max": float(moves.max())}
    return {"num_examples": len(moves), **measured, "same_answer": same, "confidence_moved": moved}


def table(result: dict[str, dict]) -> str:
    """The comparison for a screen, in per cent."""
    lines = ["| set | model | accuracy | ECE | trust score | same answer | confidence moved: mean, most |"]
    lines.append("|---|---|---:|---:|---:|---:|---:|")
    for name, measured in result.items():
        moved = measured["confidence_moved"]
        same = f"{100 * measured['same_answer']:.1f} | {100 * moved['mean']:.3f}, {100 * moved['max']:.3f}"
        for who, last in (("adapter", " | "), ("merged", same)):
            cells = " | ".join(f"{100 * measured[who][metric]:.2f}" for metric in MEASURED[:3])
            lines.append(f"| {name} | {who} | {cells} | {last} |")
    return "\n".join(lines)
