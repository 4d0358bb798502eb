"""Answers that a model writes: a teacher to prompts without any (`cache.write_answers`), a student to whoever asks."""

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import GenerationConfig

from .constants import IGNORED
from .data.choices import forced_tokens
from .data.conversations import is_conversational
from .data.encoding import eos_token_id
from .errors import FirstTrlError
from .modeling import innermost
from .scoring import left_padded, length_batches
from .settings import TaskConfig, WriteAnswers


def answer_ends(task: TaskConfig, tokenizer, row: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    """(tokens that each end an answer, the tokens that a learned answer ends in: those of the template, or the EOS).

    Raises:
        FirstTrlError: the chat template ends a turn with text alone, or the tokenizer has no end of sequence.
    """
    if not is_conversational(task, row):
        return [eos_token_id(tokenizer)], [eos_token_id(tokenizer)]
    closing = forced_tokens(task, tokenizer, row)["closing"]
    at = next((i for i, token in enumerate(closing) if token in tokenizer.added_tokens_decoder), None)
    if at is None:
        raise FirstTrlError(
            f"the chat template ends an answer with {tokenizer.decode(closing)!r}, and no generation stops at text; "
            "take a template that ends its turns with a special token"
        )
    return sorted({closing[at], tokenizer.eos_token_id} - {None}), closing[at:]


@torch.inference_mode()
def written_answers(
    model: torch.nn.Module,
    prompts: list[list[int]],
    ends: list[int],
    how: WriteAnswers,
    *,
    tokens_per_batch: int,
    vocab_limit: int,
    progress: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """The tokens written after each prompt, in order, up to one of `ends`; what may follow that is padding.

    Batches and samples follow from the prompts alone. Rows of the head from `vocab_limit` on, the size of the
    tokenizer, are never written. `progress` is called with the prompt tokens of each finished batch.
    """
    inner = innermost(model)
    # In the place of the checkpoint's own, whose penalties and sampling would fill in what is not said here
    inner.generation_config = GenerationConfig(
        max_new_tokens=how.max_new_tokens,
        do_sample=how.temperature > 0,
        eos_token_id=ends,
        pad_token_id=ends[0],
        suppress_tokens=list(range(vocab_limit, inner.config.get_text_config().vocab_size)) or None,
        **({"temperature": how.temperature, "top_p": how.top_p, "top_k": 0} if how.temperature else {}),
    )
    answers: list[list[int]] = [[]] * len(prompts)
    for indices in length_batches([len(prompt) + how.max_new_tokens for prompt in prompts], tokens_per_batch):
        batch = [list(prompts[i]) for i in indices]
        torch.manual_seed(int.from_bytes(hashlib.sha256(json.dumps([how.seed, batch]).encode()).digest()[:6]))
        tokens_BT, mask_BT = left_padded(batch, inner.get_input_embeddings().weight.device)
        written_BT = model.generate(input_ids=tokens_BT, attention_mask=mask_BT)[:, tokens_BT.shape[1] :]
        for i, written in zip(indices, written_BT.tolist(), strict=True):
            answers[i] = written
        if progress is not None:
            progress(sum(map(len, batch)))
    return answers


def until_end(written: list[int], ends: list[int]) -> tuple[list[int], bool]:
    """The tokens before the first that ends an answer, and whether there is one."""
    at = next((i for i, token in enumerate(written) if token in ends), None)
    return written[:at], at is not None


def writing_teacher(
    run_teacher: Callable,
    write: Callable,
    how: WriteAnswers,
    task: TaskConfig,
    tokenizer,
    first_row: Mapping[str, Any],
) -> tuple[Callable, Callable]:
    """`run_teacher` over examples whose answers it has written before, and what counts such answers in their labels.

    One that `how.max_new_tokens` cut has no end, and none is learned.
    """
    ends, closing = answer_ends(task, tokenizer, first_row)

    def run(examples: list[dict], progress: Callable[[int], None]) -> list[dict]:
        starts = [next(i for i, label in enumerate(example["labels"]) if label != IGNORED) for example in examples]
        prompts = [example["input_ids"][:start] for example, start in zip(examples, starts, strict=True)]
        written = [until_end(tokens, ends) for tokens in write(prompts, ends, how, progress=progress)]
        answers = [tokens + closing * ended for tokens, ended in written]
        return run_teacher(
            [
                {"input_ids": [*prompt, *answer], "labels": [IGNORED] * len(prompt) + answer}
                for prompt, answer in zip(prompts, answers, strict=True)
            ]
        )

    def count(labels: list[list[int]]) -> dict[str, int]:
        answers = [[label for label in row if label != IGNORED] for row in labels]
        cut = sum(answer[-len(closing) :] != closing for answer in answers)
        return {"answers_cut": cut, "answers_empty": answers.count(closing)}

    return run, count
