"""The anchor of a DoRA site (Liu et al. 2024): a LoRA whose corrected rows are rescaled to trained lengths.

    V = W + s B A        c = m / |V|_row        y' = y + (c - 1) * z + c * s * drop(x) A^T B^T

z is the frozen layer's output without its bias; under dropout it is drop(x) W^T, a second product with W, as in
PEFT. The row norms are constants of the backward pass. ``LoRA(dora=True)`` is the method.

Without dropout that is a LoRA and a factor per column, y' = c * (y + s * x A^T B^T) + (1 - c) * bias. The pass
``canonicalise`` writes it so where its rounding in between does no harm: in fp32 and fp64. Whatever makes LoRA faster
then does so here, and the factors become part of what reads y'. At c = 1 without a correction y' is y to the bit in
either form.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import fx, nn

from adaptc.ir.edit import Edit
from adaptc.ir.ops.dora import DORA_LINEAR, DORA_ROW_NORM, linear_body, row_norm
from adaptc.methods.base import Anchor
from adaptc.methods.lora.site import compute_in
from adaptc.torch_internals import node_value


def refusal(module: nn.Module) -> str | None:
    """Why the row norms of ``module``'s weight cannot be computed, or None when they can."""
    weight = module.weight
    if type(weight) not in (nn.Parameter, torch.Tensor) or weight.layout != torch.strided:
        kind = type(weight).__name__
        return f"DoRA reads the weight's values in every step, and this one is no plain dense tensor ({kind})"
    return None


@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]
def dora_site(
    x: torch.Tensor, y: torch.Tensor, site_id: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None,
    A: torch.Tensor, B: torch.Tensor, magnitude: torch.Tensor, scale: torch.Tensor, dropout: float, training: bool,
    compute_dtype: str | None, transposed: bool,
) -> torch.Tensor:  # fmt: skip
    """The anchor of a DoRA site, and its reference."""
    dtype = compute_in(y, compute_dtype)
    with torch.autocast(x.device.type, enabled=False):
        dropped = F.dropout(x.to(dtype), dropout, training)
        base = None
        if training and dropout > 0:
            # In the dtype in which the layer computed y: no copy of W in another.
            W = weight.to(y.dtype)
            base = F.linear(dropped.to(y.dtype), W.t() if transposed else W).to(dtype)
        norm = row_norm(weight, A, B, scale, transposed)
        return linear_body(dropped, y.to(dtype), base, bias, A, B, magnitude, norm, scale)[0].to(y.dtype)


def expand_site(
    edit: Edit, x: fx.Node, y: fx.Node, site_id: fx.Node, weight: fx.Node, bias: fx.Node | None, A: fx.Node, B: fx.Node,
    magnitude: fx.Node, scale: fx.Node, dropout: float, training: bool, compute_dtype: str | None, transposed: bool,
) -> fx.Node:  # fmt: skip
    """The anchor's body in the dialect, with its casts written out."""
    value = node_value(y)
    dtype = compute_in(value, compute_dtype)
    norm = edit.call(DORA_ROW_NORM.overload, weight, A, B, scale, transposed)
    dropped = edit.call(F.dropout, edit.cast(x, dtype), dropout, training)
    base = None
    if training and dropout > 0:
        W = edit.cast(weight, value.dtype)
        W = edit.call("t", W) if transposed else W
        base = edit.cast(edit.call(F.linear, edit.cast(dropped, value.dtype), W), dtype)
    operands = (dropped, edit.cast(y, dtype), base, bias, A, B, magnitude, norm, scale)
    corrected = edit.item(edit.call(DORA_LINEAR.overload, *operands), 0)
    return edit.cast(corrected, value.dtype)


ANCHORS = (Anchor(dora_site, expand_site),)
