"""The regions of a captured graph that run without gradients, and the adapters inside them.

``torch.no_grad``, ``torch.set_grad_enabled(False)`` and ``torch.inference_mode`` are nodes of the graph. A region is
what stands between the node that switches gradients off and the one that switches them on again. The body of a
higher-order op starts in the mode of its call.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

import torch
from torch import fx

from adaptc.ir.edit import nested
from adaptc.torch_internals import grad_switch, node_value, tree_leaves


@dataclasses.dataclass
class Region:
    """A stretch without gradients.

    ``switches``: the nodes without which it would record gradients. ``sites``: whose trained tensors it reads.
    ``asked``: the paths, of those that the walk was given, whose tensors it reads. ``reads``: what else its ``nodes``
    read, with an operand in place of the input that it is in a body.
    """

    switches: list[tuple[fx.GraphModule, fx.Node]] = dataclasses.field(default_factory=list)
    sites: set[str] = dataclasses.field(default_factory=set)
    asked: set[str] = dataclasses.field(default_factory=set)
    nodes: set[fx.Node] = dataclasses.field(default_factory=set)
    reads: set[fx.Node] = dataclasses.field(default_factory=set)

    @property
    def is_reached(self) -> bool:
        """Whether something from before it that it reads requires a gradient, besides what its sites train."""
        values = tree_leaves([node_value(source) for source in self.reads - self.nodes])
        return any(isinstance(value, torch.Tensor) and value.requires_grad for value in values)


@dataclasses.dataclass
class GradModes:
    """Follows the mode of gradients from node to node."""

    recording: bool = True
    inference: bool = False
    _before: dict[fx.Node, tuple[bool, bool]] = dataclasses.field(default_factory=dict)

    def step(self, node: fx.Node) -> bool:
        """Go past ``node``; whether it is a switch."""
        switch = grad_switch(node)
        if switch is None:
            return False
        if isinstance(switch, fx.Node):
            self.recording, self.inference = self._before[switch]
        elif node.users:  # inference mode, which another node ends
            self._before[node] = self.recording, self.inference
            self.recording, self.inference = switch, not switch
        else:
            # Nothing records in inference mode, whatever the mode of gradients is.
            self.recording = switch and not self.inference
        return True


@dataclasses.dataclass
class Walk:
    """The regions of a graph, in the order of execution, and the ``recorded`` sites: whose trained tensors are read
    with gradients."""

    regions: list[Region] = dataclasses.field(default_factory=list)
    recorded: set[str] = dataclasses.field(default_factory=set)

    @property
    def stopped(self) -> set[str]:
        """Sites that run in regions alone."""
        return {site for region in self.regions for site in region.sites} - self.recorded

    def visit(
        self, gm: fx.GraphModule, trained: Mapping[fx.Node, str], asked: Mapping[fx.Node, str], *,
        outer: Mapping[fx.Node, fx.Node] | None = None, region: Region | None = None,
    ) -> None:  # fmt: skip
        """Walk one graph, which starts inside ``region`` (None: with gradients). ``trained``: node of a tensor that an
        adapter trains -> its site; ``asked``: node of a tensor -> a path."""
        outer = outer or {}
        bodies: dict[fx.Node, list[tuple[fx.GraphModule, Mapping[fx.Node, fx.Node]]]] = {}
        for call, body, operands in nested(gm):
            bodies.setdefault(call, []).append((body, operands))
        modes = GradModes(recording=region is None)
        inside: dict[fx.Node, Region | None] = {}
        for node in gm.graph.nodes:
            if modes.step(node):
                region = self._switch(gm, node, modes, region, inside)
                continue
            if region is not None:
                region.nodes.add(node)
            if node in bodies:
                for body, operands in bodies[node]:
                    self.visit(
                        body, _through(operands, trained), _through(operands, asked), region=region,
                        outer={inner: outer.get(source, source) for inner, source in operands.items()},
                    )  # fmt: skip
            elif region is None:
                self.recorded.update(trained[source] for source in node.all_input_nodes if source in trained)
            else:
                _read(region, node.all_input_nodes, trained, asked, outer)

    def _switch(
        self, gm: fx.GraphModule, node: fx.Node, modes: GradModes, region: Region | None,
        inside: dict[fx.Node, Region | None],
    ) -> Region | None:  # fmt: skip
        """The region behind a switch. ``inside``: where each inference mode began."""
        switch = grad_switch(node)
        if isinstance(switch, fx.Node):
            for one in self.regions:
                if (gm, switch) in one.switches:
                    one.switches.append((gm, node))
            return inside[switch]
        if node.users:
            inside[node] = region
        if modes.recording:
            return None
        if region is None:
            region = Region()
            self.regions.append(region)
        if not switch:
            region.switches.append((gm, node))
        return region


def _through(operands: Mapping[fx.Node, fx.Node], known: Mapping[fx.Node, str]) -> dict[fx.Node, str]:
    return {inner: known[source] for inner, source in operands.items() if source in known}


def _read(
    region: Region, sources: Iterable[fx.Node], trained: Mapping[fx.Node, str], asked: Mapping[fx.Node, str],
    outer: Mapping[fx.Node, fx.Node],
) -> None:  # fmt: skip
    for source in sources:
        if source in asked:
            region.asked.add(asked[source])
        if source in trained:
            region.sites.add(trained[source])
        else:
            region.reads.add(outer.get(source, source))


__all__ = ["GradModes", "Region", "Walk"]
