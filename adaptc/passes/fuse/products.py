"""Reading the products of frozen layers, and remembering what they were."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from torch import fx

from adaptc.ir.origin import checkpoint_marks, keep_origins, origin_of
from adaptc.ir.products import Product, frozen_product
from adaptc.torch_internals import tree_leaves

#: Why a product stays, where a checkpoint keeps it and computes what reads it again, or the other way round.
CHECKPOINT = "a checkpoint treats its frozen layer's output in another way than its own"


class Fused(NamedTuple):
    """A new node, the first that was written with it, the one whose place it took, and the frozen products that it
    stands for, in the order of its operands."""

    node: fx.Node
    first: fx.Node
    instead_of: fx.Node
    products: Sequence[Product]


def own_product(y: fx.Node, reader: fx.Node) -> Product | str:
    """The frozen layer's product that ``y`` is, or why it could not become part of ``reader``."""
    product = frozen_product(y)
    if isinstance(product, str):
        return product
    if not product.is_read_once or tree_leaves(reader.args).count(y) > 1:
        return "its frozen layer's output is read by others too"
    theirs, ours = checkpoint_marks(product.node), checkpoint_marks(reader)
    return CHECKPOINT if theirs and ours and theirs != ours else product


def remember(gm: fx.GraphModule, before: Sequence[fx.Node], fused: Sequence[Fused]) -> None:
    """Have every new node know where the products that it stands for were, in the graph of the nodes ``before``."""
    left = set(gm.graph.nodes)
    place = {node: i for i, node in enumerate(before)}
    for node, first, instead_of, products in fused:
        end = place[instead_of]
        found = []
        for product in products:
            following = (before[i] for i in range(place[product.node] + 1, end) if before[i] in left)
            found.append(dataclasses.replace(origin_of(product.node), before=next(following, first).name))
        keep_origins(node, found)
