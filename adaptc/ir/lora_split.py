"""LoRA's products on their own, for sites that read one value (Hu et al. 2021; section 4.1 of the same).

    h_1, ... = lora_shrink(x, A, scale)              h_g = scale_g * (x A_g^T)       one pass over x
    y'       = lora_expand(y, h, B)                  y' = y + h B^T
    d_1, ... = lora_factor_grads(left, right, dtype) d_g = left_g^T right            one pass over right
    dx'      = lora_input_grads(dx, q, A)            dx' = dx + sum_g q_g A_g        one pass over dx

Lists have one entry a site. On joint graphs only: they are parts of a forward and a backward that are both there, so
they have no gradients of their own. Factors are cast to the dtype of what they multiply.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from adaptc.codegen.torch_internals import cpu_emulates, node_value
from adaptc.ir import dialect
from adaptc.ir.dialect import Cost, DialectOp
from adaptc.ir.lora import draw_dtypes, draw_tensor, rows, scaled


def shrink_body(x: torch.Tensor, A: Sequence[torch.Tensor], scale: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    wide = rows(x) @ torch.cat([a.to(x.dtype) for a in A]).t()
    parts = torch.split(wide, [a.shape[0] for a in A], dim=1)
    return [scaled(h, s).contiguous().view(*x.shape[:-1], -1) for h, s in zip(parts, scale, strict=True)]


def shrink_fake(x: torch.Tensor, A: Sequence[torch.Tensor], scale: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [x.new_empty((*x.shape[:-1], a.shape[0])) for a in A]


def expand_body(y: torch.Tensor, h: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    return torch.addmm(rows(y), rows(h), B.to(h.dtype).t()).view(y.shape)


def expand_fake(y: torch.Tensor, h: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    return y.new_empty(y.shape)


def factor_grads_body(left: Sequence[torch.Tensor], right: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
    together = (torch.cat([rows(t) for t in left], dim=1).t() @ rows(right)).to(dtype)
    return [part.clone() for part in torch.split(together, [t.shape[-1] for t in left])]


def factor_grads_fake(left: Sequence[torch.Tensor], right: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
    return [t.new_empty((t.shape[-1], right.shape[-1]), dtype=dtype) for t in left]


def input_grads_body(dx: torch.Tensor, q: Sequence[torch.Tensor], A: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.addmm(rows(dx), *_joined(dx, q, A)).view(dx.shape)


def add_input_grads(dx: torch.Tensor, q: Sequence[torch.Tensor], A: Sequence[torch.Tensor]) -> None:
    """The same in the memory of ``dx`` (rows, k), which is contiguous."""
    dx.addmm_(*_joined(dx, q, A))


def _joined(
    dx: torch.Tensor, q: Sequence[torch.Tensor], A: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.cat([rows(t) for t in q], dim=1), torch.cat([a.to(dx.dtype) for a in A])


def _whole(lists: int) -> Callable[..., bool]:
    """On a CPU, several sites together: joining and cutting are kernels that take longer to compile than to run. Not
    where products are better made in another dtype, which needs them in the graph."""

    def whole(device: str, *args: Any) -> bool:
        return device == "cpu" and len(args[lists]) > 1 and not cpu_emulates(node_value(args[1 - lists]).dtype)

    return whole


def input_grads_fake(dx: torch.Tensor, q: Sequence[torch.Tensor], A: Sequence[torch.Tensor]) -> torch.Tensor:
    return dx.new_empty(dx.shape)


def _bytes(*tensors: torch.Tensor) -> int:
    return sum(math.prod(int(s) for s in t.shape) * t.dtype.itemsize for t in tensors)


def _product(left: torch.Tensor, ranks: int, width: int) -> int:
    return 2 * math.prod(int(s) for s in left.shape[:-1]) * ranks * width


def shrink_cost(x: torch.Tensor, A: Sequence[torch.Tensor], scale: Sequence[torch.Tensor]) -> Cost:
    out = shrink_fake(x, A, scale)
    ranks = sum(int(a.shape[0]) for a in A)
    scaling = sum(math.prod(int(s) for s in h.shape) for h in out)
    flops = _product(x, ranks, int(x.shape[-1])) + scaling
    return Cost(flops=flops, read=_bytes(x, *A), written=_bytes(*out), saved=_bytes(*out))


def expand_cost(y: torch.Tensor, h: torch.Tensor, B: torch.Tensor) -> Cost:
    sums = math.prod(int(s) for s in y.shape)
    flops = _product(h, int(h.shape[-1]), int(y.shape[-1])) + sums
    return Cost(flops=flops, read=_bytes(y, h, B), written=_bytes(y))


def factor_grads_cost(left: Sequence[torch.Tensor], right: torch.Tensor, dtype: torch.dtype) -> Cost:
    out = factor_grads_fake(left, right, dtype)
    flops = _product(right, sum(int(t.shape[-1]) for t in left), int(right.shape[-1]))
    return Cost(flops=flops, read=_bytes(right, *left), written=_bytes(*out))


def input_grads_cost(dx: torch.Tensor, q: Sequence[torch.Tensor], A: Sequence[torch.Tensor]) -> Cost:
    sums = math.prod(int(s) for s in dx.shape)
    flops = _product(dx, sum(int(t.shape[-1]) for t in q), int(dx.shape[-1])) + sums
    return Cost(flops=flops, read=_bytes(dx, *q, *A), written=_bytes(dx))


def _sizes(draw: Any) -> tuple[tuple[int, ...], int, list[int]]:
    from hypothesis import strategies as st

    batch = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=2)))
    return batch, draw(st.integers(1, 9)), draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))


def shrink_sample(draw: Any) -> tuple[Any, ...]:
    from hypothesis import strategies as st

    batch, k, ranks = _sizes(draw)
    compute, factors = draw_dtypes(draw)
    A = [draw_tensor(draw, (r, k), factors) for r in ranks]
    scales = [draw_tensor(draw, draw(st.sampled_from([(1,), (r,)])), torch.float64) for r in ranks]
    return draw_tensor(draw, (*batch, k), compute), A, scales


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
    return left, draw_tensor(draw, (*batch, k), compute), factors


def input_grads_sample(draw: Any) -> tuple[Any, ...]:
    batch, k, ranks = _sizes(draw)
    compute, factors = draw_dtypes(draw)
    q = [draw_tensor(draw, (*batch, r), compute) for r in ranks]
    return draw_tensor(draw, (*batch, k), compute), q, [draw_tensor(draw, (r, k), factors) for r in ranks]


LORA_SHRINK = dialect.define(
    DialectOp(
        name="lora_shrink", schema="(Tensor x, Tensor[] A, Tensor[] scale) -> Tensor[]",
        body=shrink_body, fake=shrink_fake, cost=shrink_cost, sample=shrink_sample, whole=_whole(1),
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
        name="lora_factor_grads", schema="(Tensor[] left, Tensor right, ScalarType dtype) -> Tensor[]",
        body=factor_grads_body, fake=factor_grads_fake, cost=factor_grads_cost, sample=factor_grads_sample,
        whole=_whole(0),
    )
)  # fmt: skip
LORA_INPUT_GRADS = dialect.define(
    DialectOp(
        name="lora_input_grads", schema="(Tensor dx, Tensor[] q, Tensor[] A) -> Tensor",
        body=input_grads_body, fake=input_grads_fake, cost=input_grads_cost, sample=input_grads_sample,
        whole=_whole(1),
    )
)  # fmt: skip
