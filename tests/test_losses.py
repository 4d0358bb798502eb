"""Divergences over K kept tokens and a tail, against their definitions written out in float64."""

import math

import pytest
import torch

from first_trl.constants import DIVERGENCES
from first_trl.losses import conditional_divergence, mass_divergence, partition_divergence

close = torch.testing.assert_close


def rows(n, k1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(n, k1, generator=generator, dtype=torch.float64)).log_softmax(dim=-1)


def kl(p, q):
    return sum(pi * math.log(pi / qi) for pi, qi in zip(p, q, strict=True) if pi > 0)


def defined(student, teacher, divergence):
    """The definition, one position and one token at a time."""
    values = []
    for s, t in zip(student.exp().tolist(), teacher.exp().tolist(), strict=True):
        if divergence == "jsd":
            mixture = [(si + ti) / 2 for si, ti in zip(s, t, strict=True)]
            values.append((kl(t, mixture) + kl(s, mixture)) / 2)
        else:
            values.append(kl(t, s) if divergence == "forward_kl" else kl(s, t))
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("k1", [2, 3, 6])
def test_each_divergence_is_its_definition_and_zero_only_at_the_teacher(divergence, k1):
    student, teacher = rows(7, k1, seed=1), rows(7, k1, seed=2)
    values = partition_divergence(student, teacher, divergence)
    close(values, defined(student, teacher, divergence), rtol=1e-10, atol=1e-12)
    assert (values > 1e-3).all() and (divergence != "jsd" or (values <= math.log(2)).all())
    close(partition_divergence(teacher, teacher, divergence), torch.zeros(7).double())


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_renormalize_compares_what_is_left_without_the_tail(divergence):
    student, teacher = rows(7, 6, seed=1), rows(7, 6, seed=2)
    expected = defined(student[:, :5].log_softmax(1), teacher[:, :5].log_softmax(1), divergence)
    # Raw logits serve as well, and the tail's column holds anything
    logits = student + torch.linspace(-30, 30, 7, dtype=torch.float64)[:, None]
    logits[:, -1] = math.nan
    for given in (student, logits):
        close(partition_divergence(given, teacher, divergence, tail="renormalize"), expected)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
def test_gradients_pass_gradcheck_and_stop_at_the_teacher(divergence, tail):
    logits = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    teacher = rows(4, 6, seed=2).requires_grad_()

    def loss(logits):
        return partition_divergence(logits.log_softmax(dim=-1), teacher, divergence, tail)

    assert torch.autograd.gradcheck(loss, logits)
    loss(logits).sum().backward()
    assert teacher.grad is None


@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
def test_the_gradient_by_all_logits_is_that_of_the_method(tail):
    """bucket: p - t inside S, p (1 - tau/rho) outside; renormalize: p/Q - t/a inside, 0 outside."""
    logits, teacher = torch.randn(5, 11, dtype=torch.float64, requires_grad=True), rows(5, 11, seed=3)
    kept = teacher.topk(3, dim=1).indices
    is_kept = torch.zeros(5, 11, dtype=torch.bool).scatter(1, kept, True)

    def partition(log_probs):
        others = log_probs.masked_fill(is_kept, -math.inf).logsumexp(dim=1, keepdim=True)
        return torch.cat([log_probs.gather(1, kept), others], dim=1)

    student = logits.log_softmax(dim=-1)
    loss = partition_divergence(partition(student), partition(teacher), tail=tail)
    loss.sum().backward()
    p, t = student.exp().detach(), teacher.exp()
    q, a = ((values * is_kept).sum(1, keepdim=True) for values in (p, t))
    if tail == "bucket":
        close(logits.grad, torch.where(is_kept, p - t, p * (1 - (1 - a) / (1 - q))))
        assert (loss <= (t * (teacher - student)).sum(dim=1)).all()  # one bucket can only lose divergence
    else:
        close(logits.grad, torch.where(is_kept, p / q - t / a, 0.0))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_with_the_whole_vocabulary_kept_the_bucket_is_the_full_divergence(divergence):
    student, teacher = rows(5, 7, seed=1).requires_grad_(), rows(5, 7, seed=2)
    no_tail = torch.full((5, 1), -math.inf, dtype=torch.float64)
    values = partition_divergence(torch.cat([student, no_tail], 1), torch.cat([teacher, no_tail], 1), divergence)
    close(values, defined(student.detach(), teacher, divergence), rtol=1e-10, atol=1e-12)
    values.sum().backward()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_a_teacher_without_tail_drops_the_tail_term(divergence):
    teacher = torch.tensor([[0.7, 0.3, 0.0], [1.0, 0.0, 0.0]], dtype=torch.float64).log()
    logits = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    student = logits.log_softmax(dim=-1)
    values = partition_divergence(student, teacher, divergence)
    close(values, defined(student.detach(), teacher, divergence))
    values.sum().backward()
    assert logits.grad.isfinite().all()
    if divergence == "forward_kl":
        close(logits.grad, student.exp().detach() - teacher.exp())
        close(mass_divergence(student, teacher), -student[:, :-1].logsumexp(dim=-1))


def test_a_divergence_to_something_impossible_is_infinite_and_not_hidden():
    possible, impossible = torch.tensor([[0.7, 0.2, 0.1]]).log(), torch.tensor([[0.7, 0.3, 0.0]]).log()
    assert partition_divergence(impossible, possible, "forward_kl").item() == math.inf
    assert partition_divergence(possible, impossible, "reverse_kl").item() == math.inf
    assert partition_divergence(possible, impossible, "jsd").item() < math.log(2)


@pytest.mark.parametrize("k1", [2, 6])
def test_the_bucket_splits_exactly_into_a_conditional_part_and_a_mass_part(k1):
    student, teacher = rows(9, k1, seed=1).requires_grad_(), rows(9, k1, seed=2)
    logits = student[:, :-1] + 17.0  # the conditional part needs no normaliser
    conditional, mass = conditional_divergence(logits, teacher), mass_divergence(student, teacher)
    whole = partition_divergence(student, teacher)
    close(conditional + mass, whole)
    upstream = torch.rand(9, dtype=torch.float64)
    grads = [torch.autograd.grad((part * upstream).sum(), student)[0] for part in (conditional + mass, whole)]
    close(*grads)
    assert (conditional >= -1e-12).all() and (mass >= 0).all()


def test_the_mass_part_on_a_sample_of_positions_is_unbiased_in_value_and_gradient():
    n, fraction = 8, 0.25
    logits = rows(n, 6, seed=1).requires_grad_()
    student, teacher = logits.log_softmax(dim=-1), rows(n, 6, seed=2)
    conditional, mass = conditional_divergence(student[:, :-1], teacher), mass_divergence(student, teacher)
    # Every sample of two positions in eight, each as likely as any other: their mean is the expectation itself
    samples = torch.combinations(torch.arange(n), int(n * fraction))
    losses = torch.stack([conditional.sum() + mass[sample].sum() / fraction for sample in samples])
    exact = partition_divergence(student, teacher).sum()
    close(losses.mean(), exact)
    (mean_grad,) = torch.autograd.grad(losses.mean(), logits, retain_graph=True)
    close(mean_grad, torch.autograd.grad(exact, logits)[0])
    assert losses.std() > 1e-3  # the samples do differ


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_all_but_float64_comes_out_as_float32(dtype):
    student, teacher = rows(4, 6, seed=1).to(dtype), rows(4, 6, seed=2).half()
    values = partition_divergence(student, teacher)
    close(values.double(), partition_divergence(student.double(), teacher.double()), rtol=1e-5, atol=1e-6)
    others = mass_divergence(student, teacher), conditional_divergence(student[:, :-1], teacher)
    assert {values.dtype, *(other.dtype for other in others)} == {torch.float32}


def test_a_teacher_tail_of_1e_10_keeps_its_pull_in_float32():
    teacher = torch.tensor([[math.log1p(-1e-10), math.log(1e-10)]])
    student = torch.tensor([[math.log(0.5), math.log(0.5)]], requires_grad=True)
    partition_divergence(student, teacher).sum().backward()
    assert student.grad[0, 1].item() == pytest.approx(-1e-10, rel=1e-5)


def test_no_position_at_all_keeps_the_graph():
    student = torch.zeros(0, 6, requires_grad=True)
    for tail in ("bucket", "renormalize"):
        partition_divergence(student, torch.zeros(0, 6), tail=tail).sum().backward()
    assert student.grad.shape == (0, 6)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"divergence": "kl"}, "divergence='kl' is not one of forward_kl, reverse_kl, jsd"),
        ({"tail": "drop"}, "tail='drop' is not one of bucket, renormalize"),
        ({"teacher_log_probs": torch.zeros(2, 5)}, r"\(2, 6\) and teacher \(2, 5\)"),
        ({"student_log_probs": torch.zeros(2, 1), "teacher_log_probs": torch.zeros(2, 1)}, "then the tail"),
        ({"student_log_probs": torch.zeros(6), "teacher_log_probs": torch.zeros(6)}, "then the tail"),
    ],
)
def test_wrong_names_and_shapes_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        partition_divergence(
            **{"student_log_probs": torch.zeros(2, 6), "teacher_log_probs": torch.zeros(2, 6)} | change
        )
    with pytest.raises(ValueError, match=r"student \(2, 6\) and teacher \(2, 5\)"):
        conditional_divergence(torch.zeros(2, 5), torch.zeros(2, 5))  # the teacher's row without its tail
