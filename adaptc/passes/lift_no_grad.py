"""Let a region of the host without gradients record them, where that is asked for.

before:  set_grad_enabled(False);  %y = fc(%x);  %y2 = lora_linear(%x, %y, %A, ...);  set_grad_enabled(True)
after:   %y = fc(%x);  %y2 = lora_linear(%x, %y, %A, ...);  set_grad_enabled(True)

A stop-gradient is part of what a model computes (the target of a self-distillation), so a region stays unless

* a plan, or the caller of ``adaptc.compile``, names a module that runs in it (``lift_no_grad``), or
* its class is known to take a part for frozen that is not, once adapters train in it (``runtime/lifts.py``). Then no
  other gradient may change: every adapter in the region is read nowhere else with gradients, and nothing else that the
  region reads requires one.

Values stay to the bit; what is saved for the backward grows. The frozen weights inside still require no gradient.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import fx

from adaptc.ir.edit import Result, infer_value, nested
from adaptc.ir.effects import may_write
from adaptc.ir.stopped import GradModes, Region, Walk
from adaptc.ir.types import same_type
from adaptc.passes.contract import Context, Contract
from adaptc.passes.walk import Found, Match, Refusal, Together, walk
from adaptc.torch_internals import node_value, tree_leaves

if TYPE_CHECKING:
    from adaptc.passes.manager import PassReport

CONTRACT = Contract(level="dynamo", numerics="exact", provides=frozenset({"recording"}))

#: Between the paths of one region in the name of its rewrite; no path has it.
SEPARATOR = ", "


def lift_no_grad(gm: fx.GraphModule, context: Context) -> Result:
    result = Result()
    walk(gm, _lift, context, result)
    if result.applied:
        for body in [gm, *(body for _, body, _ in nested(gm))]:
            body.recompile()
    return result


def _lift(gm: fx.GraphModule, context: Context) -> Iterator[Found]:
    regions = Walk()
    regions.visit(gm, context.trained, context.asked)
    for region in regions.regions:
        sites = sorted(region.sites | {path for path in region.asked if not _holds(path, region.sites)})
        if reason := _why_not(region, regions.recorded, context):
            yield from (Refusal(site, reason) for site in sites)
        elif sites:
            yield Together(sites, _without_switches(gm, region, SEPARATOR.join(sites)))


def lifted(reports: Iterable[PassReport]) -> set[str]:
    """The sites whose region was lifted, by what passes reported; of a region without sites the path that was asked
    for."""
    done = (r.result.applied for r in reports if r.name == "lift_no_grad" and not r.rolled_back)
    return {path for applied in done for rewrite in applied for path in rewrite.site.split(SEPARATOR)}


def _why_not(region: Region, recorded: set[str], context: Context) -> str | None:
    """Why a region stays, or None where it is lifted or nothing is to be lifted in it."""
    if region.asked or not region.sites:
        return None
    if not region.sites <= context.own:
        return "its no_grad region stays, as the model has it (passes: {lift_no_grad: [...]} in the plan lifts it)"
    if elsewhere := region.sites & recorded:
        return f"its no_grad region stays: {min(elsewhere)} also runs outside of it"
    return "its no_grad region stays: a gradient would flow to what it reads" if region.is_reached else None


def _holds(path: str, sites: set[str]) -> bool:
    """Whether a site is the module at ``path`` or inside it."""
    return any(f"{site}.".startswith(f"{path}." if path else "") for site in sites)


def _without_switches(gm: fx.GraphModule, region: Region, site: str) -> Iterator[Match]:
    owners = {id(owner): owner for owner, _ in region.switches}
    for key, owner in owners.items():
        nodes = sorted(node for gm, node in region.switches if id(gm) == key)
        yield Match(nodes[-1], lambda edit: [], nodes, [], site, gm=owner)
    _require_gradients(gm)


def _require_gradients(gm: fx.GraphModule) -> None:
    """Infer again the values that were captured without a gradient and now have one: later passes ask."""
    modes = GradModes()
    for node in gm.graph.nodes:
        if modes.step(node) or not modes.recording:
            continue
        if node.op not in ("call_function", "call_method") or may_write(node):
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


__all__ = ["CONTRACT", "lift_no_grad", "lifted"]
