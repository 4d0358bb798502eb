"""The tiled head against slow, obvious, full-vocabulary log-softmaxes in float64."""

import math
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from first_trl import head
from first_trl.head import partition_log_probs, partition_log_probs_and_tail_max, selected_logits, top_k_log_probs

# positions, hidden size, vocabulary, kept tokens
SHAPES = [(5, 3, 7, 2), (1, 4, 7, 1), (13, 8, 101, 5), (9, 6, 11, 11), (3, 5, 1, 1), (4, 2, 2, 1)]
RULES = [
    {},
    {"logit_scale": 0.37},
    {"softcap": 1.5},
    {"bias": True},
    {"bias": True, "logit_scale": 1.8, "softcap": 3.0},
]
close = torch.testing.assert_close


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Many tiles and chunks, with ragged last ones, in tests of a few positions."""
    monkeypatch.setattr(head, "_TILE_ELEMENTS", 24)
    monkeypatch.setattr(head, "_GATHER_ELEMENTS", 24)


def inputs(shape, rule=None, dtype=torch.float64, weight_std=1.0):
    n, d, v, k = shape
    generator = torch.Generator().manual_seed(0)

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    hidden, weight = normal(n, d).to(dtype).requires_grad_(), (normal(v, d) * weight_std).to(dtype).requires_grad_()
    token_ids = torch.rand(n, v, generator=generator).argsort(dim=1)[:, :k]
    rule = dict(rule or {})
    if rule.pop("bias", False):
        rule["bias"] = normal(v).to(dtype).requires_grad_()
    return hidden, weight, token_ids, rule


def full_logits(hidden, weight, bias=None, logit_scale=1.0, softcap=None):
    logits = hidden @ weight.T
    logits = (logits if bias is None else logits + bias) * logit_scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def partition_of(logits, token_ids):
    """The definition: (N, V) logits -> (N, K+1)."""
    log_probs = logits.log_softmax(dim=-1)
    tail = log_probs.scatter(1, token_ids, -math.inf).logsumexp(dim=-1, keepdim=True)
    return torch.cat([log_probs.gather(1, token_ids), tail], dim=-1)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("chunk_size", [1, 4, 1000])
def test_partition_logits_and_top_k_are_those_of_the_full_log_softmax(shape, rule, chunk_size):
    hidden, weight, token_ids, rule = inputs(shape, rule)
    logits = full_logits(hidden, weight, **rule)
    log_probs, tail_max = partition_log_probs_and_tail_max(hidden, weight, token_ids, **rule, chunk_size=chunk_size)
    assert log_probs.dtype == torch.float64 and not tail_max.requires_grad
    close(log_probs, partition_of(logits, token_ids), rtol=0, atol=1e-12)
    others = logits.detach().log_softmax(dim=-1).scatter(1, token_ids, -math.inf)
    close(tail_max, others.amax(dim=-1), rtol=0, atol=1e-12)
    close(selected_logits(hidden, weight, token_ids, **rule), logits.gather(1, token_ids), rtol=0, atol=1e-12)

    ids, log_probs = top_k_log_probs(hidden, weight, shape[3], **rule, chunk_size=chunk_size)
    assert (ids == logits.sort(dim=1, descending=True, stable=True).indices[:, : shape[3]]).all()
    close(log_probs, partition_of(logits.detach(), ids), rtol=0, atol=1e-12)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
def test_gradients_equal_those_of_the_full_log_softmax(shape, rule, frozen):
    hidden, weight, token_ids, rule = inputs(shape, rule)
    if frozen:
        weight, rule = weight.detach(), {name: v.detach() if name == "bias" else v for name, v in rule.items()}
    leaves = [tensor for tensor in (hidden, weight, rule.get("bias")) if tensor is not None and tensor.requires_grad]
    ours = partition_log_probs(hidden, weight, token_ids, **rule, chunk_size=4)
    reference = full_logits(hidden, weight, **rule).log_softmax(dim=-1).gather(1, token_ids)
    if shape[2] > shape[3]:  # another road to the tail, good enough in float64
        tail = (1 - reference.exp().sum(dim=1, keepdim=True)).log()
        reference = torch.cat([reference, tail], dim=1)
    upstream = torch.randn_like(reference)
    ours = torch.autograd.grad((ours[:, : reference.shape[1]] * upstream).sum(), leaves)
    reference = torch.autograd.grad((reference * upstream).sum(), leaves)
    for mine, other in zip(ours, reference, strict=True):
        close(mine, other, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", [(5, 3, 7, 2), (3, 2, 4, 4), (2, 3, 30, 1)])
def test_gradients_pass_gradcheck(shape, rule):
    hidden, weight, token_ids, rule = inputs(shape, rule)
    bias = rule.pop("bias", torch.zeros(shape[2], dtype=torch.float64))

    def probabilities(hidden, weight, bias):  # finite also where the tail is empty
        return partition_log_probs(hidden, weight, token_ids, bias, **rule, chunk_size=2).exp()

    def logits(hidden, weight, bias):
        return selected_logits(hidden, weight, torch.cat([token_ids, token_ids[:, :1]], dim=1), bias, **rule)

    assert torch.autograd.gradcheck(probabilities, (hidden, weight, bias))
    assert torch.autograd.gradcheck(logits, (hidden, weight, bias))


def test_a_frozen_head_gets_no_gradient_and_no_second_look():
    hidden, weight, token_ids, _ = inputs((13, 8, 101, 5))
    with Watch() as forward:
        loss = partition_log_probs(hidden, weight.detach(), token_ids, chunk_size=4).sum()
    with Watch() as backward:
        loss.backward()
    assert forward.names.count("mm") > 2 and backward.names.count("mm") == 0
    with Watch() as scoring, torch.no_grad():
        partition_log_probs(hidden, weight, token_ids, chunk_size=4)
    # Without a gradient to come, no mean of head rows
    assert scoring.names.count("mm") == forward.names.count("mm") / 2


@pytest.mark.parametrize("trained", [False, True])
def test_no_tensor_of_positions_by_vocabulary_is_ever_allocated(trained, monkeypatch):
    monkeypatch.setattr(head, "_TILE_ELEMENTS", 2**22)  # as shipped: the whole vocabulary would fit one tile
    hidden, weight, token_ids, _ = inputs((64, 8, 499, 5))
    weight = weight.requires_grad_(trained)
    with Watch() as watch:
        partition_log_probs(hidden, weight, token_ids).sum().backward()
        top_k_log_probs(hidden, weight, 5)
        selected_logits(hidden, weight, token_ids).sum().backward()
    assert len(watch.names) > 20 and watch.largest < len(hidden) * len(weight)


def test_float32_is_as_exact_as_an_eager_log_softmax(monkeypatch):
    monkeypatch.setattr(head, "_TILE_ELEMENTS", 2**12)
    hidden, weight, token_ids, _ = inputs((33, 64, 5003, 5), {}, torch.float32, weight_std=0.6)
    weight = weight.detach()
    top = full_logits(hidden, weight).argsort(dim=1, descending=True)[:, :2]
    token_ids = torch.stack([row.unique()[:5] for row in torch.cat([top, token_ids], dim=1)])
    exact_hidden = hidden.detach().double().requires_grad_()
    exact = partition_of(full_logits(exact_hidden, weight.double()), token_ids)
    eager = partition_of(full_logits(hidden, weight), token_ids)
    ours = partition_log_probs(hidden, weight, token_ids)
    error = (ours - exact).abs().max()
    assert ours.dtype == torch.float32 and error <= 1e-5 and error <= 1.5 * (eager - exact).abs().max()
    upstream = torch.randn_like(ours)
    (exact_grad,) = torch.autograd.grad((exact * upstream).sum(), [exact_hidden])
    (our_grad,) = torch.autograd.grad((ours * upstream).sum(), [hidden])
    assert (our_grad - exact_grad).norm() <= 1e-5 * exact_grad.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_worse_than_half_precision_logits(dtype, monkeypatch):
    monkeypatch.setattr(head, "_TILE_ELEMENTS", 2**13)
    hidden, weight, token_ids, _ = inputs((64, 64, 5003, 5), {}, dtype, weight_std=0.6)
    weight = weight.detach()
    with torch.no_grad():
        token_ids[:, 0] = full_logits(hidden, weight).argmax(dim=1)
        token_ids = token_ids[[len(row.unique()) == 5 for row in token_ids]]
    hidden = hidden[: len(token_ids)].detach().requires_grad_()
    exact_hidden = hidden.detach().double().requires_grad_()
    exact = partition_of(full_logits(exact_hidden, weight.double()), token_ids)
    ordinary = partition_of(full_logits(hidden, weight).float(), token_ids)
    ours = partition_log_probs(hidden, weight, token_ids)
    assert ours.dtype == torch.float32
    for column in range(6):  # kept tokens and tail alike
        assert (ours - exact)[:, column].norm() <= (ordinary - exact)[:, column].norm()
    upstream = torch.rand_like(ours)
    (exact_grad,) = torch.autograd.grad((exact * upstream).sum(), [exact_hidden])
    (ordinary_grad,) = torch.autograd.grad((ordinary * upstream).sum(), [hidden])
    (our_grad,) = torch.autograd.grad((ours * upstream).sum(), [hidden])
    assert our_grad.dtype == dtype
    assert (our_grad - exact_grad).norm() <= (ordinary_grad - exact_grad).norm()
    # A teacher equal to its student agrees to float32, whatever the factors' dtype
    teacher_ids, teacher = top_k_log_probs(hidden, weight, 5)
    close(partition_log_probs(hidden, weight, teacher_ids), teacher, rtol=0, atol=1e-5)


@pytest.mark.parametrize("log10_tail", [-1, -4, -8, -10])
def test_tails_down_to_1e_10_are_right_in_float32(log10_tail):
    vocab_size, kept, tail = 300, 3, 10.0**log10_tail
    # One-hot hidden states read the logits straight from the head's bias
    bias = torch.linspace(-1, 1, vocab_size, dtype=torch.float64)
    token_ids = torch.tensor([[5, 17, 250]])
    rest = bias.clone().index_fill_(0, token_ids[0], -math.inf).logsumexp(0)
    bias[token_ids[0]] = rest + math.log((1 - tail) / tail / kept)
    bias = bias.float()
    hidden, weight = torch.zeros(1, 4, requires_grad=True), torch.randn(vocab_size, 4)
    exact_hidden = hidden.detach().double().requires_grad_()
    exact = partition_of(full_logits(exact_hidden, weight.double(), bias.double()), token_ids)[0, -1]
    log_tail = partition_log_probs(hidden, weight, token_ids, bias)[0, -1]
    assert exact.item() == pytest.approx(math.log(tail), abs=1e-4)
    assert log_tail.item() == pytest.approx(exact.item(), abs=1e-5)
    log_tail.backward()
    exact.backward()
    close(hidden.grad.double(), exact_hidden.grad, rtol=1e-4, atol=1e-6)


def test_edges_an_empty_tail_a_forbidden_token_and_no_position_at_all():
    hidden, weight, token_ids, _ = inputs((9, 6, 11, 11), {}, torch.float32)
    log_probs, tail_max = partition_log_probs_and_tail_max(hidden, weight, token_ids)
    assert (log_probs[:, -1] == -math.inf).all() and (tail_max == -math.inf).all()
    log_probs[:, :-1].sum().backward()
    for grad in (hidden.grad, weight.grad):
        assert grad.isfinite().all() and grad.norm() > 0

    hidden, weight, _, _ = inputs((4, 3, 9, 2), {}, torch.float32)
    bias = torch.zeros(9).index_fill_(0, torch.tensor([0, 4, 8]), -math.inf)
    token_ids = torch.tensor([[4, 1], [1, 2], [0, 8], [7, 3]])
    log_probs = partition_log_probs(hidden, weight, token_ids, bias)
    close(log_probs, partition_of(full_logits(hidden, weight, bias), token_ids))
    log_probs[log_probs > -math.inf].sum().backward()
    assert hidden.grad.isfinite().all()

    hidden, weight, token_ids, rule = inputs((0, 3, 7, 2), {"bias": True}, torch.float32)
    log_probs, tail_max = partition_log_probs_and_tail_max(hidden, weight, token_ids, **rule)
    assert log_probs.shape == (0, 3) and tail_max.shape == (0,)
    (log_probs.sum() + selected_logits(hidden, weight, token_ids, **rule).sum()).backward()
    assert hidden.grad.shape == (0, 3) and weight.grad.abs().sum() == 0 and rule["bias"].grad.abs().sum() == 0
    assert [tuple(part.shape) for part in top_k_log_probs(hidden, weight, 2)] == [(0, 2), (0, 3)]


def test_autocast_decides_the_dtype_of_the_multiplications_only():
    hidden, weight, token_ids, _ = inputs((13, 8, 101, 5), {}, torch.float32)
    exact = partition_of(full_logits(hidden, weight), token_ids)
    with torch.autocast("cpu", dtype=torch.bfloat16), Watch() as watch:
        log_probs = partition_log_probs(hidden, weight, token_ids)
        teacher_log_probs = top_k_log_probs(hidden, weight, 5)[1]
        logits = selected_logits(hidden, weight, token_ids)
        log_probs.sum().backward()
    assert set(watch.mm_dtypes) == {torch.bfloat16}
    assert log_probs.dtype == teacher_log_probs.dtype == hidden.grad.dtype == weight.grad.dtype == torch.float32
    assert 0 < (log_probs - exact).abs().max() < 0.1
    # Kept tokens' logits never pass through bfloat16
    close(log_probs[:, 1:5] - log_probs[:, :1], exact[:, 1:5] - exact[:, :1], rtol=1e-5, atol=1e-5)
    close(logits, full_logits(hidden, weight).gather(1, token_ids))


@pytest.mark.parametrize("num_distinct", [1, 2, 3, 20])
@pytest.mark.parametrize("limit", [None, 3, 30])
@pytest.mark.parametrize("tile_width", [2, 8, 31])
def test_of_equally_likely_tokens_the_lower_ids_are_kept(num_distinct, limit, tile_width, monkeypatch):
    monkeypatch.setattr(head, "_TILE_ELEMENTS", 7 * tile_width)
    bias = torch.randint(0, num_distinct, (61,), generator=torch.Generator().manual_seed(num_distinct)).float()
    hidden, weight = torch.zeros(7, 2), torch.zeros(61, 2)
    for k in (1, 3) if limit == 3 else (1, 3, 5, 20):
        ids, log_probs = top_k_log_probs(hidden, weight, k, bias, vocab_limit=limit)
        assert (ids == bias[:limit].sort(descending=True, stable=True).indices[:k]).all()
        close(log_probs, partition_of(bias.expand(7, 61), ids))  # what lies beyond the limit weighs in the tail


def test_a_sharded_head_is_made_whole():
    from torch.distributed.tensor import DeviceMesh, Shard, distribute_tensor

    hidden, weight, token_ids, _ = inputs((5, 3, 7, 2), {}, torch.float32)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        sharded = distribute_tensor(weight.detach(), DeviceMesh("cpu", [0]), [Shard(0)]).requires_grad_()
        log_probs = partition_log_probs(hidden, sharded, token_ids)
        log_probs.sum().backward()
        sharded_grad = sharded.grad.full_tensor()
    finally:
        torch.distributed.destroy_process_group()
    expected = partition_log_probs(hidden, weight, token_ids)
    close(log_probs, expected)
    close(sharded_grad, torch.autograd.grad(expected.sum(), [weight])[0])


@pytest.mark.parametrize("trained", [False, True])
def test_a_zero_3_head_is_gathered_in_the_forward_and_again_in_the_backward(trained, monkeypatch):
    hidden, weight, token_ids, _ = inputs((5, 3, 7, 2), {}, torch.float32)
    expected = partition_log_probs(hidden, weight, token_ids)
    expected_grads = torch.autograd.grad(expected.sum(), [hidden, weight])
    parameter = torch.nn.Parameter(torch.empty(0), requires_grad=trained)
    parameter.ds_id = 0  # how DeepSpeed marks a parameter that it has partitioned
    gathered = []

    class GatheredParameters:
        def __init__(self, parameters):
            self.parameters = parameters

        def __enter__(self):
            self.parameters[0].data = weight.detach()
            gathered.append(True)

        def __exit__(self, *_):
            self.parameters[0].data = torch.empty(0)

    deepspeed = SimpleNamespace(zero=SimpleNamespace(GatheredParameters=GatheredParameters))
    monkeypatch.setitem(sys.modules, "deepspeed", deepspeed)
    log_probs = partition_log_probs(hidden, parameter, token_ids)
    assert parameter.numel() == 0
    close(log_probs, expected)
    grads = torch.autograd.grad(log_probs.sum(), [hidden, parameter] if trained else [hidden])
    for mine, other in zip(grads, expected_grads, strict=False):
        close(mine, other)
    assert len(gathered) == 2


@pytest.mark.parametrize(
    "change, message",
    [
        ({"token_ids": torch.tensor([[0, 7]])}, "token id 7 .position 0. is outside"),
        ({"token_ids": torch.tensor([[-1, 2]])}, "token id -1"),
        ({"token_ids": torch.tensor([[3, 3]])}, "token id 3 occurs twice at position 0"),
        ({"token_ids": torch.tensor([3])}, "token_ids"),
        ({"token_ids": torch.zeros(1, 0, dtype=torch.int64)}, "K >= 1"),
        ({"token_ids": torch.zeros(2, 1, dtype=torch.int64)}, "N = 1"),
        ({"hidden": torch.zeros(1, 4)}, "hidden"),
        ({"bias": torch.zeros(6)}, "bias"),
        ({"softcap": 0.0}, "softcap=0.0"),
        ({"chunk_size": 0}, "chunk_size=0"),
        ({"k": 0}, "k=0"),
        ({"k": 8}, "k=8"),
        ({"k": 5, "vocab_limit": 4}, "k=5 must be between 1 and the 4"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_by_name(change, message):
    arguments = {
        "hidden": torch.zeros(1, 3),
        "weight": torch.zeros(7, 3),
        "token_ids": torch.tensor([[0, 1]]),
    } | change
    with pytest.raises(ValueError, match=message):
        if "k" in change:
            del arguments["token_ids"]
            top_k_log_probs(**arguments)
        partition_log_probs(**arguments)


class Watch(TorchDispatchMode):
    """Records every operation, its largest result, and the dtypes of the matrix products."""

    def __init__(self):
        super().__init__()
        self.names, self.mm_dtypes, self.largest = [], [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        results = func(*args, **(kwargs or {}))
        self.names.append(name)
        if name == "mm":
            self.mm_dtypes.extend(argument.dtype for argument in args)
        for result in results if isinstance(results, (tuple, list)) else [results]:
            if isinstance(result, torch.Tensor):
                self.largest = max(self.largest, result.numel())
        return results
