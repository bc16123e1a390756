"""The pass manager: which passes run, in what order, and what each of them did."""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import importlib
import pathlib
import re
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import fx

from adaptc import methods
from adaptc.codegen import choices
from adaptc.codegen.cost import level_cost
from adaptc.codegen.ops import registry
from adaptc.errors import AdaptcWarning, PipelineError, VerifyError
from adaptc.ir import dialect
from adaptc.ir.code_hash import code_hash
from adaptc.ir.dialect import Cost
from adaptc.ir.edit import Result, copy_graph_module
from adaptc.ir.names import op_name
from adaptc.passes.checks import structure
from adaptc.passes.contract import Context, Contract, Level, Pass
from adaptc.torch_internals import carry_capture_metadata, cpu_emulates, has_avx512_bf16

#: Every pass of this version in its default order: name -> "module:function"; the contract is beside it.
_TABLE = {
    "raise_peft": "adaptc.passes.raise_peft:raise_peft",
    "insert": "adaptc.passes.insert:insert",
    "merge": "adaptc.passes.merge:merge",
    "lift_no_grad": "adaptc.passes.lift_no_grad:lift_no_grad",
    "canonicalise": "adaptc.passes.canonicalise:canonicalise",
    "seed_dropout": "adaptc.passes.seed_dropout:seed_dropout",
    "reassociate": "adaptc.passes.reassociate:reassociate",
    "share": "adaptc.passes.share:share",
    "fuse": "adaptc.passes.fuse:fuse",
    "lower": "adaptc.passes.lower:lower",
    "widen": "adaptc.passes.widen:widen",
    "library": "adaptc.passes.library:library",
    "accumulate": "adaptc.passes.accumulate:accumulate",
}
#: What the passes of each level work on, in the order of the levels.
_LEVELS: dict[Level, str] = {"dynamo": "captured graphs", "joint": "joint graphs", "final": "final graphs"}


def get(name: str) -> Pass:
    """The pass called ``name``.

    Raises:
        PipelineError: no such pass.
    """
    if name not in _TABLE:
        raise PipelineError(f"no pass named {name!r}", found=", ".join(_TABLE), do="correct the name")
    path, _, function = _TABLE[name].partition(":")
    module = importlib.import_module(path)
    contract: Contract = module.CONTRACT
    return Pass(name, getattr(module, function), contract)


def default_order() -> tuple[str, ...]:
    """The passes of a model that has a plan: its adapters are not PEFT's, and are trained."""
    return tuple(name for name in _TABLE if name not in ("raise_peft", "merge"))


@dataclasses.dataclass
class PassReport:
    """What one pass did to one graph."""

    name: str
    level: Level
    result: Result
    ops_before: Mapping[str, int]
    ops_after: Mapping[str, int]
    seconds: float
    #: Give the costs of the graph before and after. Called when somebody asks: compiling does not wait for them.
    costs: tuple[Callable[[], Cost], Callable[[], Cost]] = dataclasses.field(repr=False)
    #: Why the pass was undone, when translation validation found it wrong.
    rolled_back: str | None = None
    #: Errors of the graphs before and after against fp64, when validated: (largest before, largest after).
    errors: tuple[float, float] | None = None

    @property
    def cost_before(self) -> Cost:
        return self.costs[0]()

    @property
    def cost_after(self) -> Cost:
        return self.costs[1]()


#: (pass name, graph after the pass) for every stage, in order; returns a copy of the graph if it keeps one.
StageListener = Callable[[str, fx.GraphModule], fx.GraphModule | None]


class Validator(Protocol):
    """Checks that a pass kept the meaning of the graph; set when verify is on."""

    @property
    def raises(self) -> bool:
        """Whether a wrong pass is an error instead of being undone."""

    def __call__(
        self, one: Pass, original: fx.GraphModule, gm: fx.GraphModule, result: Result
    ) -> tuple[float, float] | None:
        """(largest error before, largest error after) against fp64; raises VerifyError."""


class Pipeline:
    """A checked list of passes.

    Args:
        passes: the passes, in order.
        limits: pass name -> how many rewrites it may make in a graph; "*" limits those of one level together.

    Raises:
        PipelineError: a contract does not hold; says which pass, what is missing and what ran before.
    """

    def __init__(self, passes: Sequence[Pass], limits: Mapping[str, int] | None = None) -> None:
        self.passes = tuple(passes)
        self.limits = dict(limits or {})
        _check_contracts(self.passes)
        unknown = set(self.limits) - {p.name for p in self.passes} - {"*"}
        if unknown:
            raise PipelineError(
                f"a limit for {', '.join(sorted(unknown))}, which is not in the pipeline", found=str(self)
            )

    @classmethod
    def from_options(
        cls,
        *,
        skip: Sequence[str] = (),
        order: Sequence[str] | None = None,
        limit: int | Mapping[str, int] | None = None,
    ) -> Pipeline:
        """The default passes, or ``order`` and what ends every order, without ``skip``; ``limit`` for all or by pass
        name."""
        for name in skip:
            get(name)
        wanted = default_order() if not order else order if "accumulate" in order else [*order, "accumulate"]
        names = [n for n in wanted if n not in skip]
        limits = {"*": limit} if isinstance(limit, int) else dict(limit or {})
        return cls([get(n) for n in names], {k: v for k, v in limits.items() if k not in skip})

    def __str__(self) -> str:
        """One line of text; ``Pipeline.parse`` gives the pipeline back."""
        named = [f"{p.name}{{limit={self.limits[p.name]}}}" if p.name in self.limits else p.name
                 for p in self.passes]  # fmt: skip
        return ",".join(named) + (f";limit={self.limits['*']}" if "*" in self.limits else "")

    @classmethod
    def parse(cls, text: str) -> Pipeline:
        """The pipeline that prints as ``text``."""
        body, _, overall = text.partition(";limit=")
        limits, passes = ({"*": _limit(overall, text)} if overall else {}), []
        for entry in filter(None, body.split(",")):
            found = re.fullmatch(r"([^{]*)(?:\{limit=(.*)\})?", entry.strip())
            if found is None:
                raise PipelineError(f"this is no pass: {entry}", expected="name or name{limit=3}", found=text)
            passes.append(get(found[1]))
            if found[2] is not None:
                limits[found[1]] = _limit(found[2], text)
        return cls(passes, limits)

    def at(self, level: Level) -> tuple[Pass, ...]:
        return tuple(p for p in self.passes if p.contract.level == level)

    def uuid(self) -> str:
        """Identifies everything the rewritten code depends on besides the graph itself."""
        methods.load_all()  # which defines their ops: the key does not depend on which are in use
        digest = hashlib.sha256(f"{self}|{torch.__version__}|{package_hash()}".encode())
        digest.update((dialect.fingerprint() + registry.fingerprint()).encode())
        digest.update(bytes((*map(cpu_emulates, (torch.bfloat16, torch.float16)), has_avx512_bf16())))
        digest.update(str(choices.host()).encode())
        for one in self.passes:
            digest.update(code_hash(one.run))
        return digest.hexdigest()

    def run(
        self,
        gm: fx.GraphModule,
        level: Level,
        context: Context,
        *,
        start: fx.GraphModule | None = None,
        on_stage: StageListener | None = None,
        validate: Validator | None = None,
    ) -> tuple[fx.GraphModule, list[PassReport]]:
        """Run the passes of ``level`` on ``gm`` (changed in place); returns the graph to go on with.

        The structure of the graph is checked after every pass. With ``validate`` a pass that fails either check
        is undone, reported and warned of, unless ``validate.raises``. ``start``: a copy of ``gm`` as it is now,
        if one is kept.

        Raises:
            VerifyError: a pass is wrong, and is not to be undone.
        """
        reports = []
        overall = self.limits.get("*")
        cost = _cost_of(gm, start, level)
        for one in self.at(level):
            own = self.limits.get(one.name)
            context.budget = own if overall is None else overall if own is None else min(own, overall)
            original = copy_for_undo(gm) if validate else None
            signature = structure.signature(gm)
            before = op_counts(gm)
            began = time.perf_counter()
            result = one.run(gm, context)
            seconds = time.perf_counter() - began
            report = PassReport(one.name, level, result, before, op_counts(gm), seconds, (cost, cost))
            try:
                structure.check_structure(one, gm, signature, result)
                if validate and original is not None:
                    report.errors = validate(one, original, gm, result)
            except VerifyError as error:
                if original is None or validate is None or validate.raises:
                    raise
                report.rolled_back = str(error)
                gm = original
                context.sites = _sites_in(gm, context.sites)
                context.trained = _sites_in(gm, context.trained)
                context.asked = _sites_in(gm, context.asked)
                _warn_undone(one, error)
            else:
                if overall is not None:
                    overall = max(0, overall - len(result.applied))
                kept = on_stage(one.name, gm) if on_stage else None
                report.costs = (cost, cost := _cost_of(gm, kept, level))
            reports.append(report)
        return gm, reports


def _cost_of(gm: fx.GraphModule, kept: fx.GraphModule | None, level: Level) -> Callable[[], Cost]:
    """The cost of ``gm`` as it is now: when asked for, if a copy of it is kept. Nobody asks of a final graph."""
    if level == "final":
        return Cost
    if kept is not None:
        return functools.cache(functools.partial(level_cost, kept, level))
    now = level_cost(gm, level)
    return lambda: now


def copy_for_undo(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy that can take the place of ``gm`` in the compilation."""
    copy = copy_graph_module(gm)
    carry_capture_metadata(gm, copy)
    return copy


def _sites_in(gm: fx.GraphModule, sites: Mapping[fx.Node, str]) -> dict[fx.Node, str]:
    """``sites``, whose nodes belong to another copy of the graph, by the nodes of ``gm``."""
    by_name = {n.name: n for n in gm.graph.nodes}
    return {by_name[node.name]: path for node, path in sites.items()}


def _warn_undone(one: Pass, error: VerifyError) -> None:
    facts = ", ".join(f"{k}: {v}" for k, v in error.facts.items() if k in ("expected", "found"))
    warnings.warn(
        AdaptcWarning(
            f"{error.headline}: the pass was undone, results stay right without it ({facts})."
            f" Leave it out (passes: {{skip: [{one.name}]}} in the plan),"
            ' or compile with verify="raise" to see the graph there.'
        ),
        stacklevel=3,
    )


def _limit(number: str, text: str) -> int:
    if not number.isdecimal():
        expected = "name{limit=3}, or ;limit=3 at the end"
        raise PipelineError("a limit is not a number", expected=expected, found=text)
    return int(number)


def _check_contracts(passes: Sequence[Pass]) -> None:
    have: set[str] = set()
    ran: list[str] = []
    level: Level = "dynamo"
    for one in passes:
        contract = one.contract
        before = f"before it: {', '.join(ran) or 'nothing'}"
        if one.name in ran:
            raise PipelineError(f"pass {one.name} is in the pipeline twice", found=before)
        if list(_LEVELS).index(contract.level) < list(_LEVELS).index(level):
            raise PipelineError(
                f"pass {one.name} works on {_LEVELS[contract.level]} and cannot follow a pass on {_LEVELS[level]}",
                found=before,
            )
        if missing := contract.requires - have:
            raise PipelineError(
                f"pass {one.name} needs {', '.join(sorted(missing))}",
                found=before,
                do="put the pass that provides it earlier, or leave this one out as well",
            )
        if clash := contract.conflicts & have:
            raise PipelineError(
                f"pass {one.name} cannot run on a graph that is {', '.join(sorted(clash))}", found=before
            )
        have |= contract.provides
        level = contract.level
        ran.append(one.name)


def op_counts(gm: fx.GraphModule) -> dict[str, int]:
    """How many nodes call each op, nested bodies included."""
    counts: collections.Counter[str] = collections.Counter()
    for module in gm.modules():
        if isinstance(module, fx.GraphModule):
            for node in module.graph.nodes:
                if node.op in ("call_function", "call_method", "call_module"):
                    counts[op_name(node)] += 1
    return dict(counts)


@functools.cache
def package_hash() -> str:
    """A hash of the package's source files: any edit of adaptc invalidates cached code."""
    root = pathlib.Path(__file__).parent.parent
    digest = hashlib.sha256()
    for path in sorted(path for kind in ("py", "h", "cpp") for path in root.rglob(f"*.{kind}")):
        digest.update(path.relative_to(root).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()
