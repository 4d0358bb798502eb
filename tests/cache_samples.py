"""Small caches for the tests: rows that look like a teacher's, and jobs that can be killed. No test is here."""

import os
import time
from pathlib import Path

import numpy as np

from first_trl.cache.format import tokenizer_fingerprint
from first_trl.cache.identity import chat_template_fingerprint
from first_trl.cache.writer import CacheWriter

VOCABULARY = 40


class FakeTokenizer:
    """A tokenizer of single letters and digits, as far as fingerprints and messages look at one."""

    chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    eos_token_id, pad_token_id = 0, None

    def __init__(self, size=VOCABULARY):
        self.vocabulary = {f"<{i}>": i for i in range(size)}

    def get_vocab(self):
        return self.vocabulary

    def convert_ids_to_tokens(self, token_id):
        return {i: token for token, i in self.vocabulary.items()}.get(token_id)


def description(**changes):
    """What a caching job says about itself."""
    tokenizer = FakeTokenizer()
    return {
        "teacher": {
            "id": "org/teacher",
            "revision": "abc123",
            "weights_sha256": "11" * 32,
            "adapter_sha256": "22" * 32,
            "dtype": "bfloat16",
            "quantization": None,
        },
        "tokenizer_sha256": tokenizer_fingerprint(tokenizer),
        "chat_template_sha256": chat_template_fingerprint(tokenizer),
        "dataset": {"path": "json", "split": "train", "revision": None},
        "task": {
            "prompt": "Review: {text}\nSentiment:",
            "completion": " {label}",
            "append_eos": True,
            "max_length": 64,
            "chat_template_kwargs": {"enable_thinking": False},
        },
        "library_versions": {"torch": "2.13.0"},
    } | changes


def make_row(number, top_k=5, vocabulary=VOCABULARY, supervised=None, length=None):
    """Row `number` of an endless dataset, the same at every call; `supervised` tokens at its end are in the loss."""
    random = np.random.default_rng([number, top_k, vocabulary])
    length = length or int(random.integers(2, 12))
    supervised = supervised if supervised is not None else int(random.integers(1, length))
    input_ids = random.integers(0, vocabulary, length).tolist()
    labels = [-100] * (length - supervised) + input_ids[length - supervised :]
    logits = random.normal(0, 3, (supervised, max(2 * top_k, top_k + 1)))
    log_probs = -np.sort(-(logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)), axis=1)
    return {
        "input_ids": input_ids,
        "labels": labels,
        "teacher_ids": np.reshape(
            [random.choice(vocabulary, top_k, replace=False) for _ in range(supervised)], (supervised, top_k)
        ),
        "teacher_log_probs": log_probs[:, :top_k].astype(np.float32),
        "teacher_tail_log_prob": np.logaddexp.reduce(log_probs[:, top_k:], axis=1).astype(np.float32),
    }


def make_rows(count, **options):
    return [make_row(i, **options) for i in range(count)]


def write_cache(path, rows, *, top_k=5, rows_per_shard=4, dtype="float16", overwrite=False, **changes):
    """A finished cache of these rows; returns its manifest."""
    writer = CacheWriter(path, description(**changes), top_k=top_k, dtype=dtype, rows_per_shard=rows_per_shard)
    with writer.hold(overwrite):
        for index, start in enumerate(range(0, len(rows), rows_per_shard)):
            writer.write_shard(index, rows[start : start + rows_per_shard])
        return writer.finish(len(rows))


def contents(path):
    """Names and bytes of the files that a finished cache consists of; hidden ones are no part of it."""
    return {file.name: file.read_bytes() for file in Path(path).iterdir() if not file.name.startswith(".")}


def small_job(path):
    return CacheWriter(path, description(), top_k=5, rows_per_shard=2)


def write_share(path, log, num_rows, rank=0, processes=1, pause=0.0):
    """What one process does: the missing shards of its rank. Each one computed is a line of `log`."""
    writer = small_job(path)
    for index in range(rank, -(-num_rows // 2), processes):
        if not writer.shard_is_complete(index):
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.write(descriptor, f"{index}\n".encode())
            os.close(descriptor)
            time.sleep(pause)
            writer.write_shard(index, [make_row(i) for i in range(2 * index, min(2 * index + 2, num_rows))])


def whole_job(path, log, num_rows):
    """A job of one process, from taking the folder to the manifest."""
    with small_job(path).hold() as writer:
        write_share(path, log, num_rows)
        writer.finish(num_rows)


def hold_lock(path, ready):
    """Take a folder and never let go."""
    with small_job(path).hold():
        Path(ready).touch()
        time.sleep(600)
