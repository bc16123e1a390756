"""LoRA's products and the frozen layer's product that they belong to become one op (LoRAFusion, section 3).

    fuse_outputs      the frozen layer's product with the correction that is added to it
    fuse_bottlenecks  the two products of a backward that read the gradient of a site's output
    fuse_inputs       the frozen layers' part of an input's gradient with the adapters'

The graph is split at the tensors of the rank's size, ``lora_shrink`` on one side and ``lora_linear_expand`` on the
other: each op reads every large tensor once where a kernel makes it whole. ``lower`` writes the frozen products as the
nodes of the base model that they were, where they stood.

What follows a site's output stays as it is: ``dora_rescale``, the bias of an adapter, an activation. These are
epilogues, loops over elements that Inductor writes.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from adaptc.ir.edit import Result
from adaptc.passes.contract import Context, Contract
from adaptc.passes.fuse.bottlenecks import fuse_bottlenecks
from adaptc.passes.fuse.inputs import fuse_inputs
from adaptc.passes.fuse.outputs import fuse_outputs
from adaptc.passes.fuse.products import Fused, remember
from adaptc.passes.walk import Found, everywhere

CONTRACT = Contract(
    level="joint", numerics="reassociates", provides=frozenset({"fused"}), conflicts=frozenset({"aten"})
)


def fuse(gm: fx.GraphModule, context: Context) -> Result:
    return everywhere(gm, (_fuse,), context)


def _fuse(gm: fx.GraphModule, context: Context) -> Iterator[Found]:
    before = list(gm.graph.nodes)
    fused: list[Fused] = []
    yield from fuse_outputs(gm, fused)
    yield from fuse_bottlenecks(gm)
    yield from fuse_inputs(gm, fused)
    remember(gm, before, fused)
