"""FIRSTTrainer: TRL's SFTTrainer with the teacher's cached rows in place of the labels.

It joins the parts and holds no mathematics. A step is `compute_loss`: the collator gives each supervised position its
teacher row, `recalibrate` is applied to it, the model's partition head gives the student's row for the same tokens,
`partition_divergence` compares the two, and the sum is divided as SFTTrainer divides its own loss.

Shapes: N supervised positions of a batch in row-major order, M a subset of them, K kept tokens.
"""

import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from huggingface_hub import ModelCardData
from transformers import PreTrainedModel
from transformers.utils import logging
from trl import SFTTrainer

from .cache.reader import TeacherCache, check_cache, check_vocabulary, open_cache
from .calibration import recalibrate
from .collator import COLUMNS, TEACHER_COLUMNS, TeacherCollator, prepare_rows
from .data.encoding import check_first_row
from .errors import FirstTrlError
from .files import write_atomically
from .first_config import FIRSTConfig
from .losses import conditional_divergence, mass_divergence, partition_divergence
from .modeling import add_partition_head, check_head, innermost, keep_to_text, load_model, load_tokenizer, settle_names
from .settings import TaskConfig
from .training import RefuseNonFiniteLoss, adapters_to_float32, launched_sharded

logger = logging.get_logger(__name__)

ADDED_COLUMNS = {*TEACHER_COLUMNS, "places", "positions_per_row"}  # of a batch, beside TRL's own
METRICS = ["num_tokens", "kl", "teacher_mass", "student_mass", "teacher_agreement", "cross_entropy"]
LOW_MASS = 0.5  # below this, `renormalize` trains a distribution that the student's argmax never visits


def _as_cache(dataset, tokenizer) -> TeacherCache:
    """A cache, from its folder or its rows; refused if it is not one, or if its tokenizer is not the student's."""
    if isinstance(dataset, str | os.PathLike):
        dataset = open_cache(Path(dataset))
    if isinstance(dataset, Dataset):
        dataset = TeacherCache(Path("given as a Dataset"), {}, dataset)  # no manifest: columns and ids are checked
    elif isinstance(dataset, TeacherCache):
        check_cache(dataset, tokenizer=tokenizer)
        if "task" in dataset.manifest:  # written by the cache stage, and not by hand with a CacheWriter
            check_first_row(dataset.manifest.get("first_row"), TaskConfig(**dataset.manifest["task"]), tokenizer)
    else:
        kind = type(dataset).__name__
        raise TypeError(f"FIRSTTrainer trains on a teacher cache, not on a {kind}. Write one with `first-trl cache`.")
    if missing := [name for name in COLUMNS if name not in dataset.dataset.column_names]:
        raise FirstTrlError(f"The dataset lacks {', '.join(missing)}. Pass a cache, written by `first-trl cache`.")
    return dataset


def _checked_model(model, args: FIRSTConfig, kwargs: dict):
    """The student, loaded by our own loader where it is a name; takes from `kwargs` what that needs."""
    if isinstance(model, str):
        options, args.model_init_kwargs = args.model_init_kwargs or {}, None
        options["quantization_config"] = kwargs.pop("quantization_config", None)
        model = load_model(model, device=None if launched_sharded() else args.device, **options)
    else:
        settle_names(model)
        check_head(model)
    keep_to_text(kwargs.get("peft_config"), model)
    return model


class FIRSTTrainer(SFTTrainer):
    """Distil a cached teacher into a student: `SFTTrainer` whose dataset is a teacher cache.

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The student: a Hub id, a folder, or a model that is loaded already.
        args ([`FIRSTConfig`], *optional*):
            Settings. If `None`, the defaults, written to `first-student`.
        train_dataset (`str`, `Path`, [`TeacherCache`] or [`~datasets.Dataset`]):
            A cache: its folder, what `open_cache` gives, or a dataset with its columns.
        eval_dataset (the same, or a `dict` of them, *optional*):
            Caches to evaluate on.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The student's tokenizer, by default the one beside `model`; refused where it makes other tokens than the
            teacher's.
        **kwargs:
            Everything else that SFTTrainer takes (`peft_config`, `quantization_config`, `callbacks`, ...).

    Logged beside SFTTrainer's: `kl` (nats per position), `teacher_mass` and `student_mass` (probability on the K
    tokens), `teacher_agreement` (student's argmax is the teacher's first token), and `cross_entropy` with `ce_weight`.

    Raises:
        ValueError: the cache does not belong to this student's tokenizer, or a feature needs logits, which are never
            built here (`compute_metrics`, `return_outputs`).
    """

    _tag_names = ["trl", "first-trl"]
    _name = "FIRST"

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: FIRSTConfig | None = None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        **kwargs,
    ):
        args = FIRSTConfig(output_dir="first-student") if args is None else args
        if not isinstance(args, FIRSTConfig):
            raise TypeError(f"args is a {type(args).__name__}; FIRSTTrainer needs a FIRSTConfig.")
        for name in ("data_collator", "formatting_func", "compute_loss_func", "compute_metrics"):
            if kwargs.pop(name, None) is not None:
                raise FirstTrlError(f"{name} has no place here: the cache is tokenised, and no logits are built.")
        if processing_class is None:
            processing_class = load_tokenizer(model if isinstance(model, str) else model.config._name_or_path)

        several = isinstance(eval_dataset, dict)
        named = eval_dataset if several else {} if eval_dataset is None else {"eval": eval_dataset}
        train_cache = _as_cache(train_dataset, processing_class)
        eval_caches = {name: _as_cache(dataset, processing_class) for name, dataset in named.items()}
        if args.ce_weight > 0 and train_cache.manifest.get("labels") == "teacher":
            raise FirstTrlError(
                f"ce_weight is {args.ce_weight}, and the rows of {train_cache.path} have no labels but the teacher's "
                "own answers: set it to 0, or make the cache from labelled rows."
            )
        eval_packing = args.packing if args.eval_packing is None else args.eval_packing
        eval_rows = {name: prepare_rows(cache, args, eval_packing) for name, cache in eval_caches.items()}
        train_rows = prepare_rows(train_cache, args, args.packing)
        if not args.packing:
            args.max_length = None  # the cache is truncated; SFTTrainer would refuse it with padding-free

        model = _checked_model(model, args, kwargs)
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_rows,
            eval_dataset=eval_rows if several else eval_rows.get("eval"),
            processing_class=processing_class,
            **kwargs,
        )
        vocab_size = self.model.config.get_text_config().vocab_size
        for cache in (train_cache, *eval_caches.values()):
            check_vocabulary(cache, vocab_size, tokenizer=processing_class)
        self._refuse_unsupported()
        self.data_collator: Any = TeacherCollator(self.data_collator)
        self.add_callback(RefuseNonFiniteLoss)
        add_partition_head(innermost(self.model))
        adapters_to_float32(self)
        # {mode: {metric: [sum since the last log, positions]}}
        self._sums: dict[str, Any] = {mode: defaultdict(lambda: [0.0, 0]) for mode in ("train", "eval")}
        self._low_mass_logs = 0

    def _refuse_unsupported(self):
        parallelism = self.accelerator.parallelism_config
        if parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled):
            raise FirstTrlError(
                "Context and sequence parallelism cut a document between devices, and the teacher's rows are not cut "
                "with it. Use data parallelism (DDP, FSDP2, ZeRO), or shorter documents."
            )
        if self.aux_loss_enabled:
            raise FirstTrlError(
                f"router_aux_loss_coef is {self.router_aux_loss_coef}: the auxiliary loss of a mixture of experts is "
                "no part of a distillation loss here. Set router_aux_loss_coef: 0.0."
            )

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        self._signature_columns = list(dict.fromkeys([*self._signature_columns, *TEACHER_COLUMNS]))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Divergence summed over the supervised positions, divided as SFTTrainer divides its own loss."""
        if return_outputs:
            raise FirstTrlError("FIRSTTrainer never builds logits; return_outputs=True is not supported.")
        args, inputs = self.args, self._without_repeated_rows(inputs)
        teacher_NK1 = recalibrate(inputs["teacher_log_probs"], args.recalibration_method, args.recalibration_value)
        count, sample_M = len(teacher_NK1), self._sampled_positions(inputs)
        renormalized = args.tail == "renormalize"
        student = model(
            **{name: value for name, value in inputs.items() if name not in ADDED_COLUMNS},
            partition_ids=inputs["teacher_ids"],
            places=inputs["places"],
            sample=sample_M,
            want_logits=renormalized or sample_M is not None,
            want_labels=args.ce_weight > 0,
            want_grad=not renormalized or args.ce_weight > 0,
        )
        if renormalized:
            student_NK1 = torch.nn.functional.pad(student["logits"], (0, 1))  # the last column, the tail, is ignored
            divergence_sum = partition_divergence(student_NK1, teacher_NK1, args.divergence, "renormalize").sum()
        elif sample_M is None:
            divergence_sum = partition_divergence(student["log_probs"], teacher_NK1, args.divergence).sum()
        else:  # the same in expectation: the mass term of a few positions stands for that of all
            mass_sum = count / len(sample_M) * mass_divergence(student["log_probs"], teacher_NK1[sample_M]).sum()
            divergence_sum = conditional_divergence(student["logits"], teacher_NK1).sum() + mass_sum
        loss = divergence_sum
        if args.ce_weight > 0:
            label_N = student["label_log_probs"]
            cross_entropy_sum = -count / max(len(label_N), 1) * label_N.sum()
            self._add("cross_entropy", cross_entropy_sum, count)
            loss = (1 - args.ce_weight) * divergence_sum + args.ce_weight * cross_entropy_sum
        self._add("kl", divergence_sum, count)
        self._add_metrics(inputs, student, teacher_NK1, sample_M)
        if num_items_in_batch is None:
            return loss / max(count, 1)
        if isinstance(num_items_in_batch, torch.Tensor):
            num_items_in_batch = num_items_in_batch.to(loss.device).clamp(min=1)
        # num_items_in_batch counts the tokens of every rank, and DDP averages the gradients over ranks
        ranks = self.accelerator.num_processes // self.get_tp_size() if args.average_tokens_across_devices else 1
        return loss * ranks / num_items_in_batch

    def _sampled_positions(self, inputs: dict) -> torch.Tensor | None:
        """Positions (M,) at which the whole vocabulary is projected; None for all of them."""
        args, training, count = self.args, self.model.training, len(inputs["places"])
        if args.tail == "renormalize" and args.ce_weight == 0:  # only the logged mass needs the vocabulary
            log_is_due = (self.state.global_step + 1) % max(1, int(self.state.logging_steps or 1)) == 0
            size = min(64, count) if log_is_due or not training else 0
        elif args.mass_fraction < 1 and training and count:
            size = max(1, round(args.mass_fraction * count))
        else:
            return None
        return torch.randperm(count, device=inputs["places"].device)[:size]

    def _without_repeated_rows(self, inputs: dict) -> dict:
        """Leave out rows that were repeated to fill an evaluation's last batches on every process.

        accelerate repeats the first rows of the dataset so that all processes have batches of one size, and a mean
        over ranks would count those twice; the rows after the last genuine one are repetitions, rank after rank.
        """
        state = self.accelerator.gradient_state
        if self.model.training or not state.end_of_dataloader or state.remainder <= 0:
            return inputs
        genuine = max(state.remainder - self.accelerator.process_index * self.args.eval_batch_size, 0)
        kept = int(inputs["positions_per_row"][:genuine].sum())
        return inputs | {name: inputs[name][:kept] for name in ("teacher_ids", "teacher_log_probs", "places")}

    @torch.no_grad()
    def _add_metrics(self, inputs: dict, student: dict, teacher_NK1: torch.Tensor, sample_M) -> None:
        if self.model.training:
            tokens = inputs["attention_mask"].sum() if "attention_mask" in inputs else inputs["input_ids"].numel()
            self._add("num_tokens", tokens, 0)
        self._add("teacher_mass", teacher_NK1[:, :-1].exp().sum(), len(teacher_NK1))
        if "log_probs" in student:
            student_MK = student["log_probs"][:, :-1]
            teacher_MK = (teacher_NK1 if sample_M is None else teacher_NK1[sample_M])[:, :-1]
            first_M = student_MK.gather(1, teacher_MK.argmax(dim=1, keepdim=True)).squeeze(1)
            agrees_M = first_M >= torch.maximum(student_MK.amax(dim=1), student["tail_max"])
            self._add("student_mass", student_MK.exp().sum(), len(student_MK))
            self._add("teacher_agreement", agrees_M.sum(), len(student_MK))

    def _add(self, name: str, value: torch.Tensor | int, count: int) -> None:
        """Keep [sum, count]: the sum stays on its device until the next log, so that no micro-step waits for it."""
        entry = self._sums["train" if self.model.training else "eval"][name]
        entry[0] += value.detach().double() if isinstance(value, torch.Tensor) else value
        entry[1] += count

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means over all ranks since the last log; every rank calls this, so the reduction is safe."""
        mode = "train" if self.model.training else "eval"
        # Every name on every rank: one without a genuine row would otherwise leave the others waiting for its sums.
        pairs = [value for name in METRICS for value in self._sums[mode][name]]
        sums = torch.stack([torch.as_tensor(value, dtype=torch.double, device=self.args.device) for value in pairs])
        totals = dict(zip(METRICS, self.accelerator.reduce(sums, "sum").view(-1, 2).tolist(), strict=True))
        self._sums[mode].clear()
        self._total_train_tokens += int(totals["num_tokens"][0])
        means = {name: total / count for name, (total, count) in totals.items() if count}
        self._metrics[mode].update({name: [mean] for name, mean in means.items()})
        if self._total_train_tokens:
            self._metrics[mode]["num_tokens"] = [self._total_train_tokens]
        if mode == "train" and "student_mass" in means and self.args.tail == "renormalize":
            self._low_mass_logs = self._low_mass_logs + 1 if means["student_mass"] < LOW_MASS else 0
            if self._low_mass_logs == 2:
                logger.warning(
                    f"The student puts only {means['student_mass']:.2f} of its probability on the teacher's tokens, "
                    "and tail='renormalize' gives it no reason to put more. Use tail='bucket'."
                )
        super().log(logs, start_time)

    def create_model_card(self, model_name=None, dataset_name=None, tags=None):
        """A short card in the checkpoint folder; `first-trl push` writes the full one, with its measurements."""
        if self.is_world_process_zero():
            base_model = self.model.config._name_or_path
            data = ModelCardData(
                library_name="peft" if hasattr(self.model, "peft_config") else "transformers",
                base_model=base_model if base_model and not os.path.isdir(base_model) else None,
                tags=sorted({*self._tag_names, *([tags] if isinstance(tags, str) else tags or [])}),
            )
            text = f"---\n{data.to_yaml()}\n---\n\n# {model_name or 'student'}\n\nA student distilled with "
            text += "[FIRST](https://arxiv.org/abs/2408.12168) by first-trl. A checkpoint, not yet evaluated.\n"
            write_atomically(Path(self.args.output_dir, "README.md"), text)
