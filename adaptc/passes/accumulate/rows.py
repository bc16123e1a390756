"""LoRA by rows in the memory of the frozen layer's output."""

from __future__ import annotations

from typing import Any, cast

from torch import fx

from adaptc.codegen.ops.in_place import LORA_ROWS
from adaptc.ir import dialect
from adaptc.ir.edit import Edit
from adaptc.ir.products import views_down_to
from adaptc.ir.sites import items_of
from adaptc.passes.accumulate.memory import call, is_dense, is_new, owned, view
from adaptc.passes.walk import Match, each
from adaptc.torch_internals import node_value, tree_leaves

_ROWS = dialect.get("lora_rows").overload


@each(lambda gm: gm.graph.find_nodes(op="call_function", target=_ROWS))
def add_rows(node: fx.Node) -> Match | None:
    x, y, *rest = cast(tuple[Any, ...], node.args)
    memory = owned(y, is_new)
    if memory is None or not is_dense(memory) or y in tree_leaves((x, rest)):
        return None
    outputs = items_of(node)

    def write(edit: Edit) -> list[fx.Node]:
        h = call(edit, LORA_ROWS, (memory, x, *rest), node, node_value(node)[1])
        results = {0: view(edit, memory, y), 1: h}
        return [results[cast(int, output.args[1])] for output in outputs]

    return Match(node, write, [*views_down_to(y, memory), node, *outputs], outputs)
