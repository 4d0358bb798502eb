"""The parts of `gpu.sh` that are neither tests nor the step: caching beside a bare forward, two processes on one GPU.

    python benchmarks/gpu.py cache              # Qwen3-0.6B's configuration with random weights; writes results
    python benchmarks/gpu.py two                # a distillation with two processes on one GPU is right, or refused
    python benchmarks/gpu.py cache --rehearse   # a tiny configuration on whatever device there is; writes nothing

Shapes: B rows, T tokens, D hidden.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
QWEN3 = {
    "vocab_size": 151_936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
TINY = {
    "vocab_size": 997,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def device():
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def slug() -> str:
    """The device's name as a part of a file name."""
    import torch

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


def synchronize() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def bench_cache(rehearse: bool) -> None:
    """Seconds and peak memory of `teacher_rows`, all tokens supervised, over those of the bare backbone."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from first_trl.modeling import backbone_hidden_states
    from first_trl.scoring import teacher_rows

    rows, tokens, rounds = (4, 32, 2) if rehearse else (64, 1024, 5)
    sizes = TINY if rehearse else QWEN3
    torch.manual_seed(0)
    dtype = torch.float32 if device().type == "cpu" else torch.bfloat16
    with torch.device(device()):
        model = Qwen3ForCausalLM(Qwen3Config(**sizes, tie_word_embeddings=True)).to(dtype).eval()
    ids_BT = torch.randint(3, sizes["vocab_size"], (rows, tokens))
    examples = [{"input_ids": row.tolist(), "labels": [-100, *row.tolist()[1:]]} for row in ids_BT]
    budget = 8 * tokens

    @torch.inference_mode()
    def backbone() -> None:
        for batch_BT in ids_BT.split(8):
            backbone_hidden_states(model, input_ids=batch_BT.to(device()), attention_mask=None)

    def cached() -> None:
        teacher_rows(model, examples, top_k=5, tokens_per_batch=budget)

    seconds: dict[str, list[float]] = {"bare backbone": [], "teacher_rows": []}
    peaks: dict[str, int] = {}
    for round_ in range(rounds + 1):
        for name, run in (("bare backbone", backbone), ("teacher_rows", cached)):
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            synchronize()
            started = time.perf_counter()
            run()
            synchronize()
            if round_:  # the first round warms up
                seconds[name].append(time.perf_counter() - started)
            peaks[name] = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    ratio = statistics.median(
        ours / bare for ours, bare in zip(seconds["teacher_rows"], seconds["bare backbone"], strict=True)
    )
    lines = [
        f"# Caching beside a bare forward: {slug()}",
        "",
        f"{rows} rows of {tokens} tokens, all supervised, V = {sizes['vocab_size']:,}, D = {sizes['hidden_size']:,}, "
        f"{sizes['num_hidden_layers']} layers, {str(dtype).removeprefix('torch.')}, random weights; torch "
        f"{torch.__version__}; medians of {rounds} alternating rounds.",
        "",
        "| | seconds | x bare backbone | peak MiB |",
        "|---|---:|---:|---:|",
    ]
    for name, values in seconds.items():
        times = "1.00" if name == "bare backbone" else f"{ratio:.2f}"
        lines.append(f"| {name} | {statistics.median(values):.3f} | {times} | {peaks[name] / 2**20:,.0f} |")
    publish(lines, f"cache-{slug()}.md", rehearse)


def publish(lines: list[str], name: str, rehearse: bool) -> None:
    print("\n".join(lines))
    if not rehearse:
        (RESULTS / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"Written to {RESULTS / name}")


def bench_two(rehearse: bool) -> None:
    """A training step by two processes that share the device: the step of one process, or refused in words."""
    import torch

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if rehearse or not torch.cuda.is_available():
        environment["ACCELERATE_USE_CPU"] = "true"
    changes = {}
    with tempfile.TemporaryDirectory() as folder:
        for processes in (1, 2):
            out = Path(folder) / f"{processes}.json"
            job = json.dumps({"batch": 8 // processes, "accumulation": 1, "out": str(out)})
            launcher = [sys.executable, "-m", "accelerate.commands.launch", f"--num_processes={processes}"]
            launcher += ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"]
            launcher += ["--multi_gpu"] if processes > 1 else []
            command = [*launcher, "-m", "tests.process_jobs", "one_step", job]
            done = subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment)
            if done.returncode != 0:
                print(f"{processes} processes: exit status {done.returncode}; the end of what they printed:")
                print("\n".join(done.stderr.strip().splitlines()[-5:]))
                if processes == 1:
                    raise SystemExit("one process failed")
                return
            changes[processes] = torch.tensor(sum(json.loads(out.read_text()).values(), []))
    difference = float((changes[2] - changes[1]).norm() / changes[1].norm())
    print(f"the step of two processes differs from that of one by {difference:.1e} of its norm")
    if difference > 1e-4:
        raise SystemExit("two processes on one device do not take the step of one")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("cache", "two"))
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, any device, no file written")
    options = parser.parse_args()
    {"cache": bench_cache, "two": bench_two}[options.part](options.rehearse)


if __name__ == "__main__":
    main()
