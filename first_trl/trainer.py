"""FIRSTTrainer: TRL's SFTTrainer with the teacher's cached rows in place of the labels.

It joins the parts and holds no mathematics: the cache gives each supervised position its teacher row, the collator
keeps rows and labels in the same order, the model's partition head gives the student's row, `recalibrate` mends the
teacher's, `partition_divergence` compares the two, and the sum is normalised exactly as SFTTrainer normalises its own.

Shapes: N supervised positions of a batch in row-major order, M a subset of them, K kept tokens.
"""

import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from huggingface_hub import ModelCard, ModelCardData
from transformers import PreTrainedModel
from transformers.utils import logging
from trl import SFTTrainer

from .cache.reader import TeacherCache, check_cache, check_vocabulary, open_cache
from .calibration import recalibrate
from .collator import COLUMNS, POSITIONS_PER_ROW, TEACHER_COLUMNS, TeacherCollator, prepare_rows
from .constants import IGNORED
from .data.encoding import check_first_row
from .first_config import FIRSTConfig
from .losses import conditional_divergence, mass_divergence, partition_divergence
from .modeling import (
    PartitionOutput,
    adapters_to_float32,
    add_partition_head,
    check_head,
    innermost,
    keep_to_text,
    load_model,
    load_tokenizer,
    settle_names,
    supervised_mask,
)
from .settings import TaskConfig
from .training import launched_sharded

logger = logging.get_logger(__name__)

LOW_MASS = 0.5  # below this, `renormalize` trains a distribution that the student's argmax never visits


def _as_cache(dataset, tokenizer) -> TeacherCache:
    """A cache, from its folder or its rows; refused if it is not one, or if its tokenizer is not the student's."""
    if isinstance(dataset, str | os.PathLike):
        dataset = open_cache(Path(dataset))
    if isinstance(dataset, Dataset):
        dataset = TeacherCache(Path("given as a Dataset"), {}, dataset)  # no manifest: columns and ids are checked
    elif isinstance(dataset, TeacherCache):
        check_cache(dataset, tokenizer=tokenizer)
        if "first_row" in dataset.manifest:  # a cache of another writer may not hold it
            check_first_row(dataset.manifest["first_row"], TaskConfig(**dataset.manifest["task"]), tokenizer)
    else:
        raise TypeError(
            f"FIRSTTrainer trains on a teacher cache (a folder, a TeacherCache, or its Dataset), not on a "
            f"{type(dataset).__name__}. Write one with `first-trl cache`."
        )
    names = dataset.dataset.column_names
    missing = [name for name in COLUMNS if name not in names]
    if missing:
        raise ValueError(
            f"The dataset lacks {', '.join(missing)}; it has {', '.join(names)}. FIRSTTrainer trains on a teacher "
            "cache, written by `first-trl cache`."
        )
    return dataset


class FIRSTTrainer(SFTTrainer):
    """Distil a cached teacher into a student: `SFTTrainer` whose dataset is a teacher cache.

    Args:
        model: model id, folder, `PreTrainedModel` or `PeftModel`, as for SFTTrainer.
        args: [`FIRSTConfig`].
        train_dataset: a cache folder, a `TeacherCache`, or a `datasets.Dataset` with the cache's columns.
        eval_dataset: the same, or a dict of them.
        processing_class: the student's tokenizer; refused if its token -> id mapping is not the teacher's.
        **kwargs: everything else that SFTTrainer takes (`peft_config`, `quantization_config`, `callbacks`, ...).

    Logged beside SFTTrainer's: `kl` (nats per position), `teacher_mass` and `student_mass` (probability on the K
    tokens), `teacher_agreement` (student's argmax is the teacher's first token), and `cross_entropy` with `ce_weight`.

    Raises:
        ValueError: the cache does not belong to this student's tokenizer, or a feature needs logits, which are never
            built here (`compute_metrics`, `return_outputs`).
    """

    _tag_names = ["trl", "first-trl"]
    _name = "FIRST"
    _paper = {
        "title": "FIRST: Teach A Reliable Large Language Model Through Efficient Trustworthy Distillation",
        "id": "2408.12168",
    }

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: FIRSTConfig | None = None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        **kwargs,
    ):
        if args is None:
            args = FIRSTConfig(output_dir="first-student")
        if not isinstance(args, FIRSTConfig):
            raise TypeError(f"args is a {type(args).__name__}; FIRSTTrainer needs a FIRSTConfig.")
        for name in ("data_collator", "formatting_func", "compute_loss_func", "compute_metrics"):
            if kwargs.pop(name, None) is not None:
                raise ValueError(
                    f"{name} has no place in FIRSTTrainer: the cache is already tokenised, and no logits are built."
                )
        if processing_class is None:
            processing_class = load_tokenizer(model if isinstance(model, str) else model.config._name_or_path)
        eval_packing = args.packing if args.eval_packing is None else args.eval_packing
        named = eval_dataset if isinstance(eval_dataset, dict) else {"eval": eval_dataset} if eval_dataset else {}
        train_cache = _as_cache(train_dataset, processing_class)
        if args.ce_weight > 0 and train_cache.manifest.get("labels") == "teacher":
            raise ValueError(
                f"ce_weight is {args.ce_weight}, and the rows of {train_cache.path} have no labels but the teacher's "
                "own answers: set it to 0, or make the cache from labelled rows."
            )
        eval_caches = {name: _as_cache(dataset, processing_class) for name, dataset in named.items()}
        eval_datasets = {name: prepare_rows(cache, args, eval_packing) for name, cache in eval_caches.items()}
        train_dataset = prepare_rows(train_cache, args, args.packing)
        if not args.packing:
            args.max_length = None  # the cache is truncated; SFTTrainer would refuse it with padding-free
        if isinstance(model, str):
            options, args.model_init_kwargs = args.model_init_kwargs or {}, None
            quantization = kwargs.pop("quantization_config", None)
            device = None if launched_sharded() else args.device
            model = load_model(model, device=device, quantization_config=quantization, **options)
        else:
            settle_names(model)
            check_head(model)
        keep_to_text(kwargs.get("peft_config"), model)
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_datasets if isinstance(eval_dataset, dict) else eval_datasets.get("eval"),
            processing_class=processing_class,
            **kwargs,
        )
        vocab_size = self.model.config.get_text_config().vocab_size
        for cache in (train_cache, *eval_caches.values()):
            check_vocabulary(cache, vocab_size, tokenizer=processing_class)
        self._refuse_unsupported_parallelism()
        self.data_collator: Any = TeacherCollator(self.data_collator)
        add_partition_head(innermost(self.model))
        if not (args.bf16 or args.fp16):
            adapters_to_float32(self.model)
        self._sums: dict[str, Any] = {"train": defaultdict(float), "eval": defaultdict(float)}
        self._low_mass_logs = 0

    def _refuse_unsupported_parallelism(self):
        parallelism = self.accelerator.parallelism_config
        if parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled):
            raise ValueError(
                "Context and sequence parallelism cut a document between devices, and the teacher's rows are not cut "
                "with it. Use data parallelism (DDP, FSDP2, ZeRO), or shorter documents."
            )
        if self.aux_loss_enabled:
            raise ValueError(
                f"router_aux_loss_coef is {self.router_aux_loss_coef}: the mixture-of-experts auxiliary loss is not "
                "added to a distillation loss here. Set router_aux_loss_coef: 0.0."
            )

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        self._signature_columns = list(dict.fromkeys([*self._signature_columns, *TEACHER_COLUMNS]))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Divergence summed over the supervised positions, divided as SFTTrainer divides its own loss (design 2.2)."""
        if return_outputs:
            raise ValueError("FIRSTTrainer never builds logits; return_outputs=True is not supported.")
        inputs = self._without_repeated_rows(inputs)
        ours = (*TEACHER_COLUMNS, POSITIONS_PER_ROW)
        tokens = {name: value for name, value in inputs.items() if name not in ours}
        teacher_ids_NK = inputs["teacher_ids"]
        method, value = self.args.recalibration_method, self.args.recalibration_value
        teacher_NK1 = recalibrate(inputs["teacher_log_probs"], method, value)
        positions_M = self._positions_with_tail(len(teacher_ids_NK), teacher_ids_NK.device)
        output = model(
            **tokens,
            partition_ids=teacher_ids_NK,
            partition_positions=positions_M,
            partition_logits=positions_M is not None,
            partition_labels=self.args.ce_weight > 0,
            partition_grad=not self._tail_is_only_logged(),
        )
        loss_sum = self._summed_loss(output, teacher_NK1, positions_M)
        if num_items_in_batch is None:
            loss = loss_sum / max(len(teacher_ids_NK), 1)
        else:
            loss = loss_sum / torch.as_tensor(num_items_in_batch, device=loss_sum.device).clamp(min=1)
            if self.args.average_tokens_across_devices:
                # num_items_in_batch counts the tokens of every rank, and DDP averages the gradients over ranks
                loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        self._count_tokens(inputs)
        return loss

    def _without_repeated_rows(self, inputs: dict) -> dict:
        """Take the labels from rows that were repeated to fill an evaluation's last batches on every process.

        accelerate repeats the first rows of the dataset so that all processes have batches of one size, and a mean
        over ranks would count those twice; the rows after the last genuine one are repetitions, rank after rank.
        """
        state = self.accelerator.gradient_state
        if self.model.training or not state.end_of_dataloader or state.remainder <= 0:
            return inputs
        per_row = inputs[POSITIONS_PER_ROW]
        genuine = max(state.remainder - self.accelerator.process_index * self.args.eval_batch_size, 0)
        kept = int(per_row[:genuine].sum())
        if kept == int(per_row.sum()):
            return inputs
        supervised_BT = supervised_mask(inputs["labels"])
        order_BT = supervised_BT.flatten().cumsum(0).view_as(supervised_BT)
        labels_BT = inputs["labels"].clone()
        labels_BT[:, 1:][order_BT > kept] = IGNORED
        rows = {name: inputs[name][:kept] for name in TEACHER_COLUMNS if name in inputs}
        return {**inputs, **rows, "labels": labels_BT}

    def _positions_with_tail(self, num_positions: int, device) -> torch.Tensor | None:
        """Positions (M,) at which the whole vocabulary is projected; None for all of them."""
        if self._tail_is_only_logged():
            # Nothing here needs the vocabulary but the logged mass: a few positions, when a log is due.
            sample = min(64, num_positions) if self._log_is_due() else 0
            return torch.randperm(num_positions, device=device)[:sample]
        if self.args.mass_fraction < 1 and self.model.training and num_positions:
            sample = max(1, round(self.args.mass_fraction * num_positions))
            return torch.randperm(num_positions, device=device)[:sample]
        return None

    def _tail_is_only_logged(self) -> bool:
        return self.args.tail == "renormalize" and self.args.ce_weight == 0

    def _log_is_due(self) -> bool:
        return (
            not self.model.training or (self.state.global_step + 1) % max(1, int(self.state.logging_steps or 1)) == 0
        )

    def _summed_loss(self, output: PartitionOutput, teacher_NK1: torch.Tensor, positions_M) -> torch.Tensor:
        student_MK1 = output.log_probs
        teacher_MK1 = teacher_NK1 if positions_M is None else teacher_NK1[positions_M]
        scale = len(teacher_NK1) / max(len(teacher_MK1), 1)
        if self.args.tail == "renormalize":
            logits_NK = student_MK1[:, :-1] if positions_M is None else output.logits
            student_NK1 = torch.nn.functional.pad(logits_NK.float(), (0, 1))
            divergence_sum = partition_divergence(
                student_NK1, teacher_NK1, self.args.divergence, tail="renormalize"
            ).sum()
        elif positions_M is None:
            divergence_sum = partition_divergence(student_MK1, teacher_MK1, self.args.divergence).sum()
        else:
            divergence_sum = (
                conditional_divergence(output.logits, teacher_NK1).sum()
                + scale * mass_divergence(student_MK1, teacher_MK1).sum()
            )
        self._accumulate(output, teacher_NK1, teacher_MK1, divergence_sum)
        if self.args.ce_weight == 0:
            return divergence_sum
        cross_entropy_sum = -scale * output.label_log_probs.sum()
        self._add("cross_entropy", cross_entropy_sum, len(teacher_NK1))
        return (1 - self.args.ce_weight) * divergence_sum + self.args.ce_weight * cross_entropy_sum

    @torch.no_grad()
    def _accumulate(self, output: PartitionOutput, teacher_NK1, teacher_MK1, divergence_sum) -> None:
        self._add("kl", divergence_sum, len(teacher_NK1))
        self._add("teacher_mass", teacher_NK1[:, :-1].exp().sum(), len(teacher_NK1))
        if output.log_probs is not None and len(teacher_MK1):
            student_MK1 = output.log_probs
            first_M = student_MK1[:, :-1].gather(1, teacher_MK1[:, :-1].argmax(dim=1, keepdim=True)).squeeze(1)
            agrees_M = first_M >= torch.maximum(student_MK1[:, :-1].amax(dim=1), output.tail_max)
            self._add("student_mass", student_MK1[:, :-1].exp().sum(), len(student_MK1))
            self._add("teacher_agreement", agrees_M.sum(), len(student_MK1))

    def _add(self, name: str, value_sum: torch.Tensor, count: int) -> None:
        """Keep (sum, count) on the device; they are read once per log, not once per micro-step."""
        sums = self._sums["train" if self.model.training else "eval"]
        sums[name] = sums[name] + torch.stack(
            [value_sum.detach().double(), torch.as_tensor(float(count), device=value_sum.device, dtype=torch.double)]
        )

    def _count_tokens(self, inputs) -> None:
        if not self.model.training:
            return
        tokens = inputs["attention_mask"].sum() if "attention_mask" in inputs else inputs["input_ids"].numel()
        self._sums["train"]["num_tokens"] = self._sums["train"]["num_tokens"] + torch.as_tensor(tokens).double()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means over all ranks since the last log; every rank calls this, so the reduction is safe."""
        mode = "train" if self.model.training else "eval"
        sums = self._sums[mode]
        num_tokens = sums.pop("num_tokens", None)
        if num_tokens is not None:
            self._total_train_tokens += int(self.accelerator.reduce(num_tokens.to(self.args.device), "sum").item())
        # Every name on every rank: one without a genuine row would otherwise leave the others waiting for its sums.
        empty = torch.zeros(2, dtype=torch.double)
        sums_N2 = torch.stack([torch.as_tensor(sums.get(name, empty)).to(self.args.device) for name in self._logged()])
        means = {
            name: total / count
            for name, (total, count) in zip(
                self._logged(), self.accelerator.reduce(sums_N2, "sum").tolist(), strict=True
            )
            if count
        }
        self._metrics[mode].update({name: [mean] for name, mean in means.items()})
        if self._total_train_tokens:
            self._metrics[mode]["num_tokens"] = [self._total_train_tokens]
        if mode == "train" and "student_mass" in means:
            self._warn_on_low_mass(means["student_mass"])
        sums.clear()
        super().log(logs, start_time)

    def _logged(self) -> list[str]:
        names = ["kl", "teacher_mass", "student_mass", "teacher_agreement"]
        return [*names, "cross_entropy"] if self.args.ce_weight > 0 else names

    def _warn_on_low_mass(self, student_mass: float) -> None:
        self._low_mass_logs = self._low_mass_logs + 1 if student_mass < LOW_MASS else 0
        if self.args.tail == "renormalize" and self._low_mass_logs == 2:
            logger.warning(
                f"The student puts only {student_mass:.2f} of its probability on the teacher's tokens, and "
                "tail='renormalize' gives it no reason to put more: its most probable token is likely to be another. "
                "Use tail='bucket'."
            )

    def create_model_card(self, model_name=None, dataset_name=None, tags=None):
        """A short card in the checkpoint folder; `first-trl push` writes the full one, with its measurements."""
        if not self.is_world_process_zero():
            return
        base_model = self.model.config._name_or_path
        data = ModelCardData(
            library_name="peft" if hasattr(self.model, "peft_config") else "transformers",
            base_model=base_model if base_model and not os.path.isdir(base_model) else None,
            tags=sorted({*self._tag_names, *([tags] if isinstance(tags, str) else tags or [])}),
        )
        text = (
            f"---\n{data.to_yaml()}\n---\n\n# {model_name or 'student'}\n\nA student distilled with "
            f"[FIRST](https://arxiv.org/abs/{self._paper['id']}) by first-trl. A checkpoint, not yet evaluated.\n"
        )
        ModelCard(text, ignore_metadata_errors=True).save(os.path.join(self.args.output_dir, "README.md"))
