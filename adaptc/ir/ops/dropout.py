"""Dropout whose mask is a function of a seed and the position: regenerated where it is read, never stored.

    y = seeded_dropout(x, seed, p)      x (..., K), seed (1,) int64

    keep(i, k) = hash(seed, i, k) + 2^31 >= p * 2^32        i: row of the flattened leading dimensions
    y = x / (1 - p) where kept, else 0

The hash is a counter-based generator: two multiply-xorshift rounds (the multipliers and shifts are those of C. Wellons'
"lowbias32", public domain) over a Weyl sequence in the column, keyed by two more in the row that start at what the
halves of the seed give. Only its upper bits decide, so the last xorshift is left out. Words are int32 and wrap; every
device gives the same bits, whatever order or tiles it works in. It is written so that a compiler that inlines values
where they are read meets few of them twice.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from adaptc.ir import dialect
from adaptc.ir.dialect import Cost, DialectOp
from adaptc.ir.ops.lora import draw_tensor

#: The multipliers. Odd increments of the sequences, for the column and for the two keys of a row; 2^32 over the golden
#: ratio and over the roots of x^3 = x + 1 and x^4 = x + 1, nearly. And what joins the halves of the seed.
HASH = {
    "FIRST": 0x7FEB352D, "SECOND": 0x846CA68B - 2**32,
    "COLUMN": 0x9E3779B1 - 2**32, "ROW": 0xC13FA9A9 - 2**32, "OTHER_ROW": 0xD1B54A33 - 2**32,
    "JOIN": 0x85EBCA6B - 2**32,
}  # fmt: skip
#: Integer operations an element: 3 products, 2 shifts, masks and exclusive ors, the key and the comparison.
_OPERATIONS = 12


def threshold(p: float) -> int:
    """The 32-bit word from which on a hash keeps its element."""
    return min(math.floor(p * 2**32), 2**32 - 1)


def kept_scale(p: float) -> float:
    """What a kept element is multiplied by."""
    return 1 / (1 - p) if p < 1 else 0.0


def _xorshift(h: torch.Tensor, bits: int) -> torch.Tensor:
    # torch's shift of int32 copies the sign; the mask makes it the shift of an unsigned word.
    return h ^ ((h >> bits) & ((1 << (32 - bits)) - 1))


def keep_mask(x: torch.Tensor, seed: torch.Tensor, p: float) -> torch.Tensor:
    """Which elements of ``x`` (..., K) are kept, in its shape."""
    low, high = (seed & 0xFFFFFFFF).to(torch.int32), (seed >> 32).to(torch.int32)
    *lead, width = x.shape
    rows = torch.arange(math.prod(lead), dtype=torch.int32, device=x.device).view(*lead, 1)
    columns = torch.arange(width, dtype=torch.int32, device=x.device)
    h = columns * HASH["COLUMN"] + (rows * HASH["ROW"] + (low + high * HASH["JOIN"]))
    h = (_xorshift(h, 16) * HASH["FIRST"]) ^ (rows * HASH["OTHER_ROW"] + high)
    h = _xorshift(h, 15) * HASH["SECOND"]
    return h >= threshold(p) - 2**31


def body(x: torch.Tensor, seed: torch.Tensor, p: float) -> torch.Tensor:
    wide = torch.float32 if x.dtype.itemsize < 4 else x.dtype
    scaled = (x.contiguous().to(wide) * kept_scale(p)).to(x.dtype)
    zero = torch.zeros((), dtype=x.dtype, device=x.device)
    return torch.where(keep_mask(x, seed, p), scaled, zero)


def fake(x: torch.Tensor, seed: torch.Tensor, p: float) -> torch.Tensor:
    return x.new_empty(x.shape)


def save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, seed, ctx.p = inputs
    ctx.save_for_backward(seed)


def gradient(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """The op is linear and its own transpose, so its derivatives of every order are the op again."""
    return dialect.get("seeded_dropout").overload(grad, *ctx.saved_tensors, ctx.p), None, None


def cost(x: torch.Tensor, seed: torch.Tensor, p: float) -> Cost:
    count = math.prod(int(s) for s in x.shape)
    size = count * x.dtype.itemsize
    return Cost(flops=_OPERATIONS * count, read=size, written=size)


def sample(draw: Any) -> tuple[Any, ...]:
    from hypothesis import strategies as st

    shape = draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
    seed = torch.tensor([draw(st.integers(0, 2**62 - 1))])
    return draw_tensor(draw, tuple(shape), dtype), seed, draw(st.floats(0, 1))


DROPOUT = dialect.define(
    DialectOp(
        name="seeded_dropout",
        schema="(Tensor x, Tensor seed, float p) -> Tensor",
        body=body,
        fake=fake,
        save=save,
        gradient=gradient,
        cost=cost,
        sample=sample,
        recomputed=True,
    )
)
