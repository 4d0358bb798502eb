"""Exact log-probabilities of a few tokens and of everything else, straight from the hidden states.

The definition, in eager PyTorch, with the K kept tokens S of each position in `token_ids`:

    z         = logit_scale * (hidden @ weight.T + bias)                       # (N, V)
    z         = softcap * tanh(z / softcap)                                    # where the model has a cap
    log_probs = z.log_softmax(-1)
    kept      = log_probs.gather(1, token_ids)                                 # (N, K)
    tail      = log_probs.scatter(1, token_ids, -inf).logsumexp(-1)            # (N,): all other tokens, together
    result    = cat([kept, tail[:, None]], 1)                                  # (N, K+1)

What is different here is that no (N, V) tensor ever exists. All of it follows from K+1 numbers: the K logits, and

    tail_logit = log sum_{j not in S} exp(z_j)          the tail is a (K+1)-th token, and this is its logit
    result     = log_softmax([z_S, tail_logit])

so the vocabulary is needed for `tail_logit` alone. It is read in tiles (some positions by some of the vocabulary)
with the running maximum and sum of an online softmax. The tail is a sum of positive terms, never one minus something:
a tail of 1e-10 comes out as accurate as one of 0.5.

The gradient needs no second look at the vocabulary. With q the softmax over the complement of S,

    d tail_logit / d hidden = sum_{j not in S} q_j dz_j / d hidden

is a mean of head rows, which the same online softmax accumulates while the tile is there. Forward and backward
together multiply (N, D) by (D, V) twice, 4NVD flops, where recomputing the logits in the backward would cost 6NVD.
Only a head that is itself trained sees the vocabulary again in the backward.

Shapes: N positions, n positions of one chunk, D hidden size, V vocabulary, v vocabulary rows of one tile, K kept
tokens, K1 = K+1 (last column the tail).
Units: nats. Everything but the multiplications is computed in float32 (float64 where hidden is float64), whatever the
inputs' dtype.
"""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

from .errors import FirstTrlError

# Positions that share one pass over the vocabulary, and logits of one tile: on a CPU a tile should stay in its cache,
# on an accelerator it should be worth a launch.
_CHUNK_SIZE, _CHUNK_SIZE_OF_ACCELERATOR = 1024, 4096
_TILE_ELEMENTS, _TILE_ELEMENTS_OF_ACCELERATOR = 2**22, 2**25
_GATHER_ELEMENTS = 2**22  # elements of the gathered head rows of S


def partition_log_probs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    token_ids: torch.Tensor,
    bias: torch.Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    chunk_size: int | None = None,
) -> torch.Tensor:
    """Log-probabilities of the kept tokens and of the tail: (N, D), (V, D), (N, K) -> (N, K+1), in float32.

    Differentiable in `hidden`, `weight` and `bias`, and only where they require grad: a frozen head allocates no
    gradient. With K = V the tail is -inf and the gradients stay finite. The logits are multiplied in hidden's dtype
    (autocast's, where it is on). `chunk_size` (positions) trades memory against reads of the head.

    Raises ValueError where shapes do not fit, and where a token id lies outside [0, V) or repeats within its row.
    """
    return partition_log_probs_and_tail_max(hidden, weight, token_ids, bias, logit_scale, softcap, chunk_size)[0]


@torch.compiler.disable  # a Python loop over tiles, which a compiler would unroll anew for every shape
def partition_log_probs_and_tail_max(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    token_ids: torch.Tensor,
    bias: torch.Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    chunk_size: int | None = None,
    check_ids: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`partition_log_probs`, and the log-probability of the likeliest token of the tail, (N,), without gradient.

    The model's prediction is a kept token where the largest of the first K columns is above the second result.
    `check_ids=False` takes the ids' word for it: on a GPU the check waits for the device.
    """
    with _opened(hidden, weight, bias, logit_scale, softcap) as head:
        token_ids = _checked_ids(token_ids, hidden, head) if check_ids else token_ids
        chunk_size = _chunk_size(head) if chunk_size is None else chunk_size
        with_grad = torch.is_grad_enabled() and hidden.requires_grad
        logits_NK1, tail_max_N = _PartitionLogits.apply(hidden, *head[:2], token_ids, head[2:], chunk_size, with_grad)
    log_normalizer_N = logits_NK1.logsumexp(dim=-1)
    return logits_NK1 - log_normalizer_N[:, None], tail_max_N - log_normalizer_N.detach()


@torch.compiler.disable
def selected_logits(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    token_ids: torch.Tensor,
    bias: torch.Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> torch.Tensor:
    """Logits of the given tokens, (N, D), (V, D), (N, K) -> (N, K), by K dot products: no vocabulary-sized work.

    Enough for whatever is normalised over S alone. Differentiable and typed like `partition_log_probs`; the ids are
    not checked, and a token may occur twice in a row.
    """
    with _opened(hidden, weight, bias, logit_scale, softcap) as head:
        return _SelectedLogits.apply(hidden, *head[:2], token_ids, head[2:])


@torch.compiler.disable
@torch.no_grad()
def top_k_log_probs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    k: int,
    bias: torch.Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    chunk_size: int | None = None,
    vocab_limit: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k likeliest tokens of each position, and the partition that they make, without gradient.

    Returns the token ids, (N, k) int64, most probable first and the lower id first among equals, so that column 0 is
    the argmax; and the log-probabilities of these and of the tail, (N, k+1) float32.

    `vocab_limit` keeps ids >= vocab_limit (rows of the head beyond the tokenizer) out of S; their mass stays in the
    tail. Raises ValueError where shapes do not fit, or k tokens cannot be kept.
    """
    with _opened(hidden, weight, bias, logit_scale, softcap) as head:
        vocab_size = len(head.weight_VD)
        limit = vocab_size if vocab_limit is None else min(vocab_limit, vocab_size)
        if not 1 <= k <= limit:
            raise FirstTrlError(f"k={k} must be between 1 and the {limit} tokens that can be kept")
        ids_NK = torch.empty(len(hidden), k, dtype=torch.int64, device=hidden.device)
        log_probs_NK1 = hidden.new_empty(len(hidden), k + 1, dtype=head.sum_dtype)
        for rows in _slices(len(hidden), _chunk_size(head) if chunk_size is None else chunk_size):
            ids_NK[rows], log_probs_NK1[rows] = _top_k_of_chunk(head, hidden[rows], k, limit)
    return ids_NK, log_probs_NK1


class _Head(NamedTuple):
    """The map from hidden states to logits."""

    weight_VD: torch.Tensor
    bias_V: torch.Tensor | None
    logit_scale: float
    softcap: float | None
    dtype: torch.dtype  # of the factors of a product
    sum_dtype: torch.dtype  # of everything else

    def tile(self, hidden_nD: torch.Tensor, columns: slice) -> torch.Tensor:
        """Logits of a few positions over a part of the vocabulary, (n, v)."""
        z_nv = self.product(hidden_nD, self.weight_VD[columns].T)
        return self._finish(z_nv, None if self.bias_V is None else self.bias_V[columns])

    def selected(self, hidden_ND: torch.Tensor, ids_NK: torch.Tensor) -> torch.Tensor:
        """Logits of S, (N, K), as dot products in `sum_dtype`."""
        z_NK = hidden_ND.new_empty(ids_NK.shape, dtype=self.sum_dtype)
        for rows, weight_nKD in self._rows_of(ids_NK):
            z_NK[rows] = (weight_nKD @ hidden_ND[rows, :, None].to(z_NK.dtype)).squeeze(-1)
        return self._finish(z_NK, None if self.bias_V is None else self.bias_V[ids_NK])

    def selected_hidden_grad(self, ids_NK: torch.Tensor, grad_NK: torch.Tensor) -> torch.Tensor:
        """sum_{k in S} grad_k w_k, (N, D)."""
        grad_ND = grad_NK.new_empty(len(ids_NK), self.weight_VD.shape[1])
        for rows, weight_nKD in self._rows_of(ids_NK):
            grad_ND[rows] = (grad_NK[rows, None, :] @ weight_nKD).squeeze(1)
        return grad_ND

    def slope(self, z: torch.Tensor) -> torch.Tensor | float:
        """Slope of the soft cap at the logits z: dz / d(product) without the factor logit_scale."""
        return 1.0 if self.softcap is None else 1 - (z / self.softcap) ** 2

    def product(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """a @ b in `sum_dtype`, from factors in `dtype`."""
        a, b = a.to(self.dtype), b.to(self.dtype)
        if a.is_cuda and self.dtype != self.sum_dtype:
            return torch.mm(a, b, out_dtype=self.sum_dtype)  # not rounded to half precision on the way out
        if a.device.type in ("xpu", "mps"):
            a, b = a.to(self.sum_dtype), b.to(self.sum_dtype)
        return torch.mm(a, b).to(self.sum_dtype)

    def _finish(self, z: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if bias is not None:
            z += bias
        if self.logit_scale != 1.0:
            z *= self.logit_scale
        if self.softcap is not None:
            z.div_(self.softcap).tanh_().mul_(self.softcap)
        return z

    def _rows_of(self, ids_NK: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        """The head's rows of S, (n, K, D), for a few positions at a time: (N, K, D) is never built."""
        for rows in _slices(len(ids_NK), max(1, _GATHER_ELEMENTS // (ids_NK.shape[1] * self.weight_VD.shape[1]))):
            yield rows, self.weight_VD[ids_NK[rows]].to(self.sum_dtype)


class _OnlineLogSumExp:
    """log sum_j exp(z_j) per position, over logits that arrive a tile at a time."""

    def __init__(self, hidden_nD: torch.Tensor, dtype: torch.dtype):
        # Finite, so that positions whose logits are all -inf so far never compute -inf - -inf
        self.max_n = hidden_nD.new_full((len(hidden_nD),), torch.finfo(dtype).min, dtype=dtype)
        self.sum_n = hidden_nD.new_zeros(len(hidden_nD), dtype=dtype)

    def fold(self, z_nv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Takes in a tile, overwriting it with its exponentials exp(z - max) under the new maximum.

        Returns them, (n, v), and the factor by which all earlier ones have shrunk, (n,).
        """
        max_n = torch.maximum(self.max_n, z_nv.amax(dim=-1))
        shrink_n = (self.max_n - max_n).exp()
        self.max_n = max_n
        z_nv.sub_(max_n[:, None]).exp_()
        self.sum_n.mul_(shrink_n).add_(z_nv.sum(dim=-1))
        return z_nv, shrink_n

    def log_sum(self) -> torch.Tensor:
        """(n,); -inf where every logit was -inf."""
        return self.max_n + self.sum_n.log()


class _PartitionLogits(torch.autograd.Function):
    """(N, K+1): the logits of S, and the tail's; and (N,), without gradient: the largest logit of the tail."""

    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, bias_V, ids_NK, rule, chunk_size, with_hidden_grad):
        head = _Head(weight_VD, bias_V, *rule)
        logits_NK = head.selected(hidden_ND, ids_NK)
        tail_N, tail_max_N = logits_NK.new_empty(2, len(hidden_ND)).unbind()
        tail_grad_ND = logits_NK.new_zeros(hidden_ND.shape) if with_hidden_grad else None
        for rows in _slices(len(hidden_ND), chunk_size):
            grad_nD = tail_grad_ND[rows] if with_hidden_grad else None
            tail_N[rows], tail_max_N[rows] = _tail_of_chunk(head, hidden_ND[rows], ids_NK[rows], grad_nD)
        ctx.rule, ctx.chunk_size = rule, chunk_size
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, ids_NK, logits_NK, tail_N, tail_grad_ND)
        ctx.mark_non_differentiable(tail_max_N)
        return torch.cat([logits_NK, tail_N[:, None]], dim=-1), tail_max_N

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_NK1, _):
        hidden_ND, weight_VD, bias_V, ids_NK, logits_NK, tail_N, tail_grad_ND = ctx.saved_tensors
        grad_hidden = grad_weight = grad_bias = None
        with _gathered(weight_VD, bias_V), torch.autocast(hidden_ND.device.type, enabled=False):
            head = _Head(weight_VD, bias_V, *ctx.rule)
            if ctx.needs_input_grad[0]:
                grad_product_NK = grad_NK1[:, :-1] * head.logit_scale * head.slope(logits_NK)
                grad_hidden = torch.empty_like(hidden_ND)
                for rows in _slices(len(hidden_ND), ctx.chunk_size):
                    of_kept_nD = head.selected_hidden_grad(ids_NK[rows], grad_product_NK[rows])
                    grad_hidden[rows] = of_kept_nD.addcmul_(grad_NK1[rows, -1:], tail_grad_ND[rows])
            if any(ctx.needs_input_grad[1:3]):
                grad_weight, grad_bias = _head_grads(head, hidden_ND, ids_NK, grad_NK1, tail_N, ctx.chunk_size)
        return grad_hidden, grad_weight, grad_bias, None, None, None, None


class _SelectedLogits(torch.autograd.Function):
    """(N, K): the logits of S."""

    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, bias_V, ids_NK, rule):
        logits_NK = _Head(weight_VD, bias_V, *rule).selected(hidden_ND, ids_NK)
        ctx.rule = rule
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, ids_NK, logits_NK)
        return logits_NK

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_NK):
        hidden_ND, weight_VD, bias_V, ids_NK, logits_NK = ctx.saved_tensors
        grad_hidden = grad_weight = grad_bias = None
        with _gathered(weight_VD, bias_V), torch.autocast(hidden_ND.device.type, enabled=False):
            head = _Head(weight_VD, bias_V, *ctx.rule)
            grad_NK = grad_NK * head.logit_scale * head.slope(logits_NK)
            if ctx.needs_input_grad[0]:
                grad_hidden = head.selected_hidden_grad(ids_NK, grad_NK).to(hidden_ND.dtype)
            if ctx.needs_input_grad[1]:
                grad_weight = grad_NK.new_zeros(weight_VD.shape)
                for column_N, grad_N in zip(ids_NK.T, grad_NK.T, strict=True):  # (N, K, D) is never built
                    grad_weight.index_add_(0, column_N, grad_N[:, None] * hidden_ND)
                grad_weight = grad_weight.to(weight_VD.dtype)
            if ctx.needs_input_grad[2]:
                grad_bias = grad_NK.new_zeros(bias_V.shape).index_add_(0, ids_NK.flatten(), grad_NK.flatten())
                grad_bias = grad_bias.to(bias_V.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None


def _tail_of_chunk(head: _Head, hidden_nD, ids_nK, grad_nD) -> tuple[torch.Tensor, torch.Tensor]:
    """The tail's logit and its largest logit, (n,) each. `grad_nD`, zeros, receives d tail_logit / d hidden."""
    tail = _OnlineLogSumExp(hidden_nD, head.sum_dtype)
    for columns in _tiles(head, len(hidden_nD)):
        z_nv = head.tile(hidden_nD, columns)
        slope_nv = 1.0 if grad_nD is None else head.slope(z_nv)
        _mask_kept(z_nv, ids_nK, columns)
        exp_nv, shrink_n = tail.fold(z_nv)
        if grad_nD is not None:
            grad_nD *= shrink_n[:, None]
            grad_nD += head.product(_times(exp_nv, slope_nv), head.weight_VD[columns])
        del z_nv, exp_nv, slope_nv  # before the next tile, not beside it
    if grad_nD is not None:
        # A sum is at least exp(0), the largest logit's own, unless S is the whole vocabulary
        grad_nD *= head.logit_scale / tail.sum_n.clamp_min(1)[:, None]
    logit_n = tail.log_sum()
    return logit_n, tail.max_n.masked_fill(logit_n == -math.inf, -math.inf)


def _head_grads(head: _Head, hidden_ND, ids_NK, grad_NK1, tail_N, chunk_size):
    """Gradients of a trained head, (V, D) and (V,), from logits that are computed once more."""
    grad_weight_VD = torch.empty_like(head.weight_VD)
    grad_bias_V = None if head.bias_V is None else torch.empty_like(head.bias_V)
    tail_N = tail_N.clamp_min(torch.finfo(tail_N.dtype).min)  # finite where K = V: no -inf - -inf
    for columns in _tiles(head, min(chunk_size, len(hidden_ND))):
        grad_weight_vD = tail_N.new_zeros(head.weight_VD[columns].shape)
        grad_bias_v = tail_N.new_zeros(len(grad_weight_vD))
        for rows in _slices(len(hidden_ND), chunk_size):
            z_nv = head.tile(hidden_ND[rows], columns)
            slope_nv = head.slope(z_nv)
            _mask_kept(z_nv, ids_NK[rows], columns)
            # d loss / dz_j: the tail's gradient times q_j outside S, the token's own gradient inside
            grad_nv = z_nv.sub_(tail_N[rows, None]).exp_().mul_(grad_NK1[rows, -1:])
            local_nK, inside_nK = _columns_of(ids_NK[rows], columns)
            grad_nv.scatter_add_(1, local_nK, grad_NK1[rows, :-1] * inside_nK)
            grad_nv = _times(grad_nv, slope_nv)
            grad_weight_vD += head.product(grad_nv.T, hidden_ND[rows])
            grad_bias_v += grad_nv.sum(dim=0)
        grad_weight_VD[columns] = grad_weight_vD * head.logit_scale
        if grad_bias_V is not None:
            grad_bias_V[columns] = grad_bias_v * head.logit_scale
    return grad_weight_VD, grad_bias_V


def _top_k_of_chunk(head: _Head, hidden_nD, k: int, limit: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(n, k) ids and (n, k+1) log-probabilities, in one pass over the vocabulary.

    What never enters the running top k, and what drops out of it, goes to the tail: nothing is ever subtracted.
    """
    best_nk = hidden_nD.new_empty(len(hidden_nD), 0, dtype=head.sum_dtype)
    best_ids_nk = best_nk.long()
    tail = _OnlineLogSumExp(hidden_nD, head.sum_dtype)
    for columns in _tiles(head, len(hidden_nD)):
        z_nv = head.tile(hidden_nD, columns)
        if columns.start < limit:
            local = _top_columns(z_nv[:, : limit - columns.start], k)
            # Earlier tiles hold lower ids, so a stable sort puts the lower id first among equals
            candidates = torch.cat([best_nk, z_nv.gather(1, local)], dim=1).sort(dim=1, descending=True, stable=True)
            ids = torch.cat([best_ids_nk, local + columns.start], dim=1).gather(1, candidates.indices)
            best_nk, best_ids_nk, dropped = candidates.values[:, :k], ids[:, :k], candidates.values[:, k:]
            z_nv.scatter_(1, local, -math.inf)
            if dropped.shape[1]:
                tail.fold(dropped)
        tail.fold(z_nv)
    # Dot products, as the student's side computes them: a tile in half precision has rounded its logits
    best_ids_nk = best_ids_nk.sort(dim=1).values
    best = head.selected(hidden_nD, best_ids_nk).sort(dim=1, descending=True, stable=True)
    logits_nK1 = torch.cat([best.values, tail.log_sum()[:, None]], dim=1)
    return best_ids_nk.gather(1, best.indices), logits_nK1.log_softmax(dim=1)


def _top_columns(z_nv: torch.Tensor, k: int) -> torch.Tensor:
    """Columns of the k largest values, (n, min(k, v)), in ascending order; of equal values the first columns."""
    n, v = z_nv.shape
    if v <= k:
        return torch.arange(v, device=z_nv.device).expand(n, v)
    values, columns = z_nv.topk(k + 1, dim=1)
    columns = columns[:, :k].clone()
    # topk chooses freely among equals: where the best value left out equals the last one kept, choose by column
    tied = values[:, k] == values[:, k - 1]
    if tied.any():
        columns[tied] = z_nv[tied].sort(dim=1, descending=True, stable=True).indices[:, :k]
    return columns.sort(dim=1).values


def _mask_kept(z_nv: torch.Tensor, ids_nK: torch.Tensor, columns: slice) -> None:
    """Sets the logits of S to -inf, in place."""
    local_nK, inside_nK = _columns_of(ids_nK, columns)
    bound_nK = torch.where(inside_nK, -math.inf, math.inf).to(z_nv.dtype)
    z_nv.scatter_reduce_(1, local_nK, bound_nK, "amin")


def _columns_of(ids_nK: torch.Tensor, columns: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """Where in a tile the ids are, and whether they are in it at all; if not, the place is any column."""
    local_nK = (ids_nK - columns.start).clamp(0, columns.stop - columns.start - 1)
    return local_nK, local_nK + columns.start == ids_nK


def _times(grad_nv: torch.Tensor, slope_nv: torch.Tensor | float) -> torch.Tensor:
    return grad_nv if isinstance(slope_nv, float) else grad_nv.mul_(slope_nv)  # without a cap, no pass over the tile


def _slices(length: int, size: int) -> Iterator[slice]:
    if size < 1:
        raise FirstTrlError(f"chunk_size={size} must be at least 1")
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


def _tiles(head: _Head, num_positions: int) -> Iterator[slice]:
    """Parts of the vocabulary within the tile budget; two or more of them, so that no tile is (N, V)."""
    vocab_size, elements = len(head.weight_VD), _TILE_ELEMENTS
    if head.weight_VD.device.type not in ("cpu", "meta"):
        elements = _TILE_ELEMENTS_OF_ACCELERATOR
    if head.weight_VD.is_cuda:  # a sixteenth of the free memory, with three copies of a tile beside it
        free, _ = torch.cuda.mem_get_info(head.weight_VD.device)
        elements = max(_TILE_ELEMENTS, min(elements, free // 256))
    return _slices(vocab_size, max(1, min(elements // max(1, num_positions), math.ceil(vocab_size / 2))))


def _chunk_size(head: _Head) -> int:
    return _CHUNK_SIZE if head.weight_VD.device.type in ("cpu", "meta") else _CHUNK_SIZE_OF_ACCELERATOR


@contextmanager
def _opened(hidden, weight, bias, logit_scale, softcap) -> Iterator[_Head]:
    """The head to read: whole where FSDP2 or ZeRO-3 hold it in pieces, with autocast's dtype, and autocast off."""
    weight, bias = (
        tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # FSDP2's DTensor
        for tensor in (weight, bias)
    )
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    dtypes = (torch.float64, torch.float64) if hidden.dtype == torch.float64 else (dtype, torch.float32)
    with _gathered(weight, bias), torch.autocast(device, enabled=False):
        if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
            raise FirstTrlError(f"hidden {tuple(hidden.shape)} must be (N, D) and weight {tuple(weight.shape)} (V, D)")
        if bias is not None and bias.shape != weight.shape[:1]:
            raise FirstTrlError(f"bias {tuple(bias.shape)} must be (V,) with the V of weight {tuple(weight.shape)}")
        if softcap is not None and softcap <= 0:
            raise FirstTrlError(f"softcap={softcap} must be positive, or None for no soft-capping")
        yield _Head(weight, bias, logit_scale, softcap, *dtypes)


def _gathered(*parameters: torch.Tensor | None) -> AbstractContextManager:
    """Makes DeepSpeed ZeRO-3 parameters whole for as long as the context lasts."""
    partitioned = [p for p in parameters if p is not None and hasattr(p, "ds_id") and p.numel() == 0]
    if not partitioned:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(partitioned)


def _checked_ids(token_ids, hidden, head: _Head) -> torch.Tensor:
    if token_ids.ndim != 2 or len(token_ids) != len(hidden) or token_ids.shape[1] == 0:
        raise FirstTrlError(f"token_ids {tuple(token_ids.shape)} must be (N, K), K >= 1, N = {len(hidden)} of hidden")
    ids = token_ids.long()
    outside = (ids < 0) | (ids >= len(head.weight_VD))
    if outside.any():
        position = int(outside.any(dim=1).nonzero()[0])
        raise FirstTrlError(
            f"token id {ids[outside][0]} (position {position}) is outside the head's vocabulary of "
            f"{len(head.weight_VD)}: teacher and student must share a tokenizer"
        )
    ordered = ids.sort(dim=1).values
    repeated = ordered[:, 1:] == ordered[:, :-1]
    if repeated.any():
        position = int(repeated.any(dim=1).nonzero()[0])
        raise FirstTrlError(
            f"token id {ordered[:, 1:][repeated][0]} occurs twice at position {position}; keep K different tokens"
        )
    return ids
