"""How rewrites are made: a rewrite finds places in a graph and says what to write there, and the walk does the rest.

A rewrite is a function of a graph. It yields a :class:`Match` for every place that it would change, and a
:class:`Refusal` for every place that it leaves as it is for a reason that a user may ask for. :func:`each` makes one of
a function of a single node. The walk asks the limit of the pass, writes, and reports. It writes a match before it asks
for the next one: a rewrite sees what it has written so far.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from torch import fx

from adaptc.ir.edit import Edit, Result, Rewrite, nested
from adaptc.ir.sites import calls_of, site_of
from adaptc.passes.contract import Context


class Match(NamedTuple):
    """Nodes that a rewrite replaces, and how.

    ``node``: the new nodes go before it, and its site is the one that reports name, unless ``site`` is given.
    ``write``: adds the new nodes; returns what takes the place of each of the results, or one node for all of them.
    ``matched``: the nodes that are replaced, in graph order; ``results``: those of them that others read. By default
    both are ``node`` alone. ``gm``: the graph, if it is a nested one.
    """

    node: fx.Node
    write: Callable[[Edit], fx.Node | Sequence[fx.Node]]
    matched: Sequence[fx.Node] | None = None
    results: Sequence[fx.Node] | None = None
    site: str | None = None
    gm: fx.GraphModule | None = None


class Together(NamedTuple):
    """Matches that are made one after the other or not at all. ``sites``: those to name where the limit of the pass,
    from which they take ``cost``, does not allow them."""

    sites: Sequence[str]
    matches: Iterable[Match]
    cost: int = 1


class Refusal(NamedTuple):
    """A site that a rewrite could have changed and did not, with the reason."""

    site: str
    reason: str


Found = Match | Together | Refusal
#: Finds its places in one graph, nested bodies excluded.
Rewriting = Callable[[fx.GraphModule, Context], Iterator[Found]]
_OfNode = Callable[[fx.Node], Found | str | None]


def each(nodes: str | Callable[[fx.GraphModule], Iterable[fx.Node]]) -> Callable[[_OfNode], Rewriting]:
    """Make a rewrite of a function that is asked about each of ``nodes``: the calls of a dialect op, or what a function
    lists. It returns what it found, the reason why the node stays, or None for a node that it is not about."""

    def rewriting_of(match: _OfNode) -> Rewriting:
        @functools.wraps(match)
        def find(gm: fx.GraphModule, context: Context) -> Iterator[Found]:
            for node in calls_of(gm, nodes) if isinstance(nodes, str) else list(nodes(gm)):
                found = match(node)
                if found is not None:
                    yield Refusal(site_of(node), found) if isinstance(found, str) else found

        return find

    return rewriting_of


def everywhere(
    gm: fx.GraphModule, rewrites: Sequence[Rewriting], context: Context, result: Result | None = None
) -> Result:
    """Make ``rewrites`` in order in a graph, and then in each body of its higher-order ops; adds to ``result``."""
    result = Result() if result is None else result
    for rewrite in rewrites:
        walk(gm, rewrite, context, result)
    for _, body, _ in nested(gm):
        everywhere(body, rewrites, context, result)
    gm.recompile()
    return result


def walk(gm: fx.GraphModule, rewrite: Rewriting, context: Context, result: Result) -> None:
    """Make one rewrite in one graph wherever it fits and the limit allows it, and note what was done."""
    for found in rewrite(gm, context):
        if isinstance(found, Refusal):
            result.refused.append(found)
            continue
        group = Together([_site(found)], [found]) if isinstance(found, Match) else found
        if context.spend(group.cost):
            result.applied.extend(_make(gm, match, record=context.record) for match in group.matches)
        else:
            result.refused += [(site, "limit reached") for site in group.sites]


def _make(gm: fx.GraphModule, match: Match, *, record: bool) -> Rewrite:
    node = match.node
    results = [node] if match.results is None else match.results
    edit = Edit(match.gm or gm, _site(match), match.matched or [node], results, at=node, record=record)
    new = match.write(edit)
    return edit.finish(*([new] * len(results) if isinstance(new, fx.Node) else new))


def _site(match: Match) -> str:
    return site_of(match.node) if match.site is None else match.site
