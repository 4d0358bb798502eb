"""The teacher's rows from a server that speaks OpenAI's protocol and gives log-probabilities of prompts, as vLLM does.

    vllm serve TEACHER --max-logprobs 20 --logprobs-mode raw_logprobs --max-model-len LENGTH
        --max-num-batched-tokens 2048 --gpu-memory-utilization 0.8 --hf-overrides '{"head_dtype": "float32"}'

LENGTH is at least task.max_length + 1. An adapter is served with its base: `vllm serve BASE --enable-lora
--max-lora-rank R --lora-modules teacher=FOLDER ...`. The head runs in float32, for logits of 16 bits come in steps of
0.06 to 0.125 nats; few tokens are batched, for the logits of all prompt tokens are held at once. The columns are those
of `first_trl.scoring.teacher_rows`, but the tail is what the K tokens leave of 1, not a sum over the others.

Shapes: N supervised positions, K kept tokens.
"""

import http.client
import json
import os
import queue
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import numpy as np

from .constants import IGNORED
from .errors import FirstTrlError, shorten

if TYPE_CHECKING:
    from .settings import WriteAnswers

MINUS_INFINITY = -9999.0  # what vLLM writes for -inf, which JSON does not have
SMALLEST_TAIL = 2.0**-24  # half the step of float32 below 1: what log-probabilities near 0 cannot tell from nothing
SUM_TOLERANCE = 1e-3  # rounding moves a sum of float32 probabilities by much less
WAITS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)  # seconds between attempts
LONGEST_WAIT = 600.0  # seconds, where a server asks for more by Retry-After
ENTRY_BYTES = 512  # of one token's log-probability in an answer, its text included
_RETRIED = (OSError, http.client.HTTPException)  # no connection, a broken one, a timeout, a response cut short
_KEEPS = "Finished shards are kept"


class ServerError(FirstTrlError):
    """A server that does not answer, or whose answer is not what a teacher's would be."""


@dataclass(frozen=True)
class PromptServer:
    """A server of one model.

    Args:
        url: where `/v1/completions` is, with or without the `/v1`.
        model: the name that it serves the teacher under.
        version: of vLLM, None where the server does not say.
        next_tokens: whether it gives the log-probabilities of the next token by token ids: one row for one answer.
        timeout: seconds that a whole answer may take; the first of a new server takes longest.
        waits: seconds before each further attempt at a request that failed.
    """

    url: str
    model: str = ""
    version: str | None = None
    next_tokens: bool = False
    timeout: float = 600.0
    waits: Sequence[float] = WAITS

    def ask(
        self, place: str, content: dict | None = None, give_up: threading.Event | None = None, limit: int = 2**20
    ) -> dict:
        """The JSON at `place`, or its answer to `content`, of at most `limit` bytes.

        No connection, a broken one, a timeout, status 429 and 5xx are tried again after longer and longer waits,
        unless `give_up` is set: another request has failed for good. The key in `FIRST_TRL_SERVER_KEY` is sent as the
        bearer token, and no redirect is followed with it. Raises ServerError: refused, or the last attempt failed.
        """
        for wait in (*self.waits, None):
            try:
                status, headers, body = self._exchange(place, content, limit)
            except _RETRIED as error:
                problem: object = repr(error)
            else:
                if status == 200:
                    return _json_object(body, self.url, limit)
                problem = f"status {status}, {shorten(body[:500].decode(errors='replace'))!r}"
                if status < 500 and status != 429:
                    raise ServerError(_refusal(self.url, place, status, headers, problem))
                asked = headers.get("Retry-After", "")
                if wait is not None and asked.isdecimal():
                    wait = min(max(wait, float(asked)), LONGEST_WAIT)
            if wait is None or (give_up or threading.Event()).wait(wait):
                break
        raise ServerError(
            f"The teacher's server {self.url} does not answer: {problem}, after {len(self.waits) + 1} attempts. "
            f"{_KEEPS}: start the server again, with the same model, and run the cache stage again."
        )

    def _exchange(self, place: str, content: dict | None, limit: int) -> tuple[int, http.client.HTTPMessage, bytes]:
        """(status, headers, body) of one request; at most `limit` + 1 bytes, and `timeout` seconds for all of it."""
        address = urlsplit(self.url.rstrip("/").removesuffix("/v1") + place)
        kind = http.client.HTTPSConnection if address.scheme == "https" else http.client.HTTPConnection
        connection = kind(address.hostname or "", address.port, timeout=self.timeout)
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("FIRST_TRL_SERVER_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        late = threading.Event()

        connection.connect()
        channel = connection.sock

        def hang_up() -> None:  # the socket's own timeout begins again with every byte
            late.set()
            with suppress(OSError):  # they hung up first
                channel.shutdown(socket.SHUT_RDWR)

        watch = threading.Timer(self.timeout, hang_up)
        watch.daemon = True
        watch.start()
        try:
            data = None if content is None else json.dumps(content)
            connection.request("GET" if content is None else "POST", address.path, data, headers)
            response = connection.getresponse()
            body = response.read(limit + 1)
            if late.is_set():
                raise TimeoutError(f"no whole answer in {self.timeout:g} s")
            return response.status, response.headers, body
        finally:
            watch.cancel()
            connection.close()

    def prompt_entries(self, tokens: list[int], top_k: int, give_up: threading.Event | None = None) -> list:
        """For each token of a prompt but the first: log-probabilities by id, of the K most probable and of itself."""
        content = {"prompt": tokens, "prompt_logprobs": top_k, **self._one_token()}
        answer = self.ask("/v1/completions", content, give_up, 2**20 + ENTRY_BYTES * len(tokens) * (top_k + 1))
        return [
            None if entry is None else {int(token): _number(value["logprob"]) for token, value in entry.items()}
            for entry in _choice(answer, self.url, "prompt_logprobs")
        ]

    def next_token_entry(self, tokens: list[int], top_k: int, give_up: threading.Event | None = None) -> dict:
        """Token id -> log-probability of the K most probable tokens after a prompt."""
        content = {"prompt": tokens, "logprobs": top_k, "return_tokens_as_token_ids": True, **self._one_token()}
        answer = self.ask("/v1/completions", content, give_up)
        entry = _choice(answer, self.url, "logprobs")["top_logprobs"][0]
        return {int(token.removeprefix("token_id:")): _number(value) for token, value in entry.items()}

    def _one_token(self) -> dict:
        return {"model": self.model, "max_tokens": 1, "temperature": 1.0}  # the fewest that a server takes


def _json_object(body: bytes, url: str, limit: int) -> dict:
    if len(body) > limit:
        raise ServerError(f"{url} answered with more than {limit:,} bytes. Check cache.server_url.")
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ServerError(f"{url} did not answer with JSON: {shorten(repr(body[:200]))}. Check it.") from error
    if not isinstance(answer, dict):
        raise ServerError(f"{url} answered with {shorten(repr(answer))}, not with an object. Check cache.server_url.")
    return answer


def _choice(answer: dict, url: str, name: str):
    try:
        found = answer["choices"][0][name]
        if not found:
            raise KeyError(name)
        return found
    except (KeyError, IndexError, TypeError) as error:
        raise ServerError(
            f"The answer of {url} has no readable {name}: {shorten(json.dumps(answer))}. The server must be one that "
            "returns them from /v1/completions, as vLLM does."
        ) from error


def _number(log_prob) -> float:
    if isinstance(log_prob, bool) or not isinstance(log_prob, int | float):
        raise FirstTrlError(f"log-probability {log_prob!r}")
    return -np.inf if log_prob <= MINUS_INFINITY else float(log_prob)


def _refusal(url: str, place: str, status: int, headers, said: object) -> str:
    remedy = "check cache.server_url" if status == 404 else "start the server in another way, or change the recipe"
    if 300 <= status < 400:
        remedy = f"write the address itself, {shorten(headers.get('Location', ''))}, as cache.server_url"
    elif status in (401, 403):
        remedy = "put the server's key into the environment variable FIRST_TRL_SERVER_KEY"
    elif "max allowed" in str(said):
        remedy = "start the server with --max-logprobs of at least cache.top_k, or lower cache.top_k"
    elif "context length" in str(said):
        remedy = "start the server with --max-model-len above task.max_length, or lower task.max_length"
    return f"The server {url} refused {place}: {said}. To fix it, {remedy}. {_KEEPS}."


def connect(url: str, teacher: str, top_k: int = 1, max_length: int = 1, **options) -> PromptServer:
    """The server at `url`, if it serves `teacher` (an id or a folder, or its last part) and gives what a cache keeps.

    `top_k` and `max_length` are the cache's: K, and the tokens of the longest example. Raises ServerError: there is no
    server, it serves something else, or it cannot give `prompt_logprobs` of that many.
    """
    # At the start, a wrong address is likelier than a server that pauses
    server = PromptServer(url, **{"waits": WAITS[:2]} | options)
    listed = server.ask("/v1/models").get("data")
    models = {str(model.get("id")): model for model in listed or [] if isinstance(model, dict)}
    last = Path(teacher).name
    ours = [name for name in models if name == teacher] or [name for name in models if Path(name).name == last]
    if len(ours) != 1:
        names = shorten(", ".join(models)) or "no model"
        raise ServerError(
            f"The server {url} serves {names}, and the recipe's teacher is {teacher}. Start it with that model, or "
            f"name the model that it serves: --served-model-name {last}."
        )
    longest = models[ours[0]].get("max_model_len")
    if isinstance(longest, int) and longest <= max_length:
        raise ServerError(
            f"The server {url} takes {longest} tokens, and task.max_length is {max_length}: start it with "
            f"--max-model-len {max_length + 1}."
        )
    try:
        version = replace(server, timeout=min(server.timeout, 60), waits=()).ask("/version").get("version")
    except ServerError:  # not vLLM
        version = None
    server = replace(server, model=ours[0], version=None if version is None else shorten(str(version), 60))
    prompt_row({"input_ids": [0, 0], "labels": [IGNORED, 0]}, server.prompt_entries([0, 0], top_k), top_k)
    try:
        next_tokens = len(server.next_token_entry([0], top_k)) >= top_k
    except (ServerError, ValueError, KeyError, AttributeError):  # older servers name tokens by their text
        next_tokens = False
    return replace(server, next_tokens=next_tokens, waits=options.get("waits", WAITS))


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

    An answer of one token, and its end, is asked for as the next token of the prompt: the server then computes one row
    of logits and keeps the prompt's prefix. Other examples are asked for as whole prompts. Arguments as there; raises
    ServerError: no answer, or other ones than log-probabilities of these tokens at temperature 1.
    """
    give_up = threading.Event()

    def row(example: dict) -> dict:
        tokens = [int(token) for token in example["input_ids"]]
        positions = [i for i in range(1, len(tokens)) if example["labels"][i] != IGNORED]
        try:
            if server.next_tokens and len(positions) <= 2:
                entries: list = [None] * len(tokens)
                for i in positions:
                    found = server.next_token_entry(tokens[:i], top_k, give_up)
                    # As in a prompt's entries, where the token itself is one more, whatever its rank
                    entries[i] = {tokens[i]: -np.inf} | found if len(found) >= top_k else found
            else:
                entries = server.prompt_entries(tokens, top_k, give_up)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, ServerError):
                raise
            raise ServerError(f"The answer of {server.url} has no readable log-probabilities ({error!r}).") from error
        return prompt_row(example, entries, top_k, vocab_limit)

    rows = []
    for example, result in zip(examples, _in_threads(row, examples, requests, give_up), strict=True):
        rows.append(result)
        if progress is not None:
            progress(len(example["input_ids"]))
    return rows


def server_answers(
    server: PromptServer,
    prompts: list[list[int]],
    ends: list[int],
    how: "WriteAnswers",
    *,
    requests: int = 16,
    progress: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """As `first_trl.generation.written_answers`, by a server, at most `requests` under way at once."""
    give_up = threading.Event()
    request = {"model": server.model, "logprobs": 1, "return_tokens_as_token_ids": True, "stop_token_ids": ends}
    request |= {"max_tokens": how.max_new_tokens, "temperature": how.temperature, "top_p": how.top_p, "seed": how.seed}
    # What a server would take from the model's generation_config.json otherwise
    request |= {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}

    def written(prompt: list[int]) -> list[int]:
        content = {"prompt": [int(token) for token in prompt], **request}
        answer = server.ask("/v1/completions", content, give_up, 2**20 + 4 * ENTRY_BYTES * how.max_new_tokens)
        try:
            tokens = _choice(answer, server.url, "logprobs")["tokens"]
            ids = [int(token.removeprefix("token_id:")) for token in tokens]
            ended = answer["choices"][0]["finish_reason"] == "stop" and ids[-1:] != [ends[0]]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ServerError(f"The answer of {server.url} has no readable token ids ({error!r}).") from error
        return [*ids, ends[0]] if ended else ids  # some servers leave the end out

    answers = []
    for prompt, answer in zip(prompts, _in_threads(written, prompts, requests, give_up), strict=True):
        answers.append(answer)
        if progress is not None:
            progress(len(prompt))
    return answers


def _in_threads(function: Callable, items: list, count: int, give_up: threading.Event) -> Iterator:
    """The results of `function`, in order. The threads never keep a process alive that was interrupted."""
    todo: queue.SimpleQueue = queue.SimpleQueue()
    done: queue.SimpleQueue = queue.SimpleQueue()
    for number, item in enumerate(items):
        todo.put((number, item))

    def work() -> None:
        while not give_up.is_set():
            try:
                number, item = todo.get_nowait()
                done.put((number, function(item), None))
            except queue.Empty:
                return
            except BaseException as error:
                done.put((-1, None, error))
                return

    for _ in range(min(count, len(items))):
        threading.Thread(target=work, daemon=True).start()
    results: dict[int, dict] = {}
    try:
        for number in range(len(items)):
            while number not in results:
                found, result, error = done.get()
                if error is not None:
                    raise error
                results[found] = result
            yield results.pop(number)
    finally:
        give_up.set()


def prompt_row(
    example: dict, entries: Sequence[dict[int, float] | None], top_k: int, vocab_limit: int | None = None
) -> dict:
    """One row of the cache from the log-probabilities of a prompt.

    `entries` are, for each token, those (nats) of the most probable tokens in its place and of itself; None for the
    first. Raises ServerError: they are not those of this prompt, or no log-probabilities at temperature 1.
    """
    tokens, labels = example["input_ids"], example["labels"]
    if len(entries) != len(tokens):
        raise ServerError(
            f"A prompt of {len(tokens)} tokens came back with {len(entries)}: the server changes prompts, which must "
            "be taken as they are. Start it without templates or special tokens of its own."
        )
    positions = [i for i in range(1, len(tokens)) if labels[i] != IGNORED]
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
    place, given = f"Position {position} of a prompt (token {token}): the server gave", shorten(str(entry))
    if entry is None or token not in entry:
        what = "no log-probabilities" if entry is None else f"log-probabilities without the token itself, {given}"
        raise ServerError(f"{place} {what}. It must take token ids as they are, and return prompt_logprobs.")
    if not all(value <= SUM_TOLERANCE for value in entry.values()) or max(entry.values()) == -np.inf:  # or NaN
        raise ServerError(f"{place} {given}: no log-probabilities. Start it with --logprobs-mode raw_logprobs.")
    if len(entry) < top_k:
        raise ServerError(f"{place} {len(entry)} tokens, and cache.top_k asks for {top_k}: {given}.")
    best = sorted(((i, min(value, 0.0)) for i, value in entry.items()), key=lambda pair: (-pair[1], pair[0]))[:top_k]
    beyond = [i for i, _ in best if vocab_limit is not None and i >= vocab_limit]
    if beyond:
        raise ServerError(
            f"{place} token {beyond[0]} among the {top_k} most probable, but the tokenizer has {vocab_limit}. Lower "
            "cache.top_k, or use cache.backend: hf, which leaves such tokens out."
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
