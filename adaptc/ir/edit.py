"""Edits: how a pass changes a graph, so that every change can be counted, checked and undone.

A pass opens one :class:`Edit` per rewrite, naming the matched nodes; it adds nodes through the edit and
finishes it with ``old -> new``. What was there and what is there now are two cut-outs over the same boundary,
which translation validation compares.
"""

from __future__ import annotations

import contextlib
import dataclasses
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from adaptc.ir import dialect
from adaptc.ir.origin import INHERITED, Origin
from adaptc.torch_internals import fake_mode_of, lazy_graph_module, node_value, printable, tree_leaves


@dataclasses.dataclass
class Rewrite:
    """One finished edit.

    ``owner``: the graph module that was edited, which may be a nested one. ``matched``: names of the nodes
    that the rewrite replaces; ``removed``: those of them that are gone. ``replaced``: (old, new) results.
    ``dead``: nobody read the old results. ``boundary``: nodes whose values both cut-outs read, in order.
    ``before`` and ``after`` are GraphModules with one placeholder per boundary node and the tuple of results
    as output; None unless recorded.
    """

    site: str
    removed: tuple[str, ...]
    added: tuple[str, ...]
    boundary: tuple[fx.Node, ...] = ()
    before: fx.GraphModule | None = None
    after: fx.GraphModule | None = None
    owner: fx.GraphModule | None = None
    matched: tuple[str, ...] = ()
    replaced: tuple[tuple[fx.Node, fx.Node], ...] = ()
    dead: bool = False


@dataclasses.dataclass
class Result:
    """What a pass did: finished rewrites, and sites it could have rewritten and did not, with the reason."""

    applied: list[Rewrite] = dataclasses.field(default_factory=list)
    refused: list[tuple[str, str]] = dataclasses.field(default_factory=list)


class Edit:
    """Replaces ``matched`` nodes of a graph, whose ``results`` others read, by nodes that it adds.

    Args:
        gm: the graph module (the one that owns the nodes, which may be a nested one).
        site: module path for reports.
        matched: nodes to be replaced, in graph order.
        results: the matched nodes whose values are used outside; their new values must be given to
            :meth:`finish` in the same order.
        at: the matched node before which new nodes go (default: the last); their inputs must stand before it.
        record: keep both cut-outs for translation validation.
    """

    def __init__(
        self, gm: fx.GraphModule, site: str, matched: Sequence[fx.Node], results: Sequence[fx.Node], *,
        at: fx.Node | None = None, record: bool = False,
    ) -> None:  # fmt: skip
        self.gm, self.site, self.matched, self.results = gm, site, list(matched), list(results)
        self.record = record
        #: The new nodes are the base model's, as the matched ones are, and not an adapter's.
        self.of_base = False
        self.position = self.matched[-1] if at is None else at
        self.new_nodes: list[fx.Node] = []
        self._origin: Origin | None = None
        self._place: fx.Node | None = None

    @contextlib.contextmanager
    def in_place_of(self, origin: Origin | None, inputs: Sequence[fx.Node] | None = None) -> Iterator[None]:
        """A block in which new nodes are what the node with this ``origin`` was, and with ``inputs`` stand where it
        stood, behind what they read. Nothing happens without an origin."""
        if origin is not None:
            self._origin = origin
            self._place = None if inputs is None else self._where(origin, inputs)
        try:
            yield
        finally:
            self._origin = self._place = None

    def _where(self, origin: Origin, inputs: Sequence[fx.Node]) -> fx.Node:
        place = self.position
        while origin.before is not None and place.name != origin.before:
            if place.prev in inputs or place.prev.op in ("placeholder", "root"):
                break
            place = place.prev
        return place

    def call(self, target: Callable[..., Any] | str, *args: Any, **kwargs: Any) -> fx.Node:
        """Add a node before the edit's position; a string target is a method call. Sets its fake value."""
        with self.gm.graph.inserting_before(self._place or self.position):
            if isinstance(target, str):
                node = self.gm.graph.call_method(target, args, kwargs)
            else:
                node = self.gm.graph.call_function(printable(target), args, kwargs)
        if self._origin is not None:
            node.meta.update(self._origin.meta)
        else:
            for key in INHERITED:
                if key in self.position.meta:
                    node.meta[key] = self.position.meta[key]
            mark = {} if self.of_base else {"adaptc": self.site}
            node.meta["custom"] = {**self.position.meta.get("custom", {}), **mark}
        key = "val" if "val" in self.position.meta else "example_value"
        value = infer_value(node)
        if value is not None:
            node.meta[key] = value
        self.new_nodes.append(node)
        return node

    def op(self, name: str, *args: Any) -> fx.Node:
        """Add a call of a dialect op."""
        return self.call(dialect.get(name).overload, *args)

    def cast(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        """``node`` in ``dtype``: itself where it has that dtype."""
        return node if node_value(node).dtype == dtype else self.call("to", node, dtype)

    def item(self, node: fx.Node, index: int) -> fx.Node:
        """One output of a node that returns a tuple."""
        return self.call(operator.getitem, node, index)

    def copy_in(self, body: fx.Graph, inputs: Sequence[Any]) -> list[fx.Node]:
        """Add a traced body whose placeholders stand for ``inputs``; returns the nodes of its outputs."""
        env: dict[fx.Node, Any] = dict(
            zip((n for n in body.nodes if n.op == "placeholder"), inputs, strict=True)
        )
        outputs: Any = ()
        for node in body.nodes:
            if node.op == "placeholder":
                continue
            if node.op == "output":
                outputs = fx.map_arg(node.args[0], lambda n: env[n])
                continue
            args = fx.map_arg(node.args, lambda n: env[n])
            kwargs = fx.map_arg(node.kwargs, lambda n: env[n])
            new = self.call(node.target, *args, **kwargs)
            if "val" in node.meta and node_value(new) is None:
                new.meta["val"] = node.meta["val"]
            env[node] = new
        return list(outputs) if isinstance(outputs, list | tuple) else [outputs]

    def finish(self, *new_results: fx.Node) -> Rewrite:
        """Redirect the readers of the results to ``new_results`` and erase what nobody reads any more."""
        inside = set(self.matched)
        fresh = set(self.new_nodes)
        before = after = None
        boundary: list[fx.Node] = []
        if self.record:
            boundary = _boundary([*self.matched, *self.new_nodes], inside | fresh)
            before = extract(self.gm, self.matched, boundary, self.results)
            # New nodes may go on reading what they replace, as in y -> 2 * y.
            still_read = _ancestors(self.new_nodes, inside)
            kept = [n for n in self.matched if n in still_read]
            after = extract(self.gm, [*kept, *self.new_nodes], boundary, list(new_results))
        dead = all(is_unread(old) for old in self.results)
        for old, new in zip(self.results, new_results, strict=True):
            old.replace_all_uses_with(new, delete_user_cb=lambda user: user not in fresh)
        removed = []
        for node in reversed(self.matched):
            if not node.users:
                removed.append(node.name)
                self.gm.graph.erase_node(node)
        return Rewrite(
            self.site,
            tuple(removed),
            tuple(n.name for n in self.new_nodes),
            tuple(boundary),
            before,
            after,
            owner=self.gm,
            matched=tuple(n.name for n in self.matched),
            replaced=tuple(zip(self.results, new_results, strict=True)),
            dead=dead,
        )


def is_unread(node: fx.Node) -> bool:
    """Whether nobody reads a node's value, nor an item of it."""
    return all(user.target is operator.getitem and not user.users for user in node.users)


def infer_value(node: fx.Node) -> Any:
    """The fake value of a node, computed from those of its inputs; None when one of them has none.

    On a captured graph whether the value requires a gradient is inferred as well (passes ask), on a joint graph
    nothing does.
    """
    if any(node_value(source) is None for source in node.all_input_nodes):
        return None
    args, kwargs = fx.map_arg((node.args, node.kwargs), node_value)
    known = [v for v in tree_leaves((args, kwargs)) if isinstance(v, torch.Tensor)]
    if not known:
        # A factory function: any value of the graph knows the mode.
        values = (node_value(n) for n in node.graph.nodes)
        known = [v for v in values if isinstance(v, torch.Tensor)][:1]
    is_joint = any("val" in source.meta for source in node.all_input_nodes)
    with fake_mode_of(known), torch.no_grad() if is_joint else contextlib.nullcontext():
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        if not callable(node.target):
            return None
        return node.target(*args, **kwargs)


def _ancestors(nodes: Iterable[fx.Node], inside: set[fx.Node]) -> set[fx.Node]:
    """What of ``inside`` the values of ``nodes`` depend on."""
    found: set[fx.Node] = set()
    queue = [source for node in nodes for source in node.all_input_nodes]
    while queue:
        node = queue.pop()
        if node in inside and node not in found:
            found.add(node)
            queue += node.all_input_nodes
    return found


def _boundary(nodes: Iterable[fx.Node], inside: set[fx.Node]) -> list[fx.Node]:
    seen: dict[fx.Node, None] = {}
    for node in nodes:
        for source in node.all_input_nodes:
            if source not in inside:
                seen[source] = None
    return list(seen)


def extract(
    gm: fx.GraphModule, nodes: Sequence[fx.Node], boundary: Sequence[fx.Node], results: Sequence[fx.Node]
) -> fx.GraphModule:
    """A stand-alone GraphModule of ``nodes``, from ``boundary`` to the tuple ``results``."""
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for source in boundary:
        env[source] = graph.placeholder(source.name)
        env[source].meta = dict(source.meta)
    for node in nodes:
        env[node] = graph.node_copy(node, lambda n: env[n])
    graph.output(tuple(env[r] for r in results))
    return fx.GraphModule(gm, graph)


def copy_graph_module(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy whose graphs (nested ones too) can be changed freely; tensors and node values are shared."""
    return _copy(gm, fx.GraphModule)


def snapshot(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy to read: its code is written when somebody runs or prints it."""
    return _copy(gm, lazy_graph_module)


def _copy(gm: fx.GraphModule, make: Callable[[fx.GraphModule, fx.Graph], fx.GraphModule]) -> fx.GraphModule:
    graph = fx.Graph()
    env: dict[fx.Node, Any] = {}
    output = graph.graph_copy(gm.graph, env)
    old_output = next(n for n in gm.graph.nodes if n.op == "output")
    graph.output(output, getattr(old_output, "type", None)).meta = dict(old_output.meta)
    new = make(gm, graph)
    for name, child in gm.named_children():
        if isinstance(child, fx.GraphModule):
            setattr(new, name, _copy(child, make))
    return new


def nested(gm: fx.GraphModule) -> list[tuple[fx.Node, fx.GraphModule, Mapping[fx.Node, fx.Node]]]:
    """The bodies that higher-order ops of ``gm`` call: (call node, body, body placeholder -> outer node)."""
    found: list[tuple[fx.Node, fx.GraphModule, Mapping[fx.Node, fx.Node]]] = []
    for node in gm.graph.nodes:
        if node.op != "call_function":
            continue
        bodies = {a: body for a in node.args if (body := _body(gm, a)) is not None}
        for body_node, body in bodies.items():
            start = node.args.index(body_node) + 1
            # Ops with operands in a list (cond) or in order (checkpoint) both bind them in order.
            operands = [a for a in _flat(node.args[start:]) if isinstance(a, fx.Node) and a not in bodies]
            inputs = [n for n in body.graph.nodes if n.op == "placeholder"]
            found.append((node, body, dict(zip(inputs, operands, strict=False))))
    return found


def in_bodies(gm: fx.GraphModule, known: Mapping[fx.Node, str]) -> dict[fx.Node, str]:
    """What is ``known`` of nodes of ``gm``, also of the inputs that they are in the bodies of its higher-order ops."""
    found = dict(known)
    for _, body, operands in nested(gm):
        inputs = {inside: known[outside] for inside, outside in operands.items() if outside in known}
        found = in_bodies(body, inputs) | found
    return found


def _body(gm: fx.GraphModule, argument: Any) -> fx.GraphModule | None:
    if not (isinstance(argument, fx.Node) and argument.op == "get_attr"):
        return None
    body = getattr(gm, str(argument.target), None)
    return body if isinstance(body, fx.GraphModule) else None


def _flat(args: Any) -> list[Any]:
    flat: list[Any] = []
    for a in args:
        flat.extend(_flat(a) if isinstance(a, list | tuple) else [a])
    return flat
