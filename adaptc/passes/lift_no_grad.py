"""Let a ``torch.no_grad`` region of the host record gradients where adapters inside it are trained.

before:  set_grad_enabled(False);  %y = fc(%x);  %y2 = lora_linear(%x, %y, %A, ...);  set_grad_enabled(True)
after:   %y = fc(%x);  %y2 = lora_linear(%x, %y, %A, ...);  set_grad_enabled(True)

Some classes run a part that they take to be frozen without gradients (CLIPSeg its two towers): an adapter in there
could never learn. The frozen weights inside still require none.

Precondition: the region reads a tensor that an adapter trains, and every adapter that it reads is read nowhere else
with gradients. One that is, is trained already, and the region may be there to stop one of its two gradients (a target
network): it stays. Values stay to the bit; what is saved for the backward grows. Recurses into the bodies of
higher-order ops, which start in the mode of their call.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import fx

from adaptc.codegen.torch_internals import node_value, sets_grad_mode, tree_leaves
from adaptc.ir.edit import Edit, Result, infer_value, nested
from adaptc.ir.effects import may_write
from adaptc.ir.structure import same_type
from adaptc.passes.contract import Context, Contract

CONTRACT = Contract(level="dynamo", numerics="exact", provides=frozenset({"recording"}))

#: Between the paths of one region in the name of its rewrite; no path has it.
SEPARATOR = ", "


@dataclasses.dataclass
class _Region:
    """A stretch without gradients: the nodes that switch them off, and the sites whose trained tensors it reads."""

    off: list[tuple[fx.GraphModule, fx.Node]]
    sites: set[str] = dataclasses.field(default_factory=set)


@dataclasses.dataclass
class _Walk:
    """Finds the regions of a graph in the order of execution."""

    regions: list[_Region] = dataclasses.field(default_factory=list)
    #: Sites whose trained tensors are read with gradients.
    recorded: set[str] = dataclasses.field(default_factory=set)

    def visit(self, gm: fx.GraphModule, trained: Mapping[fx.Node, str], region: _Region | None) -> None:
        """Walk one graph, which starts inside ``region`` (None: with gradients)."""
        bodies: dict[fx.Node, list[tuple[fx.GraphModule, Mapping[fx.Node, fx.Node]]]] = {}
        for call, body, operands in nested(gm):
            bodies.setdefault(call, []).append((body, operands))
        for node in gm.graph.nodes:
            mode = sets_grad_mode(node)
            if mode is not None:
                region = None if mode else self._inside(region, gm, node)
            elif node in bodies:
                for body, operands in bodies[node]:
                    inner = {inside: trained[outside] for inside, outside in operands.items() if outside in trained}
                    self.visit(body, inner, region)
            else:
                sites = {trained[source] for source in node.all_input_nodes if source in trained}
                (self.recorded if region is None else region.sites).update(sites)

    def _inside(self, region: _Region | None, gm: fx.GraphModule, node: fx.Node) -> _Region:
        if region is None:
            region = _Region([])
            self.regions.append(region)
        region.off.append((gm, node))
        return region


def lift_no_grad(gm: fx.GraphModule, context: Context) -> Result:
    result = Result()
    walk = _Walk()
    walk.visit(gm, context.trained, None)
    for region in walk.regions:
        sites = sorted(region.sites)
        if not sites:
            continue
        if elsewhere := region.sites & walk.recorded:
            for site in sites:
                result.refuse(site, f"its no_grad region stays: {min(elsewhere)} also runs outside of it")
        elif not context.spend():
            for site in sites:
                result.refuse(site, "limit reached")
        else:
            _lift(region, SEPARATOR.join(sites), context, result)
    if result.applied:
        _require_gradients(gm)
        for body in [gm, *(body for _, body, _ in nested(gm))]:
            body.recompile()
    return result


def _lift(region: _Region, site: str, context: Context, result: Result) -> None:
    owners = {id(owner): owner for owner, _ in region.off}
    for key, owner in owners.items():
        nodes = [node for gm, node in region.off if id(gm) == key]
        result.applied.append(Edit(owner, site, nodes, [], record=context.record).finish())


def _require_gradients(gm: fx.GraphModule) -> None:
    """Infer again the values that were captured without a gradient and now have one: later passes ask."""
    recording = True
    for node in gm.graph.nodes:
        mode = sets_grad_mode(node)
        recording = recording if mode is None else mode
        if not recording or node.op not in ("call_function", "call_method") or may_write(node):
            continue
        old = node_value(node)
        floats = [v for v in tree_leaves(old) if isinstance(v, torch.Tensor) and v.dtype.is_floating_point]
        sources = tree_leaves([node_value(source) for source in node.all_input_nodes])
        fed = any(isinstance(v, torch.Tensor) and v.requires_grad for v in sources)
        if not fed or not floats or any(v.requires_grad for v in floats):
            continue
        value = infer_value(node)
        if value is not None and same_type(old, value):
            node.meta["example_value"] = value


__all__ = ["CONTRACT", "SEPARATOR", "lift_no_grad"]
