"""Reading the products of frozen layers, and remembering what they were."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import fx

from adaptc.codegen.torch_internals import node_value, tree_leaves
from adaptc.ir import dialect
from adaptc.ir.names import op_name
from adaptc.ir.origin import Origin, checkpoint_marks, keep_origins, origin_of
from adaptc.ir.products import TRANSPOSES, VIEWS

aten = torch.ops.aten
_CASTS = (aten._to_copy.default, torch.ops.prims.convert_element_type.default)
#: Why a product stays, where a checkpoint keeps it and computes what reads it again, or the other way round.
CHECKPOINT = "a checkpoint treats its frozen layer's output in another way than its own"


class Product(NamedTuple):
    """x (M, K) times ``right`` (K, N), plus ``bias`` (N,): the node ``product``, read through ``views`` alone."""

    product: fx.Node
    views: tuple[fx.Node, ...]
    x: fx.Node
    right: fx.Node
    bias: fx.Node | None

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        return (self.product, *self.views)


class Fused(NamedTuple):
    """A new node, the first that was written with it, the one whose place it took, and the frozen products that it
    stands for in the order of its operands."""

    node: fx.Node
    first: fx.Node
    instead_of: fx.Node
    products: tuple[fx.Node, ...]
    origins: tuple[Origin, ...]


def frozen_product(y: fx.Node, reader: fx.Node) -> Product | str:
    """The product that ``y`` is, or why it is none that could become part of ``reader``."""
    views: list[fx.Node] = []
    node = y
    while node.target in VIEWS and isinstance(node.args[0], fx.Node):
        views.insert(0, node)
        node = node.args[0]
    source = node.args[0] if node.target is operator.getitem else node
    if isinstance(source, fx.Node) and dialect.of_target(source.target) is not None:
        return "another op of an adapter stands between it and its frozen layer"
    if node.kwargs or node.target not in (aten.mm.default, aten.addmm.default):
        return _no_product(node)
    bias, x, right = node.args if node.target is aten.addmm.default else (None, *node.args)
    assert isinstance(x, fx.Node) and isinstance(right, fx.Node) and (bias is None or isinstance(bias, fx.Node))
    if not _is_weight(right):
        return "its frozen layer multiplies by what is computed: a weight that is dequantised, or has an update"
    if bias is not None and node_value(bias).dim() != 1:
        return "its frozen layer adds another tensor than a bias"
    if any(len(one.users) > 1 for one in (node, *views)) or tree_leaves(reader.args).count(y) > 1:
        return "its frozen layer's output is read by others too"
    theirs, ours = checkpoint_marks(node), checkpoint_marks(reader)
    if theirs and ours and theirs != ours:
        return CHECKPOINT
    return Product(node, tuple(views), x, right, bias)


def _no_product(node: fx.Node) -> str:
    what = "an input of the graph" if node.op == "placeholder" else op_name(node)
    return f"its frozen layer is no product with a weight, but ends in {what}"


def _is_weight(node: fx.Node) -> bool:
    """Whether a node is an input of the graph, its transpose, or that in another dtype, as under autocast."""
    while node.target in (*TRANSPOSES, *_CASTS) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node.op == "get_attr" or (node.op == "placeholder" and not node.name.startswith("tangents"))


def origins_of(products: Sequence[Product]) -> tuple[Origin, ...]:
    return tuple(origin_of(one.product) for one in products)


def remember(gm: fx.GraphModule, before: Sequence[fx.Node], fused: Sequence[Fused]) -> None:
    """Have every new node know where the products that it stands for were, in the graph of the nodes ``before``."""
    left = set(gm.graph.nodes)
    place = {node: i for i, node in enumerate(before)}
    for node, first, instead_of, products, known in fused:
        end = place[instead_of]
        found = []
        for product, origin in zip(products, known, strict=True):
            following = (before[i] for i in range(place[product] + 1, end) if before[i] in left)
            found.append(dataclasses.replace(origin, before=next(following, first).name))
        keep_origins(node, found)
