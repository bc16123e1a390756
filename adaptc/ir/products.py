"""Reading the frozen layers' products with weights in a joint graph."""

from __future__ import annotations

import operator
from typing import NamedTuple

import torch
from torch import fx

from adaptc.ir import dialect
from adaptc.ir.names import op_name
from adaptc.torch_internals import node_value

aten = torch.ops.aten
VIEWS = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)
_TRANSPOSES = (aten.permute.default, aten.t.default, aten.transpose.int)
_CASTS = (aten._to_copy.default, torch.ops.prims.convert_element_type.default)


class Product(NamedTuple):
    """x (M, K) times ``right`` (K, N), plus ``bias`` (N,): ``node``, read through ``views`` alone, the last of which is
    what was asked for. ``right`` is an input of the graph, its transpose, or that in another dtype."""

    node: fx.Node
    views: tuple[fx.Node, ...]
    x: fx.Node
    right: fx.Node
    bias: fx.Node | None

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        return (self.node, *self.views)

    @property
    def is_read_once(self) -> bool:
        return all(len(node.users) == 1 for node in self.nodes)

    @property
    def weight(self) -> fx.Node:
        """The graph's input."""
        return _below(self.right, (*_TRANSPOSES, *_CASTS))

    @property
    def is_plain(self) -> bool:
        """Whether ``right`` lies in memory as the weight does: of fixed sizes, in rows or columns without gaps."""
        value = node_value(self.right)
        if _below(self.right, _TRANSPOSES) is not self.weight or not all(isinstance(s, int) for s in value.shape):
            return False
        return bool(value.is_contiguous() or value.t().is_contiguous())

    @property
    def is_transposed(self) -> bool:
        """Whether ``right`` is the weight with its dimensions swapped."""
        swaps, node = 0, self.right
        while node.target in (*_TRANSPOSES, *_CASTS):
            swaps += node.target in _TRANSPOSES
            node = node.args[0]  # type: ignore[assignment]
        return swaps % 2 == 1


def frozen_product(y: fx.Node) -> Product | str:
    """The product with a weight that ``y`` is, or why it is none."""
    node = without_views(y)
    source = node.args[0] if node.target is operator.getitem else node
    if isinstance(source, fx.Node) and dialect.of_target(source.target) is not None:
        return "another op of an adapter stands between it and its frozen layer"
    if node.kwargs or node.target not in (aten.mm.default, aten.addmm.default):
        what = "an input of the graph" if node.op == "placeholder" else op_name(node)
        return f"its frozen layer is no product with a weight, but ends in {what}"
    bias, x, right = node.args if node.target is aten.addmm.default else (None, *node.args)
    assert isinstance(x, fx.Node) and isinstance(right, fx.Node) and (bias is None or isinstance(bias, fx.Node))
    product = Product(node, tuple(views_down_to(y, node)), x, right, bias)
    weight = product.weight
    if weight.op != "get_attr" and (weight.op != "placeholder" or weight.name.startswith("tangents")):
        return "its frozen layer multiplies by what is computed: a weight that is dequantised, or has an update"
    if bias is not None and node_value(bias).dim() != 1:
        return "its frozen layer adds another tensor than a bias"
    return product


def without_views(node: fx.Node) -> fx.Node:
    """The node that ``node`` is another shape of, if any."""
    return _below(node, VIEWS)


def _below(node: fx.Node, targets: tuple[object, ...]) -> fx.Node:
    while node.target in targets and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def views_down_to(node: fx.Node, source: fx.Node) -> list[fx.Node]:
    """The nodes from ``source``, which is left out, to ``node``, each of which reads the one before."""
    found = []
    while node is not source:
        found.append(node)
        assert isinstance(node.args[0], fx.Node)
        node = node.args[0]
    return found[::-1]
