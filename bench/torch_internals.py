"""The private names of torch that the bench reads; no other file of the package may use ``torch._*``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo
from torch._dynamo.utils import counters


@dataclasses.dataclass(frozen=True)
class GraphCounts:
    """Graphs that Dynamo captured and graph breaks it met, in this process, whatever the backend."""

    graphs: int = 0
    breaks: int = 0

    def __add__(self, other: GraphCounts) -> GraphCounts:
        return GraphCounts(self.graphs + other.graphs, self.breaks + other.breaks)

    def __sub__(self, other: GraphCounts) -> GraphCounts:
        return GraphCounts(self.graphs - other.graphs, self.breaks - other.breaks)


def graph_counts() -> GraphCounts:
    """The counts so far. ``torch.compiler.reset()`` does not clear them. Read on torch 2.13."""
    return GraphCounts(counters["stats"]["unique_graphs"], sum(counters["graph_break"].values()))


def multiplies_bf16_pairs() -> bool:
    """Whether the CPU has AVX512_BF16. Read on torch 2.13."""
    return torch.cpu._is_avx512_bf16_supported()


def has_both_libraries() -> bool:
    """Whether torch multiplies in fp32 by MKL and can call oneDNN. Read on torch 2.13."""
    return torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()


def onednn_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """``left @ right`` by oneDNN, with ``right`` where it is. Read on torch 2.13."""
    made: torch.Tensor = torch.ops.mkldnn._linear_pointwise(left, right.t(), None, "none", [], "")
    return made


#: A backend of ``torch.compile`` whose graphs compute once. Calls must have equal inputs.
GRAPHS_THAT_COMPUTE_ONCE = "graphs_that_compute_once"


@torch._dynamo.register_backend(name=GRAPHS_THAT_COMPUTE_ONCE)
def _compute_once(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
    """Run ``graph`` when it is first called, and give the same outputs ever after. Read on torch 2.13."""
    outputs: Any = None

    def call(*args: Any) -> Any:
        nonlocal outputs
        if outputs is None:
            outputs = graph(*args)
        return outputs

    return call
