"""The report of a compiled model: what was adapted, how the graphs were rewritten, and what was not."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from adaptc.codegen.backend import JOINT_BACKENDS

if TYPE_CHECKING:
    from adaptc.runtime.handle import Handle


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Sections of (title, lines); prints as text."""

    sections: tuple[tuple[str, tuple[str, ...]], ...]

    def __str__(self) -> str:
        return "\n".join(line for title, lines in self.sections for line in (title, *(f"  {one}" for one in lines)))

    __repr__ = __str__

    def to_dict(self) -> dict[str, list[str]]:
        """Title -> lines."""
        return {title: list(lines) for title, lines in self.sections}


def explain(handle: Handle) -> Explanation:
    """The report as of now: before the first call it knows sites and parameters only, and says so."""
    sections = [
        (f"{type(handle.model).__name__}: {len(handle.sites)} adapted modules", tuple(_sites(handle))),
        ("trained parameters", tuple(_parameters(handle))),
        (f"backend {handle.options.backend.name}", tuple(_backend(handle))),
        ("graphs", tuple(_graphs(handle))),
        ("passes", tuple(_passes(handle))),
        ("attention", tuple(_attention(handle))),
    ]
    return Explanation(tuple((title, lines) for title, lines in sections if lines))


def folded(paths: Iterable[str]) -> list[str]:
    """Paths with runs of layer numbers folded: ``layers.{0..3}.q_proj``. Exact: unfolding gives the paths back."""
    groups: dict[str, list[int]] = {}
    plain = []
    for path in paths:
        if match := re.search(r"(?<![^.])(\d+)(?![^.])", path):
            template = f"{path[: match.start()]}{{}}{path[match.end() :]}"
            groups.setdefault(template, []).append(int(match[1]))
        else:
            plain.append(path)
    for template, numbers in groups.items():
        plain.extend(template.replace("{}", _span(run)) for run in _runs(sorted(set(numbers))))
    return plain


def _runs(numbers: list[int]) -> Iterator[list[int]]:
    run = numbers[:1]
    for number in numbers[1:]:
        if number != run[-1] + 1:
            yield run
            run = []
        run.append(number)
    yield run


def _span(run: list[int]) -> str:
    return str(run[0]) if len(run) == 1 else f"{{{run[0]}..{run[-1]}}}"


def _sites(handle: Handle) -> Iterator[str]:
    for name, record in handle.records.items():
        yield f"adapter {name!r} ({'live' if name in handle.live else 'not live'})"
        for number, rule in enumerate(record.plan.rules):
            paths = [path for path, _, index, _ in record.sites if index == number]
            yield f"  rule {number + 1}: {rule}: {len(paths)} modules"
            yield from (f"    {path}" for path in folded(paths))
        left_out = record.plan.resolve(handle.model).left_out
        yield from (f"  left out: {path}: {reason}" for path, reason in left_out)


def _parameters(handle: Handle) -> Iterator[str]:
    ours = list(handle.parameters())
    trained = sum(p.numel() for p in ours)
    everything = sum(p.numel() for p in handle.model.parameters())
    dtypes = ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in ours}))
    yield f"{trained:,} of {everything:,} ({trained / max(everything, 1):.3%}), {dtypes}"


def _backend(handle: Handle) -> Iterator[str]:
    yield f"pipeline {handle.pipeline()}"
    if handle.options.backend.name not in JOINT_BACKENDS:
        yield "joint passes do not run: this backend does not show its joint graph"
    if handle.entries:
        yield f"captured beside the model's forward: {', '.join(handle.entries)}"


def _graphs(handle: Handle) -> Iterator[str]:
    if not handle.graphs:
        yield "none yet: the model has not been called"
    for graph in handle.graphs:
        kind = "recompiled" if graph.is_recompile else "captured"
        nodes = len(graph.graph_module("captured").graph.nodes)
        yield f"{graph.index}: {kind}, {nodes} nodes, {len(graph.sites)} sites"
        if graph.break_reason:
            yield f"   ends at a graph break: {graph.break_reason}"
        yield from (f"   {note}" for note in graph.notes)


def _passes(handle: Handle) -> Iterator[str]:
    for graph in handle.graphs:
        for report in graph.reports:
            yield f"graph {graph.index}  {report.name}: {len(report.result.applied)} rewrites"
            if report.rolled_back:
                yield f"   undone: {report.rolled_back}"
            reasons: dict[str, list[str]] = {}
            for site, reason in report.result.refused:
                reasons.setdefault(reason, []).append(site)
            for reason, sites in reasons.items():
                yield from (f"   refused {path}: {reason}" for path in folded(sites))


def _attention(handle: Handle) -> Iterator[str]:
    if handle.graphs or handle.captures.eager:
        yield from (f"did not run in any forward: {path}" for path in folded(handle.idle_sites()))
    yield from (f"ran outside a captured graph: {path}" for path in folded(handle.eager_sites()))
    if hit := handle.captures.counts["recompile_limits_hit"]:
        yield f"recompile limit hit {hit} times: those frames run eagerly"
