"""LoRA's products on their own, for sites that read one value (Hu et al. 2021; section 4.1 of the same).

    h_1, ... = lora_shrink(x, A, scale, seeds, p)              h_g = scale_g * (x_g A_g^T)          one pass over x
    y'       = lora_expand(y, h, B)                            y' = y + h B^T
    d_1, ... = lora_factor_grads(left, right, dtype, seeds, p) d_g = left_g^T right_g               one pass over right
    dx'      = lora_input_grads(dx, q, A, seeds, p)            dx' = dx + sum_g drop_g(q_g A_g)     one pass over dx

Lists have one entry a site. ``seeds`` and ``p`` are those of the sites' dropouts, x_g = seeded_dropout(x, seed_g, p_g),
or empty: then x_g is x. On joint graphs only: they are parts of a forward and a backward that are both there, so they
have no gradients of their own. Factors are cast to the dtype of what they multiply.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from adaptc.ir import dialect
from adaptc.ir.dialect import Cost, DialectOp, nbytes
from adaptc.ir.ops import dropout
from adaptc.ir.ops.lora import draw_dtypes, draw_tensor, rows, scaled

Tensors = Sequence[torch.Tensor]


def _each(x: torch.Tensor, count: int, seeds: Tensors, p: Sequence[float]) -> list[torch.Tensor]:
    """What each of ``count`` sites reads of ``x``, as rows."""
    if not seeds:
        return [rows(x)] * count
    return [rows(dropout.body(x, seed, one)) for seed, one in zip(seeds, p, strict=True)]


def shrink_body(x: torch.Tensor, A: Tensors, scale: Tensors, seeds: Tensors, p: Sequence[float]) -> list[torch.Tensor]:
    if seeds:
        parts = [one @ a.to(x.dtype).t() for one, a in zip(_each(x, len(A), seeds, p), A, strict=True)]
    else:
        wide = rows(x) @ torch.cat([a.to(x.dtype) for a in A]).t()
        parts = list(torch.split(wide, [a.shape[0] for a in A], dim=1))
    return [scaled(h, s).contiguous().view(*x.shape[:-1], -1) for h, s in zip(parts, scale, strict=True)]


def shrink_fake(x: torch.Tensor, A: Tensors, scale: Tensors, seeds: Tensors, p: Sequence[float]) -> list[torch.Tensor]:
    return [x.new_empty((*x.shape[:-1], a.shape[0])) for a in A]


def expand_body(y: torch.Tensor, h: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    return torch.addmm(rows(y), rows(h), B.to(h.dtype).t()).view(y.shape)


def expand_fake(y: torch.Tensor, h: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    return y.new_empty(y.shape)


def factor_grads_body(
    left: Tensors, right: torch.Tensor, dtype: torch.dtype, seeds: Tensors, p: Sequence[float]
) -> list[torch.Tensor]:
    if seeds:
        each = zip(left, _each(right, len(left), seeds, p), strict=True)
        return [(rows(t).t() @ one).to(dtype) for t, one in each]
    together = (torch.cat([rows(t) for t in left], dim=1).t() @ rows(right)).to(dtype)
    return [part.clone() for part in torch.split(together, [t.shape[-1] for t in left])]


def factor_grads_fake(
    left: Tensors, right: torch.Tensor, dtype: torch.dtype, seeds: Tensors, p: Sequence[float]
) -> list[torch.Tensor]:
    return [t.new_empty((t.shape[-1], right.shape[-1]), dtype=dtype) for t in left]


def input_grads_body(dx: torch.Tensor, q: Tensors, A: Tensors, seeds: Tensors, p: Sequence[float]) -> torch.Tensor:
    if not seeds:
        return torch.addmm(rows(dx), *joined(dx, q, A)).view(dx.shape)
    for one, a, seed, rate in zip(q, A, seeds, p, strict=True):
        dx = dx + dropout.body((rows(one) @ a.to(dx.dtype)).view(dx.shape), seed, rate)
    return dx.contiguous()


def joined(dx: torch.Tensor, q: Tensors, A: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors of all sites as those of one product."""
    left, right = [rows(t) for t in q], [a.to(dx.dtype) for a in A]
    return (left[0], right[0]) if len(left) == 1 else (torch.cat(left, dim=1), torch.cat(right))


def input_grads_fake(dx: torch.Tensor, q: Tensors, A: Tensors, seeds: Tensors, p: Sequence[float]) -> torch.Tensor:
    return dx.new_empty(dx.shape)


def _product(left: torch.Tensor, ranks: int, width: int) -> int:
    return 2 * math.prod(int(s) for s in left.shape[:-1]) * ranks * width


def _masks(x: torch.Tensor, seeds: Tensors, p: Sequence[float]) -> int:
    """Operations of dropping elements of ``x``."""
    return sum(dropout.cost(x, seed, one).flops for seed, one in zip(seeds, p, strict=True))


def shrink_cost(x: torch.Tensor, A: Tensors, scale: Tensors, seeds: Tensors, p: Sequence[float]) -> Cost:
    out = shrink_fake(x, A, scale, seeds, p)
    ranks = sum(int(a.shape[0]) for a in A)
    scaling = sum(math.prod(int(s) for s in h.shape) for h in out)
    flops = _product(x, ranks, int(x.shape[-1])) + scaling + _masks(x, seeds, p)
    return Cost(flops=flops, read=nbytes(x, *A), written=nbytes(*out), saved=nbytes(*out))


def expand_cost(y: torch.Tensor, h: torch.Tensor, B: torch.Tensor) -> Cost:
    sums = math.prod(int(s) for s in y.shape)
    flops = _product(h, int(h.shape[-1]), int(y.shape[-1])) + sums
    return Cost(flops=flops, read=nbytes(y, h, B), written=nbytes(y))


def factor_grads_cost(
    left: Tensors, right: torch.Tensor, dtype: torch.dtype, seeds: Tensors, p: Sequence[float]
) -> Cost:
    out = factor_grads_fake(left, right, dtype, seeds, p)
    flops = _product(right, sum(int(t.shape[-1]) for t in left), int(right.shape[-1])) + _masks(right, seeds, p)
    return Cost(flops=flops, read=nbytes(right, *left), written=nbytes(*out))


def input_grads_cost(dx: torch.Tensor, q: Tensors, A: Tensors, seeds: Tensors, p: Sequence[float]) -> Cost:
    sums = math.prod(int(s) for s in dx.shape) * (len(q) if seeds else 1) + _masks(dx, seeds, p)
    flops = _product(dx, sum(int(t.shape[-1]) for t in q), int(dx.shape[-1])) + sums
    return Cost(flops=flops, read=nbytes(dx, *q, *A), written=nbytes(dx))


def _sizes(draw: Any) -> tuple[tuple[int, ...], int, list[int]]:
    from hypothesis import strategies as st

    batch = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=2)))
    return batch, draw(st.integers(1, 9)), draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))


def _draw_seeds(draw: Any, count: int) -> tuple[list[torch.Tensor], list[float]]:
    from hypothesis import strategies as st

    if not draw(st.booleans()):
        return [], []
    seeds = [torch.tensor([draw(st.integers(0, 2**62 - 1))]) for _ in range(count)]
    return seeds, [draw(st.floats(0, 0.9)) for _ in range(count)]


def shrink_sample(draw: Any) -> tuple[Any, ...]:
    from hypothesis import strategies as st

    batch, k, ranks = _sizes(draw)
    compute, factors = draw_dtypes(draw)
    A = [draw_tensor(draw, (r, k), factors) for r in ranks]
    scales = [draw_tensor(draw, draw(st.sampled_from([(1,), (r,)])), torch.float64) for r in ranks]
    return draw_tensor(draw, (*batch, k), compute), A, scales, *_draw_seeds(draw, len(A))


def expand_sample(draw: Any) -> tuple[Any, ...]:
    batch, n, (r, *_) = _sizes(draw)
    compute, factors = draw_dtypes(draw)
    return (
        draw_tensor(draw, (*batch, n), compute),
        draw_tensor(draw, (*batch, r), compute),
        draw_tensor(draw, (n, r), factors),
    )


def factor_grads_sample(draw: Any) -> tuple[Any, ...]:
    batch, k, ranks = _sizes(draw)
    compute, factors = draw_dtypes(draw)
    left = [draw_tensor(draw, (*batch, r), compute) for r in ranks]
    return left, draw_tensor(draw, (*batch, k), compute), factors, *_draw_seeds(draw, len(left))


def input_grads_sample(draw: Any) -> tuple[Any, ...]:
    batch, k, ranks = _sizes(draw)
    compute, factors = draw_dtypes(draw)
    q = [draw_tensor(draw, (*batch, r), compute) for r in ranks]
    A = [draw_tensor(draw, (r, k), factors) for r in ranks]
    return draw_tensor(draw, (*batch, k), compute), q, A, *_draw_seeds(draw, len(q))


LORA_SHRINK = dialect.define(
    DialectOp(
        name="lora_shrink", schema="(Tensor x, Tensor[] A, Tensor[] scale, Tensor[] seeds, float[] p) -> Tensor[]",
        body=shrink_body, fake=shrink_fake, cost=shrink_cost, sample=shrink_sample,
    )
)  # fmt: skip
LORA_EXPAND = dialect.define(
    DialectOp(
        name="lora_expand", schema="(Tensor y, Tensor h, Tensor B) -> Tensor",
        body=expand_body, fake=expand_fake, cost=expand_cost, sample=expand_sample,
    )
)  # fmt: skip
LORA_FACTOR_GRADS = dialect.define(
    DialectOp(
        name="lora_factor_grads",
        schema="(Tensor[] left, Tensor right, ScalarType dtype, Tensor[] seeds, float[] p) -> Tensor[]",
        body=factor_grads_body, fake=factor_grads_fake, cost=factor_grads_cost, sample=factor_grads_sample,
    )
)  # fmt: skip
LORA_INPUT_GRADS = dialect.define(
    DialectOp(
        name="lora_input_grads", schema="(Tensor dx, Tensor[] q, Tensor[] A, Tensor[] seeds, float[] p) -> Tensor",
        body=input_grads_body, fake=input_grads_fake, cost=input_grads_cost, sample=input_grads_sample,
    )
)  # fmt: skip
