"""The one text form of a graph."""

from __future__ import annotations

from torch import fx


def graph_text(gm: fx.GraphModule) -> str:
    return str(gm.graph)
