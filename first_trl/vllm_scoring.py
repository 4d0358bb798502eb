"""The teacher's rows and answers, from a server with OpenAI's protocol and log-probabilities of prompts, as vLLM has.

    vllm serve TEACHER --max-logprobs 20 --logprobs-mode raw_logprobs --max-model-len LENGTH
        --max-num-batched-tokens 2048 --gpu-memory-utilization 0.8 --hf-overrides '{"head_dtype": "float32"}'

What each option is for, and how an adapter is served, is in docs/cache.md. The columns are those of
`first_trl.scoring.teacher_rows`, but the tail is what the K tokens leave of 1, not a sum over the others.

Shapes: N supervised positions, K kept tokens.
"""

import asyncio
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import httpx2
import numpy as np
from anyio.from_thread import start_blocking_portal

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
_KEEPS = "Finished shards are kept"
_REMEDIES = {  # status, or words of the answer -> what to do
    "max allowed": "start the server with --max-logprobs of at least cache.top_k, or lower cache.top_k",
    "context length": "start the server with --max-model-len above task.max_length, or lower task.max_length",
    "status 401": "put the server's key into the environment variable FIRST_TRL_SERVER_KEY",
    "status 403": "put the server's key into the environment variable FIRST_TRL_SERVER_KEY",
    "status 404": "check cache.server_url",
    "status 3": "write the address itself, {location}, as cache.server_url",
    "": "start the server in another way, or change the recipe",
}


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
        whole_prompts: whether its log-probabilities of prompts are the teacher's.
        timeout: seconds that a whole answer may take; the first of a new server takes longest.
        waits: seconds before each further attempt at a request that failed.
    """

    url: str
    model: str = ""
    version: str | None = None
    next_tokens: bool = False
    whole_prompts: bool = True
    timeout: float = 600.0
    waits: Sequence[float] = WAITS

    async def ask(self, client: httpx2.AsyncClient, place: str, content: dict | None = None, limit=2**20) -> dict:
        """The JSON at `place`, or its answer to `content`, of at most `limit` bytes.

        No connection, a broken one, a timeout, status 429 and 5xx are tried again after longer and longer waits.
        Raises ServerError: the server refused, or the last attempt failed.
        """
        address, method = self.url.rstrip("/").removesuffix("/v1") + place, "GET" if content is None else "POST"
        for wait in (*self.waits, None):
            body = bytearray()
            try:
                # The client's own timeouts begin again with every byte
                async with asyncio.timeout(self.timeout), client.stream(method, address, json=content) as response:
                    async for part in response.aiter_bytes():
                        body += part
                        if len(body) > limit:
                            raise ServerError(
                                f"{self.url} answered with more than {limit:,} bytes; check its address."
                            )
            except TimeoutError:
                problem = f"no whole answer in {self.timeout:g} s"
            except (httpx2.RequestError, httpx2.InvalidURL) as error:
                problem = repr(error)
            else:
                if response.status_code == 200:
                    return _json_object(body, self.url)
                problem = f"status {response.status_code}, {shorten(body[:500].decode(errors='replace'))!r}"
                if response.status_code < 500 and response.status_code != 429:
                    remedy = next(remedy for words, remedy in _REMEDIES.items() if words in problem)
                    remedy = remedy.format(location=shorten(response.headers.get("Location", "")))
                    raise ServerError(f"{self.url} refused {place}: {problem}. To fix it, {remedy}. {_KEEPS}.")
                asked = response.headers.get("Retry-After", "")
                if wait is not None and asked.isdecimal():
                    wait = min(max(wait, float(asked)), LONGEST_WAIT)
            if wait is not None:
                await asyncio.sleep(wait)
        raise ServerError(
            f"The teacher's server {self.url} does not answer: {problem}, after {len(self.waits) + 1} attempts. "
            f"{_KEEPS}: start the server again, with the same model, and run the cache stage again."
        )

    async def complete(self, client: httpx2.AsyncClient, tokens: list[int], read: Callable, limit=2**20, **wanted):
        """What `read` finds in the completion of a prompt, by default of one token, the fewest that a server takes."""
        content = {"model": self.model, "prompt": tokens, "max_tokens": 1, "temperature": 1.0, **wanted}
        answer = await self.ask(client, "/v1/completions", content, limit)
        try:
            return read(answer["choices"][0])
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise ServerError(
                f"The answer of {self.url} has no readable log-probabilities: {shorten(json.dumps(answer))}. The "
                "server must return prompt_logprobs from /v1/completions, as vLLM does."
            ) from error

    async def prompt_entries(self, client: httpx2.AsyncClient, tokens: list[int], top_k: int) -> list:
        """For each token of a prompt but the first: log-probabilities by id, of the K most probable and of itself."""

        def read(choice: dict) -> list[dict[int, float] | None]:
            return [
                None if entry is None else {int(token): _number(value["logprob"]) for token, value in entry.items()}
                for entry in choice["prompt_logprobs"]
            ]

        limit = 2**20 + ENTRY_BYTES * len(tokens) * (top_k + 1)
        return await self.complete(client, tokens, read, limit, prompt_logprobs=top_k)

    async def next_token_entry(self, client: httpx2.AsyncClient, tokens: list[int], top_k: int) -> dict[int, float]:
        """Token id -> log-probability of the K most probable tokens after a prompt."""

        def read(choice: dict) -> dict[int, float]:
            return {_token_id(token): _number(at) for token, at in choice["logprobs"]["top_logprobs"][0].items()}

        return await self.complete(client, tokens, read, logprobs=top_k, return_tokens_as_token_ids=True)


def _client() -> httpx2.AsyncClient:
    """Follows no redirect, least of all with the key; proxies are those of the environment."""
    key = os.environ.get("FIRST_TRL_SERVER_KEY", "").strip()
    if not (key.isascii() and key.isprintable()):  # refused here, for httpx2 would show it
        raise ServerError("FIRST_TRL_SERVER_KEY holds a character that no key has; write it again.")
    headers, limits = {"Authorization": f"Bearer {key}"} if key else {}, httpx2.Limits(max_connections=None)
    return httpx2.AsyncClient(headers=headers, timeout=None, limits=limits, follow_redirects=False)


def _json_object(body: bytearray, url: str) -> dict:
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        answer = None
    if not isinstance(answer, dict):
        raise ServerError(
            f"{url} answered with {shorten(repr(bytes(body[:200])))}, not with a JSON object; check its address."
        )
    return answer


def _token_id(name: str) -> int:
    return int(name.removeprefix("token_id:"))


def _number(log_prob) -> float:
    if isinstance(log_prob, bool) or not isinstance(log_prob, int | float):
        raise TypeError(f"log-probability {log_prob!r}")
    return -np.inf if log_prob <= MINUS_INFINITY else float(log_prob)


def connect(url: str, teacher: str, top_k: int = 1, max_length: int = 1, **options) -> PromptServer:
    """The server at `url`, if it serves `teacher` (an id or a folder, or its last part) and gives what a cache keeps.

    `top_k` and `max_length` are the cache's: K, and the tokens of the longest example. Raises ServerError: there is no
    server, it serves something else, or it cannot give `prompt_logprobs` of that many.
    """

    async def probe() -> PromptServer:
        # At the start, a wrong address is likelier than a server that pauses
        server = PromptServer(url, **{"waits": WAITS[:2]} | options)
        async with _client() as client:
            listed = (await server.ask(client, "/v1/models")).get("data")
            models = {str(model.get("id")): model for model in listed or [] if isinstance(model, dict)}
            name = _name_of(teacher, url, models)
            server = replace(server, model=name, whole_prompts=not models[name].get("parent") or _keeps_head(teacher))
            longest = models[name].get("max_model_len")
            if isinstance(longest, int) and longest <= max_length:
                raise ServerError(
                    f"The server {url} takes {longest} tokens, and task.max_length is {max_length}: start it with "
                    f"--max-model-len {max_length + 1}."
                )
            entries = await server.prompt_entries(client, [0, 0], top_k)
            prompt_row({"input_ids": [0, 0], "labels": [IGNORED, 0]}, entries, top_k)
            try:
                next_tokens = len(await server.next_token_entry(client, [0], top_k)) >= top_k
            except ServerError:  # older servers name tokens by their text
                next_tokens = False
            try:
                about = await replace(server, timeout=min(server.timeout, 60), waits=()).ask(client, "/version")
                version = shorten(str(about["version"]), 60)
            except (ServerError, KeyError):  # not vLLM
                version = None
        return replace(server, version=version, next_tokens=next_tokens, waits=options.get("waits", WAITS))

    return _run(probe)


def _name_of(teacher: str, url: str, models: dict) -> str:
    last = Path(teacher).name
    ours = [name for name in models if name == teacher] or [name for name in models if Path(name).name == last]
    if len(ours) != 1:
        names = shorten(", ".join(models)) or "no model"
        raise ServerError(
            f"The server {url} serves {names}, and the recipe's teacher is {teacher}. Start it with that model, or "
            f"name the model that it serves: --served-model-name {last}."
        )
    return ours[0]


def _keeps_head(teacher: str) -> bool:
    """Whether an adapter is known to leave the head as it is.

    vLLM leaves an adapter's head out of `prompt_logprobs`, silently: github.com/vllm-project/vllm/issues/51594.
    """
    file = Path(teacher) / "adapter_config.json"
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"target_modules": "head"}
    return "head" not in f"{config.get('target_modules')} {config.get('modules_to_save')}"


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

    async def row(client: httpx2.AsyncClient, example: dict) -> dict:
        tokens = [int(token) for token in example["input_ids"]]
        positions = [i for i in range(1, len(tokens)) if example["labels"][i] != IGNORED]
        if server.next_tokens and len(positions) <= 2:
            entries: list = [None] * len(tokens)
            for i in positions:
                found = await server.next_token_entry(client, tokens[:i], top_k)
                # As in a prompt's entries, where the token itself is one more, whatever its rank
                entries[i] = {tokens[i]: -np.inf} | found if len(found) >= top_k else found
        elif not server.whole_prompts:
            raise ServerError(
                f"{server.model} is an adapter, on the head too as far as is known here, and servers leave that out "
                f"of a prompt's log-probabilities, which {len(positions)} learned tokens of a row need: merge it into "
                "its base (merge_and_unload of PEFT), serve that, and name it as cache.teacher."
            )
        else:
            entries = await server.prompt_entries(client, tokens, top_k)
        return prompt_row(example, entries, top_k, vocab_limit)

    return _under_way(row, examples, requests, lambda example: progress and progress(len(example["input_ids"])))


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
    # What a server would take from the model's generation_config.json otherwise
    wanted: dict = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, **how.model_dump(exclude={"max_new_tokens"})}
    wanted |= {"logprobs": 1, "return_tokens_as_token_ids": True, "stop_token_ids": ends}

    def read(choice: dict) -> list[int]:
        tokens = [_token_id(token) for token in choice["logprobs"]["tokens"]]
        left_out = choice["finish_reason"] == "stop" and tokens[-1:] != [ends[0]]  # as some servers do with the end
        return [*tokens, ends[0]] if left_out else tokens

    async def written(client: httpx2.AsyncClient, prompt: list[int]) -> list[int]:
        limit = 2**20 + 4 * ENTRY_BYTES * how.max_new_tokens
        tokens, length = [int(token) for token in prompt], how.max_new_tokens
        return await server.complete(client, tokens, read, limit, max_tokens=length, **wanted)

    return _under_way(written, prompts, requests, lambda prompt: progress and progress(len(prompt)))


def _under_way(ask: Callable, items: list, requests: int, done: Callable) -> list:
    """The results of `ask(client, item)`, in order. An interrupt or the first failure cancels what is under way."""

    async def all_of_them() -> list:
        places = asyncio.Semaphore(requests)

        async def one(item):
            async with places:
                result = await ask(client, item)
            done(item)
            return result

        async with _client() as client:
            return await asyncio.gather(*map(one, items))

    return _run(all_of_them)


def _run(work: Callable):
    """What a coroutine function without arguments returns; in a thread where a loop runs already, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work())
    with start_blocking_portal() as portal:  # an interrupt cancels what is under way there, too
        return portal.call(work)


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
    entry = entry or {}
    best = sorted(((i, min(value, 0.0)) for i, value in entry.items()), key=lambda pair: (-pair[1], pair[0]))[:top_k]
    beyond = [i for i, _ in best if vocab_limit is not None and i >= vocab_limit]
    problem = None
    if token not in entry:
        problem = "without the token itself: it must take token ids as they are, and return prompt_logprobs"
    elif not all(value <= SUM_TOLERANCE for value in entry.values()) or max(entry.values()) == -np.inf:  # or NaN
        problem = "which are no log-probabilities: start it with --logprobs-mode raw_logprobs"
    elif len(entry) < top_k:
        problem = f"{len(entry)} tokens where cache.top_k asks for {top_k}"
    elif beyond:
        problem = (
            f"with token {beyond[0]} among the {top_k} most probable, beyond the tokenizer's {vocab_limit}: lower "
            "cache.top_k, or use cache.backend: hf, which leaves such tokens out"
        )
    elif (total := np.exp([value for _, value in best]).sum()) > 1 + SUM_TOLERANCE:
        problem = f"whose probabilities sum to {total:.4f}: start it with --logprobs-mode raw_logprobs"
    if problem:
        given = shorten(str(entry or "nothing"))
        raise ServerError(f"Position {position} of a prompt (token {token}): the server gave {given}, {problem}.")
    return best


def tail_from_top_k(log_probs_NK: np.ndarray) -> np.ndarray:
    """(N,) float32 log of what K probabilities leave of 1, for log-probabilities most probable first.

    1 - sum p = -expm1(log p_1) - p_2 - ... - p_K keeps every digit that the log-probabilities have. They have none for
    a tail below 2**-24, where rounding may even take the sum over 1: that is the smallest tail here, -16.6 nats.
    """
    remainder_N = -np.expm1(log_probs_NK[:, 0]) - np.exp(log_probs_NK[:, 1:]).sum(axis=1)
    return np.log(np.maximum(remainder_N, SMALLEST_TAIL)).astype(np.float32)
