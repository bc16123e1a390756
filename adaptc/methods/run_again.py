"""Whether the forward of a module may run several times in one call, on all rows each time: once for each adapter of a
batch that acts inside of it or in its place."""

from __future__ import annotations

import inspect

from torch import nn

from adaptc.methods.quantised import Refusal
from adaptc.transformers_names import LAYER_CACHES


def refusal(module: nn.Module) -> Refusal | None:
    """Why it may not, or None: what it is given could be changed by it, or rows meet in it."""
    parameters = inspect.signature(type(module).forward).parameters
    if cache := next((name for name in LAYER_CACHES if name in parameters), None):
        kind = type(module).__name__
        return Refusal(f"its forward would run once for each adapter, and a {kind} fills a cache ({cache})")
    for inner in module.modules():
        if isinstance(inner, nn.modules.batchnorm._NormBase) and inner.track_running_stats:
            return Refusal(f"a {type(inner).__name__} in it takes statistics over all rows in training")
    return None
