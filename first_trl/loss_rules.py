"""Which settings of the loss exclude each other: asked by FIRSTConfig and, before TRL is imported, by recipes."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple


class Conflict(NamedTuple):
    """A setting that cannot have its value beside the others: what is wrong, and what to write instead."""

    key: str
    what: str
    remedy: str


def loss_conflicts(settings: Mapping[str, Any]) -> Iterator[Conflict]:
    """The conflicts between settings of [`FIRSTConfig`]; those that are not given have their defaults."""
    divergence, tail = settings.get("divergence", "forward_kl"), settings.get("tail", "bucket")
    method, value = settings.get("recalibration_method"), settings.get("recalibration_value")
    if settings.get("mass_fraction", 1) < 1 and (tail, divergence) != ("bucket", "forward_kl"):
        what = "only tail: bucket with divergence: forward_kl has a mass term to sample"
        yield Conflict("mass_fraction", what, "write these two, or remove it")
    if (divergence, tail) == ("reverse_kl", "bucket") and method in ("probability", "auto"):
        chosen = ", which `auto` may choose," if method == "auto" else ""
        what = (
            f"the recalibration `probability`{chosen} leaves the teacher's tail nothing: every loss would be infinite"
        )
        yield Conflict("divergence", what, "write forward_kl or jsd, or recalibrate by temperature")
    if value is not None and method == "none":
        what = "it has no effect with recalibration_method: none"
        yield Conflict("recalibration_value", what, "remove one of them; a value alone means temperature")
    if settings.get("loss_type", "nll") != "nll":
        yield Conflict("loss_type", "it has no effect here", "remove it: `divergence` and `tail` choose the loss")
    packing = settings.get("packing") or settings.get("eval_packing")
    if packing and settings.get("packing_strategy") == "wrapped":
        what = "a document's first token would be a target of the document before, which has no teacher row"
        yield Conflict("packing_strategy", what, "write packing_strategy: bfd")
    if settings.get("eval_packing") and not (settings.get("packing") or settings.get("padding_free")):
        what = "TRL's collator would pad, and the documents of a packed row would see each other"
        yield Conflict("eval_packing", what, "write packing: true or padding_free: true, or remove it")
