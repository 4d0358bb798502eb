"""Run a model over token rows and read its head at chosen positions: the teacher's rows, and everyone's answers.

One way of running serves the cache and the evaluation, so a teacher is cached by the same code that scores it. Batches
are cut by a token budget from examples sorted by length; the head is applied only where something is read, in chunks.

Shapes: N positions, D hidden, V vocabulary, K kept tokens, C choices; B prompts of a batch, T tokens, L of an answer.
"""

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch

from .constants import IGNORED
from .head import partition_log_probs, partition_log_probs_and_tail_max, selected_logits, top_k_log_probs
from .modeling import Head, backbone_hidden_states, innermost, language_model_head


def length_batches(lengths: list[int], tokens_per_batch: int) -> list[list[int]]:
    """Indices in batches of at most `tokens_per_batch` tokens after padding, longest examples first.

    A batch also ends where the next example is shorter than 3/4 of its longest, once it has an eighth of the tokens
    it may have: padding costs as much as tokens do, and more than a batch. Ties keep their order, so the same lengths
    always give the same batches. A single longer example is its own batch.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    batches: list[list[int]] = []
    for i in order:
        longest, size = (lengths[batches[-1][0]], len(batches[-1])) if batches else (0, 0)
        is_worth_it = 4 * lengths[i] >= 3 * longest or 8 * longest * size < tokens_per_batch
        if batches and longest * (size + 1) <= tokens_per_batch and is_worth_it:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def hidden_states_at(
    model: torch.nn.Module, token_rows: list, positions: list, tokens_per_batch: int
) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Yield (indices, hidden_ND): the last hidden states of some examples at their `positions`, in row-major order."""
    model = innermost(model)
    device = model.get_input_embeddings().weight.device
    for indices in length_batches([len(row) for row in token_rows], tokens_per_batch):
        input_ids = torch.zeros(len(indices), len(token_rows[indices[0]]), dtype=torch.long)
        mask_BT, wanted_BT = torch.zeros_like(input_ids), torch.zeros_like(input_ids, dtype=torch.bool)
        for slot, i in enumerate(indices):
            input_ids[slot, : len(token_rows[i])] = torch.as_tensor(token_rows[i])
            mask_BT[slot, : len(token_rows[i])] = 1
            wanted_BT[slot, torch.as_tensor(positions[i], dtype=torch.long)] = True
        hidden_BTD = backbone_hidden_states(model, input_ids=input_ids.to(device), attention_mask=mask_BT.to(device))
        yield indices, hidden_BTD[wanted_BT.to(hidden_BTD.device)]  # a model may be split over devices


@torch.inference_mode()
def teacher_rows(
    model: torch.nn.Module,
    examples: list[dict],
    *,
    top_k: int,
    tokens_per_batch: int,
    kept_ids: list[int] | None = None,
    candidates: tuple[list[list[int]], list[list[int]]] | None = None,
    vocab_limit: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[dict]:
    """The teacher's columns of the cache for tokenised examples, in the order given.

    Args:
        examples: dicts with `input_ids` and `labels` (-100 outside the loss).
        kept_ids: the K tokens to keep at every position, instead of the most probable ones.
        candidates: (answers, completions), C each: what follows a prompt is replaced by the completion whose answer
            the teacher finds most probable there.
        vocab_limit: size of the tokenizer; rows of the head beyond it are padding and never among the K.
        progress: called with the number of tokens of each finished batch.

    Returns:
        One dict per example with `input_ids`, `labels`, `teacher_ids` (n, K) int32, `teacher_log_probs` (n, K) float32
        and `teacher_tail_log_prob` (n,) float32, for its n supervised positions in order; nats.
    """
    if candidates is not None:
        examples = _answered(model, examples, *candidates, tokens_per_batch)
    positions = [np.flatnonzero(np.asarray(example["labels"][1:]) != IGNORED) for example in examples]
    rows: list[dict] = [{}] * len(examples)
    batches = hidden_states_at(model, [example["input_ids"] for example in examples], positions, tokens_per_batch)
    head = language_model_head(innermost(model))
    for indices, hidden_ND in batches:
        ids_NK, log_probs_NK1, _ = _kept_log_probs(hidden_ND, head, top_k, kept_ids, vocab_limit)
        ends = np.cumsum([len(positions[i]) for i in indices])[:-1]
        ids_parts = np.split(ids_NK.cpu().numpy().astype(np.int32), ends)
        log_parts = np.split(log_probs_NK1.cpu().numpy(), ends)
        for i, ids, log_probs in zip(indices, ids_parts, log_parts, strict=True):
            rows[i] = {
                "input_ids": examples[i]["input_ids"],
                "labels": examples[i]["labels"],
                "teacher_ids": ids,
                "teacher_log_probs": log_probs[:, :-1],
                "teacher_tail_log_prob": log_probs[:, -1],
            }
        if progress is not None:
            progress(sum(len(examples[i]["input_ids"]) for i in indices))
    return rows


def _answered(model, examples: list[dict], answers: list, completions: list, tokens_per_batch: int) -> list[dict]:
    """The examples, answered by the model itself."""
    starts = [next(i for i, label in enumerate(example["labels"]) if label != IGNORED) for example in examples]
    prompts = [example["input_ids"][:start] for example, start in zip(examples, starts, strict=True)]
    likeliest = sequence_log_probs(model, prompts, answers, tokens_per_batch=tokens_per_batch).argmax(axis=1)
    return [
        {"input_ids": [*prompt, *completions[c]], "labels": [IGNORED] * len(prompt) + completions[c]}
        for prompt, c in zip(prompts, likeliest, strict=True)
    ]


def _kept_log_probs(hidden_ND, head: Head, top_k: int, kept_ids: list[int] | None, vocab_limit: int | None):
    """The kept tokens (N, K), most probable first and the lower id first among equals; log-probabilities (N, K+1)
    with the tail last; and where the tokens are given, the log-probability of the tail's likeliest token (N,)."""
    if kept_ids is None:
        return *top_k_log_probs(hidden_ND, head.weight, top_k, *head[1:], vocab_limit=vocab_limit), None
    ids_NK = torch.tensor(sorted(kept_ids), device=hidden_ND.device).expand(len(hidden_ND), -1)
    log_probs_NK1, tail_max_N = partition_log_probs_and_tail_max(hidden_ND, head.weight, ids_NK, *head[1:])
    ordered = log_probs_NK1[:, :-1].sort(dim=1, descending=True, stable=True)
    return ids_NK.gather(1, ordered.indices), torch.cat([ordered.values, log_probs_NK1[:, -1:]], dim=1), tail_max_N


@torch.inference_mode()
def answer_scores(
    model: torch.nn.Module,
    prompts: list[list[int]],
    label_ids: list[int],
    choice_ids: list[int],
    *,
    top_k: int,
    tokens_per_batch: int,
    keep_choices: bool = False,
    vocab_limit: int | None = None,
    places: list | None = None,
) -> dict[str, np.ndarray]:
    """What a model answers after each prompt, under its full-vocabulary softmax.

    Args:
        label_ids: (N,) the token that is right at each place.
        choice_ids: tokens that are asked for besides, at every place.
        keep_choices: the K tokens are those of the choices, and not the most probable ones.
        places: the positions of each prompt after which it is asked, in order; by default after its last token.

    Returns:
        Arrays over the N places: `token_ids` (N, K) most probable first, `log_probs` (N, K+1) with the tail last,
        `target` (N,) the column that holds the label (K = the tail), `label_log_prob` (N,) nats, `choice_log_probs`
        (N, C) nats, not normalised over the choices; with `keep_choices`, `tail_max_log_prob` (N,), the likeliest
        token of the tail.
    """
    head, places = language_model_head(innermost(model)), places or [[len(prompt) - 1] for prompt in prompts]
    starts, order = np.cumsum([0, *map(len, places)]), []
    blocks: list[dict[str, torch.Tensor]] = []
    for indices, hidden_ND in hidden_states_at(model, prompts, places, tokens_per_batch):
        kept_ids = choice_ids if keep_choices else None
        ids_NK, log_probs_NK1, tail_max_N = _kept_log_probs(hidden_ND, head, top_k, kept_ids, vocab_limit)
        numbers = [number for i in indices for number in range(starts[i], starts[i + 1])]
        asked = torch.tensor([[label_ids[number], *choice_ids] for number in numbers], device=ids_NK.device)
        logits = selected_logits(hidden_ND, head.weight, torch.cat([ids_NK[:, :1], asked], dim=1), *head[1:])
        # log p(w) = z_w - log Z, and log Z = z_1 - log p_1 for the most probable token
        asked_log_probs = logits[:, 1:] - logits[:, :1] + log_probs_NK1[:, :1]
        block = {"token_ids": ids_NK, "log_probs": log_probs_NK1, "label_log_prob": asked_log_probs[:, 0].float()}
        block["choice_log_probs"] = asked_log_probs[:, 1:].float()
        blocks.append(block | ({"tail_max_log_prob": tail_max_N} if keep_choices else {}))
        order += numbers
    back = np.argsort(order)
    scores = {name: torch.cat([block[name] for block in blocks]).cpu().numpy()[back] for name in blocks[0]}
    is_label = scores["token_ids"] == np.asarray(label_ids)[:, None]
    scores["target"] = np.where(is_label.any(axis=1), is_label.argmax(axis=1), is_label.shape[1]).astype(np.int64)
    return scores


@torch.inference_mode()
def token_log_probs(
    model: torch.nn.Module, rows: list, places: list, temperatures: Iterable[float], tokens_per_batch: int
) -> list[np.ndarray]:
    """(n, G) nats for each row: of the token after each of its n `places`, under each of G temperatures."""
    head, found = language_model_head(innermost(model)), [np.empty(0)] * len(rows)
    for indices, hidden_ND in hidden_states_at(model, rows, places, tokens_per_batch):
        ids = [int(rows[i][place + 1]) for i in indices for place in places[i]]
        ids_N1 = torch.tensor(ids, dtype=torch.long, device=hidden_ND.device)[:, None]
        columns = []
        for temperature in temperatures:  # cap * tanh(scale * x / cap) / T has the same form, both divided by T
            scale, softcap = head.logit_scale / temperature, head.softcap and head.softcap / temperature
            columns.append(partition_log_probs(hidden_ND, head.weight, ids_N1, head.bias, scale, softcap)[:, :1])
        parts = torch.cat(columns, dim=1).cpu().split([len(places[i]) for i in indices])
        for i, part in zip(indices, parts, strict=True):
            found[i] = part.numpy()
    return found


@torch.inference_mode()
def sequence_log_probs(
    model: torch.nn.Module, prompts: list[list[int]], sequences: list[list[int]], *, tokens_per_batch: int
) -> np.ndarray:
    """(N, C) nats: how likely each of C token sequences is after each of N prompts, the sum over its tokens.

    A batch of prompts is read once; every sequence continues from a copy of the KV cache. Models that keep a state
    instead (Mamba, RWKV, Jamba, ...), or count positions on their own, read every prompt again with each sequence.
    """
    model = innermost(model)
    backbone, head = model.base_model, language_model_head(model)
    if model._is_stateful or "position_ids" not in inspect.signature(backbone.forward).parameters:
        return _uncached_sequence_log_probs(model, prompts, sequences, tokens_per_batch)
    log_probs_NC = np.empty((len(prompts), len(sequences)), dtype=np.float32)
    first_ids, longest = sorted({sequence[0] for sequence in sequences}), max(map(len, sequences))
    for indices in length_batches([len(prompt) + longest for prompt in prompts], tokens_per_batch):
        tokens_BT, mask_BT = left_padded([prompts[i] for i in indices], head.weight.device)
        places_BT = (mask_BT.cumsum(dim=1) - 1).clamp(min=0)
        prompt_output = backbone(input_ids=tokens_BT, attention_mask=mask_BT, position_ids=places_BT, use_cache=True)
        if getattr(prompt_output, "past_key_values", None) is None:
            return _uncached_sequence_log_probs(model, prompts, sequences, tokens_per_batch)
        ids_BF = torch.tensor(first_ids, device=mask_BT.device).expand(len(indices), -1)
        first_BF = partition_log_probs(prompt_output.last_hidden_state[:, -1], head.weight, ids_BF, *head[1:]).cpu()
        for c, sequence in enumerate(sequences):
            log_probs_NC[indices, c] = first_BF[:, first_ids.index(sequence[0])]
            if len(sequence) > 1:
                prefix_BL = torch.tensor(sequence[:-1], device=mask_BT.device).expand(len(indices), -1)
                hidden_BLD = backbone(
                    input_ids=prefix_BL,
                    attention_mask=torch.cat([mask_BT, torch.ones_like(prefix_BL)], dim=1),
                    position_ids=places_BT[:, -1:] + 1 + torch.arange(prefix_BL.shape[1], device=mask_BT.device),
                    past_key_values=copy.deepcopy(prompt_output.past_key_values),
                    use_cache=True,
                ).last_hidden_state
                log_probs_NC[indices, c] += _summed_log_probs(hidden_BLD.flatten(0, 1), head, sequence[1:])
    return log_probs_NC


def _uncached_sequence_log_probs(model, prompts, sequences, tokens_per_batch: int) -> np.ndarray:
    """`sequence_log_probs` by right-padded passes over prompt and sequence, one for all that differ in their last
    token alone: what follows a token never changes it, so that padding there is harmless to any causal model."""
    head = language_model_head(model)
    log_probs_NC = np.empty((len(prompts), len(sequences)), dtype=np.float32)
    for start in dict.fromkeys(tuple(sequence[:-1]) for sequence in sequences):
        rows = [[*prompt, *start] for prompt in prompts]
        positions = [range(len(row) - len(start) - 1, len(row)) for row in rows]
        for indices, hidden_ND in hidden_states_at(model, rows, positions, tokens_per_batch):
            for c, sequence in enumerate(sequences):
                if tuple(sequence[:-1]) == start:
                    log_probs_NC[indices, c] = _summed_log_probs(hidden_ND, head, sequence)
    return log_probs_NC


def _summed_log_probs(hidden_ND: torch.Tensor, head: Head, sequence: list[int]) -> np.ndarray:
    """(B,) log-probabilities of a sequence, whose tokens are read from the hidden states of B rows one by one."""
    ids_BL = torch.tensor(sequence, device=hidden_ND.device).expand(len(hidden_ND) // len(sequence), -1)
    log_probs_N2 = partition_log_probs(hidden_ND, head.weight, ids_BL.reshape(-1, 1), *head[1:])
    return log_probs_N2[:, 0].view(ids_BL.shape).sum(dim=1).float().cpu().numpy()


def left_padded(rows: list[list[int]], device) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, T) tokens that end together, and the mask of those that are there."""
    length = max(len(row) for row in rows)
    tokens_BT = torch.tensor([[0] * (length - len(row)) + list(row) for row in rows], device=device)
    mask_BT = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], device=device)
    return tokens_BT, mask_BT
