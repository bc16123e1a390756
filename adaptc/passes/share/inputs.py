"""Add the adapters' part of an input's gradient to the frozen layers' in one product.

before:  %a = lora_input_grad(%q1, A:q);  %s1 = add(%a, %dx1)
         %b = lora_input_grad(%q2, A:k);  %s2 = add(%s1, %b);  %dx = add(%s2, %dx2)
after:   %s = add(%dx1, %dx2);            %dx = lora_input_grads(%s, [%q1, %q2], [A:q, A:k], [], [])

before:  %a = lora_input_grad(%q, A:q);  %d = seeded_dropout(%a, %seed, p);  %dx = add(%d, %dx1)
after:   %dx = lora_input_grads(%dx1, [%q], [A:q], [%seed], [p])

Reassociates a sum. It is taken from its last addition down, through additions that nothing else reads; one adapter is
worth it too, because its product then needs no tensor of its own.
"""

from __future__ import annotations

from torch import fx

from adaptc.ir import dialect
from adaptc.ir.edit import Edit
from adaptc.ir.sites import site_of
from adaptc.ir.sums import ADD, flatten, is_inner, is_sum
from adaptc.passes.share.dropped import Dropped, dropped, seeds_of
from adaptc.passes.walk import Match, Together, each
from adaptc.torch_internals import node_value


@each(lambda gm: gm.graph.find_nodes(op="call_function", target=ADD))
def share_inputs(root: fx.Node) -> Together | None:
    if not is_sum(root) or is_inner(root) or not node_value(root).is_contiguous():
        return None
    sums, terms = flatten(root)
    parts = {t: part for t in terms if (part := _adapters_part(t)) is not None}
    # Of one kind in an op: those that drop, or those that do not.
    drops = any(part.dropout is not None for part in parts.values())
    ours = [t for t, part in parts.items() if (part.dropout is not None) == drops]
    others = [t for t in terms if t not in ours]
    if not ours or not others:
        return None
    products = [parts[t].source for t in ours]

    def write(edit: Edit) -> fx.Node:
        total = others[0]
        for other in others[1:]:
            total = edit.call(ADD, total, other)
        q, A = ([node.args[i] for node in products] for i in (0, 1))
        return edit.op("lora_input_grads", total, q, A, *seeds_of([parts[t] for t in ours]))

    sites = [site_of(node) for node in ours]
    return Together(sites, [Match(root, write, sorted({*sums, *ours, *products}), site=sites[0])])


def _adapters_part(term: fx.Node) -> Dropped | None:
    """The product ``lora_input_grad`` that a term of a sum is, as it is or dropped, where nothing else reads it."""
    part = dropped(term)
    if part is None or part.source.target is not dialect.get("lora_input_grad").overload:
        return None
    return part if all(len(node.users) == 1 for node in {term, part.source}) else None
