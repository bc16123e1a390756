"""The call of a compiled model: a small Python prologue outside the graph, then the captured graphs."""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
from torch import nn

from adaptc.capture.call import CALL
from adaptc.runtime.calls.state import Calls


class Prologue:
    """Installed as ``_compiled_call_impl`` of a module; also kept in its ``__dict__`` so that copies re-arm.

    torch drops ``_compiled_call_impl`` when a module is copied or pickled. This object is copied with the
    module's ``__dict__`` and installs itself on the copy.
    """

    KEY = "_adaptc_prologue"

    def __init__(self, calls: Calls, owner: nn.Module, entry: str) -> None:
        self.calls, self.owner, self.entry = calls, owner, entry
        #: What the user's own ``module.compile()`` had installed.
        self.previous: Any = owner.__dict__.get("_compiled_call_impl")
        self.arm()

    def arm(self) -> None:
        self.owner.__dict__[self.KEY] = self
        self.owner.__dict__["_compiled_call_impl"] = self

    def disarm(self) -> None:
        self.owner.__dict__.pop(self.KEY, None)
        self.owner.__dict__.pop("_compiled_call_impl", None)
        if self.previous is not None:
            self.owner.__dict__["_compiled_call_impl"] = self.previous

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Inside another capture (the root's, or a torch.compile of the user) this is an ordinary module call.
        if CALL.depth > 0 or torch.compiler.is_compiling():
            return self.owner._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]
        if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            return self._run_plainly(args, kwargs)
        return self.calls.call(self.entry, self.owner._call_impl, args, kwargs)

    def _run_plainly(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The call as ordinary module calls, for ``torch.jit.trace``: neither the model nor a block is captured."""
        before = CALL.depth, CALL.whole
        CALL.depth, CALL.whole = CALL.depth + 1, True
        try:
            return self.owner._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]
        finally:
            CALL.depth, CALL.whole = before

    def __deepcopy__(self, memo: dict[int, Any]) -> Prologue | None:
        owner = memo.get(id(self.owner))
        if owner is None or id(self.calls.adapters.model) not in memo:
            return None  # part of the model is copied on its own: it keeps its adapters and runs eagerly
        new = object.__new__(type(self))
        memo[id(self)] = new
        new.calls, new.owner, new.entry, new.previous = copy.deepcopy(self.calls, memo), owner, self.entry, None
        new.arm()
        return new

    def __getstate__(self) -> dict[str, Any]:
        return {"calls": self.calls, "owner": self.owner, "entry": self.entry, "previous": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.arm()


class EntryMethod:
    """A method of the model that bypasses its forward (``get_text_features``), captured as well."""

    def __init__(self, calls: Calls, name: str) -> None:
        self.calls, self.name = calls, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model = self.calls.adapters.model
        method = getattr(type(model), self.name).__get__(model)
        if torch.compiler.is_compiling() or CALL.depth > 0:
            return method(*args, **kwargs)
        return self.calls.call(self.name, method, args, kwargs)


def arm(calls: Calls) -> list[str]:
    """Install the prologue on the model and on the entry points that bypass its forward; returns their names."""
    model = calls.adapters.model
    Prologue(calls, model, "")
    names = []
    encoder = _separate_encoder(model)
    if encoder is not None:
        Prologue(calls, encoder, "encoder")
        names.append("encoder")
    for name in _feature_methods(model):
        setattr(model, name, EntryMethod(calls, name))
        names.append(name)
    return names


def disarm(model: nn.Module) -> None:
    """Undo :func:`arm`."""
    for module in model.modules():
        prologue = module.__dict__.get(Prologue.KEY)
        if isinstance(prologue, Prologue) and prologue.calls.adapters.model is model:
            prologue.disarm()
    for name, value in list(model.__dict__.items()):
        if isinstance(value, EntryMethod):
            del model.__dict__[name]


def _separate_encoder(model: nn.Module) -> nn.Module | None:
    """The encoder that ``generate`` calls by itself on encoder-decoder models of transformers."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return None
    get = getattr(model, "get_encoder", None)
    encoder = get() if callable(get) else None
    return encoder if isinstance(encoder, nn.Module) and encoder is not model else None


def _feature_methods(model: nn.Module) -> list[str]:
    """Methods such as CLIP's ``get_text_features``, which call a tower without the model's forward."""
    return sorted(n for n in dir(type(model)) if re.fullmatch(r"get_\w+_features", n))
