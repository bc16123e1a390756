"""What was captured and what the passes made of it, kept for reading."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from torch import fx

from adaptc.codegen import cost
from adaptc.codegen.choices import Choice
from adaptc.errors import PipelineError
from adaptc.ir import show
from adaptc.ir.edit import snapshot
from adaptc.torch_internals import compiling

if TYPE_CHECKING:
    from adaptc.passes.manager import PassReport


@dataclasses.dataclass
class CapturedGraph:
    """One graph that Dynamo captured, with a snapshot after every pass.

    Stages are called "captured", by the name of each pass that ran on the captured graph, "joint", and by the
    name of each pass that ran on the joint graph. Of code that came from a cache the latter are made when somebody
    asks.
    """

    index: int
    #: (frame, how many times that frame had been compiled before, for any model).
    compile_id: tuple[int, int] | None
    #: Why the graph ends where it does, when that is a graph break.
    break_reason: str | None
    training: bool
    pipeline: str
    sites: list[str] = dataclasses.field(default_factory=list)
    #: Those of them that run in regions without gradients alone, as far as they are trained and no region was lifted.
    stopped: set[str] = dataclasses.field(default_factory=set)
    notes: list[str] = dataclasses.field(default_factory=list)
    #: Where Dynamo read each input, in order.
    input_sources: list[str | None] = dataclasses.field(default_factory=list, repr=False)
    #: The forward and backward graphs that the joint graph was cut into, where the cut is ours to see.
    parts: tuple[fx.GraphModule, fx.GraphModule] | None = dataclasses.field(default=None, repr=False)
    #: Whether the same frame had been compiled before, for the same model.
    is_recompile: bool = False
    #: Sums that Inductor's code makes where their first term is.
    in_place: int = 0
    #: Runs the joint passes, where the compiled code is from a cache and they have not run in this process.
    run_joint_passes: Callable[[], None] | None = dataclasses.field(default=None, repr=False)
    #: Makes a context in which torch's modes are as they were when the graph was compiled.
    modes: Callable[[], contextlib.AbstractContextManager[None]] = dataclasses.field(
        default=contextlib.nullcontext, repr=False
    )
    #: ``id`` of the site-id tensors it was called with: of several layers, where they share the graph.
    ran: set[int] = dataclasses.field(default_factory=set)
    _stages: dict[str, fx.GraphModule] = dataclasses.field(default_factory=dict, repr=False)
    _reports: list[PassReport] = dataclasses.field(default_factory=list, repr=False)
    _completing: bool = dataclasses.field(default=False, repr=False)
    _saved: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict, repr=False)
    _choices: list[Choice] = dataclasses.field(default_factory=list, repr=False)

    @property
    def stages(self) -> list[str]:
        self.complete()
        return list(self._stages)

    @property
    def reports(self) -> Sequence[PassReport]:
        """What each pass did, in order."""
        self.complete()
        return self._reports

    @property
    def capture_reports(self) -> Sequence[PassReport]:
        """What the passes on the captured graph did."""
        return [report for report in self._reports if report.level == "dynamo"]

    @property
    def choices(self) -> Sequence[Choice]:
        """What passes chose by its speed, once for each product."""
        self.complete()
        return self._choices

    @property
    def saw_joint(self) -> bool:
        """Whether the joint passes have run."""
        return "joint" in self._stages

    def complete(self) -> None:
        """Run the joint passes if the compiled code is from a cache."""
        if self.run_joint_passes is None:
            return
        with compiling():  # another thread that asks meanwhile waits for the whole
            run = self.run_joint_passes
            if run is None or self._completing:
                return
            self._completing = True
            try:
                run()
                self.run_joint_passes = None
            finally:
                self._completing = False

    def drop_joint_stages(self) -> None:
        """Forget what was kept of joint passes that did not come to their end."""
        names = list(self._stages)
        for name in names[names.index("joint") :] if self.saw_joint else ():
            del self._stages[name]

    def keep_reports(self, reports: Sequence[PassReport], choices: Sequence[Choice] = ()) -> None:
        """Add what passes did and chose."""
        self._reports += reports
        self._choices += choices

    def keep_stage(self, name: str, gm: fx.GraphModule) -> fx.GraphModule:
        """Keep a copy of ``gm`` as stage ``name``; returns it."""
        kept = self._stages[name] = snapshot(gm)
        return kept

    def keep_parts(self, forward: fx.GraphModule, backward: fx.GraphModule) -> None:
        self.parts = snapshot(forward), snapshot(backward)

    def graph_module(self, name: str) -> fx.GraphModule:
        """The graph after stage ``name``.

        Raises:
            PipelineError: there is no such stage.
        """
        if name not in self._stages:
            self.complete()
        if name not in self._stages:
            raise PipelineError(f"graph {self.index} has no stage {name!r}", found=", ".join(self._stages))
        return self._stages[name]

    def saved_bytes(self, stage: str) -> tuple[int, int]:
        """Bytes that a step would keep for the backward if the joint graph were compiled as it is after ``stage``: for
        the base, and for the adapters. As AOTAutograd's min-cut partitioner cuts it.

        Raises:
            PipelineError: there is no such stage.
        """
        if stage not in self._saved:
            parts = self.parts if stage == self.stages[-1] else None
            with self.modes():
                self._saved[stage] = cost.saved_bytes(*(parts or cost.partition(self.graph_module(stage))))
        return self._saved[stage]

    def stage(self, name: str) -> str:
        """The graph after stage ``name`` as text."""
        return show.graph_text(self.graph_module(name))

    def diff(self, before: str, after: str) -> str:
        """What changed between two stages, as a unified diff of their text."""
        lines = difflib.unified_diff(
            self.stage(before).splitlines(), self.stage(after).splitlines(), before, after, lineterm="", n=2
        )
        return "\n".join(lines)
