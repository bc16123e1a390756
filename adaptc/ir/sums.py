"""Reading sums of gradients in a joint graph."""

from __future__ import annotations

import torch
from torch import fx

from adaptc.ir.types import same_type
from adaptc.torch_internals import node_value

ADD = torch.ops.aten.add.Tensor


def is_sum(node: fx.Node) -> bool:
    """An addition of two tensors of one type, neither of them scaled or broadcast."""
    if node.target is not ADD or node.kwargs or len(node.args) != 2:
        return False
    values = [node_value(a) for a in node.args if isinstance(a, fx.Node)]
    return len(values) == 2 and all(same_type(v, node_value(node), strides=False) for v in values)


def is_inner(node: fx.Node) -> bool:
    """Whether only another such addition reads it."""
    return len(node.users) == 1 and is_sum(next(iter(node.users)))


def root_of(term: fx.Node) -> fx.Node:
    """The last addition of the sum that alone reads ``term``; ``term`` where none does."""
    while is_inner(term):
        term = next(iter(term.users))
    return term


def flatten(root: fx.Node) -> tuple[list[fx.Node], list[fx.Node]]:
    """The additions of a sum, and its terms from left to right."""
    sums, terms = [root], []
    for term in root.args:
        assert isinstance(term, fx.Node)
        if is_sum(term) and len(term.users) == 1:
            inner_sums, inner_terms = flatten(term)
            sums += inner_sums
            terms += inner_terms
        else:
            terms.append(term)
    return sums, terms
