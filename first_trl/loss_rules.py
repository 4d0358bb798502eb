"""The rules of the loss's settings: asked by FIRSTConfig and, before TRL is imported, by recipes."""

from collections.abc import Iterator, Mapping
from typing import Any

from .constants import DIVERGENCES, RECALIBRATION_METHODS, TAILS

LOSS_CHOICES = {"divergence": DIVERGENCES, "tail": TAILS, "recalibration_method": RECALIBRATION_METHODS}
LOSS_LIMITS: dict[str, dict[str, Any]] = {"ce_weight": {"ge": 0, "le": 1}, "mass_fraction": {"gt": 0, "le": 1}}


def loss_conflicts(settings: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(key, "what is wrong; what to do") between settings of [`FIRSTConfig`]; those not given have their defaults."""
    divergence, tail = settings.get("divergence", "forward_kl"), settings.get("tail", "bucket")
    method, value = settings.get("recalibration_method"), settings.get("recalibration_value")
    if settings.get("mass_fraction", 1) < 1 and (tail, divergence) != ("bucket", "forward_kl"):
        yield "mass_fraction", "it needs tail: bucket and divergence: forward_kl; write these two, or remove it"
    if (divergence, tail) == ("reverse_kl", "bucket") and method in ("probability", "auto"):
        chosen = "`probability`, which `auto` may choose," if method == "auto" else "`probability`"
        why = f"{chosen} leaves the teacher no tail, and every loss would be infinite"
        yield "divergence", f"{why}; write forward_kl or jsd, or recalibrate by temperature"
    if value is not None and method == "none":
        yield "recalibration_value", "recalibration_method is none; remove one (a value alone means temperature)"
    if settings.get("loss_type", "nll") != "nll":
        yield "loss_type", "it has no effect here; remove it: `divergence` and `tail` choose the loss"
    packing = settings.get("packing") or settings.get("eval_packing")
    if packing and settings.get("packing_strategy") == "wrapped":
        why = "a document's first token would be a target of the document before, which has no teacher row"
        yield "packing_strategy", f"{why}; write packing_strategy: bfd"
    if settings.get("eval_packing") and not (settings.get("packing") or settings.get("padding_free")):
        why = "the documents of a padded packed row would see each other"
        yield "eval_packing", f"{why}; write packing: true or padding_free: true, or remove it"
