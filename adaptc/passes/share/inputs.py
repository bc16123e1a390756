"""Add the adapters' part of an input's gradient to the frozen layers' in one product.

before:  %a = lora_input_grad(%q1, A:q);  %s1 = add(%a, %dx1)
         %b = lora_input_grad(%q2, A:k);  %s2 = add(%s1, %b);  %dx = add(%s2, %dx2)
after:   %s = add(%dx1, %dx2);            %dx = lora_input_grads(%s, [%q1, %q2], [A:q, A:k])

Reassociates a sum. It is taken from its last addition down, through additions that nothing else reads; one adapter is
worth it too, because its product then needs no tensor of its own.
"""

from __future__ import annotations

import torch
from torch import fx

from adaptc.codegen.torch_internals import node_value
from adaptc.ir import dialect
from adaptc.ir.edit import Edit, Result
from adaptc.ir.sites import site_of
from adaptc.ir.structure import same_type
from adaptc.passes.contract import Context

_ADD = torch.ops.aten.add.Tensor


def share_inputs(gm: fx.GraphModule, context: Context, result: Result) -> None:
    product = dialect.get("lora_input_grad").overload
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    for root in list(gm.graph.find_nodes(op="call_function", target=_ADD)):
        if not _is_sum(root) or _is_inner(root) or not node_value(root).is_contiguous():
            continue
        sums, terms = _flatten(root)
        ours = [t for t in terms if t.target is product and len(t.users) == 1]
        others = [t for t in terms if t not in ours]
        if not ours or not others:
            continue
        if not context.spend():
            result.refused += [(site_of(node), "limit reached") for node in ours]
            continue
        matched = sorted({*sums, *ours}, key=order.__getitem__)
        edit = Edit(gm, site_of(ours[0]), matched, [root], record=context.record)
        total = others[0]
        for other in others[1:]:
            total = edit.call(_ADD, total, other)
        q, A = ([t.args[i] for t in ours] for i in (0, 1))
        result.applied.append(edit.finish(edit.call(dialect.get("lora_input_grads").overload, total, q, A)))


def _is_sum(node: fx.Node) -> bool:
    """An addition of two tensors of one type, neither of them scaled or broadcast."""
    if node.target is not _ADD or node.kwargs or len(node.args) != 2:
        return False
    values = [node_value(a) for a in node.args if isinstance(a, fx.Node)]
    return len(values) == 2 and all(same_type(v, node_value(node), strides=False) for v in values)


def _is_inner(node: fx.Node) -> bool:
    """Whether only another such addition reads it."""
    return len(node.users) == 1 and _is_sum(next(iter(node.users)))


def _flatten(root: fx.Node) -> tuple[list[fx.Node], list[fx.Node]]:
    """The additions of a sum, and its terms from left to right."""
    sums, terms = [root], []
    for term in root.args:
        assert isinstance(term, fx.Node)
        if _is_sum(term) and len(term.users) == 1:
            inner_sums, inner_terms = _flatten(term)
            sums += inner_sums
            terms += inner_terms
        else:
            terms.append(term)
    return sums, terms
