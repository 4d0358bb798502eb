"""Divergences between a student and a teacher that both see K kept tokens and one tail.

A row of K+1 log-probabilities, last column the tail, is a categorical distribution, so every divergence here is a true
divergence between two distributions: non-negative, and zero only where they agree. This is the knowledge matching of
FIRST (arXiv 2408.12168, section 3.3), with the teacher's tail kept where the authors' code renormalises it away
(`tail="renormalize"`). The rows come from `head.py`; how positions are weighted is the trainer's decision.

Shapes: N supervised positions, K kept tokens, K1 = K+1. S is a position's set of kept tokens; t and p are the
teacher's and the student's probabilities, a and Q the mass they put on S, tau = 1 - a and rho = 1 - Q their tails.
Units: nats.
"""

import math

import torch

from .constants import DIVERGENCES, TAILS
from .errors import FirstTrlError


def partition_divergence(
    student_log_probs: torch.Tensor,
    teacher_log_probs: torch.Tensor,
    divergence: str = "forward_kl",
    tail: str = "bucket",
) -> torch.Tensor:
    """Divergence of each position, (N, K+1) and (N, K+1) -> (N,), in float32 (float64 where the student is float64).

    `tail="bucket"` compares all K+1 columns. `tail="renormalize"` ignores the last column of both and compares what
    is left after normalising over S: then the student's columns may be raw logits, for a constant cancels.

    `forward_kl` is KL(teacher || student), the paper's; `reverse_kl` is KL(student || teacher); `jsd` is the mean of
    both divergences to the mixture (t + p) / 2, at most log 2.

    The teacher is a constant: no gradient reaches it. A column where the first distribution of a KL is exactly zero
    (log-probability -inf) contributes nothing, so a teacher without tail drops the tau term. A column where only the
    second is zero makes that KL infinite, as it is: `reverse_kl` against a teacher without tail cannot be trained.

    Raises ValueError on an unknown `divergence` or `tail`, and on shapes that differ or lack the tail column.
    """
    student, teacher = _checked_rows(student_log_probs, teacher_log_probs)
    if tail not in TAILS:
        raise FirstTrlError(f"tail={tail!r} is not one of {', '.join(TAILS)}")
    if tail == "renormalize":
        student = student[:, :-1].log_softmax(dim=-1)
        teacher = teacher[:, :-1].log_softmax(dim=-1)
    match divergence:
        case "forward_kl":
            return _kl(teacher, student)
        case "reverse_kl":
            return _kl(student, teacher)
        case "jsd":
            mixture = _log_mean_prob(student, teacher)
            return 0.5 * (_kl(teacher, mixture) + _kl(student, mixture))
    raise FirstTrlError(f"divergence={divergence!r} is not one of {', '.join(DIVERGENCES)}")


def conditional_divergence(student_logits: torch.Tensor, teacher_log_probs: torch.Tensor) -> torch.Tensor:
    """How the kept tokens share their mass: a * KL(t/a || p/Q), the part of the bucket KL that needs no tail.

    By the chain rule of the KL divergence,

        KL(t, tau || p, rho)  =  a * KL(t/a || p/Q)      conditional_divergence: K dot products per position
                               + KL(a, tau || Q, rho)    mass_divergence: needs the whole vocabulary

    so evaluating the second part on a random fraction of the positions, and dividing it by that fraction, leaves the
    expected loss and the expected gradient unchanged.

    `student_logits` is (N, K), on S, up to a constant per position; `teacher_log_probs` is (N, K+1). Returns (N,).
    """
    student_NK1 = torch.nn.functional.pad(student_logits, (0, 1))  # a tail that is not read
    student, teacher = (rows[:, :-1] for rows in _checked_rows(student_NK1, teacher_log_probs))
    return teacher.logsumexp(dim=-1).exp() * _kl(teacher.log_softmax(dim=-1), student.log_softmax(dim=-1))


def mass_divergence(student_log_probs: torch.Tensor, teacher_log_probs: torch.Tensor) -> torch.Tensor:
    """How much mass the kept tokens have: a log(a/Q) + tau log(tau/rho), (N, K+1) and (N, K+1) -> (N,).

    The rest of the bucket KL once `conditional_divergence` is taken away; see there.
    """
    student, teacher = _checked_rows(student_log_probs, teacher_log_probs)
    return _kl(_kept_and_tail(teacher), _kept_and_tail(student))


def _kept_and_tail(log_probs_NK1: torch.Tensor) -> torch.Tensor:
    """(log of the mass on S, log of the tail), (N, 2)."""
    return torch.stack([log_probs_NK1[:, :-1].logsumexp(dim=-1), log_probs_NK1[:, -1]], dim=-1)


def _kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """sum p log(p/q) over the last dimension, with 0 log 0 = 0 in the value and in the gradient."""
    # Filling both sides before the arithmetic keeps -inf - -inf, and the nan of its gradient, from ever arising
    absent = log_p == -math.inf
    log_p, log_q = log_p.masked_fill(absent, 0.0), log_q.masked_fill(absent, 0.0)
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)


def _log_mean_prob(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """log((p + q) / 2). Where both are zero the result is arbitrary but finite: no KL to the mixture reads it."""
    absent = (log_p == -math.inf) & (log_q == -math.inf)
    return torch.logaddexp(log_p.masked_fill(absent, 0.0), log_q.masked_fill(absent, 0.0)) - math.log(2)


def _checked_rows(student: torch.Tensor, teacher: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both rows in float32, or in float64 where the student is; the teacher without gradient."""
    if student.ndim != 2 or student.shape != teacher.shape or student.shape[1] < 2:
        raise FirstTrlError(
            f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must both be (N, K+1): K kept tokens, "
            "then the tail"
        )
    dtype = torch.promote_types(student.dtype, torch.float32)
    return student.to(dtype), teacher.detach().to(dtype)
