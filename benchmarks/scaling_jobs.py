"""What `scaling.py` measures, each in processes of one thread: caching rows, and distilling from a cache.

Processes start together, make everything ready, wait for each other, and only then does the clock run, until the last
of them is done. Caching processes share a folder and nothing else; distilling ones are joined by gloo, as DDP.
"""

import multiprocessing
import os
import socket
import tempfile
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

VOCAB_SIZE, TOP_K = 8192, 5
MODEL = {"hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 4, "num_key_value_heads": 4}


def cache_seconds(processes: int, rows: int, tokens: int) -> float:
    """Seconds from the first teacher batch to the last shard on the disk: `rows` of `tokens` in each process."""
    with tempfile.TemporaryDirectory() as folder:
        return _together(processes, partial(_cache, Path(folder), rows * processes, tokens))


def distill_seconds(processes: int, rows: int, tokens: int, batch: int = 8) -> float:
    """Seconds of one epoch, after a step to warm up, of `rows` of `tokens` in each process."""
    return _together(processes, partial(_distill, rows * processes, tokens, batch))


def _together(processes: int, work) -> float:
    """Run `work(rank, processes, ready)` in processes of one thread; seconds from the last `ready` to the last end."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["first_trl.trainer", "first_trl.cache.writer", "first_trl.scoring", "peft"])
    barrier, results = context.Barrier(processes), context.SimpleQueue()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [
        context.Process(target=_process, args=(rank, processes, port, work, barrier, results), daemon=True)
        for rank in range(processes)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join()
        if process.exitcode != 0:
            raise RuntimeError(f"a process of the benchmark ended with {process.exitcode}; its error is above")
    times = [results.get() for _ in started]
    return max(end for _, end in times) - max(start for start, _ in times)


def _process(rank: int, processes: int, port: int, work, barrier, results) -> None:
    os.environ.update(ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    if processes > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes), LOCAL_WORLD_SIZE="1")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what the trainers print is not a result
    import torch

    torch.set_num_threads(1)
    begun = []

    def ready() -> None:
        barrier.wait()
        begun.append(time.monotonic())

    work(rank, processes, ready)
    results.put((begun[0], time.monotonic()))


def build_model(layers: int):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB_SIZE,
            num_hidden_layers=layers,
            max_position_embeddings=4096,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=0,
            pad_token_id=1,
            initializer_range=0.1,
            **MODEL,
        )
    )


def _cache(folder: Path, rows: int, tokens: int, rank: int, processes: int, ready) -> None:
    import numpy as np
    from datasets import Dataset

    from first_trl.cache.identity import library_versions
    from first_trl.cache.writer import CacheWriter, write_shards
    from first_trl.scoring import teacher_rows

    model = build_model(layers=4).eval()
    ids = np.random.default_rng(0).integers(3, VOCAB_SIZE, (rows, tokens)).tolist()
    dataset = Dataset.from_dict({"input_ids": ids, "labels": [[-100, *row[1:]] for row in ids]})
    identity = {"teacher": {}, "dataset": {}, "task": {}, "library_versions": library_versions()}
    identity |= {"tokenizer_sha256": "", "chat_template_sha256": None}
    writer = CacheWriter(folder, identity, top_k=TOP_K, rows_per_shard=16)
    score = partial(teacher_rows, model, top_k=TOP_K, tokens_per_batch=2048, vocab_limit=VOCAB_SIZE)
    score([dataset[0]])  # warms up
    share = {"rank": rank, "processes": processes, "title": "cache"}
    with writer.hold() if rank == 0 else nullcontext():
        ready()
        write_shards(writer, dataset, lambda row, _: row, lambda rows, _: score(rows), **share)


def _distill(rows: int, tokens: int, batch: int, rank: int, processes: int, ready) -> None:
    import numpy as np
    from datasets import Dataset
    from peft import LoraConfig
    from step_arms import build_tokenizer
    from transformers import TrainerCallback

    from first_trl import FIRSTConfig, FIRSTTrainer

    class AfterTheFirst(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 1:
                ready()

    dice = np.random.default_rng(0)
    rows += batch * processes  # the step that warms up
    ids = dice.integers(3, VOCAB_SIZE, (rows, tokens))
    first = dice.integers(0, VOCAB_SIZE - TOP_K * 100, (rows, tokens - 1, 1))
    dataset = Dataset.from_dict(
        {
            "input_ids": ids,
            "labels": np.concatenate([np.full((rows, 1), -100), ids[:, 1:]], axis=1),
            "teacher_ids": first + np.arange(TOP_K) * 100,
            "teacher_log_probs": np.full((rows, tokens - 1, TOP_K), np.log(0.18), np.float32),
            "teacher_tail_log_prob": np.full((rows, tokens - 1), np.log(0.1), np.float32),
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = FIRSTTrainer(
            model=build_model(layers=2),
            args=FIRSTConfig(
                output_dir=folder,
                num_train_epochs=1,
                per_device_train_batch_size=batch,
                bf16=False,
                use_cpu=True,
                gradient_checkpointing=False,
                logging_strategy="no",
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=dataset,
            processing_class=build_tokenizer(VOCAB_SIZE),
            peft_config=LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
            callbacks=[AfterTheFirst()],
        )
        trainer.train()
