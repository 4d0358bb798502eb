"""Answers of a student with their confidence, and whether to trust them: the package's last step, and a user's first.

    first-trl predict ADAPTER [--accuracy 0.9] < questions.jsonl > answers.jsonl

ADAPTER is a student's folder or its id on the Hub. Each line is a row as the task's prompt wants it, e.g.
{"text": "..."}; for each comes a line with "answer", "confidence" and "abstain", which is true where the confidence is
below the one that reached the target accuracy on validation. Nothing is fitted and nothing measured here.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

# Rows answered at a time: what a reader at the other end of a pipe waits for.
ROWS_AT_A_TIME = 256
_REMEDY = 'write one object a line, e.g. {"text": "..."}'
_WANTED = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]


class RowError(ValueError):
    """A row that does not fit the task: its `number`, from 0, and the `reason`."""

    def __init__(self, number: int, reason: str):
        super().__init__(f"row {number}: {reason}")
        self.number, self.reason = number, reason


class Predictor:
    """A student, loaded once.

    Args:
        adapter: its folder, or its id on the Hub; code that comes with a model is never run.
        revision: branch, tag or commit on the Hub.
        device: where it runs; default: an accelerator if there is one.

    Raises:
        ValueError: the folder lacks what prediction needs, or its base model is not here.
    """

    def __init__(self, adapter: str | Path, *, revision: str | None = None, device: str | None = None):
        import torch

        from .evaluation import read_student
        from .modeling import load_model, load_tokenizer
        from .training import load_arguments

        folder = _folder(str(adapter), revision)
        self.task, self.description = read_student(folder)
        _check_base(folder)
        if device is None and torch.accelerator.is_available():
            device = str(torch.accelerator.current_accelerator())
        self.model = load_model(str(folder), device=device or "cpu", **load_arguments(self.description["loading"]))
        self.tokenizer = load_tokenizer(folder)

    def predict(self, rows: Iterable[dict], accuracy: float = 0.9, tokens_per_batch: int = 8192) -> list[dict]:
        """[{"answer", "confidence", "abstain"}] of rows, in order; they need no label.

        Args:
            rows: the columns that the task's prompt reads, or conversations.
            accuracy: the target whose threshold decides; one of those in `predict.json`.
            tokens_per_batch: tokens of one batch, padding included.

        Raises:
            RowError: a row does not fit the task, beginning with its number, from 0.
            ValueError: an accuracy for which no threshold was fitted.
        """
        from .data.choices import choice_token_ids
        from .data.encoding import encode_prompt
        from .evaluation import threshold_for
        from .scoring import sequence_log_probs

        threshold, rows, prompts = threshold_for(self.description, accuracy), list(rows), []
        for number, row in enumerate(rows):
            try:
                prompts.append(encode_prompt(self.task, self.tokenizer, row))
            except ValueError as error:
                raise RowError(number, str(error)) from error
        if not prompts:
            return []
        answers = choice_token_ids(self.task, self.tokenizer, rows[0])
        log_probs_NC = sequence_log_probs(self.model, prompts, answers, tokens_per_batch=tokens_per_batch)
        return _decide(log_probs_NC, self.task.choices or [], threshold)


def _decide(log_probs_NC, choices: list[str], threshold: float | None) -> list[dict]:
    """The most probable choice of each row, its share among the choices, and whether that is too little."""
    from .evaluation import choice_shares

    shares = choice_shares(log_probs_NC)
    best = shares.argmax(axis=1)
    return [
        {
            "answer": choices[place],
            "confidence": float(share[place]),
            "abstain": threshold is None or bool(share[place] < threshold),
        }
        for place, share in zip(best, shares, strict=True)
    ]


def predict(
    adapter: str | Path | Predictor, rows: Iterable[dict], accuracy: float = 0.9, tokens_per_batch: int = 8192
) -> list[dict]:
    """Answers of a student: [{"answer", "confidence", "abstain"}] of rows, in order. See [`Predictor`].

    Args:
        adapter: a student's folder, its id on the Hub, or a [`Predictor`], which is loaded once for many calls.
    """
    student = adapter if isinstance(adapter, Predictor) else Predictor(adapter)
    return student.predict(rows, accuracy, tokens_per_batch)


def _folder(adapter: str, revision: str | None) -> Path:
    if Path(adapter).is_dir():
        return Path(adapter)
    if adapter.startswith((".", "/", "~")) or adapter.count("/") > 1:
        raise ValueError(f"there is no folder {adapter}; give a student's, such as runs/NAME/students/first")
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(adapter, revision=revision, allow_patterns=_WANTED))


def _check_base(folder: Path) -> None:
    """Refuse an adapter whose base model was a folder that is not here."""
    from .recipe import looks_local

    config = folder / "adapter_config.json"
    if not config.is_file():
        return  # a whole model
    base = json.loads(config.read_text(encoding="utf-8"))["base_model_name_or_path"]
    if looks_local(base) and not Path(base).is_dir():
        raise ValueError(
            f"{folder} is an adapter of {base}, and there is no such folder here; run where that path leads to it, or "
            f"correct base_model_name_or_path in {config}"
        )


def main(argv: list[str]) -> int:
    """The command; returns its exit status."""
    from .failures import explain

    options = _parser().parse_args(argv)
    try:
        _answer_lines(options)
    except BrokenPipeError:  # whoever reads has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError) as error:
        print(f"[first-trl] predict failed: {explain(error, 'predict') or error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="first-trl predict",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("adapter", metavar="ADAPTER", help="a student's folder, or its id on the Hub")
    parser.add_argument("--input", type=Path, help="JSON lines to answer (default: standard input)")
    parser.add_argument("--output", type=Path, help="file for the answers, whole or absent (default: standard output)")
    parser.add_argument("--accuracy", type=float, default=0.9, help="abstain below its threshold (default: 0.9)")
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")
    parser.add_argument("--tokens_per_batch", type=int, default=8192, help="tokens of one batch (default: 8192)")
    return parser


def _answer_lines(options: argparse.Namespace) -> None:
    from .evaluation import threshold_for
    from .files import write_atomically

    source = options.input.open("rb") if options.input else sys.stdin.buffer
    with source:
        student = Predictor(options.adapter, revision=options.revision)
        threshold_for(student.description, options.accuracy)
        lines = answered_lines(student, source, options.accuracy, options.tokens_per_batch)
        if options.output:
            write_atomically(options.output, "".join(lines))
            return
        for line in lines:
            print(line, end="", flush=True)


def answered_lines(
    student: Predictor, source: Iterable[bytes], accuracy: float, tokens_per_batch: int
) -> Iterator[str]:
    """A line of JSON for each line of JSON, some at a time; blank lines are passed over.

    Raises:
        ValueError: a line is no row of this task, beginning with its number, from 1.
    """
    numbers, rows = [], []
    for number, line in enumerate(source, start=1):
        if line.strip():
            numbers.append(number)
            rows.append(_read_line(line, number))
        if len(rows) == ROWS_AT_A_TIME:
            yield from _answer_some(student, numbers, rows, accuracy, tokens_per_batch)
            numbers, rows = [], []
    yield from _answer_some(student, numbers, rows, accuracy, tokens_per_batch)


def _read_line(line: bytes, number: int) -> dict:
    try:
        row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except ValueError as error:
        raise ValueError(f"line {number} is not JSON in UTF-8 ({error}); {_REMEDY}") from error
    if not isinstance(row, dict):
        raise ValueError(f"line {number} holds a {type(row).__name__}; {_REMEDY}")
    return row


def _answer_some(student, numbers: list[int], rows: list[dict], accuracy: float, tokens_per_batch: int) -> list[str]:
    try:
        answers = student.predict(rows, accuracy, tokens_per_batch)
    except RowError as error:
        raise ValueError(f"line {numbers[error.number]}: {error.reason}") from error
    return [json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers]
