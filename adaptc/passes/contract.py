"""What a pass promises, and how a list of passes is checked before it runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Literal

from torch import fx

from adaptc.codegen.choices import Choice
from adaptc.ir.edit import Result

Level = Literal["dynamo", "joint", "final"]
Numerics = Literal["exact", "reassociates", "approximate"]


@dataclasses.dataclass(frozen=True)
class Contract:
    """Conditions of a pass, in capability names (``inserted``, ``canonical``, ``aten``).

    ``level``: "dynamo" works on the captured graph (torch functions, may mutate), "joint" on the functional
    forward+backward graph, "final" on the forward's and the backward's as the compiler lowers them (may mutate; not
    validated). ``numerics``: what the rewrite may change.
    """

    level: Level
    numerics: Numerics
    requires: frozenset[str] = frozenset()
    provides: frozenset[str] = frozenset()
    conflicts: frozenset[str] = frozenset()


@dataclasses.dataclass
class Context:
    """What a pass may know besides the graph.

    ``sites``: placeholder or attribute node of a site id -> module path. ``trained``: node of a tensor that an adapter
    trains -> its site's path; none where the graph runs without gradients. ``asked``: node of a tensor of a module
    whose regions without gradients are to record them -> the module's path; ``own``: sites whose regions are lifted
    without being asked for. ``budget``: how many rewrites are still allowed (None: no limit). ``record``: keep cut-outs
    for translation validation. ``choices``: what passes chose by its speed, once for each product.
    """

    sites: Mapping[fx.Node, str] = dataclasses.field(default_factory=dict)
    trained: Mapping[fx.Node, str] = dataclasses.field(default_factory=dict)
    asked: Mapping[fx.Node, str] = dataclasses.field(default_factory=dict)
    own: frozenset[str] = frozenset()
    budget: int | None = None
    record: bool = False
    choices: list[Choice] = dataclasses.field(default_factory=list)

    def spend(self, rewrites: int = 1) -> bool:
        """Take so many rewrites from the budget; False, and nothing is taken, when there are not enough left."""
        if self.budget is None:
            return True
        if self.budget < rewrites:
            return False
        self.budget -= rewrites
        return True


PassFunction = Callable[[fx.GraphModule, Context], Result]


@dataclasses.dataclass(frozen=True)
class Pass:
    name: str
    run: PassFunction
    contract: Contract
