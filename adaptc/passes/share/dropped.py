"""Reading through the dropouts of adapters."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import fx

from adaptc.ir import dialect


@dataclasses.dataclass(frozen=True)
class Dropped:
    """A value as an adapter reads it: ``source``, or by a node ``dropout`` of it, with ``seed`` and ``p``."""

    source: fx.Node
    dropout: fx.Node | None = None
    seed: fx.Node | None = None
    p: float = 0.0


def dropped(x: Any) -> Dropped | None:
    """What ``x`` is of; None where it is no node."""
    if not isinstance(x, fx.Node):
        return None
    if x.target is not dialect.get("seeded_dropout").overload:
        return Dropped(x)
    source, seed, p = x.args
    return Dropped(source, x, seed, p)  # type: ignore[arg-type]


def seeds_of(values: Sequence[Dropped]) -> tuple[list[fx.Node], list[float]]:
    """The last two arguments of the ops on lists: both empty where nothing is dropped."""
    return [v.seed for v in values if v.seed is not None], [v.p for v in values if v.seed is not None]


def dropouts_of(values: Sequence[Dropped]) -> list[fx.Node]:
    return [v.dropout for v in values if v.dropout is not None]
