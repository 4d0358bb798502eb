"""Answers of a student with their confidence, and whether to trust them: the package's last step, and a user's first.

    first-trl predict ADAPTER [--accuracy 0.9] < questions.jsonl > answers.jsonl

ADAPTER is a student's folder or its id on the Hub. Each line is a row as the task's prompt wants it, e.g.
{"text": "..."}; for each comes a line with "answer", "confidence" and "abstain", which is true where the confidence is
below the one that reached the target accuracy on validation. The confidence is that under the student's closing
temperature. A line that cannot be answered comes back as {"error": ...}. Nothing is fitted and nothing measured here.

With --generate, for tasks without choices, each line is {"answer", "mean_token_probability",
"lowest_token_probability", "ended"}: the text that the student writes, and how probable its tokens were to it, each
given all before it. That is no probability of being right. "ended" is false where --max_new_tokens cut it.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path

from .constants import HUB_ID
from .errors import FirstTrlError
from .settings import WriteAnswers

# Rows answered at a time: what a reader at the other end of a pipe waits for.
ROWS_AT_A_TIME = 256
NO_NUMBERS = "the model's probabilities are not numbers: its weights are damaged"


class RowError(FirstTrlError):
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
        generate: it is to write free text, by [`Predictor.generate`], and not to choose.

    Raises:
        FirstTrlError: the folder lacks what prediction needs, or its base model is not here.
    """

    def __init__(
        self, adapter: str | Path, *, revision: str | None = None, device: str | None = None, generate: bool = False
    ):
        import torch

        from .modeling import load_model, load_tokenizer
        from .student import read_student
        from .training import load_arguments

        folder = _folder(str(adapter), revision)
        self.task, self.student = read_student(folder, closed=not generate)
        _check_base(folder, self.student.base_is_local)
        if device is None and torch.accelerator.is_available():
            device = str(torch.accelerator.current_accelerator())
        loading = load_arguments(self.student.loading.model_dump(exclude_none=True))
        self.model = load_model(str(folder), device=device or "cpu", **loading)
        self.tokenizer = load_tokenizer(folder)

    def predict(self, rows: Iterable[dict], accuracy: float = 0.9, tokens_per_batch: int = 8192) -> list[dict]:
        """[{"answer", "confidence", "abstain"}] of rows, in order; they need no label.

        Args:
            rows: the columns that the task's prompt reads, or conversations.
            accuracy: the target whose threshold decides; one of those in `predict.json`.
            tokens_per_batch: tokens of one batch, padding included.

        Raises:
            RowError: a row does not fit the task, or has no probabilities, beginning with its number, from 0.
            FirstTrlError: an accuracy for which no threshold was fitted.
        """
        answers = self.choose(list(rows), accuracy, tokens_per_batch)
        for number, answer in enumerate(answers):
            if "error" in answer:
                raise RowError(number, answer["error"])
        return answers

    def choose(self, rows: list, accuracy: float, tokens_per_batch: int) -> list[dict]:
        """As `predict`, but {"error": why} for a row that cannot be answered, or that is a text saying so already."""
        import numpy as np

        from .data.choices import choice_token_ids
        from .scoring import sequence_log_probs
        from .student import choice_shares, threshold_for

        threshold = threshold_for(self.student, accuracy)
        answers, prompts = self._prompts(rows)
        if not prompts:
            return answers
        ids = choice_token_ids(self.task, self.tokenizer, rows[next(iter(prompts))])
        asked = list(prompts.values())
        log_probs_NC = sequence_log_probs(self.model, asked, ids, tokens_per_batch=tokens_per_batch)
        with np.errstate(invalid="ignore"):
            shares_NC = choice_shares(log_probs_NC, self.student.temperature)
        for number, shares_C in zip(prompts, shares_NC, strict=True):
            best = int(shares_C.argmax())
            confidence = float(shares_C[best])
            answers[number] = {
                "answer": (self.task.choices or [])[best],
                "confidence": confidence,
                "abstain": threshold is None or confidence < threshold,
            }
            if not np.isfinite(shares_C).all():
                answers[number] = {"error": NO_NUMBERS}
        return answers

    def generate(self, rows: list, max_new_tokens: int = 512, tokens_per_batch: int = 8192) -> list[dict]:
        """[{"answer", "mean_token_probability", "lowest_token_probability", "ended"}] of rows, written greedily.

        The probabilities are of the tokens, each given all before it, under the closing temperature (None for an
        empty answer), and not of being right. A row that is no prompt, or a text saying why, gives {"error": why}.
        """
        import numpy as np

        from .generation import answer_ends, until_end, written_answers
        from .scoring import token_log_probs

        answers, prompts = self._prompts(rows)
        if not prompts:
            return answers
        ids, how = list(prompts.values()), WriteAnswers(max_new_tokens=max_new_tokens)
        ends, _ = answer_ends(self.task, self.tokenizer, rows[next(iter(prompts))])
        size = {"tokens_per_batch": tokens_per_batch}
        written = written_answers(self.model, ids, ends, how, vocab_limit=len(self.tokenizer), **size)
        texts = [until_end(tokens, ends) for tokens in written]
        # With an end: what is no number shows in an empty answer, too
        whole = [[*prompt, *text, ends[0]] for prompt, (text, _) in zip(ids, texts, strict=True)]
        places = [range(len(prompt) - 1, len(row) - 1) for prompt, row in zip(ids, whole, strict=True)]
        log_probs = token_log_probs(self.model, whole, places, [self.student.temperature], **size)
        for number, (text, ended), found in zip(prompts, texts, map(np.exp, log_probs), strict=True):
            answers[number] = {
                "answer": self.tokenizer.decode(text, skip_special_tokens=True),
                "mean_token_probability": float(found[:-1].mean()) if text else None,
                "lowest_token_probability": float(found[:-1].min()) if text else None,
                "ended": ended,
            }
            if np.isnan(found).any():
                answers[number] = {"error": NO_NUMBERS}
        return answers

    def _prompts(self, rows: list) -> tuple[list[dict], dict[int, list[int]]]:
        """({"error": why} for each row, the tokens of those that are prompts, by number)."""
        from .data.encoding import encode_prompt

        answers: list[dict] = [{"error": row} for row in rows]
        prompts = {}
        for number, row in enumerate(rows):
            try:
                if not isinstance(row, str):
                    prompts[number] = encode_prompt(self.task, self.tokenizer, row)
            except (ValueError, TypeError, RecursionError) as error:  # a tokenizer refuses some texts with the latter
                answers[number] = {"error": " ".join(str(error).split())[:300]}
        return answers, prompts


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
    if not HUB_ID.fullmatch(adapter):
        raise FirstTrlError(f"there is no folder {adapter}; give a student's, such as runs/NAME/students/first")
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
    return Path(snapshot_download(adapter, revision=revision, allow_patterns=wanted))


def _check_base(folder: Path, base_is_local: bool) -> None:
    """Refuse an adapter whose base model was a folder that is not here: the Hub is never asked for that name."""
    file = folder / "adapter_config.json"
    if not file.is_file():
        return  # a whole model
    try:
        base = json.loads(file.read_bytes())["base_model_name_or_path"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise FirstTrlError(f"{file} is damaged ({type(error).__name__}: {error}); fetch the adapter again") from error
    if not isinstance(base, str) or not (Path(base).is_dir() or HUB_ID.fullmatch(base) and not base_is_local):
        raise FirstTrlError(
            f"{folder} is an adapter of {base}, and there is no such folder here; run where that path leads to it, or "
            f"correct base_model_name_or_path in {file}"
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
    except KeyboardInterrupt:
        print("[first-trl] predict interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        unexpected = f"{type(error).__name__}: {' '.join(str(error).split())[:300]} (unexpected)"
        print(f"[first-trl] predict failed: {explain(error, 'predict') or unexpected}", file=sys.stderr)
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
    parser.add_argument("--generate", action="store_true", help="write free text, for tasks without choices")
    parser.add_argument("--max_new_tokens", type=int, default=512, help="most tokens of a text (default: 512)")
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")
    parser.add_argument("--tokens_per_batch", type=int, default=8192, help="tokens of one batch (default: 8192)")
    return parser


def _answer_lines(options: argparse.Namespace) -> None:
    from .files import replace_atomically
    from .student import threshold_for

    if sys.stdout is None and options.output is None:
        raise FirstTrlError("standard output is closed; give --output")
    output = _checked_output(options.output, options.input)
    with options.input.open("rb") if options.input else sys.stdin.buffer as source:
        student = Predictor(options.adapter, revision=options.revision, generate=options.generate)
        if options.generate:
            answer = partial(student.generate, max_new_tokens=options.max_new_tokens)
        else:
            threshold_for(student.student, options.accuracy)  # refuses another accuracy before a line is read
            answer = partial(student.choose, accuracy=options.accuracy)
        lines = answered_lines(partial(answer, tokens_per_batch=options.tokens_per_batch), source)
        if output is None:
            _write(lines, sys.stdout)
        elif output.exists() and not output.is_file():  # a device or a pipe is written to, not replaced
            with output.open("w", encoding="utf-8") as file:
                _write(lines, file)
        else:
            with replace_atomically(output) as temporary, temporary.open("w", encoding="utf-8") as file:
                _write(lines, file)


def _checked_output(output: Path | None, source: Path | None) -> Path | None:
    """Where to write: what a link leads to, and never the questions themselves."""
    if output is not None and output.is_dir():
        raise FirstTrlError(f"--output {output} is a folder; name a file")
    if output is not None and source is not None and output.exists() and output.samefile(source):
        raise FirstTrlError(f"--output {output} is the file of the questions; name another one")
    return output and Path(os.path.realpath(output))


def _write(lines: Iterator[str], file) -> None:
    failed: list[bool] = []
    for line in lines:
        failed.append(line.startswith('{"error":'))
        print(line, end="", file=file, flush=True)
    if any(failed):
        print(
            f"[first-trl] predict: {sum(failed)} of {len(failed)} lines have no answer, but an error",
            file=sys.stderr,
        )


def answered_lines(answer: Callable[[list], list[dict]], source: Iterable[bytes]) -> Iterator[str]:
    """A line of JSON for each line of JSON, `ROWS_AT_A_TIME` at a time; blank lines are passed over."""
    numbered = ((number, line) for number, line in enumerate(source, start=1) if line.strip())
    while block := list(islice(numbered, ROWS_AT_A_TIME)):
        answers = answer([_read_line(line, number) for number, line in block])
        for (number, _), found in zip(block, answers, strict=True):
            if "error" in found:
                found = {"error": f"line {number}: {found['error']}"}
            yield json.dumps(found, ensure_ascii="error" in found) + "\n"


def _read_line(line: bytes, number: int) -> dict | str:
    """The row of a line, or what is wrong with it."""
    remedy = 'write one object a line, e.g. {"text": "..."}'
    try:
        row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except (ValueError, RecursionError) as error:
        return f"it is not JSON in UTF-8 ({error}); {remedy}"
    return row if isinstance(row, dict) else f"it holds a {type(row).__name__}; {remedy}"
