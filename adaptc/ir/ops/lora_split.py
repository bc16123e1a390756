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
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import fx

from adaptc.codegen.cpp import pairs, products, skinny
from adaptc.ir import dialect
from adaptc.ir.dialect import Cost, DialectOp, nbytes
from adaptc.ir.ops import dropout
from adaptc.ir.ops.lora import draw_dtypes, draw_tensor, rows, scaled
from adaptc.torch_internals import cpu_emulates, has_avx512_bf16, node_value, size_hint

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


def shrink_kernel(
    x: torch.Tensor, A: Tensors, scale: Tensors, seeds: Tensors, p: Sequence[float]
) -> list[torch.Tensor] | None:
    if _goes_in_pairs(x, seeds, (a.shape[0] for a in A)):
        return pairs.shrink(x, A, scale)
    if not goes_to_skinny(x, seeds, (a.shape[0] for a in A)):
        return None
    return skinny.shrink(x, A, scale, seeds, p)


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


def factor_grads_kernel(
    left: Tensors, right: torch.Tensor, dtype: torch.dtype, seeds: Tensors, p: Sequence[float]
) -> list[torch.Tensor] | None:
    if _goes_in_pairs(right, seeds, (t.shape[-1] for t in left)):
        return pairs.gradient(left, right, dtype)
    if not goes_to_skinny(right, seeds, (t.shape[-1] for t in left)):
        return None
    return skinny.gradient(left, right, dtype, seeds, p)


def input_grads_body(dx: torch.Tensor, q: Tensors, A: Tensors, seeds: Tensors, p: Sequence[float]) -> torch.Tensor:
    if not seeds:
        return torch.addmm(rows(dx), *_joined(dx, q, A)).view(dx.shape)
    for one, a, seed, rate in zip(q, A, seeds, p, strict=True):
        dx = dx + dropout.body((rows(one) @ a.to(dx.dtype)).view(dx.shape), seed, rate)
    return dx.contiguous()


def input_grads_kernel(
    dx: torch.Tensor, q: Tensors, A: Tensors, seeds: Tensors, p: Sequence[float]
) -> torch.Tensor | None:
    ranks = [a.shape[0] for a in A]
    if not (goes_to_skinny(dx, seeds, ranks) or _goes_in_pairs(dx, seeds, ranks)):
        return None
    total = dx.detach().clone(memory_format=torch.contiguous_format)
    add_input_grads(total, q, A, seeds, p)
    return total


def add_input_grads(dx: torch.Tensor, q: Tensors, A: Tensors, seeds: Tensors, p: Sequence[float]) -> None:
    """The same in the memory of ``dx``, which is contiguous."""
    ranks = [a.shape[0] for a in A]
    if _goes_in_pairs(dx, seeds, ranks):
        pairs.update(dx, q, A)
    elif goes_to_skinny(dx, seeds, ranks):
        skinny.update(dx, q, A, seeds, p)
    elif seeds:
        dx.copy_(input_grads_body(dx, q, A, seeds, p))
    else:
        rows(dx).addmm_(*_joined(dx, q, A))


def _joined(dx: torch.Tensor, q: Tensors, A: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
    left, right = [rows(t) for t in q], [a.to(dx.dtype) for a in A]
    return (left[0], right[0]) if len(left) == 1 else (torch.cat(left, dim=1), torch.cat(right))


def goes_to_skinny(x: torch.Tensor, seeds: Tensors, ranks: Iterable[int]) -> bool:
    """Whether our own kernel is faster than the libraries: it drops as it reads, sums bf16 in fp32, and is made for few
    ranks."""
    known = bool(seeds) or cpu_emulates(x.dtype)
    if x.dtype == torch.float32 and x.numel() >= products.FEWEST_ROWS * x.shape[-1]:
        known = known or products.are_few(ranks)
    return known and skinny.takes(x)


def _goes_in_pairs(x: torch.Tensor, seeds: Tensors, ranks: Iterable[int]) -> bool:
    return not seeds and pairs.takes(x, sum(ranks))


def has_kernel(device: str, x: fx.Node, small: fx.Node, *also: torch.dtype, rank: int = -1) -> bool:
    """Whether kernels multiply ``x`` by ``small``, whose dimension ``rank`` is one: those for pairs of bf16, or of the
    dtypes ``also`` for as many rows as those are fast for."""
    value, is_small = node_value(x), size_hint(node_value(small).shape[rank]) <= products.MOST_RANKS
    many_rows = math.prod(size_hint(s) for s in value.shape[:-1]) >= products.FEWEST_ROWS
    known = (value.dtype in also and many_rows) or (value.dtype == torch.bfloat16 and has_avx512_bf16())
    return device == "cpu" and is_small and known


def has_fp32_kernel(device: str, x: fx.Node, small: fx.Node, rank: int = -1) -> bool:
    """The same of ``x`` in fp32 alone, for one site: in bf16 the libraries are as fast for its shrink."""
    return node_value(x).dtype == torch.float32 and has_kernel(device, x, small, torch.float32, rank=rank)


def _whole(lists: int, seeds: int, rank: int | None = None) -> Callable[..., bool]:
    """On a CPU, what a kernel does, and several sites together: joining and cutting are kernels that take longer to
    compile than to run. Not where products are better made in another dtype, which needs them in the graph. Of one site
    alone in fp32, if its ``rank`` is a dimension of what is in the list."""

    def whole(device: str, *args: Any) -> bool:
        if device != "cpu":
            return False
        parts, x = args[lists], args[1 - lists]
        if len(parts) > 1 or args[seeds]:
            dtype = node_value(x).dtype
            return dtype in skinny.DTYPES or not cpu_emulates(dtype)
        return rank is not None and has_fp32_kernel(device, x, parts[0], rank)

    return whole


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
        body=shrink_body, fake=shrink_fake, cost=shrink_cost, sample=shrink_sample, kernel=shrink_kernel,
        whole=_whole(1, seeds=3, rank=0),
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
        kernel=factor_grads_kernel, whole=_whole(0, seeds=3, rank=-1),
    )
)  # fmt: skip
LORA_INPUT_GRADS = dialect.define(
    DialectOp(
        name="lora_input_grads", schema="(Tensor dx, Tensor[] q, Tensor[] A, Tensor[] seeds, float[] p) -> Tensor",
        body=input_grads_body, fake=input_grads_fake, cost=input_grads_cost, sample=input_grads_sample,
        kernel=input_grads_kernel, whole=_whole(1, seeds=3),
    )
)  # fmt: skip
