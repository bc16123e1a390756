"""Reading the base model's products with weights in a joint graph."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import fx

from adaptc.codegen.torch_internals import node_value
from adaptc.ir.sites import is_inserted

aten = torch.ops.aten
TRANSPOSES = (aten.permute.default, aten.t.default, aten.transpose.int)
VIEWS = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)


class Product(NamedTuple):
    """x (M, K) times the node ``right`` (K, N), which is a weight or a transpose of one, plus ``bias`` (N,)."""

    x: fx.Node
    right: fx.Node
    bias: fx.Node | None

    @property
    def weight(self) -> fx.Node:
        """The graph's input."""
        return without_transposes(self.right)


def frozen_product(node: object) -> Product | None:
    """The product that a node is, if it is the base model's with a weight of fixed sizes that lies in rows or columns
    without gaps."""
    if not isinstance(node, fx.Node) or is_inserted(node) or node.kwargs:
        return None
    if node.target is aten.mm.default:
        (x, right), bias = node.args, None
    elif node.target is aten.addmm.default:
        bias, x, right = node.args
    else:
        return None
    values = [node_value(n) for n in (x, right, bias) if isinstance(n, fx.Node)]
    if any(not isinstance(v, torch.Tensor) for v in values) or not _is_weight(right):
        return None
    if any(v.shape != values[1].shape[1:] for v in values[2:]):
        return None
    return Product(x, right, bias)  # type: ignore[arg-type]


def _is_weight(node: object) -> bool:
    """Whether a node is an input of the graph of fixed sizes, or its transpose: rows or columns without gaps."""
    if not isinstance(node, fx.Node) or not all(isinstance(size, int) for size in node_value(node).shape):
        return False
    value = node_value(node)
    if not (value.is_contiguous() or value.t().is_contiguous()):
        return False
    return without_transposes(node).op in ("placeholder", "get_attr")


def without_views(node: fx.Node) -> fx.Node:
    """The node that ``node`` is another shape of, if any."""
    while node.target in VIEWS and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def without_transposes(node: fx.Node) -> fx.Node:
    """The node that ``node`` is a transpose of, if any."""
    while node.target in TRANSPOSES and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def views_down_to(node: fx.Node, source: fx.Node) -> list[fx.Node]:
    """The views that make ``node`` of ``source``, ``node`` last; not ``source``."""
    found = []
    while node is not source:
        found.append(node)
        assert isinstance(node.args[0], fx.Node)
        node = node.args[0]
    return found[::-1]
