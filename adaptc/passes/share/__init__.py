"""What sites have in common is done once: q, k and v; gate and up; keys and values of cross-attention read one value.

    share_seeds        one draw of the seeds of all dropouts
    split_dora_linear  the bottleneck of a DoRA layer on its own
    share_shrink       one product of x with the first factors of all of them
    share_factors      one product of x with the gradients of all their bottlenecks
    share_inputs       one accumulation into the gradient of x

Dropouts become part of these products, of one site's too: their seeds are operands.

On the joint graph, which is functional: between two readers of a node its value cannot change, whatever the captured
graph wrote to. The frozen weights stay where they are, and so do the sites' own products with them.
"""

from __future__ import annotations

from torch import fx

from adaptc.ir.edit import Result
from adaptc.passes.contract import Context, Contract
from adaptc.passes.share.dora import split_dora_linear
from adaptc.passes.share.factors import share_factors
from adaptc.passes.share.inputs import share_inputs
from adaptc.passes.share.seeds import share_seeds
from adaptc.passes.share.shrink import share_shrink
from adaptc.passes.walk import everywhere

CONTRACT = Contract(
    level="joint", numerics="reassociates", provides=frozenset({"shared"}), conflicts=frozenset({"aten"})
)

REWRITES = (share_seeds, split_dora_linear, share_shrink, share_factors, share_inputs)


def share(gm: fx.GraphModule, context: Context) -> Result:
    return everywhere(gm, REWRITES, context)
