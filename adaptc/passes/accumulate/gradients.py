"""Gradients of what DoRA rescales, in the memory of the gradient that is rescaled."""

from __future__ import annotations

import operator
from typing import Any, cast

from torch import fx

from adaptc.codegen.ops.in_place import OUTPUT_GRADS, RESCALE_GRAD
from adaptc.ir import dialect
from adaptc.ir.edit import Result, Rewrite
from adaptc.ir.sites import site_of
from adaptc.passes.accumulate.memory import Change, is_dense, is_new, owned
from adaptc.passes.contract import Context
from adaptc.torch_internals import OpOverload, node_value

#: Op -> the same in place, and which of its results that one leaves in the memory of the gradient.
_SCALED = {
    dialect.get("dora_rescale_grad").overload: (RESCALE_GRAD, 0),
    dialect.get("dora_output_grads").overload: (OUTPUT_GRADS, 2),
}


def scale_gradients(gm: fx.GraphModule, context: Context, result: Result) -> None:
    for node in [n for n in gm.graph.nodes if n.target in _SCALED]:
        grad, *rest = cast(tuple[Any, ...], node.args)
        memory = owned(grad, is_new)
        if memory is None or grad in rest or not is_dense(memory):
            continue
        if not context.spend():
            result.refuse(site_of(node), "limit reached")
            continue
        result.applied.append(_scale_in_place(gm, node, memory))


def _scale_in_place(gm: fx.GraphModule, node: fx.Node, memory: fx.Node) -> Rewrite:
    grad, values = cast(fx.Node, node.args[0]), node_value(node)
    outputs = {cast(int, user.args[1]): user for user in node.users if user.target is operator.getitem}
    op, scaled = _SCALED[cast(OpOverload, node.target)]
    others = [i for i in range(len(values)) if i != scaled]
    change = Change(gm, node)
    with gm.graph.inserting_before(node):
        value = tuple(values[i] for i in others) if len(others) > 1 else values[others[0]]
        made = change.call(op, (memory, *node.args[1:]), node, value)
        results = {scaled: change.view(memory, grad)}
        for place, index in enumerate(others):
            meta = {**made.meta, "val": values[index]}
            results[index] = change.add(operator.getitem, (made, place), meta) if len(others) > 1 else made
    for index, output in outputs.items():
        change.replace(output, results[index])
    change.erase(node)
    change.erase_views(grad, memory)
    return change.finish()
