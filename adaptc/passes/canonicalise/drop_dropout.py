"""Remove an adapter's dropout that does nothing: p = 0, or in eval.

before:  %d = dropout(%x, 0.05, False);  %t = lora_linear(%d, ...)
after:   %t = lora_linear(%x, ...)

and the same for ``dora_linear``.

Exact. Only dropouts that adapters read: the base model's own graph is left as it is.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import fx

from adaptc.ir.sites import calls_of
from adaptc.passes.walk import Match, each


@each(lambda gm: [*calls_of(gm, "lora_linear"), *calls_of(gm, "dora_linear")])
def drop_dropout(node: fx.Node) -> Match | None:
    dropout = node.args[0]
    if not (isinstance(dropout, fx.Node) and dropout.target is F.dropout):
        return None
    if len(dropout.args) != 3 or dropout.kwargs:
        return None  # not as a pass writes it: one of the base model's own
    source, p, training = dropout.args
    if (p != 0 and training) or set(dropout.users) != {node}:
        return None
    return Match(node, lambda edit: edit.call(node.target, source, *node.args[1:]), [dropout, node])
