"""FIRSTConfig: the settings of a distillation run, on top of TRL's SFTConfig, whose own keep their meaning."""

import json
import operator
from dataclasses import dataclass, field
from pathlib import Path

from trl import SFTConfig

from .errors import FirstTrlError
from .loss_rules import LOSS_CHOICES, LOSS_LIMITS, loss_conflicts

_WITHOUT_EFFECT = {
    "label_smoothing_factor": "use recalibration_method='label_smoothing', which smooths the teacher",
    "use_liger_kernel": "remove it: no logits are built that it would save",
    "trust_remote_code": "remove it: code of a model is never run",
    "assistant_only_loss": "remove it: the cache decides what is supervised",
}


@dataclass
class FIRSTConfig(SFTConfig):
    """Settings of [`FIRSTTrainer`]: those of `trl.SFTConfig` and these.

    Args:
        divergence (`str`, *optional*, defaults to `"forward_kl"`):
            `forward_kl` (the paper's), `reverse_kl` or `jsd` between the teacher's and the student's rows.
        tail (`str`, *optional*, defaults to `"bucket"`):
            `bucket` keeps the mass outside the K tokens as one more outcome, a true KL divergence; `renormalize`
            reproduces the authors' code, which ignores it.
        ce_weight (`float`, *optional*, defaults to `0.0`):
            Weight w in [0, 1] of cross-entropy on the label: loss = (1 - w) * divergence + w * cross-entropy.
        mass_fraction (`float`, *optional*, defaults to `1.0`):
            Fraction of the positions at which the mass term of the bucket loss is evaluated, rescaled so that the loss
            stays unbiased. 1.0 is exact.
        recalibration_method (`str`, *optional*):
            How the teacher's rows are recalibrated before the loss sees them. By default `temperature` where a value
            is given, otherwise `none`, which is plain distillation.
        recalibration_value (`float`, *optional*):
            The value found by `first_trl.calibration.search`; required by every method but `none`.
        calibration (`str`, *optional*):
            The `calibration.json` that `first-trl calibrate` wrote, for both of these.
        max_length (`int`, *optional*):
            Tokens in a packed row; only used with `packing`. The cache is already truncated.

    Raises:
        ValueError: a value out of range, or a setting of SFTConfig that this trainer cannot honour.
    """

    divergence: str = field(
        default="forward_kl",
        metadata={"help": "Divergence between teacher and student rows: forward_kl, reverse_kl or jsd."},
    )
    tail: str = field(
        default="bucket",
        metadata={"help": "What happens to the mass outside the K tokens: bucket (exact) or renormalize (ignored)."},
    )
    ce_weight: float = field(
        default=0.0, metadata={"help": "Weight in [0, 1] of cross-entropy on the label, mixed into the loss."}
    )
    mass_fraction: float = field(
        default=1.0,
        metadata={"help": "Fraction in (0, 1] of positions that pay for the vocabulary-sized part of the loss."},
    )
    recalibration_method: str | None = field(
        default=None,
        metadata={"help": "Recalibration of the teacher's rows; none: plain distillation. With a value: temperature."},
    )
    recalibration_value: float | None = field(
        default=None, metadata={"help": "Value of the recalibration, as found on the validation cache."}
    )
    calibration: str | None = field(
        default=None, metadata={"help": "The calibration.json of a run, for the method and the value found there."}
    )
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Log the finite losses alone."})
    max_length: int | None = field(
        default=None,
        metadata={"help": "Tokens in a packed row, with packing only; defaults to the cache's own max_length."},
    )

    def __post_init__(self):
        # The cache is complete before TRL sees it: tokenised, truncated, labelled.
        self.dataset_kwargs = {**(self.dataset_kwargs or {}), "skip_prepare_dataset": True}
        super().__post_init__()
        if self.calibration is not None:
            self._read_calibration()
        if self.recalibration_method is None:
            self.recalibration_method = "none" if self.recalibration_value is None else "temperature"
        wrong = list(loss_conflicts(vars(self)))
        for key, choices in LOSS_CHOICES.items():
            wrong += [(key, f"choose one of {', '.join(choices)}")] * (getattr(self, key) not in choices)
        for key, limits in LOSS_LIMITS.items():
            fits = all(getattr(operator, how)(getattr(self, key), limit) for how, limit in limits.items())
            wrong += [(key, "it must lie between 0 and 1")] * (not fits)
        for key, remedy in _WITHOUT_EFFECT.items():
            wrong += [(key, f"it has no effect here; {remedy}")] * bool(getattr(self, key))
        if wrong:
            key, why = wrong[0]
            raise FirstTrlError(f"{key}={getattr(self, key)!r}: {why}.")
        if self.recalibration_method != "none" and self.recalibration_value is None:
            raise FirstTrlError(
                f"recalibration_method is {self.recalibration_method!r} but recalibration_value is missing; take the "
                "value from calibration.json, or from first_trl.calibration.search on a validation cache."
            )

    def _read_calibration(self):
        try:
            content = json.loads(Path(self.calibration).read_text(encoding="utf-8"))
            method = self.recalibration_method or content["method"]
            value = float(content["families"][method]["value"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise FirstTrlError(
                f"calibration={str(self.calibration)!r} has no value for recalibration_method="
                f"{self.recalibration_method!r} ({error!r}); give the file that `first-trl calibrate` wrote."
            ) from error
        if self.recalibration_value not in (None, value):
            raise FirstTrlError(
                f"recalibration_value is {self.recalibration_value}, and {self.calibration} says {value}; give one."
            )
        self.recalibration_method, self.recalibration_value = method, value
