"""Accelerators that a plan can name: their makers' peak figures and memory, and nothing measured here.

Peaks are the data sheets', dense (the larger figures with sparsity are no use to training), for matrices in bfloat16
and for plain float32. No run reaches them: a plan multiplies by a utilisation, and says which.
"""

from typing import NamedTuple


class Accelerator(NamedTuple):
    """One device: TFLOPS = 10^12 operations per second, memory in GB = 10^9 bytes."""

    title: str
    bfloat16_tflops: float | None  # None where the device has no bfloat16
    float32_tflops: float
    memory_gb: float


ACCELERATORS = {
    "h100": Accelerator("NVIDIA H100 SXM", 989, 67, 80),
    "h200": Accelerator("NVIDIA H200 SXM", 989, 67, 141),
    "a100": Accelerator("NVIDIA A100 80GB", 312, 19.5, 80),
    "l40s": Accelerator("NVIDIA L40S", 362, 91.6, 48),
    "l4": Accelerator("NVIDIA L4", 121, 30.3, 24),
    "a10": Accelerator("NVIDIA A10", 125, 31.2, 24),
    "rtx4090": Accelerator("NVIDIA GeForce RTX 4090", 165, 82.6, 24),
    "t4": Accelerator("NVIDIA T4", None, 8.1, 16),
    "mi300x": Accelerator("AMD Instinct MI300X", 1307, 163, 192),
}
UTILISATION = 0.3  # of the peak: what well-fed training of small batches reaches, not what a data sheet promises
