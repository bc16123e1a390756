"""Values at the boundary of rewritten cut-outs, on which before and after are compared.

Where the real inputs of a captured graph are at hand, the graph as it was before the pass is run once on copies
of them, and each rewrite gets its boundary values as they are when its matched nodes run: captured graphs write
to memory, so the same node may hold another value later. Everything else is drawn from the fake values.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from adaptc.ir.edit import Rewrite
from adaptc.passes.checks.claims import replacements
from adaptc.passes.checks.structure import bodies
from adaptc.torch_internals import is_fake, node_value, size_hint, tree_leaves, tree_map

#: What is called with each rewrite, its boundary values, and the boundary nodes that were written to while its
#: matched nodes ran.
Visit = Callable[[Rewrite, list[Any], list[fx.Node]], None]
_SEED = 0x5EED


def visit_rewrites(
    original: fx.GraphModule,
    gm: fx.GraphModule,
    rewrites: Sequence[Rewrite],
    inputs: Sequence[Any] | None,
    visit: Visit,
) -> None:
    """Call ``visit`` for every rewrite of ``gm``, each time with fresh values that it may change.

    Args:
        original: the graph before the pass; ``inputs``: its real inputs, or None.
    """
    generator = torch.Generator().manual_seed(_SEED)
    probes = [_Probe(r, generator, visit) for r in rewrites]
    if inputs is not None and not any(is_fake(value) for value in inputs):
        watched = _attach(original, gm, probes)
        real = [_concrete(v) for v in inputs]
        with torch.no_grad(), torch.inference_mode(False), private_randomness(real):
            _Replay(original, watched).run(*real)
    for probe in probes:
        probe.finish()


def exact_copy(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A detached copy with the same strides, whatever they are (``clone`` makes some tensors dense)."""
    tensor = tensor.detach()
    if tensor.layout != torch.strided or type(tensor) is not torch.Tensor:
        return tensor.clone() if dtype is None else tensor.to(dtype, copy=True)
    flat = span(tensor).to(dtype or tensor.dtype, copy=True)
    return flat.as_strided(tensor.size(), tensor.stride(), 0)


def span(tensor: torch.Tensor) -> torch.Tensor:
    """The stretch of memory that ``tensor`` uses, as a 1-d view."""
    if tensor.numel() == 0:
        return tensor.as_strided((0,), (1,))
    last = sum((size - 1) * stride for size, stride in zip(tensor.size(), tensor.stride(), strict=True))
    return tensor.as_strided((last + 1,), (1,))


def draw(fake: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A real tensor of the shape, strides, dtype and device of ``fake``: normal values, coin flips for bool,
    zeros for integers (any index is legal at zero)."""
    size, stride = [size_hint(s) for s in fake.shape], [size_hint(s) for s in fake.stride()]
    drawn = torch.empty_strided(size, stride, dtype=fake.dtype)
    flat = span(drawn)
    if fake.dtype.is_floating_point or fake.dtype.is_complex:
        flat.copy_(torch.randn(flat.shape, generator=generator, dtype=torch.float64))
    else:
        flat.copy_(torch.randint(0, 2 if fake.dtype == torch.bool else 1, flat.shape, generator=generator))
    return drawn.to(fake.device)


def vary_constant(value: Any, generator: torch.Generator) -> Any:
    """``value``, changed in place where all its elements are equal.

    Zeros hide whatever reads them (LoRA's B before the first step), and a scale of one hides that it was dropped;
    the graph will run with other values. Signs stay, so that domains of functions do.
    """
    if not isinstance(value, torch.Tensor) or not value.dtype.is_floating_point or value.numel() == 0:
        return value
    first = value.reshape(-1)[0]
    if not bool(torch.isfinite(first)) or not bool((value == first).all()):
        return value
    flat = span(value)
    if first == 0:
        fresh = torch.randn(flat.shape, generator=generator, dtype=torch.float64) / 2
    else:
        fresh = float(first) * (1 + torch.rand(flat.shape, generator=generator, dtype=torch.float64))
    flat.copy_(fresh)
    return value


@contextlib.contextmanager
def private_randomness(values: Iterable[Any]) -> Iterator[None]:
    """A block that leaves the random state of the CPU and of the devices of ``values`` as it found it."""
    devices = {v.device for v in tree_leaves(list(values)) if isinstance(v, torch.Tensor)}
    kinds = {d.type for d in devices} - {"cpu", "meta"}
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        for kind in sorted(kinds):
            indices = sorted(d.index or 0 for d in devices if d.type == kind)
            stack.enter_context(torch.random.fork_rng(devices=indices, device_type=kind))
        yield


@dataclasses.dataclass
class _Probe:
    """Collects the boundary values of one rewrite while the original graph runs.

    ``sources``: per boundary node, the node of the original graph that holds its value. ``points``: nodes of the
    original graph that the rewrite replaces, each a moment at which boundary values are read.
    """

    rewrite: Rewrite
    generator: torch.Generator
    visit: Visit
    sources: list[fx.Node | None] = dataclasses.field(default_factory=list)
    points: list[fx.Node] = dataclasses.field(default_factory=list)
    values: dict[int, Any] = dataclasses.field(default_factory=dict)
    versions: dict[int, list[int]] = dataclasses.field(default_factory=dict)
    written: list[fx.Node] = dataclasses.field(default_factory=list)
    done: bool = False

    def look(self, env: Mapping[fx.Node, Any], node: fx.Node) -> None:
        """Read what is there just before ``node``, one of the points, runs."""
        for i, source in enumerate(self.sources):
            if source is None or source not in env or self.done:
                continue
            versions = [t._version for t in tree_leaves(env[source]) if isinstance(t, torch.Tensor)]
            if i not in self.values:
                self.values[i] = tree_map(_copy_leaf, env[source])
                self.versions[i] = versions
            elif versions != self.versions[i] and self.rewrite.boundary[i] not in self.written:
                self.written.append(self.rewrite.boundary[i])
        if node is self.points[-1]:
            self.finish()

    def finish(self) -> None:
        """Hand the rewrite over, once; what was not seen is drawn."""
        if self.done:
            return
        self.done = True
        values = [
            self.values[i] if i in self.values else self._drawn(node)
            for i, node in enumerate(self.rewrite.boundary)
        ]
        values = [tree_map(lambda leaf: vary_constant(leaf, self.generator), v) for v in values]
        self.values.clear()
        self.visit(self.rewrite, values, self.written)

    def _drawn(self, node: fx.Node) -> Any:
        if node.op == "get_attr" and self.rewrite.owner is not None:
            found = self.rewrite.owner
            for name in str(node.target).split("."):
                found = getattr(found, name)
            return tree_map(_copy_leaf, found)
        return tree_map(self._drawn_leaf, node_value(node))

    def _drawn_leaf(self, leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            return draw(leaf, self.generator)
        return _concrete(leaf)


def _concrete(value: Any) -> Any:
    """A symbolic number as the one it was captured with."""
    if isinstance(value, torch.SymInt):
        return size_hint(value)
    return value.node.hint if isinstance(value, torch.SymFloat | torch.SymBool) else value


def _copy_leaf(leaf: Any) -> Any:
    return exact_copy(leaf) if isinstance(leaf, torch.Tensor) else leaf


def _attach(
    original: fx.GraphModule, gm: fx.GraphModule, probes: Sequence[_Probe]
) -> dict[fx.Node, list[_Probe]]:
    """Find the sources and points of every probe; returns the probes by point."""
    old_bodies = bodies(original)
    watched: dict[fx.Node, list[_Probe]] = {}
    for path, body in bodies(gm).items():
        nodes = {n.name: n for n in old_bodies[path].graph.nodes}
        mine = [p for p in probes if p.rewrite.owner is body]
        origin: dict[str, str] = {}
        moments: dict[str, set[str]] = {}
        for probe in mine:
            rewrite = probe.rewrite
            names = [n.name if n.name in nodes else origin.get(n.name, "") for n in rewrite.boundary]
            probe.sources = [nodes.get(name) for name in names]
            # A node that an earlier rewrite of this pass added stands for the moments of what it replaced.
            points = set().union(*(moments.get(name, {name}) for name in rewrite.matched))
            probe.points = [n for name, n in nodes.items() if name in points]
            for name in rewrite.added:
                moments[name] = points
            for old, new in replacements([rewrite]).items():
                origin.setdefault(new, origin.get(old, old))
            for point in probe.points:
                watched.setdefault(point, []).append(probe)
    return watched


class _Replay(fx.Interpreter):
    """Runs a captured graph on copies of its inputs and shows every probe its points."""

    def __init__(
        self, gm: fx.GraphModule, watched: Mapping[fx.Node, list[_Probe]], *, copy_inputs: bool = True
    ) -> None:
        super().__init__(gm)
        self.watched = watched
        self.copied_ops = ("placeholder", "get_attr") if copy_inputs else ("get_attr",)
        # An error of a check is shown as it is, without the interpreter's own remarks.
        self.extra_traceback = False
        self._owned: set[fx.Node] = set()

    def run_node(self, n: fx.Node) -> Any:
        probes = self.watched.get(n, ())
        self._own([*n.all_input_nodes, *(s for p in probes for s in p.sources if s is not None)])
        for probe in probes:
            probe.look(self.env, n)
        return super().run_node(n)

    def _own(self, nodes: Iterable[fx.Node]) -> None:
        """Copy inputs at their first use; they are freed after their last, so never all weights at once."""
        for node in nodes:
            if node.op in self.copied_ops and node in self.env and node not in self._owned:
                self._owned.add(node)
                self.env[node] = tree_map(_copy_leaf, self.env[node])

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is torch.ops.higher_order.tag_activation_checkpoint:
            body, *operands = args
            return _Replay(body, self.watched, copy_inputs=False).run(*operands)
        return super().call_function(target, args, kwargs)
