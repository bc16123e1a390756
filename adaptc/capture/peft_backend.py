"""``torch.compile(peft_model, backend="adaptc")``: PEFT's LoRA through the passes, without a plan or a handle.

What a graph holds of PEFT's LoRA is rewritten; the rest of it is left as it was, with the reason in the log of
``adaptc`` (level INFO). Where PEFT's own code, or transformers' checkpointing, breaks the graph inside the model, the
pieces are rewritten one by one, and a warning says what gives one graph.
"""

from __future__ import annotations

import collections
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from adaptc.capture.adapter_inputs import AdapterTensors
from adaptc.capture.backend import AdapterBackend, BackendOptions, prepare
from adaptc.capture.graphs import CapturedGraph
from adaptc.errors import AdaptcWarning
from adaptc.passes.manager import Pipeline

PASSES = ("raise_peft", "canonicalise", "seed_dropout", "reassociate", "share", "fuse", "lower", "widen", "library")
LOG = logging.getLogger("adaptc")

#: The graphs that were compiled last, for reading.
GRAPHS: collections.deque[CapturedGraph] = collections.deque(maxlen=32)

_told: set[str] = set()


def adaptc(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """The Dynamo backend: PEFT's adapters rewritten, then Inductor. ``mode``, ``options``: as in ``torch.compile``."""
    wanted = BackendOptions("inductor", mode, options or {})
    if torch.is_grad_enabled():
        prepare(wanted, (given for given in inputs if isinstance(given, nn.Parameter)))
    pipeline = Pipeline.from_options(order=PASSES)
    backend = AdapterBackend(pipeline, wanted, _no_tensors)
    compiled = backend(gm, inputs)
    (graph,) = backend.graphs
    GRAPHS.append(graph)
    _report(graph)
    return compiled


def _no_tensors() -> AdapterTensors:
    return AdapterTensors((), ())


def _report(graph: CapturedGraph) -> None:
    raised = next(report for report in graph.capture_reports if report.name == "raise_peft")
    LOG.info("%d of PEFT's LoRA layers are rewritten", len(raised.result.applied))
    for site, reason in raised.result.refused:
        LOG.info("left as it was: %s: %s", site, reason)
    if graph.break_reason is None or not (raised.result.applied or raised.result.refused):
        return
    if "break" not in _told:
        _told.add("break")
        warnings.warn(
            AdaptcWarning(
                f"the graph of a PEFT model ends inside it: {graph.break_reason}; the parts are rewritten one by one"
                " (adaptc.compile(peft_model) takes the model over and gives one graph)"
            ),
            stacklevel=2,
        )


__all__ = ["GRAPHS", "PASSES", "adaptc"]
