"""Read the products that PEFT's LoRA layers write as adapters, in a graph captured from a PEFT model.

before:  %y = linear(%x, %W);  %d = dropout(%x.to(f32), 0.05, True)
         %u = linear(linear(%d, %A), %B);  %out = (%y + %u * 2.0).to(bf16)
after:   %y = linear(%x, %W);  %d = dropout(%x, 0.05, True);  %s = full((1,), 2.0)
         %t = lora_linear(%d, %y, %A, %B, %s, "n");  %out = %t[0]

As ``adaptc.compile`` has it: in the dtype of the frozen layer's output, to which factors are cast instead of the
activation. Factors are known by where Dynamo read them (``lora_A``, ``lora_B``), their products by their form. What has
another form is left as it was, with the reason.
"""

from __future__ import annotations

import dataclasses
import operator
import re
from collections.abc import Iterator, Mapping
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import fx

from adaptc.ir.edit import Edit, Result, in_bodies
from adaptc.ir.effects import barrier
from adaptc.ir.names import module_path
from adaptc.ir.sites import adapter_below, cast_dtype, dropout_of, is_cast
from adaptc.methods.lora.linear import expand_site
from adaptc.passes.contract import Context, Contract
from adaptc.passes.walk import Match, Refusal, everywhere
from adaptc.torch_internals import node_value, source_name

CONTRACT = Contract(level="dynamo", numerics="approximate", provides=frozenset({"inserted"}))


class _OtherForm(Exception):  # noqa: N818  # says why a site is left as it is
    pass


@dataclasses.dataclass
class _Layer:
    """One LoRA layer's nodes: its products in graph order, and what they read."""

    matched: list[fx.Node]
    x: fx.Node
    y: fx.Node
    A: fx.Node
    B: fx.Node
    scale: float
    dropout: float
    training: bool


def raise_peft(gm: fx.GraphModule, context: Context) -> Result:
    inputs = {n: source for n in gm.graph.find_nodes(op="placeholder") if (source := source_name(n))}
    return everywhere(gm, (partial(_raise, in_bodies(gm, inputs)),), context)


def _raise(sources: Mapping[fx.Node, str], gm: fx.GraphModule, context: Context) -> Iterator[Match | Refusal]:
    for A in gm.graph.find_nodes(op="placeholder"):
        source = sources.get(A, "")
        if not re.search(r"\blora_(embedding_)?A\b", source):
            continue
        for reader in sorted(A.users):
            if reader.target is torch.ops.higher_order.tag_activation_checkpoint:
                continue  # a body's operand: read inside
            try:
                layer = _match(A, reader, sources)
            except _OtherForm as reason:
                yield Refusal(site_path(source), str(reason))
                continue
            total = layer.matched[-1]
            yield Match(total, partial(_write, layer), layer.matched, [total], site_path(source))


def _match(A: fx.Node, first: fx.Node, sources: Mapping[fx.Node, str]) -> _Layer:
    """The layer whose first product is ``first``.

    Raises:
        _OtherForm: it is not that of a linear LoRA layer; says what is different.
    """
    if not _is_product(first) or first.args[1] is not A:
        raise _OtherForm("its first factor is not the weight of a linear layer")
    second = _reader(first, "its bottleneck")
    if not _is_product(second) or second.args[0] is not first:
        raise _OtherForm("its bottleneck is not the input of one linear layer without a bias")
    B = cast(fx.Node, second.args[1])
    if "lora_B" not in sources.get(B, ""):
        raise _OtherForm("its second factor is not read from the model")
    scaled = _reader(second, "its product")
    if scaled.target is not operator.mul or not isinstance(scaled.args[1], float | int):
        raise _OtherForm("its product is not scaled by a number")
    total = _reader(scaled, "its scaled product")
    y = total.args[0]
    if total.target is not operator.add or total.args[1] is not scaled or not isinstance(y, fx.Node):
        raise _OtherForm("its scaled product is not added to the layer's output")
    product, output = node_value(second), node_value(y)
    if not isinstance(output, torch.Tensor) or output.shape != product.shape:
        raise _OtherForm("the layer's output has another shape than its product")
    x, dropout, training, before = _input(cast(fx.Node, first.args[0]))
    matched = [*before, first, second, scaled, total]
    if is_cast(y) and adapter_below(y) is not None and len(y.users) == 1:
        # Another adapter of the site, whose sum PEFT keeps in the factors' dtype.
        matched.append(y)
        y = cast(fx.Node, y.args[0])
    after = next(iter(total.users)) if len(total.users) == 1 else total
    if cast_dtype(after) == node_value(y).dtype:
        matched.append(after)
    matched.sort()
    if reason := barrier(matched[0], matched[-1]):
        raise _OtherForm(f"{reason} between its products")
    return _Layer(matched, x, y, A, B, float(scaled.args[1]), dropout, training)


def _is_product(node: fx.Node) -> bool:
    bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
    return node.target is F.linear and len(node.args) > 1 and bias is None


def _reader(node: fx.Node, what: str) -> fx.Node:
    if len(node.users) != 1:
        raise _OtherForm(f"{what} is read {len(node.users)} times")
    return next(iter(node.users))


def _input(node: fx.Node) -> tuple[fx.Node, float, bool, list[fx.Node]]:
    """What a first product reads, before it is dropped and cast: (it, p, training, nodes in between)."""
    before: list[fx.Node] = []
    p, training = 0.0, False
    dropout = dropout_of(node)
    if dropout is not None and len(node.users) == 1:
        before.append(node)
        node, p, training = dropout
    if is_cast(node):
        source = cast(fx.Node, node.args[0])
        wide, narrow = node_value(node).dtype, node_value(source).dtype
        if torch.promote_types(wide, narrow) == wide:  # to the factors' dtype: nothing is lost without it
            before.append(node)
            node = source
    return node, p, training, before


def _write(layer: _Layer, edit: Edit) -> fx.Node:
    scale = edit.call(torch.full, (1,), layer.scale, dtype=torch.float64, device=node_value(layer.y).device)
    out = expand_site(edit, layer.x, layer.y, scale, layer.A, layer.B, scale, layer.dropout, layer.training, None)
    return edit.cast(out, node_value(layer.matched[-1]).dtype)


def site_path(source: str) -> str:
    """``model.layers.0.mlp.up_proj`` of where Dynamo read one of its factors."""
    return re.sub(r"(^|\.)lora_.*", "", module_path(source))


__all__ = ["CONTRACT", "raise_peft", "site_path"]
