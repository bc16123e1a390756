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
from adaptc.passes.contract import Context, Contract
from adaptc.passes.walk import Match, Refusal, each, everywhere
from adaptc.torch_internals import node_value

CONTRACT = Contract(
    level="dynamo", numerics="reassociates", requires=frozenset({"inserted"}), provides=frozenset({"seeded"})
)


def seed_dropout(gm: fx.GraphModule, context: Context) -> Result:
    return everywhere(gm, (_seed,), context)


@each(lambda gm: gm.graph.find_nodes(op="call_function", target=F.dropout))
def _seed(node: fx.Node) -> Match | Refusal | None:
    dropout = dropout_of(node)
    adapters = [user for user in node.users if dialect.of_target(user.target)]
    if dropout is None or not dropout[2] or dropout[1] == 0 or not adapters:
        return None
    x, p, _ = dropout
    site = site_of(adapters[0])
    if len(adapters) < len(node.users):
        # Else it is one of the base model, which is none of ours.
        reason = "the base model's product reads what it drops too: its mask is kept"
        return Refusal(site, reason) if is_inserted(node) else None

    def write(edit: Edit) -> fx.Node:
        seed = edit.call(torch.randint, 2**62, (1,), dtype=torch.int64, device=node_value(x).device)
        return edit.op("seeded_dropout", x, seed, p)

    return Match(node, write, site=site)
