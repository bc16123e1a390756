"""The pass manager: which passes run, in what order, and what each of them did."""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import importlib
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import fx

from adaptc.errors import PipelineError
from adaptc.ir import dialect
from adaptc.ir.edit import Result, copy_graph_module
from adaptc.passes.contract import Context, Contract, Level, Pass

#: Every pass of this version in its default order: name -> "module:function"; the contract is beside it.
_TABLE = {
    "insert": "adaptc.passes.insert:insert",
    "canonicalise": "adaptc.passes.canonicalise:canonicalise",
    "lower": "adaptc.passes.lower:lower",
}


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
    return tuple(_TABLE)


@dataclasses.dataclass
class PassReport:
    """What one pass did to one graph."""

    name: str
    level: Level
    result: Result
    ops_before: Mapping[str, int]
    ops_after: Mapping[str, int]
    seconds: float
    #: Why the pass was undone, when translation validation found it wrong.
    rolled_back: str | None = None
    #: Errors of the graphs before and after against fp64, when validated: (largest before, largest after).
    errors: tuple[float, float] | None = None


#: (pass name, graph after the pass) for every stage, in order.
StageListener = Callable[[str, fx.GraphModule], None]
#: (pass, graph before, graph after, result) -> errors; raises VerifyError. Set when verify is on.
Validator = Callable[[Pass, fx.GraphModule, fx.GraphModule, Result], tuple[float, float] | None]


class Pipeline:
    """A checked list of passes.

    Args:
        passes: the passes, in order.
        limits: pass name -> how many rewrites it may make; "*" limits all of them together.

    Raises:
        PipelineError: a contract does not hold: the message names the pass, what is missing and what ran before.
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
        """The default passes, or ``order``, without ``skip``; ``limit`` for all or by pass name."""
        for name in skip:
            get(name)
        names = [n for n in (order or default_order()) if n not in skip]
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
        limits, passes = ({"*": int(overall)} if overall else {}), []
        for entry in filter(None, body.split(",")):
            name, _, option = entry.partition("{limit=")
            passes.append(get(name))
            if option:
                limits[name] = int(option.rstrip("}"))
        return cls(passes, limits)

    def at(self, level: Level) -> tuple[Pass, ...]:
        return tuple(p for p in self.passes if p.contract.level == level)

    def uuid(self) -> str:
        """Identifies everything the rewritten code depends on besides the graph itself."""
        digest = hashlib.sha256(f"{self}|{torch.__version__}|{package_hash()}".encode())
        digest.update(dialect.fingerprint().encode())
        for one in self.passes:
            digest.update(dialect.code_hash(one.run))
        return digest.hexdigest()

    def run(
        self,
        gm: fx.GraphModule,
        level: Level,
        context: Context,
        *,
        on_stage: StageListener | None = None,
        validate: Validator | None = None,
        check: Callable[[Pass, fx.GraphModule, fx.GraphModule | None, Result], None] | None = None,
    ) -> tuple[fx.GraphModule, list[PassReport]]:
        """Run the passes of ``level`` on ``gm`` (changed in place); returns the graph to go on with."""
        from adaptc.errors import VerifyError

        reports = []
        overall = self.limits.get("*")
        for one in self.at(level):
            context.budget = self.limits.get(one.name, overall)
            original = copy_graph_module(gm) if validate else None
            before = op_counts(gm)
            start = time.perf_counter()
            result = one.run(gm, context)
            report = PassReport(one.name, level, result, before, op_counts(gm), time.perf_counter() - start)
            if overall is not None:
                overall = max(0, overall - len(result.applied))
            try:
                if check:
                    check(one, gm, original, result)
                if validate and original is not None:
                    report.errors = validate(one, original, gm, result)
            except VerifyError as error:
                if original is None:
                    raise
                report.rolled_back = str(error)
                gm = original
            if on_stage and report.rolled_back is None:
                on_stage(one.name, gm)
            reports.append(report)
        return gm, reports


def _check_contracts(passes: Sequence[Pass]) -> None:
    levels = {"dynamo": 0, "joint": 1}
    have: set[str] = set()
    ran: list[str] = []
    for one in passes:
        contract = one.contract
        before = f"before it: {', '.join(ran) or 'nothing'}"
        if one.name in ran:
            raise PipelineError(f"pass {one.name} is in the pipeline twice", found=before)
        if ran and levels[contract.level] < levels[get(ran[-1]).contract.level if ran[-1] in _TABLE else "dynamo"]:
            raise PipelineError(
                f"pass {one.name} works on captured graphs and cannot follow a pass on joint graphs", found=before
            )
        if missing := contract.requires - have:
            raise PipelineError(
                f"pass {one.name} needs {', '.join(sorted(missing))}",
                found=before,
                do="put the pass that provides it earlier, or leave this one out as well",
            )
        if clash := contract.conflicts & have:
            raise PipelineError(f"pass {one.name} cannot run on a graph that is {', '.join(sorted(clash))}", found=before)
        have |= contract.provides
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


def op_name(node: fx.Node) -> str:
    """A node's op in short: ``linear``, ``lora_linear``, ``view``."""
    target = node.target
    if isinstance(target, str):
        return target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.partition("::")[2]
    return str(getattr(target, "__name__", target))


@functools.cache
def package_hash() -> str:
    """A hash of the package's source files: any edit of adaptc invalidates cached code."""
    root = pathlib.Path(__file__).parent.parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()
