"""How a model is compiled: the options of ``adaptc.compile``, and the passes of a plan."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from adaptc.capture.backend import BackendOptions
from adaptc.passes.manager import Pipeline
from adaptc.plan import Plan
from adaptc.runtime.bank import Bank


@dataclasses.dataclass(frozen=True)
class CompileOptions:
    """The arguments of ``adaptc.compile`` that say how, not what."""

    backend: BackendOptions
    fullgraph: bool = False
    dynamic: bool | None = None
    adapter_dtype: torch.dtype | None = None
    example_inputs: Any = None
    regional: bool | str = "auto"
    lift_no_grad: tuple[str, ...] = ()
    bank: Bank | None = None


def pipeline_of(plan: Plan | None) -> Pipeline:
    """The passes that a plan asks for.

    Raises:
        PipelineError: they cannot run in this order, or one of them is not known.
    """
    passes = None if plan is None else plan.passes
    if passes is None:
        return Pipeline.from_options()
    return Pipeline.from_options(skip=passes.skip, order=passes.order, limit=passes.limit)
