"""A distillation step holds nothing of the size of the logits, by two instruments that do see logits.

One instrument lists every tensor that an operation returns, forward and backward; the other reads the process's own
peak memory, which also catches what a kernel allocates inside. Both run in one process of their own.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

VOCAB_SIZE = 151_936  # Qwen3's
ROWS, TOKENS, TOP_K = 16, 160, 5
POSITIONS = ROWS * (TOKENS - 1)
LOGITS = POSITIONS * VOCAB_SIZE  # numbers in an (N, V) tensor; in float32 more than 1.5 GB
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
def test_no_operation_of_a_step_returns_a_tensor_of_the_size_of_the_logits(case, measured):
    assert 4 * LOGITS > 1.5e9
    assert VOCAB_SIZE < measured[case]["largest"] < LOGITS / 20


@pytest.mark.parametrize("case", CASES)
def test_a_step_adds_a_small_part_of_what_the_logits_would_take(case, measured):
    if measured[case]["bytes"] is None:
        pytest.skip("the peak memory of a process is read from Linux's /proc")
    assert 0 < measured[case]["bytes"] < 4 * LOGITS / 10


def test_both_instruments_see_full_logits(measured):
    assert measured["full_logits"]["largest"] >= CONTROL_LOGITS
    assert measured["full_logits"]["bytes"] is None or measured["full_logits"]["bytes"] >= 4 * CONTROL_LOGITS


def largest_tensor(function) -> int:
    """Most elements in one tensor that an operation returned while `function` ran."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            output = operation(*args, **(kwargs or {}))
            for leaf in tree_leaves(output):
                if isinstance(leaf, torch.Tensor):
                    self.numel = max(self.numel, leaf.numel())
            return output

    with Largest() as seen:
        function()
    return seen.numel


def peak_bytes(function) -> int | None:
    """Highest resident memory while `function` ran, above what was held before; None where it cannot be read."""
    import ctypes

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
    import numpy as np
    from datasets import Dataset

    from tests.test_trainer import trainer_for
    from tests.tiny import build_model, build_tokenizer

    tokenizer = build_tokenizer()
    model = build_model(VOCAB_SIZE, hidden_size=16, intermediate_size=32, max_position_embeddings=TOKENS)
    model.get_output_embeddings().weight.requires_grad_(train_head)
    generator = np.random.default_rng(0)
    teacher_ids = np.stack([generator.permutation(len(tokenizer))[:TOP_K] for _ in range(TOKENS - 1)])
    row = {
        "input_ids": generator.integers(3, len(tokenizer), TOKENS),
        "teacher_ids": teacher_ids,
        "teacher_log_probs": np.full((TOKENS - 1, TOP_K), np.log(0.18), np.float32),
        "teacher_tail_log_prob": np.full(TOKENS - 1, np.log(0.1), np.float32),
    }
    row["labels"] = row["input_ids"]
    dataset = Dataset.from_dict({name: [value] * ROWS for name, value in row.items()})
    return trainer_for(
        model,
        dataset,
        tokenizer,
        folder,
        per_device_train_batch_size=ROWS,
        max_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        **settings,
    )


def main() -> None:
    import ctypes
    import tempfile

    import torch

    if sys.platform == "linux":
        # Every tensor a mapping of its own (M_MMAP_THRESHOLD), so that no hole in the heap counts as memory in use
        ctypes.CDLL(None).mallopt(-3, 2**16)
    results = {}
    for case, settings in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            trainer = build_trainer(folder, **settings)
            # The first call also loads what any step loads, so that the second measures the step
            results[case] = {"largest": largest_tensor(trainer.train), "bytes": peak_bytes(trainer.train)}

    few_ids = torch.as_tensor(trainer.train_dataset[:ROWS]["input_ids"])[:, :8]

    def full_logits():
        trainer.model(input_ids=few_ids).logits.log_softmax(dim=-1).sum().backward()

    results["full_logits"] = {"largest": largest_tensor(full_logits), "bytes": peak_bytes(full_logits)}
    print(json.dumps(results))


if __name__ == "__main__":
    main()
