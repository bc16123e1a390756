"""What LoRA's ops become that are not shared by sites: products of the library."""

from __future__ import annotations

import torch
from torch import fx

from adaptc.codegen.ops import emit
from adaptc.codegen.ops.row import Row
from adaptc.ir.edit import Edit
from adaptc.torch_internals import node_value

aten = torch.ops.aten


def linear(
    edit: Edit, x: fx.Node, y: fx.Node, A: fx.Node, B: fx.Node, scale: fx.Node, scale_at: str
) -> tuple[fx.Node, ...]:
    dtype = node_value(x).dtype
    h = edit.call(aten.mm.default, emit.rows(edit, x), emit.transposed(edit, emit.cast(edit, A, dtype)))
    expand = emit.transposed(edit, emit.cast(edit, B, dtype))
    if scale_at == "r":
        h = emit.scaled(edit, h, scale)
        out = edit.call(aten.addmm.default, emit.rows(edit, y), h, expand)
    else:
        product = edit.call(aten.mm.default, h, expand)
        out = edit.call(aten.add.Tensor, emit.rows(edit, y), emit.scaled(edit, product, scale))
        if not node_value(out).is_contiguous():  # the sum takes y's layout
            out = edit.call(aten.clone.default, out, memory_format=torch.contiguous_format)
    return emit.like(edit, out, y), emit.like(edit, h, x)


def bottleneck_grad(edit: Edit, grad: fx.Node, B: fx.Node, scale: fx.Node) -> tuple[fx.Node, ...]:
    q = edit.call(aten.mm.default, emit.rows(edit, grad), emit.cast(edit, B, node_value(grad).dtype))
    return (emit.like(edit, emit.scaled(edit, q, scale), grad),)


def factor_grad(edit: Edit, left: fx.Node, right: fx.Node, dtype: torch.dtype) -> tuple[fx.Node, ...]:
    product = edit.call(aten.mm.default, emit.transposed(edit, emit.rows(edit, left)), emit.rows(edit, right))
    return (emit.cast(edit, product, dtype),)


def input_grad(edit: Edit, q: fx.Node, A: fx.Node) -> tuple[fx.Node, ...]:
    dx = edit.call(aten.mm.default, emit.rows(edit, q), emit.cast(edit, A, node_value(q).dtype))
    return (emit.like(edit, dx, q),)


ROWS = {
    "lora_linear": Row(linear),
    "lora_bottleneck_grad": Row(bottleneck_grad),
    "lora_factor_grad": Row(factor_grad),
    "lora_input_grad": Row(input_grad),
}
