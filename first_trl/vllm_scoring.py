"""The teacher's rows from vLLM: through a server that speaks OpenAI's protocol, or in this process.

Both return the K most probable tokens of every prompt position (`prompt_logprobs`), and so the same columns as
`first_trl.scoring.teacher_rows`, with one difference: the tail is what the K leave of 1, not a sum over the other
tokens. Prompts are token ids, never text. Starting a server, and writing what it says, are not here.

Shapes: N supervised positions, K kept tokens.
"""

import http.client
import json
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

_IGNORED = -100
MINUS_INFINITY = -9999.0  # what vLLM writes for -inf, which JSON does not have
SMALLEST_TAIL = 2.0**-24  # half the step of float32 below 1: what log-probabilities near 0 cannot tell from nothing
SUM_TOLERANCE = 1e-3  # rounding moves a sum of float32 probabilities by much less
WAITS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)  # seconds between attempts
_RETRIED = (OSError, http.client.HTTPException)  # no connection, a broken one, a timeout, a response cut short
_KEEPS = "Finished shards are kept"


class ServerError(ValueError):
    """A server that does not answer, or whose answer is not what a teacher's would be."""


@dataclass(frozen=True)
class PromptServer:
    """A server of one model.

    Args:
        url: where `/v1/completions` is, with or without the `/v1`.
        model: the name that it serves the teacher under.
        version: of vLLM, None where the server does not say.
        timeout: seconds to wait for an answer; the first of a new server takes longest.
        waits: seconds before each further attempt at a request that failed.
    """

    url: str
    model: str = ""
    version: str | None = None
    timeout: float = 600.0
    waits: Sequence[float] = WAITS

    def ask(self, place: str, content: dict | None = None, give_up: threading.Event | None = None) -> dict:
        """The JSON that is at `place`, or that it answers to `content`.

        What may pass is tried again, after longer and longer waits: no connection, a broken one, a timeout, status 429
        and 5xx. With `FIRST_TRL_SERVER_KEY` in the environment, it is sent as the bearer token.

        Args:
            give_up: set where another request has failed for good, so that this one need not be tried again.

        Raises:
            ServerError: the last attempt failed, or the server refused the request.
        """
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("FIRST_TRL_SERVER_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        data = None if content is None else json.dumps(content).encode()
        request = urllib.request.Request(self.url.rstrip("/").removesuffix("/v1") + place, data, headers)
        for wait in (*self.waits, None):
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as response:
                    return _json_object(response.read(), self.url)
            except urllib.error.HTTPError as error:
                said = error.read(2000).decode(errors="replace")
                if error.code < 500 and error.code != 429:
                    raise ServerError(_refusal(self.url, place, error.code, said)) from error
                problem: object = f"status {error.code}, {said!r}"
            except _RETRIED as error:
                problem = getattr(error, "reason", None) or repr(error)
            if wait is None or (give_up or threading.Event()).wait(wait):
                break
        raise ServerError(
            f"The teacher's server {self.url} does not answer: {problem}, after {len(self.waits) + 1} attempts. "
            f"{_KEEPS}: start the server again, with the same model, and run the cache stage again."
        )


def _json_object(body: bytes, url: str) -> dict:
    try:
        answer = json.loads(body)
    except ValueError as error:
        raise ServerError(f"{url} did not answer with JSON: {body[:200]!r}. Check cache.server_url.") from error
    if not isinstance(answer, dict):
        raise ServerError(f"{url} answered with {body[:200]!r}, not with an object. Check cache.server_url.")
    return answer


def _refusal(url: str, place: str, status: int, said: str) -> str:
    remedy = "check cache.server_url" if status == 404 else "start the server in another way, or change the recipe"
    if status in (401, 403):
        remedy = "put the server's key into the environment variable FIRST_TRL_SERVER_KEY"
    elif "max allowed" in said:
        remedy = "start the server with --max-logprobs of at least cache.top_k, or lower cache.top_k"
    elif "context length" in said:
        remedy = "start the server with --max-model-len above task.max_length, or lower task.max_length"
    return f"The server {url} refused {place} with status {status}: {said.strip()}. To mend it, {remedy}. {_KEEPS}."


def connect(url: str, teacher: str, **options) -> PromptServer:
    """The server at `url`, if it serves the teacher.

    Args:
        teacher: its id, or its folder; the server must know it by that name, or by the last part of it.
        options: of `PromptServer`.

    Raises:
        ServerError: there is no server, or it serves something else.
    """
    # At the start, a wrong address is likelier than a server that pauses
    server = PromptServer(url, **{"waits": WAITS[:2]} | options)
    listed = server.ask("/v1/models").get("data")
    models = [model for model in listed if isinstance(model, dict)] if isinstance(listed, list) else []
    names = [str(model.get("id")) for model in models]
    last = Path(teacher).name
    ours = [name for name in names if name == teacher] or [name for name in names if Path(name).name == last]
    if len(ours) != 1:
        raise ServerError(
            f"The server {url} serves {', '.join(names) or 'no model'}, and the recipe's teacher is {teacher}. Start "
            f"it with that model, or name the model that it serves: --served-model-name {last}."
        )
    return PromptServer(url, ours[0], _version(url), **options)


def _version(url: str) -> str | None:
    """vLLM's version; other servers have no such page."""
    try:
        return str(PromptServer(url, timeout=60, waits=()).ask("/version").get("version"))
    except ServerError:
        return None


def server_teacher_rows(
    server: PromptServer,
    examples: list[dict],
    *,
    top_k: int,
    requests: int = 16,
    vocab_limit: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[dict]:
    """The columns of `first_trl.scoring.teacher_rows`, from a server, at most `requests` of them under way at once.

    Args:
        examples, top_k, vocab_limit, progress: as there.

    Raises:
        ServerError: the server stopped answering, or answered with something else than the log-probabilities of these
            tokens at temperature 1.
    """
    give_up = threading.Event()

    def row(example: dict) -> dict:
        content = {
            "model": server.model,
            "prompt": [int(token) for token in example["input_ids"]],
            "prompt_logprobs": top_k,
            "max_tokens": 1,  # the fewest that a server takes; the token is thrown away
            "temperature": 1.0,
        }
        answer = server.ask("/v1/completions", content, give_up)
        return prompt_row(example, _entries_of(answer, server.url), top_k, vocab_limit)

    rows = []
    with ThreadPoolExecutor(max_workers=requests) as threads:
        try:
            for example, result in zip(examples, threads.map(row, examples), strict=True):
                rows.append(result)
                if progress is not None:
                    progress(len(example["input_ids"]))
        except BaseException:
            give_up.set()
            threads.shutdown(wait=False, cancel_futures=True)
            raise
    return rows


def _entries_of(answer: dict, url: str) -> list[dict[int, float] | None]:
    """`prompt_logprobs` of a completion: token id -> log-probability for each token of the prompt but the first."""
    try:
        found = answer["choices"][0]["prompt_logprobs"]
        return [None if e is None else {int(token): _number(v["logprob"]) for token, v in e.items()} for e in found]
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise ServerError(
            f"The answer of {url} has no readable prompt_logprobs ({error!r}): {json.dumps(answer)[:300]}. The server "
            "must be one that returns them from /v1/completions, as vLLM does."
        ) from error


def _number(log_prob) -> float:
    if isinstance(log_prob, bool) or not isinstance(log_prob, int | float):
        raise ValueError(f"log-probability {log_prob!r}")
    return -np.inf if log_prob <= MINUS_INFINITY else float(log_prob)


def prompt_row(
    example: dict, entries: Sequence[dict[int, float] | None], top_k: int, vocab_limit: int | None = None
) -> dict:
    """One row of the cache from the log-probabilities of a prompt.

    Args:
        example: `input_ids` and `labels` (-100 outside the loss).
        entries: for each token, the log-probabilities (nats) of the most probable tokens in its place and of itself;
            None for the first, which nothing comes before.
        vocab_limit: size of the tokenizer.

    Raises:
        ServerError: the entries are not those of this prompt, or no log-probabilities at temperature 1.
    """
    tokens, labels = example["input_ids"], example["labels"]
    if len(entries) != len(tokens):
        raise ServerError(
            f"A prompt of {len(tokens)} tokens came back with {len(entries)}: the server changes prompts, which must "
            "be taken as they are. Start it without templates or special tokens of its own."
        )
    positions = [i for i in range(1, len(tokens)) if labels[i] != _IGNORED]
    best = [_most_probable(entries[i], int(tokens[i]), i, top_k, vocab_limit) for i in positions]
    ids_NK = np.array([[token for token, _ in row] for row in best], dtype=np.int32).reshape(-1, top_k)
    log_probs_NK = np.array([[value for _, value in row] for row in best], dtype=np.float64).reshape(-1, top_k)
    return {
        "input_ids": tokens,
        "labels": labels,
        "teacher_ids": ids_NK,
        "teacher_log_probs": log_probs_NK.astype(np.float32),
        "teacher_tail_log_prob": tail_from_top_k(log_probs_NK),
    }


def _most_probable(
    entry: dict[int, float] | None, token: int, position: int, top_k: int, vocab_limit: int | None
) -> list[tuple[int, float]]:
    """The K most probable (token, log-probability) of a position, the lower id first among equals.

    The token that is really there is among the entries, as one more than K where it is not among the K.
    """
    place = f"Position {position} of a prompt (token {token}): the server gave"
    if entry is None or token not in entry:
        given = "no log-probabilities" if entry is None else f"log-probabilities without the token itself, {entry}"
        raise ServerError(f"{place} {given}. It must take token ids as they are, and return prompt_logprobs.")
    if not all(value <= SUM_TOLERANCE for value in entry.values()):  # also true for NaN
        raise ServerError(
            f"{place} {entry}, which are no log-probabilities: start it with --logprobs-mode raw_logprobs."
        )
    if len(entry) < top_k:
        raise ServerError(f"{place} {len(entry)} tokens, and cache.top_k asks for {top_k}: {entry}.")
    best = sorted(((i, min(value, 0.0)) for i, value in entry.items()), key=lambda pair: (-pair[1], pair[0]))[:top_k]
    beyond = [] if vocab_limit is None else [i for i, _ in best if i >= vocab_limit]
    if beyond and vocab_limit is not None:
        raise ServerError(
            f"{place} token {beyond[0]} among the {top_k} most probable, but the tokenizer ends at {vocab_limit - 1}. "
            "Lower cache.top_k, or use cache.backend: hf, which leaves such tokens out."
        )
    return best


def tail_from_top_k(log_probs_NK: np.ndarray) -> np.ndarray:
    """(N,) float32 log of what K probabilities leave of 1, for log-probabilities most probable first.

    1 - sum p = -expm1(log p_1) - p_2 - ... - p_K keeps every digit that the log-probabilities have. They have none for
    a tail below 2**-24, where rounding may even take the sum over 1: that is the smallest tail here, -16.6 nats.

    Raises:
        ServerError: the probabilities sum to more than rounding explains.
    """
    with np.errstate(over="ignore"):
        remainder_N = -np.expm1(log_probs_NK[:, 0]) - np.exp(log_probs_NK[:, 1:]).sum(axis=1)
    if not (remainder_N >= -SUM_TOLERANCE).all():
        row = int((~(remainder_N >= -SUM_TOLERANCE)).argmax())
        raise ServerError(
            f"The server gave log-probabilities {log_probs_NK[row].tolist()}, of probabilities that sum to "
            f"{1 - remainder_N[row]:.4f}: it must not apply a temperature or a filter; start it with --logprobs-mode "
            "raw_logprobs."
        )
    return np.log(np.maximum(remainder_N, SMALLEST_TAIL)).astype(np.float32)
