"""What LoRA's products together with the frozen layer's become: the frozen layer's, and what is left beside them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from adaptc.codegen.cpp.takes import MOST_RANKS, stays
from adaptc.codegen.ops import emit
from adaptc.codegen.ops.lora import bottleneck_grad, factor_grad
from adaptc.codegen.ops.lora_split import product_kernels
from adaptc.codegen.ops.row import Row, on_cpu
from adaptc.ir.edit import Edit
from adaptc.ir.origin import origins

aten = torch.ops.aten


def _frozen(edit: Edit, index: int, like: fx.Node, x: fx.Node, right: fx.Node, bias: fx.Node | None = None) -> fx.Node:
    """x right + bias with the leading dimensions of ``like``: the base model's product whose origin the node to be
    lowered keeps as its ``index``-th, where that was; an adapter's own if it keeps none."""
    known = origins(edit.position)
    origin = known[index] if known else None
    given = [node for node in (x, right, bias) if node is not None]
    with edit.in_place_of(origin, given):
        pair = emit.rows(edit, x), right
        product = edit.call(aten.mm.default, *pair) if bias is None else edit.call(aten.addmm.default, bias, *pair)
    with edit.in_place_of(origin):
        return emit.like(edit, product, like)


#: An op without the frozen layer's products, and its arguments.
_Rest = tuple[str, tuple[Any, ...]]


def _split_linear_expand(
    edit: Edit, x: fx.Node, right: fx.Node, bias: fx.Node | None, h: fx.Node, B: fx.Node
) -> _Rest:
    return "lora_expand", (_frozen(edit, 0, h, x, right, bias), h, B)


def _split_linear_input_grads(
    edit: Edit, grad: Sequence[fx.Node], right: Sequence[fx.Node], q: Sequence[fx.Node], *rest: Any
) -> _Rest:
    pairs = zip(grad, right, strict=True)
    dx, *others = [_frozen(edit, i, q[0], one, weight) for i, (one, weight) in enumerate(pairs)]
    for other in others:
        dx = edit.call(aten.add.Tensor, dx, other)
    return "lora_input_grads", (dx, q, *rest)


def _bottleneck_grads(
    edit: Edit, grad: fx.Node, h: fx.Node, B: fx.Node, scale: fx.Node, dtype: torch.dtype
) -> tuple[fx.Node, ...]:
    return (*bottleneck_grad(edit, grad, B, scale), *factor_grad(edit, grad, h, dtype))


ROWS = {
    "lora_linear_expand": Row(split=_split_linear_expand),
    "lora_bottleneck_grads": Row(
        _bottleneck_grads, product_kernels("both", lambda grad, h, *others: (grad, h.shape[-1], False), MOST_RANKS),
        whole=lambda device, grad, h, *others: on_cpu(device) and stays(grad, h.shape[-1]),
    ),
    "lora_linear_input_grads": Row(split=_split_linear_input_grads),
}  # fmt: skip
