"""Bring inserted adapters into the one form that later passes match. Only what is always right.

    read_low_rank  a weight with an update is read as the frozen weight and a low-rank product beside it
    split_dora     a DoRA layer that drops nothing is read as a LoRA layer and a factor per column
    drop_dropout   a dropout that does nothing is removed
    sink_casts     casts of factors go into the op, where they act on r-sized tensors
    sink_scale     the scale multiplies the M x r bottleneck instead of the M x N product
    join_adapters  several adapters of one site become one node of the summed rank
"""

from __future__ import annotations

from torch import fx

from adaptc.ir.edit import Result
from adaptc.passes.canonicalise.drop_dropout import drop_dropout
from adaptc.passes.canonicalise.join_adapters import join_adapters
from adaptc.passes.canonicalise.read_low_rank import read_low_rank
from adaptc.passes.canonicalise.sink_casts import sink_casts
from adaptc.passes.canonicalise.sink_scale import sink_scale
from adaptc.passes.canonicalise.split_dora import split_dora
from adaptc.passes.contract import Context, Contract
from adaptc.passes.walk import everywhere

CONTRACT = Contract(
    level="dynamo",
    numerics="reassociates",
    requires=frozenset({"inserted"}),
    provides=frozenset({"canonical"}),
)

REWRITES = (read_low_rank, split_dora, drop_dropout, sink_casts, sink_scale, join_adapters)


def canonicalise(gm: fx.GraphModule, context: Context) -> Result:
    return everywhere(gm, REWRITES, context)
