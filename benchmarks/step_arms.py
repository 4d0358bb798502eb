"""One arm of the step benchmark, in a process of its own: a trainer that takes a step whenever it is its turn.

Every arm is a real trainer running its real `train()`, on the same student, rows, LoRA adapter and arguments; what
differs is `compute_loss` alone. The arms that no trainer offers (the backbone without any head, the full logits, the
dense divergence with a live teacher) override it here.

What this module is not: it decides neither which arms run nor in which order, and it prints nothing; see `step.py`.

Shapes: B rows, T tokens, N supervised positions in row-major order, D hidden, V vocabulary, K kept tokens.
"""

import ctypes
import os
import tempfile
import time
import warnings
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback, logging
from trl import SFTConfig, SFTTrainer
from trl.trainer.distillation_trainer import _chunked_divergence_loss
from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE, _ChunkedLogProbFunction

from first_trl import FIRSTConfig, FIRSTTrainer
from first_trl.losses import partition_divergence
from first_trl.modeling import backbone_hidden_states

TOP_K = 5
WARM_UP_STEPS = 1  # makes the optimizer's state
M_MMAP_THRESHOLD = -3  # glibc's malloc.h
ATTENTION_AND_MLP = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Job:
    """What one process measures. `model` holds LlamaConfig's settings of the student."""

    arm: str
    model: dict
    rows: int
    tokens: int
    supervision: str  # "all" tokens, or the "answer" alone: the last token of each row
    steps: int
    device: str
    threads: int
    exact_memory: bool  # give back what is freed at once, which takes time: for measuring memory, not seconds


class BackboneTrainer(SFTTrainer):
    """The limit: forward and backward of the adapted backbone, and no head at all."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        hidden_BTD = backbone_hidden_states(
            model.get_base_model(), input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]
        )
        return hidden_BTD.float().square().mean()


class SupervisedSFTTrainer(SFTTrainer):
    """TRL's step as TRL takes it on a GPU: its fused head reads the supervised positions alone, on a CPU too."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        student, labels = model.get_base_model(), inputs["labels"][:, 1:]
        hidden_BTD = backbone_hidden_states(
            student, input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]
        )[:, :-1]
        mask = labels != -100
        log_probs_N, *_ = _ChunkedLogProbFunction.apply(
            hidden_BTD[mask],
            student.get_output_embeddings().weight,
            None,  # no bias
            labels[mask],
            1.0,  # temperature
            _CHUNKED_LOGPROB_CHUNK_SIZE,
            None,  # no soft-cap
            1.0,  # logit scale
            ("log_probs", "entropy", "is_top1"),  # what SFTTrainer logs
        )
        return -log_probs_N.sum() / num_items_in_batch


class FullLogitsTrainer(FIRSTTrainer):
    """The loss of `bucket`, written as it is where memory is free: all logits, log_softmax, gather."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        logits_BTV = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        log_probs_BTV = logits_BTV[:, :-1].float().log_softmax(dim=-1)
        log_probs_NK = log_probs_BTV[inputs["labels"][:, 1:] != -100].gather(1, inputs["teacher_ids"])
        tail_N = torch.log1p(-log_probs_NK.exp().sum(dim=1))
        student_NK1 = torch.cat([log_probs_NK, tail_N[:, None]], dim=1)
        return partition_divergence(student_NK1, inputs["teacher_log_probs"]).sum() / num_items_in_batch


class LiveTeacherTrainer(SFTTrainer):
    """TRL's dense divergence, in vocabulary chunks, to a teacher of the student's size that runs in every step."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs["labels"]
        first = int((labels[:, 1:] != -100).any(dim=0).nonzero()[0])  # as TRL, keep the completion's positions alone
        tokens = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
        student = model.get_base_model()
        with torch.no_grad():
            teacher_hidden_BTD = backbone_hidden_states(self.teacher, **tokens)[:, first:-1]
        return _chunked_divergence_loss(
            backbone_hidden_states(student, **tokens)[:, first:-1],
            teacher_hidden_BTD,
            student.get_output_embeddings().weight,
            self.teacher.get_output_embeddings().weight,
            labels[:, first + 1 :] != -100,
            beta=0.0,  # KL(teacher || student)
            num_items_in_batch=num_items_in_batch,
        )[0]


class LigerTrainer(LiveTeacherTrainer):
    """Liger's fused distillation loss on the supervised positions, to the same live teacher; the same divergence."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        labels_BT = inputs["labels"][:, 1:]
        mask_BT = labels_BT != -100
        tokens = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
        student = model.get_base_model()
        with torch.no_grad():
            teacher_hidden_ND = backbone_hidden_states(self.teacher, **tokens)[:, :-1][mask_BT]
        loss = LigerFusedLinearJSDLoss(
            weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=labels_BT.is_cuda
        )
        return loss(
            backbone_hidden_states(student, **tokens)[:, :-1][mask_BT],
            student.get_output_embeddings().weight,
            teacher_hidden_ND,
            self.teacher.get_output_embeddings().weight,
            labels_BT[mask_BT],
        )


ARMS = {
    "backbone": (BackboneTrainer, SFTConfig, {}),
    "renormalize": (FIRSTTrainer, FIRSTConfig, {"tail": "renormalize"}),
    "bucket": (FIRSTTrainer, FIRSTConfig, {}),
    "bucket_quarter": (FIRSTTrainer, FIRSTConfig, {"mass_fraction": 0.25}),
    "sft": (SFTTrainer, SFTConfig, {}),
    "sft_supervised": (SupervisedSFTTrainer, SFTConfig, {}),
    "full_logits": (FullLogitsTrainer, FIRSTConfig, {}),
    "live_teacher": (LiveTeacherTrainer, SFTConfig, {}),
    "liger": (LigerTrainer, SFTConfig, {}),
}


def serve(connection: Connection, job: Job) -> None:
    """Build the arm, warm up, say so; then take one measured step per message received, and send what it cost."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what the trainers print is not a result
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    if job.exact_memory and job.device == "cpu":
        # From now on every tensor is a mapping of its own, so that no hole in the heap counts as memory in use
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**16)
    torch.set_num_threads(job.threads)
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(job, folder)
        trainer.add_callback(InTurn(connection, job.device))
        trainer.train()


def build_trainer(job: Job, folder: str) -> SFTTrainer:
    trainer_class, config_class, settings = ARMS[job.arm]
    if config_class is SFTConfig:
        settings = {**settings, "dataset_kwargs": {"skip_prepare_dataset": True}, "max_length": None}
    on_cpu = job.device == "cpu"
    trainer = trainer_class(
        model=build_model(job, seed=0),
        args=config_class(
            output_dir=folder,
            max_steps=WARM_UP_STEPS + job.steps,
            per_device_train_batch_size=job.rows,
            bf16=not on_cpu,
            use_cpu=on_cpu,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **settings,
        ),
        train_dataset=build_rows(job),
        processing_class=build_tokenizer(job.model["vocab_size"]),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules=ATTENTION_AND_MLP, task_type="CAUSAL_LM"),
    )
    if issubclass(trainer_class, LiveTeacherTrainer):
        trainer.teacher = build_model(job, seed=1).to(trainer.args.device).eval().requires_grad_(False)
    return trainer


def build_model(job: Job, seed: int) -> LlamaForCausalLM:
    """A student with random weights and a tied head; float32 on a CPU, bfloat16 on a GPU."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**job.model, tie_word_embeddings=True, bos_token_id=None, pad_token_id=1))
    return model if job.device == "cpu" else model.to(torch.bfloat16)


def build_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    vocabulary = {f"<{name}>": i for i, name in enumerate(["eos", "pad", "unk", *range(3, vocab_size)])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>")


def build_rows(job: Job) -> Dataset:
    """Random rows with a cache's columns, one batch per step: what an arm does not read, its trainer drops."""
    generator = np.random.default_rng(0)
    vocab_size = job.model["vocab_size"]
    num_supervised = job.tokens - 1 if job.supervision == "all" else 1
    rows = []
    for _ in range((WARM_UP_STEPS + job.steps) * job.rows):
        ids = generator.integers(3, vocab_size, job.tokens)
        # Distinct without a permutation of the vocabulary: steps of at most V / K, from a random start
        gaps = generator.integers(1, vocab_size // TOP_K, (num_supervised, TOP_K))
        probs = -np.sort(-generator.dirichlet(np.ones(TOP_K + 1), num_supervised), axis=1)
        rows.append(
            {
                "input_ids": ids,
                "labels": np.concatenate([np.full(job.tokens - num_supervised, -100), ids[-num_supervised:]]),
                "teacher_ids": gaps.cumsum(axis=1) % vocab_size,
                "teacher_log_probs": np.log(probs[:, :TOP_K]).astype(np.float16),
                "teacher_tail_log_prob": np.log(probs[:, TOP_K]).astype(np.float16),
            }
        )
    return Dataset.from_dict({name: [row[name] for row in rows] for name in rows[0]})


class InTurn(TrainerCallback):
    """Holds every step after the warm-up until a message comes, and answers with what it cost.

    `wall` and `process` are seconds: by the clock, and of the cores' time; `bytes` is the peak.
    """

    def __init__(self, connection: Connection, device: str):
        self.connection = connection
        self.memory = GPUMemory() if device == "cuda" else ProcessMemory()

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step < WARM_UP_STEPS:
            return
        if state.global_step == WARM_UP_STEPS:
            self.connection.send("ready")
        self.connection.recv()
        self.memory.start()
        self.started = time.perf_counter(), time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step > WARM_UP_STEPS:
            self.memory.synchronize()
            wall, process = time.perf_counter() - self.started[0], time.process_time() - self.started[1]
            self.connection.send({"wall": wall, "process": process, "bytes": self.memory.peak()})


class ProcessMemory:
    """Highest resident memory of this process above what it held at the start of the step (Linux)."""

    def synchronize(self) -> None:
        pass

    def start(self) -> None:
        ctypes.CDLL(None).malloc_trim(0)  # what earlier steps freed must not pass for free memory of this one
        Path("/proc/self/clear_refs").write_text("5")  # restarts the high-water mark
        self.held = self._status("VmRSS")

    def peak(self) -> int:
        return self._status("VmHWM") - self.held

    @staticmethod
    def _status(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


class GPUMemory:
    """Highest memory of torch's allocator above what it held at the start of the step."""

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def start(self) -> None:
        torch.cuda.reset_peak_memory_stats()
        self.held = torch.cuda.memory_allocated()
        self.synchronize()

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated() - self.held
