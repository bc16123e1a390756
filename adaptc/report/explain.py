"""The report of a compiled model: what was adapted, how the graphs were rewritten, what that costs, what was not."""

from __future__ import annotations

import dataclasses
import html
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from torch import nn

from adaptc.capture.backend import JOINT_BACKENDS
from adaptc.capture.graphs import CapturedGraph
from adaptc.codegen import cost
from adaptc.codegen.choices import Choice
from adaptc.ir.dialect import Cost
from adaptc.ir.fold import fold, ranges
from adaptc.methods import quantised

if TYPE_CHECKING:
    from adaptc.passes.manager import PassReport
    from adaptc.runtime.adapters import AdapterSet
    from adaptc.runtime.calls.captures import Captures


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Sections of (title, lines); prints as text."""

    sections: tuple[tuple[str, tuple[str, ...]], ...]

    def __str__(self) -> str:
        return "\n".join(line for title, lines in self.sections for line in (title, *(f"  {one}" for one in lines)))

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """For notebooks: a section that opens and closes for each title."""
        parts = []
        for title, lines in self.sections:
            text = html.escape("\n".join(lines))
            parts.append(f"<details open><summary>{html.escape(title)}</summary><pre>{text}</pre></details>")
        return "".join(parts)

    def to_dict(self) -> dict[str, list[str]]:
        """Title -> lines."""
        return {title: list(lines) for title, lines in self.sections}


def explain(captures: Captures, entries: Sequence[str]) -> Explanation:
    """The report as of now; ``entries``: what is captured beside the model's forward. Before the first call it has
    graphs only when example inputs were given."""
    adapters, graphs, previewed = captures.adapters, captures.graphs, False
    called = captures.counts["calls"] > 0
    if not (graphs or called):
        graphs = captures.preview()
        previewed = bool(graphs)
    for graph in graphs:
        graph.complete()  # which may add notes
    noun = "adapted module" if adapters.bank is None else "site"
    sections: list[tuple[str, Iterable[str]]] = [
        (f"{type(adapters.model).__name__}: {_count(len(adapters.sites), noun)}", _sites(adapters)),
        ("bank", _bank(adapters)),
        ("base", _base(adapters.model)),
        ("trained parameters", _parameters(adapters)),
        (f"backend {captures.options.backend.name}", _backend(captures, entries)),
        ("graphs of example inputs (no call yet)" if previewed else "graphs", _graphs(graphs, called)),
    ]
    for members, passes, costs in _alike(graphs):
        which = f"graph{'s' if len(members) > 1 else ''} {ranges(members)}"
        sections.append((f"{which}: passes", passes))
        sections.append((f"{which}: cost over the frozen base (estimated)", costs))
    sections.append(("chosen for this host", _choices(graphs)))
    sections.append(("attention", _attention(captures)))
    complete = ((title, tuple(lines)) for title, lines in sections)
    return Explanation(tuple((title, lines) for title, lines in complete if lines))


def number_text(value: float, unit: str) -> str:
    """``1.25 MB``: three significant digits, decimal prefixes."""
    for prefix in ("", "k", "M", "G", "T", "P"):
        if abs(value) < 999.5 or prefix == "P":
            break
        value /= 1000
    digits = f"{value:.0f}" if value == int(value) and not prefix else f"{value:.3g}"
    return f"{digits} {prefix}{unit}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _sites(adapters: AdapterSet) -> Iterator[str]:
    for name, record in adapters.records.items():
        state = "not live" if name not in adapters.acting else "merged" if adapters.merged else "live"
        yield f"adapter {name!r} ({state})"
        resolution = record.plan.resolve(adapters.model)
        modules = {path for path, _ in adapters.model.named_modules()}
        shared = [site for site in resolution.sites if site.train is None and not site.method.follows_ties]
        tied = {site.path: site.tied_to for site in shared if site.tied_to}
        for number, rule in enumerate(record.plan.rules):
            paths = [path for path, _, index, _ in record.sites if index == number]
            inside = sum(path not in modules for path in paths)
            noun = "module" if inside == 0 else "parameter" if inside == len(paths) else "site"
            yield f"  rule {number + 1}: {rule}: {_count(len(paths), noun)}"
            yield from (f"    {path or 'the model itself'}" for path in fold(paths))
            for path in (p for p in paths if p in tied):
                yield f"    {path}: shares {', '.join(tied[path])}, which stays as it is"
            shadowed: dict[int, list[str]] = {}
            for index, path, winner in resolution.shadowed:
                if index == number:
                    shadowed.setdefault(winner, []).append(path)
            for winner, hidden in shadowed.items():
                yield from (f"    {path}: taken by rule {winner + 1}" for path in fold(hidden))
        yield from (f"  left out: {line}" for line in _by_reason(resolution.left_out))
        yield from (f"  {_count(len(rows.index), 'row')} of {rows.path}, from its file" for rows in record.rows)


def _by_reason(pairs: Iterable[tuple[str, str]]) -> Iterator[str]:
    """``path: reason`` with equal reasons' paths folded."""
    reasons: dict[str, list[str]] = {}
    for path, reason in pairs:
        reasons.setdefault(reason, []).append(path)
    for reason, paths in reasons.items():
        yield from (f"{path}: {reason}" for path in fold(paths))


def _base(model: nn.Module) -> Iterator[str]:
    """How the base's modules are quantised; nothing where none is."""
    kinds: dict[str, list[str]] = {}
    for path, module in model.named_modules():
        if ".adapters." not in f".{path}." and (how := quantised.describe(module)) is not None:
            kinds.setdefault(how, []).append(path)
    for how, paths in kinds.items():
        yield f"{how}: {_count(len(paths), 'module')}"
        yield from (f"  {path}" for path in fold(paths))


def _parameters(adapters: AdapterSet) -> Iterator[str]:
    ours = [parameter for _, parameter in adapters.named_parameters()]
    trained = sum(p.numel() for p in ours)
    base = sum(quantised.numel(p) for p in adapters.model.parameters()) - trained
    dtypes = ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in ours}))
    yield f"{trained:,} beside {base:,} frozen ({trained / max(base, 1):.3%}), {dtypes}"


def _bank(adapters: AdapterSet) -> Iterator[str]:
    if adapters.bank is None:
        return
    bank, counts = adapters.bank.bank, adapters.bank_counts()
    yield f"{counts['bank_used']} of {bank.slots} slots taken"
    room = "" if bank.bytes is None else f" of {number_text(int(bank.bytes), 'B')}"
    yield f"{number_text(counts['bank_bytes'], 'B')}{room} in adapters"
    yield "what adapters cost in calls without gradients is not in the estimates below: their graphs do not know them"
    yield f"kinds {', '.join(bank.kinds)}; rank at most {bank.max_rank}"
    yield from (f"  {path}" for path in fold(sorted(adapters.bank.sites)))


def _backend(captures: Captures, entries: Sequence[str]) -> Iterator[str]:
    backend = captures.options.backend
    yield f"passes {captures.adapters.pipeline()}"
    if backend.instead:
        yield backend.instead
    if backend.name not in JOINT_BACKENDS:
        yield "passes on the joint graph do not run: this backend does not show it"
    if entries:
        yield f"captured beside the model's forward: {', '.join(entries)}"
    regions: dict[str, list[str]] = {}
    for path, name in captures.epoch.regions.items():
        regions.setdefault(name, []).append(path)
    for name, paths in regions.items():
        yield f"captured by themselves, and together ({name.split()[-2]}): {', '.join(fold(paths))}"


def _graphs(graphs: Sequence[CapturedGraph], called: bool) -> Iterator[str]:
    if not graphs and called:
        yield "none yet: what was called so far ran op by op, and is captured from its next call on"
    elif not graphs:
        yield "none yet: the model has not been called (example_inputs= gives a report before)"
    for graph in graphs:
        kind = "recompiled" if graph.is_recompile else "captured"
        nodes = len(graph.graph_module("captured").graph.nodes)
        mode = "training" if graph.training else "inference"
        sites, ran = _count(len(graph.sites), "site"), len(graph.ran)
        shared = f" (ran for {ran})" if ran > len(graph.sites) else ""
        yield f"{graph.index}: {kind} for {mode}, {_count(nodes, 'node')}, {sites}{shared}"
        if graph.break_reason:
            yield f"   ends at a graph break: {graph.break_reason}"
        yield from (f"   {note}" for note in graph.notes)


def _alike(graphs: Sequence[CapturedGraph]) -> Iterator[tuple[list[int], tuple[str, ...], tuple[str, ...]]]:
    """(graphs, what passes did, costs) of graphs with sites; those of equal layers are told once."""
    members: dict[tuple[tuple[str, ...], tuple[str, ...]], list[int]] = {}
    for graph in graphs:
        if graph.sites:
            members.setdefault((tuple(_passes(graph)), tuple(_costs(graph))), []).append(graph.index)
    for (passes, costs), indices in members.items():
        yield indices, passes, costs


def _passes(graph: CapturedGraph) -> Iterator[str]:
    for report in graph.reports:
        applied, refused = len(report.result.applied), len(report.result.refused)
        done = f"applied {applied}" + (f" of {applied + refused}" if refused else "")
        changes = [done, *_op_changes(report), *_cost_changes(report)]
        yield f"{report.name:<13} {'    '.join(changes)}"
        if report.rolled_back:
            yield f"  undone: {report.rolled_back.splitlines()[0]}"
        if report.errors:
            yield f"  validated: error against fp64 {report.errors[0]:.1e} before, {report.errors[1]:.1e} after"
        yield from (f"  refused {line}" for line in _by_reason(report.result.refused))


def _op_changes(report: PassReport) -> Iterator[str]:
    before, after = Counter(report.ops_before), Counter(report.ops_after)
    interesting = [op for op in {**before, **after} if before[op] != after[op] and op != "getitem"]
    shown = sorted(interesting, key=lambda op: -abs(after[op] - before[op]))[:4]
    if shown:
        more = f" (+{len(interesting) - 4})" if len(interesting) > 4 else ""
        yield ", ".join(f"{op} {before[op]} -> {after[op]}" for op in shown) + more


def _cost_changes(report: PassReport) -> Iterator[str]:
    before, after = report.cost_before, report.cost_after
    for name, unit, was, now in (
        ("", "FLOP", before.flops, after.flops),
        ("moved ", "B", before.read + before.written, after.read + after.written),
        ("saved ", "B", before.saved, after.saved),
    ):
        before_text, after_text = number_text(was, unit), number_text(now, unit)
        if before_text != after_text:
            yield f"{name}{before_text} -> {after_text}"


def _costs(graph: CapturedGraph) -> Iterator[str]:
    last_stage = graph.stages[-1]
    phases = cost.shares(graph.graph_module(last_stage))
    for phase, share in phases.items():
        flops = _over(share.base.flops, share.adapters.flops, "FLOP")
        moved = _over(_moved(share.base), _moved(share.adapters), "B")
        yield f"{phase:<9} {flops}    moved {moved}"
    if "backward" in phases:
        yield f"saved     {_saved(graph, last_stage)}"
    if graph.in_place:
        yield f"in place  {graph.in_place} results are made in the memory of their first operand"


def _saved(graph: CapturedGraph, last_stage: str) -> str:
    try:
        now, before = (_over(*graph.saved_bytes(stage), "B") for stage in (last_stage, "joint"))
    except Exception as error:  # the partitioner is given what it may not be made for, and a report is to be read
        return f"not known: {type(error).__name__}: {error}".splitlines()[0]
    return now if now == before else f"{now}; {before} before these passes"


def _choices(graphs: Sequence[CapturedGraph]) -> Iterator[str]:
    """What was chosen by its speed: for which sites, or for how many of the base's products."""
    alike: dict[str, list[Choice]] = {}
    for choice in (choice for graph in graphs for choice in graph.choices):
        alike.setdefault(str(choice), []).append(choice)
    for text, choices in alike.items():
        sites = dict.fromkeys(site for choice in choices for site in choice.sites)
        yield text if sites else f"{text} ({_count(len(choices), 'product')})"
        yield from (f"  {path}" for path in fold(list(sites)))


def _moved(one: Cost) -> int:
    return one.read + one.written


def _over(base: int, extra: int, unit: str) -> str:
    percent = f" (+{extra / base:.1%})" if base else ""
    return f"{number_text(base, unit)} + {number_text(extra, unit)}{percent}"


def _attention(captures: Captures) -> Iterator[str]:
    backend = captures.epoch.backend
    if captures.graphs or captures.epoch.eager:
        yield from (f"did not run in any forward: {path}" for path in fold(captures.idle_sites()))
    yield from (f"ran outside a captured graph: {path}" for path in fold(captures.eager_sites()))
    if backend is not None:
        for frame, op in backend.uncompiled.items():
            yield f"not compiled itself, for it needs a size that only data say ({op}): {frame}"
    yield from captures.lint.rows(captures)
    if hit := captures.counts["recompile_limits_hit"]:
        yield f"recompile limit hit {hit} times: those frames run eagerly"
