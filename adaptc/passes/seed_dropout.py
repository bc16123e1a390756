"""Give the dropouts of adapters masks that are made where they are read, from a seed that is drawn in every call.

before:  %d = dropout(%x, 0.05, True)
after:   %s = randint(2^62, (1,));  %d = adaptc.seeded_dropout(%x, %s, 0.05)

The backward makes the mask again, so that neither the mask nor the dropped input is kept. Which elements are dropped
changes, their distribution does not. In a checkpointed block the seed is drawn with the random state that checkpointing
gives it: a block that is computed again has the masks that it had. A seed is a tensor of its own, so that equal sites
have equal code. Dropouts that something else than adapters reads, the base model's own, stay as they are.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import fx

from adaptc.ir import dialect
from adaptc.ir.edit import Edit, Result
from adaptc.ir.sites import dropout_of, is_inserted, site_of
from adaptc.passes.contract import Context, Contract, everywhere
from adaptc.torch_internals import node_value

CONTRACT = Contract(
    level="dynamo", numerics="reassociates", requires=frozenset({"inserted"}), provides=frozenset({"seeded"})
)


def seed_dropout(gm: fx.GraphModule, context: Context) -> Result:
    return everywhere(gm, (_seed,), context)


def _seed(gm: fx.GraphModule, context: Context, result: Result) -> None:
    for node, x, p in _dropouts(gm):
        if not all(dialect.of_target(user.target) for user in node.users):
            if is_inserted(node):  # else it is one of the base model, which is none of ours
                result.refuse(_site(node), "the base model's product reads what it drops too: its mask is kept")
            continue
        if not context.spend():
            result.refuse(_site(node), "limit reached")
            continue
        edit = Edit(gm, _site(node), [node], [node], record=context.record)
        seed = edit.call(torch.randint, 2**62, (1,), dtype=torch.int64, device=node_value(x).device)
        result.applied.append(edit.finish(edit.call(dialect.get("seeded_dropout").overload, x, seed, p)))


def _dropouts(gm: fx.GraphModule) -> list[tuple[fx.Node, fx.Node, float]]:
    """The active dropouts that adapters read; with what they drop and how often."""
    found = []
    for node in gm.graph.find_nodes(op="call_function", target=F.dropout):
        dropout = dropout_of(node)
        if dropout is None or not dropout[2] or dropout[1] == 0:
            continue
        x, p, _ = dropout
        if any(dialect.of_target(user.target) for user in node.users):
            found.append((node, x, p))
    return found


def _site(node: fx.Node) -> str:
    return site_of(next(user for user in node.users if dialect.of_target(user.target)))
