"""transformers' hooks that record hidden states, put in place before a model is captured.

Some classes read their towers' hidden states at every call (CLIPSeg, LLaVA). transformers 5 records these by hooks,
which it installs under a lock in the first call that wants them; Dynamo cannot trace the lock, and the whole model
falls into pieces, for as long as they are kept.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from typing import Any

from torch import nn

_MODULE = "transformers.utils.output_capturing"
_INSTALLED = "_output_capturing_hooks_installed"


def install(model: nn.Module) -> None:
    """Install the hooks that the next call would, where a class of the model always reads hidden states."""
    recording = sys.modules.get(_MODULE)
    if recording is None or not any(map(_selects, model.modules())):
        return
    # Each installs those of what is inside it: from the outermost one, and none twice.
    for module in model.modules():
        if hasattr(module, "config") and not any(getattr(m, _INSTALLED, False) for m in module.modules()):
            recording.maybe_install_capturing_hooks(module)


def _selects(module: nn.Module) -> bool:
    """Whether a method of the module's class is decorated to read some hidden states (``select_hidden_states``)."""
    return hasattr(module, "config") and any(map(_is_selecting, _methods(type(module))))


def _methods(kind: type) -> Iterator[Any]:
    for value in vars(kind).values():
        while inspect.isfunction(value):
            yield value
            value = getattr(value, "__wrapped__", None)


def _is_selecting(function: Any) -> bool:
    return function.__globals__.get("__name__") == _MODULE and "selection" in function.__code__.co_freevars
