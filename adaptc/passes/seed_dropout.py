"""Give the dropouts of adapters masks that are made where they are read, from one draw of seeds a call.

before:  %d = dropout(%x, 0.05, True)
after:   %s = randint(2^62, (n,));  %d = adaptc.seeded_dropout(%x, %s, 0, 0.05)

The backward makes the mask again, so that neither the mask nor the dropped input is kept. Which elements are dropped
changes, their distribution does not. A graph draws one seed for each of its n dropouts, and so
does each body of a higher-order op, with the random state that checkpointing gives it: a block that is computed again
has the masks that it had. Dropouts that something else than adapters reads, the base model's own, stay as they are.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import fx

from adaptc.codegen.torch_internals import node_value
from adaptc.ir import dialect
from adaptc.ir.edit import Edit, Result, nested
from adaptc.ir.sites import site_of
from adaptc.passes.contract import Context, Contract

CONTRACT = Contract(
    level="dynamo", numerics="reassociates", requires=frozenset({"inserted"}), provides=frozenset({"seeded"})
)


def seed_dropout(gm: fx.GraphModule, context: Context) -> Result:
    result = Result()
    found = []
    for node, p in _dropouts(gm):
        if context.spend():
            found.append((node, p))
        else:
            result.refuse(_site(node), "limit reached")
    seeds = None
    for index, (node, p) in enumerate(found):
        edit = Edit(gm, _site(node), [node], [node], record=context.record)
        x = node.args[0]
        if seeds is None:  # before the first of them, and so before all
            device = node_value(cast(fx.Node, x)).device
            seeds = edit.call(torch.randint, 2**62, (len(found),), dtype=torch.int64, device=device)
        op = dialect.get("seeded_dropout").overload
        result.applied.append(edit.finish(edit.call(op, x, seeds, index, p)))
    for _, body, _ in nested(gm):
        inner = seed_dropout(body, context)
        result.applied += inner.applied
        result.refused += inner.refused
    gm.recompile()
    return result


def _dropouts(gm: fx.GraphModule) -> list[tuple[fx.Node, float]]:
    """The active dropouts that adapters read, and nothing else does; with their probabilities."""
    found = []
    for node in gm.graph.find_nodes(op="call_function", target=F.dropout):
        given = dict(zip(("input", "p", "training", "inplace"), node.args, strict=False)) | node.kwargs
        p = given.get("p", 0.5)
        active = given.get("training", True) is True and not given.get("inplace", False)
        if not active or not isinstance(p, float) or p == 0 or not isinstance(node.args[0], fx.Node):
            continue
        if node.users and all(dialect.of_target(user.target) for user in node.users):
            found.append((node, p))
    return found


def _site(node: fx.Node) -> str:
    return site_of(next(iter(node.users)))
