"""A distillation step holds nothing of the size of the logits, by two instruments that do see logits.

One instrument lists every tensor that an operation returns, forward and backward; the other reads the process's own
peak memory, which also catches what a kernel allocates inside. Both run in one process of their own.
"""

import ctypes
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.test_trainer import trainer_for
from tests.tiny import build_model, build_tokenizer

VOCAB_SIZE = 151_936  # Qwen3's
ROWS, TOKENS, TOP_K = 16, 160, 5
LOGITS = ROWS * (TOKENS - 1) * VOCAB_SIZE  # numbers in an (N, V) tensor; in float32 more than 1.5 GB
CONTROL_LOGITS = ROWS * 8 * VOCAB_SIZE
CASES = {
    "bucket": {},
    "bucket_with_a_trained_head": {"train_head": True},
    "renormalize": {"tail": "renormalize"},
    "mass_fraction": {"mass_fraction": 0.25},
}


@pytest.fixture(scope="module")
def measured():
    command = [sys.executable, "-m", "tests.test_step_memory"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parent.parent)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", CASES)
def test_a_step_holds_no_tensor_and_no_memory_of_the_size_of_the_logits(case, measured):
    assert VOCAB_SIZE < measured[case]["largest"] < LOGITS / 20
    if measured[case]["bytes"] is None:
        pytest.skip("the peak memory of a process is read from Linux's /proc")
    assert 0 < measured[case]["bytes"] < 4 * LOGITS / 10


def test_both_instruments_see_full_logits(measured):
    assert measured["full_logits"]["largest"] >= CONTROL_LOGITS
    assert measured["full_logits"]["bytes"] is None or measured["full_logits"]["bytes"] >= 4 * CONTROL_LOGITS


class Largest(TorchDispatchMode):
    """The most elements in one tensor that an operation returned."""

    numel = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        output = operation(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(leaf.numel() for leaf in tree_leaves(output) if torch.is_tensor(leaf))])
        return output


def measure(function) -> dict:
    """Of two calls: the largest tensor of the first, which also loads what any step loads; the second's peak bytes."""
    with Largest() as seen:
        function()
    return {"largest": seen.numel, "bytes": peak_bytes(function)}


def peak_bytes(function) -> int | None:
    """Highest resident memory while `function` ran, above what was held before; None where it cannot be read."""
    status, restart = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not restart.exists():
        return None

    def read(name: str) -> int:
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith(name))

    ctypes.CDLL(None).malloc_trim(0)  # what was freed before must not serve the function unseen
    restart.write_text("5")
    held = read("VmRSS")
    function()
    return read("VmHWM") - held


def build_trainer(folder: str, train_head: bool = False, **settings):
    """A trainer whose train() is one step over a batch in which every token but the first of a row is supervised."""
    tokenizer, generator = build_tokenizer(), np.random.default_rng(0)
    model = build_model(VOCAB_SIZE, hidden_size=16, intermediate_size=32, max_position_embeddings=TOKENS)
    model.get_output_embeddings().weight.requires_grad_(train_head)
    ids = generator.integers(3, len(tokenizer), TOKENS)
    row = {
        "input_ids": ids,
        "labels": ids,
        "teacher_ids": np.stack([generator.permutation(len(tokenizer))[:TOP_K] for _ in range(TOKENS - 1)]),
        "teacher_log_probs": np.full((TOKENS - 1, TOP_K), np.log(0.18), np.float32),
        "teacher_tail_log_prob": np.full(TOKENS - 1, np.log(0.1), np.float32),
    }
    dataset = Dataset.from_dict({name: [value] * ROWS for name, value in row.items()})
    steps = {"per_device_train_batch_size": ROWS, "max_steps": 1, "save_strategy": "no", "disable_tqdm": True}
    return trainer_for(model, dataset, tokenizer, folder, **steps, **settings)


def main() -> None:
    if sys.platform == "linux":
        # Every tensor a mapping of its own (M_MMAP_THRESHOLD), so that no hole in the heap counts as memory in use
        ctypes.CDLL(None).mallopt(-3, 2**16)
    results = {}
    for case, settings in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            trainer = build_trainer(folder, **settings)
            results[case] = measure(trainer.train)
    few_ids = torch.as_tensor(trainer.train_dataset[:ROWS]["input_ids"])[:, :8]
    results["full_logits"] = measure(
        lambda: trainer.model(input_ids=few_ids).logits.log_softmax(dim=-1).sum().backward()
    )
    print(json.dumps(results))


if __name__ == "__main__":
    main()
