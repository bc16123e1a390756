"""Read a value once for the gradients of all first factors that multiply it, each through its own dropout if any.

before:  %dA1 = lora_factor_grad(%q1, %x, f32);   %dA2 = lora_factor_grad(%q2, %x, f32)
after:   %dA1, %dA2 = lora_factor_grads([%q1, %q2], %x, f32, [], [])

before:  %d = seeded_dropout(%x, %seed, p);  %dA = lora_factor_grad(%q, %d, f32)
after:   %dA = lora_factor_grads([%q], %x, f32, [%seed], [p])

Where %x is made by a loop over elements it is marked to be made again in the backward, as the dropped input was: what
the loop reads, such as the input of a norm, is mostly kept for other reasons. A sum of two tensors is not, and neither
is a value that the base model's backward reads too, nor one in a graph that writes to its inputs, of which the backward
would see the new values.

One gradient without dropout becomes such a node where a kernel makes it. Reassociates nothing. The new node stands
where the last of the old ones did; a gradient that something reads before that keeps its own product.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import cast

import torch
from torch import fx

from adaptc.codegen.ops.lora_split import is_made_again, is_made_alone
from adaptc.ir import dialect
from adaptc.ir.edit import Edit
from adaptc.ir.products import VIEWS
from adaptc.ir.sites import calls_of, site_of
from adaptc.passes.contract import Context
from adaptc.passes.share.dropped import Dropped, dropouts_of, dropped, seeds_of
from adaptc.passes.walk import Match, Refusal, Together
from adaptc.torch_internals import OpOverload, is_backward, keeps_inputs, mark_recomputed, node_value

aten = torch.ops.aten
#: What a value is read through: autograd keeps results behind the second two.
_SAME = (*VIEWS, aten.alias.default, aten.detach.default)


def share_factors(gm: fx.GraphModule, context: Context) -> Iterator[Refusal | Together]:
    # What makes %x again in the backward may read an input of the graph.
    may_read_again = keeps_inputs(gm)
    for products in _groups(gm):
        late = [node for node in products if all(products[-1] < user for user in node.users)]
        reason = "the gradient of its first factor is read before the others are known"
        yield from (Refusal(site_of(node), reason) for node in products if node not in late)
        values = [cast(Dropped, dropped(node.args[1])) for node in late]
        seeds = seeds_of(values)
        x = values[0].source
        again = may_read_again and is_made_again(node_value(x), drops=bool(seeds[0]))
        if again and _is_cheap(x) and not _is_read_by_others(x):
            mark_recomputed(x)
        alone_too = bool(seeds[0]) or _has_kernel(late[0])
        if len(late) >= (1 if alone_too else 2) and products[-1] in late:
            sites = [site_of(node) for node in late]
            matched = sorted({*dropouts_of(values), *late})
            yield Together(sites, [Match(late[-1], partial(_write, late, values), matched, late, sites[0])])


def _write(products: list[fx.Node], values: list[Dropped], edit: Edit) -> list[fx.Node]:
    left, dtype = [node.args[0] for node in products], products[0].args[2]
    wide = edit.op("lora_factor_grads", left, values[0].source, dtype, *seeds_of(values))
    return [edit.item(wide, i) for i in range(len(products))]


def _has_kernel(product: fx.Node) -> bool:
    """Whether a kernel makes the gradient of one first factor faster than a library. That of a second one, which the
    product of a wide value with one of the rank's size is, goes with the gradient of its bottleneck."""
    left, right, _ = cast(tuple[fx.Node, ...], product.args)
    bottleneck = dialect.get("lora_bottleneck_grad").overload
    is_second = any(user.target is bottleneck and user.args[0] is left for user in left.users)
    return not is_second and is_made_alone(node_value(right), node_value(left).shape[-1])


def _groups(gm: fx.GraphModule) -> list[list[fx.Node]]:
    """The products with one right operand and dtype, in graph order."""
    found: dict[tuple[object, ...], list[fx.Node]] = {}
    for node in calls_of(gm, "lora_factor_grad"):
        if (x := dropped(node.args[1])) is not None:
            found.setdefault((x.dropout is not None, x.source, node.args[2]), []).append(node)
    return list(found.values())


def _is_read_by_others(x: fx.Node) -> bool:
    """Whether the backward reads ``x`` for more than the gradients of first factors."""
    readers: list[fx.Node] = []
    left = [x]
    while left:
        for user in left.pop().users:
            (left if user.target in _SAME else readers).append(user)
    ours = dialect.get("lora_factor_grad").overload
    return any(is_backward(reader) and reader.target is not ours for reader in readers)


def _is_cheap(x: fx.Node) -> bool:
    """Whether a loop over elements makes ``x`` from what is not larger, and other than by adding two of its size."""
    if not (isinstance(x.target, OpOverload) and torch.Tag.pointwise in x.target.tags) or "recompute" in x.meta:
        return False
    size = node_value(x).numel()
    whole = [n for n in x.all_input_nodes if isinstance(v := node_value(n), torch.Tensor) and v.numel() >= size]
    return len(whole) < 2 or x.target is aten.mul.Tensor
