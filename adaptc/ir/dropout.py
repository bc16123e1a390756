"""Dropout whose mask is a function of a seed and the position: regenerated where it is read, never stored.

    y = seeded_dropout(x, seeds, index, p)      x (..., K), seeds (n,) int64

    keep(i, k) = hash(seeds[index], i, k) + 2^31 >= p * 2^32        i: row of the flattened leading dimensions
    y = x / (1 - p) where kept, else 0

The hash is a counter-based generator: two rounds of the multiply-xorshift mixer of C. Wellons ("lowbias32", public
domain) over the column, keyed by two 32-bit words that the same mixer makes of the row and the seed. Words are int32
and wrap; every device gives the same bits, whatever order or tiles it works in.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from adaptc.ir import dialect
from adaptc.ir.derive import inline
from adaptc.ir.dialect import Cost, DialectOp
from adaptc.ir.lora import draw_tensor

_FIRST, _SECOND = 0x7FEB352D, 0x846CA68B - 2**32
#: The odd number next to 2^32 over the golden ratio.
_SPREAD = 0x9E3779B1 - 2**32
#: Integer operations an element: 2 products, and 3 shifts, masks and exclusive ors, and the keys and comparison.
_OPERATIONS = 16


def _xorshift(h: torch.Tensor, bits: int) -> torch.Tensor:
    # torch's shift of int32 copies the sign; the mask makes it the shift of an unsigned word.
    return h ^ ((h >> bits) & ((1 << (32 - bits)) - 1))


def _mixed(h: torch.Tensor) -> torch.Tensor:
    return _xorshift(_xorshift(_xorshift(h, 16) * _FIRST, 15) * _SECOND, 16)


def keep_mask(x: torch.Tensor, seeds: torch.Tensor, index: int, p: float) -> torch.Tensor:
    """Which elements of ``x`` (..., K) are kept, in its shape."""
    seed = seeds[index]
    low, high = (seed & 0xFFFFFFFF).to(torch.int32), (seed >> 32).to(torch.int32)
    *lead, width = x.shape
    rows = torch.arange(math.prod(lead), dtype=torch.int32, device=x.device).view(*lead, 1)
    # Two keys a row: rows that meet in one of them still have masks of their own. Spread, because close seeds would
    # otherwise have the same keys for other rows.
    row = _mixed(rows * _SPREAD + low)
    other = _mixed(row ^ high)
    h = torch.arange(width, dtype=torch.int32, device=x.device) ^ row
    h = (_xorshift(h, 16) * _FIRST) ^ other
    h = _xorshift(_xorshift(h, 15) * _SECOND, 16)
    return h >= min(math.floor(p * 2**32), 2**32 - 1) - 2**31


def body(x: torch.Tensor, seeds: torch.Tensor, index: int, p: float) -> torch.Tensor:
    wide = torch.float32 if x.dtype.itemsize < 4 else x.dtype
    scaled = (x.to(wide) * (1 / (1 - p) if p < 1 else 0.0)).to(x.dtype)
    zero = torch.zeros((), dtype=x.dtype, device=x.device)
    return torch.where(keep_mask(x, seeds, index, p), scaled, zero).contiguous()


def fake(x: torch.Tensor, seeds: torch.Tensor, index: int, p: float) -> torch.Tensor:
    return x.new_empty(x.shape)


def save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, seeds, ctx.index, ctx.p = inputs
    ctx.save_for_backward(seeds)


def gradient(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """The op is linear and its own transpose, so its derivatives of every order are the op again."""
    return dialect.get("seeded_dropout").overload(grad, *ctx.saved_tensors, ctx.index, ctx.p), None, None, None


def cost(x: torch.Tensor, seeds: torch.Tensor, index: int, p: float) -> Cost:
    count = math.prod(int(s) for s in x.shape)
    size = count * x.dtype.itemsize
    return Cost(flops=_OPERATIONS * count, read=size, written=size)


def sample(draw: Any) -> tuple[Any, ...]:
    from hypothesis import strategies as st

    shape = draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
    seeds = torch.tensor(draw(st.lists(st.integers(0, 2**62 - 1), min_size=1, max_size=3)))
    index = draw(st.integers(0, len(seeds) - 1))
    return draw_tensor(draw, tuple(shape), dtype), seeds, index, draw(st.floats(0, 1))


DROPOUT = dialect.define(
    DialectOp(
        name="seeded_dropout",
        schema="(Tensor x, Tensor seeds, int index, float p) -> Tensor",
        body=body,
        fake=fake,
        save=save,
        gradient=gradient,
        cost=cost,
        sample=sample,
        lowering=inline("seeded_dropout"),
        recomputed=True,
    )
)
