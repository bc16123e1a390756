"""Does a pass report what it did: no rewrite that is not there, no change that no rewrite names?

Translation validation compares what rewrites record; this check makes sure that nothing else changed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import fx

from adaptc.ir.edit import Result, Rewrite
from adaptc.passes.checks.structure import bodies, failure, place_of

if TYPE_CHECKING:
    from adaptc.passes.contract import Pass


@dataclasses.dataclass(frozen=True)
class _Reference:
    """A node as an argument, by name: two graphs' nodes compare equal."""

    name: str


def check_claims(one: Pass, original: fx.GraphModule, gm: fx.GraphModule, result: Result) -> None:
    """Compare the graphs before and after a pass with the rewrites it reports.

    Raises:
        VerifyError: see the message.
    """
    old_bodies = bodies(original)
    owners = set(map(id, bodies(gm).values()))
    stray = [r for r in result.applied if id(r.owner) not in owners]
    changed = False
    for path, body in bodies(gm).items():
        rewrites = [r for r in result.applied if r.owner is body]
        changed |= _check_body(one, old_bodies[path], body, rewrites)
    if result.applied and not changed:
        claim = f"{len(result.applied)} rewrites, as {one.name} reports"
        found = "the graph is the same as before"
        raise failure(one, gm, None, result.applied[0].site, expected=claim, found=found)
    if stray:
        expected, found = "a rewrite of this graph", f"a rewrite made by no edit of it (removed {stray[0].removed})"
        raise failure(one, gm, None, stray[0].site, expected=expected, found=found)


def replacements(rewrites: Sequence[Rewrite]) -> dict[str, str]:
    """Replaced node -> the node that stands for it in the end, by name; ``rewrites`` in the order they were made."""
    stands_for: dict[str, str] = {}
    for rewrite in reversed(rewrites):
        _add_replacements(rewrite, stands_for)
    return stands_for


def _add_replacements(rewrite: Rewrite, later: dict[str, str]) -> None:
    """Extend what ``later`` rewrites replaced by what ``rewrite``, made before them, did."""
    for old, new in rewrite.replaced:
        later[old.name] = later.get(new.name, new.name)


def _check_body(one: Pass, old: fx.GraphModule, new: fx.GraphModule, rewrites: Sequence[Rewrite]) -> bool:
    """Check one graph; returns whether it changed at all."""
    before, after = _by_name(old), _by_name(new)
    _check_names(one, old, new, rewrites)
    stands_for = replacements(rewrites)
    for name, node in before.items():
        if name in after:
            _check_same(one, new, node, after[name], stands_for, "as before the pass")
    later: dict[str, str] = {}
    for rewrite in reversed(rewrites):
        recorded = rewrite.after.graph.nodes if rewrite.after is not None else ()
        for node in recorded:
            if node.name in rewrite.added and node.name in after:
                _check_same(one, new, node, after[node.name], later, "as its rewrite recorded it")
        _add_replacements(rewrite, later)
    survivors = [n for n in before if n in after]
    order = [n for n in after if n in before]
    if survivors != order:
        moved = next(b for a, b in zip(survivors, order, strict=True) if a != b)
        raise failure(
            one, new, after[moved], place_of(after[moved]),
            expected="the nodes it left alone in their order", found=f"%{moved} was moved",
        )  # fmt: skip
    return before.keys() != after.keys() or any(
        _call(before[n], {}) != _call(after[n], {}) for n in survivors
    )


def _by_name(gm: fx.GraphModule) -> dict[str, fx.Node]:
    # A copy may number its output node anew; there is one in every graph.
    return {"(output)" if n.op == "output" else n.name: n for n in gm.graph.nodes}


def _check_names(one: Pass, old: fx.GraphModule, new: fx.GraphModule, rewrites: Sequence[Rewrite]) -> None:
    before, after = _by_name(old), _by_name(new)
    removed = {name for r in rewrites for name in r.removed}
    added = {name for r in rewrites for name in r.added}
    for name, node in before.items():
        if name not in after and name not in removed:
            found = f"%{name} is gone, and no rewrite names it"
            raise failure(one, old, node, place_of(node), expected="removed nodes in a rewrite's record", found=found)
    for name, node in after.items():
        if name not in before and name not in added:
            found = f"%{name} is new, and no rewrite names it"
            raise failure(one, new, node, place_of(node), expected="added nodes in a rewrite's record", found=found)


def _check_same(
    one: Pass, gm: fx.GraphModule, old: fx.Node, new: fx.Node, stands_for: dict[str, str], when: str
) -> None:
    expected, found = _call(old, stands_for), _call(new, {})
    if expected != found:
        was, is_ = _first_difference(expected, found)
        raise failure(
            one, gm, new, place_of(new),
            expected=f"%{new.name} {when}, but for replaced values: {was}", found=is_,
        )  # fmt: skip


def _call(node: fx.Node, stands_for: dict[str, str]) -> tuple[Any, ...]:
    """What a node does, with references by name, replaced values by what replaces them."""

    def name_of(argument: fx.Node) -> Any:
        return _Reference(stands_for.get(argument.name, argument.name))

    arguments = fx.map_arg((node.args, node.kwargs), name_of)
    return (node.op, node.target, *arguments)


def _first_difference(expected: tuple[Any, ...], found: tuple[Any, ...]) -> tuple[str, str]:
    """The first thing in which two calls differ, as text for each."""
    (op, target, args, kwargs), (new_op, new_target, new_args, new_kwargs) = expected, found
    if (op, target) != (new_op, new_target):
        return f"a call of {_text(target)}", f"a call of {_text(new_target)}"
    named = {**dict(enumerate(args)), **kwargs}
    new_named = {**dict(enumerate(new_args)), **new_kwargs}
    for key in {**named, **new_named}:
        was, is_ = (_text(d[key]) if key in d else "not given" for d in (named, new_named))
        if was != is_:
            return f"argument {key} is {was}", f"argument {key} is {is_}"
    return _text(args), _text(new_args)


def _text(argument: Any) -> str:
    if isinstance(argument, _Reference):
        return f"%{argument.name}"
    if isinstance(argument, list | tuple):
        return f"({', '.join(map(_text, argument))})"
    return str(getattr(argument, "__name__", None) or repr(argument))
