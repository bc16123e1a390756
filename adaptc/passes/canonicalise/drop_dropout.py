"""Remove an adapter's dropout that does nothing: p = 0, or in eval.

before:  %d = dropout(%x, 0.05, False);  %t = lora_linear(%d, ...)
after:   %t = lora_linear(%x, ...)

and the same for ``dora_linear``.

Exact. Only dropouts that adapters read: the base model's own graph is left as it is.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import fx

from adaptc.ir import dialect
from adaptc.ir.edit import Edit, Result
from adaptc.ir.sites import lora_nodes, site_of
from adaptc.passes.contract import Context


def drop_dropout(gm: fx.GraphModule, context: Context, result: Result) -> None:
    dora = gm.graph.find_nodes(op="call_function", target=dialect.get("dora_linear").overload)
    for node in (*lora_nodes(gm), *dora):
        dropout = node.args[0]
        if not (isinstance(dropout, fx.Node) and dropout.target is F.dropout):
            continue
        if len(dropout.args) != 3 or dropout.kwargs:
            continue  # not as a pass writes it: one of the base model's own
        source, p, training = dropout.args
        if (p != 0 and training) or set(dropout.users) != {node}:
            continue
        if not context.spend():
            result.refuse(site_of(node), "limit reached")
            continue
        edit = Edit(gm, site_of(node), [dropout, node], [node], record=context.record)
        result.applied.append(edit.finish(edit.call(node.target, source, *node.args[1:])))
