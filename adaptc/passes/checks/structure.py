"""Checks after every pass that cost little and always run: is the graph well formed and well typed, with the
inputs and outputs it had?

A failure names the pass, the site, what was expected and found, and shows the graph around the node.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import fx

from adaptc.errors import VerifyError
from adaptc.ir import show
from adaptc.ir.edit import Result, Rewrite, infer_value, is_unread
from adaptc.ir.sites import dialect_nodes, site_of
from adaptc.ir.types import describe, same_type
from adaptc.torch_internals import node_value, tree_leaves

if TYPE_CHECKING:
    from adaptc.passes.contract import Pass

#: Site named in an error that concerns no single site.
WHOLE_GRAPH = "the whole graph"


@dataclasses.dataclass(frozen=True)
class BodySignature:
    """What a pass must leave alone in one graph: names of inputs, values of outputs (``...`` where nothing is
    known). ``unread``: dialect nodes that nobody read before the pass either."""

    inputs: tuple[str, ...]
    outputs: tuple[Any, ...]
    unread: frozenset[str]


def bodies(gm: fx.GraphModule) -> dict[str, fx.GraphModule]:
    """The graph module and every nested body, by attribute path ("" is the module itself)."""
    return {path: m for path, m in gm.named_modules() if isinstance(m, fx.GraphModule)}


def signature(gm: fx.GraphModule) -> dict[str, BodySignature]:
    """What :func:`check_structure` compares; taken before a pass runs."""
    return {path: _body_signature(body) for path, body in bodies(gm).items()}


def _body_signature(body: fx.GraphModule) -> BodySignature:
    inputs = tuple(str(n.target) for n in body.graph.nodes if n.op == "placeholder")
    outputs: list[Any] = []
    for leaf in tree_leaves(body.graph.output_node().args[0]):
        value = node_value(leaf) if isinstance(leaf, fx.Node) else leaf
        outputs.append(... if value is None and isinstance(leaf, fx.Node) else value)
    unread = frozenset(n.name for n in dialect_nodes(body) if is_unread(n))
    return BodySignature(inputs, tuple(outputs), unread)


def check_structure(
    one: Pass, gm: fx.GraphModule, before: Mapping[str, BodySignature], result: Result
) -> None:
    """Check the graph that ``one`` left, given the ``signature`` of the graph it was given.

    Raises:
        VerifyError: see the message.
    """
    now = bodies(gm)
    if now.keys() != before.keys():
        raise failure(one, gm, None, WHOLE_GRAPH, expected=_names(before), found=_names(now))
    for path, body in now.items():
        rewrites = [r for r in result.applied if r.owner is body]
        _check_lint(one, body)
        # Rewrites first: what they break shows at their site, not far down at an output.
        for rewrite in rewrites:
            _check_results(one, body, rewrite)
        _check_values(one, body, rewrites)
        _check_interface(one, body, before[path])
        _check_unread(one, body, before[path], rewrites)


def failure(one: Pass, gm: fx.GraphModule, node: fx.Node | None, site: str, **facts: object) -> VerifyError:
    """The error of a check: pass, site, ``facts`` (expected, found), and the graph around ``node``."""
    if node is not None:
        facts["graph"] = f"10 nodes before and after %{node.name}\n{show.excerpt(gm, node, around=10)}"
    return VerifyError(f"VerifyError after pass {one.name}, at {site}", **facts)


def place_of(node: fx.Node) -> str:
    """The site that a node belongs to, for a headline."""
    found = site_of(node)
    return WHOLE_GRAPH if found == "(unknown site)" else found


def _names(found: Mapping[str, object]) -> str:
    return f"nested bodies {', '.join(filter(None, found)) or '(none)'}"


def _check_lint(one: Pass, body: fx.GraphModule) -> None:
    try:
        body.graph.lint()
    except RuntimeError as error:
        # torch's message names the node.
        raise failure(one, body, None, WHOLE_GRAPH, expected="a well-formed graph", found=error) from error


def _check_interface(one: Pass, body: fx.GraphModule, before: BodySignature) -> None:
    now = _body_signature(body)
    if now.inputs != before.inputs:
        gone = [f"%{n} is gone" for n in before.inputs if n not in now.inputs]
        new = [f"%{n} is new" for n in now.inputs if n not in before.inputs]
        found = ", ".join(gone + new) or "the same inputs in another order"
        raise failure(one, body, None, WHOLE_GRAPH, expected="the inputs from before the pass", found=found)
    output = body.graph.output_node()
    if len(now.outputs) != len(before.outputs):
        expected, found = f"{len(before.outputs)} outputs, as before the pass", str(len(now.outputs))
        raise failure(one, body, output, WHOLE_GRAPH, expected=expected, found=found)
    for i, (was, is_) in enumerate(zip(before.outputs, now.outputs, strict=True)):
        if was is not ... and not same_type(was, is_, strides=False):
            leaf = tree_leaves(output.args[0])[i]
            node = leaf if isinstance(leaf, fx.Node) else output
            expected, found = (describe(v, strides=False) for v in (was, is_))
            raise failure(one, body, node, place_of(node), expected=f"output {i}: {expected}", found=found)


def _check_unread(
    one: Pass, body: fx.GraphModule, before: BodySignature, rewrites: list[Rewrite]
) -> None:
    allowed = before.unread | {name for r in rewrites if r.dead for name in r.added}
    for node in dialect_nodes(body):
        if is_unread(node) and node.name not in allowed:
            found = f"nobody reads %{node.name}"
            raise failure(one, body, node, site_of(node), expected="no dead dialect node", found=found)


def _check_values(one: Pass, body: fx.GraphModule, rewrites: list[Rewrite]) -> None:
    """Every added node has a fake value, and its inputs still give that value."""
    for node in _added_nodes(body, rewrites):
        stored = node_value(node)
        inferred = infer_value(node)
        if stored is None:
            if inferred is None:
                continue
            is_joint = any("val" in n.meta for n in body.graph.nodes if n.op == "placeholder")
            key = "val" if is_joint else "example_value"
            found = f"no meta[{key!r}] on %{node.name}"
            raise failure(one, body, node, site_of(node), expected="a fake value on every new node", found=found)
        if inferred is not None and not same_type(stored, inferred):
            expected = f"%{node.name} as its inputs give it: {_describe_all(inferred)}"
            raise failure(one, body, node, site_of(node), expected=expected, found=_describe_all(stored))


def _added_nodes(body: fx.GraphModule, rewrites: list[Rewrite]) -> Iterator[fx.Node]:
    names = {name for r in rewrites for name in r.added}
    return (n for n in body.graph.nodes if n.name in names)


def _check_results(one: Pass, body: fx.GraphModule, rewrite: Rewrite) -> None:
    """What replaces a value has its type. Strides count where the graph's own strides are promised to others."""
    for old, new in rewrite.replaced:
        was, is_ = node_value(old), node_value(new)
        strides = "val" in old.meta
        if was is None or is_ is None or same_type(was, is_, strides=strides):
            continue
        node = new if any(new is n for n in body.graph.nodes) else None
        expected, found = (_describe_all(v, strides=strides) for v in (was, is_))
        raise failure(one, body, node, rewrite.site, expected=f"%{old.name}: {expected}", found=found)


def _describe_all(value: Any, *, strides: bool = True) -> str:
    return "; ".join(describe(leaf, strides=strides) for leaf in tree_leaves(value))
