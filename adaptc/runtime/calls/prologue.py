"""The call of a compiled model: a small Python prologue outside the graph, then the captured graphs."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from adaptc.capture.backend import AdapterBackend
from adaptc.errors import RecompileLimitWarning
from adaptc.runtime.attach import CALL
from adaptc.torch_internals import compile_isolated, state_across_modules, watch_recompile_limit

if TYPE_CHECKING:
    from adaptc.handle import Handle

#: How often one frame may be compiled before Dynamo gives up on it (torch's default is 8).
RECOMPILE_LIMIT = 64


def compiled(
    handle: Handle, run: Callable[..., Any], backend: Callable[..., Any], *, copies: int = 0
) -> Callable[..., Any]:
    """``run``, a function, captured as the options say; for so many ``copies`` of a block, which may turn out to need
    a graph or two of their own."""
    return compile_isolated(
        run,
        backend=backend,
        recompile_limit=RECOMPILE_LIMIT + 2 * copies,
        fullgraph=handle.options.fullgraph,
        dynamic=handle.options.dynamic,
    )


class Capture:
    """One capture epoch of one entry point: a fresh backend object and callable, which share no cache entries
    with any other model or epoch. Without a backend the entry point runs as it is, and blocks inside it are captured.
    """

    def __init__(self, handle: Handle, function: Callable[..., Any], backend: AdapterBackend | None) -> None:
        self.handle = handle
        self.across = handle.adapters.has_taps

        # A frame of ours as the root: Dynamo skips frames of torch's own containers, so that a model that is
        # an nn.Sequential or an nn.TransformerEncoder would capture nothing.
        def run(*args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs)

        self.whole = backend is not None
        self.run = run if backend is None else compiled(handle, run, backend)

    def __call__(self, kind: tuple[object, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The call of a kind (of which blocks may find that it is to be captured whole)."""
        previous = CALL.eager, CALL.recorded, CALL.stopped, CALL.whole
        records = torch.is_grad_enabled()
        recorded: set[int] = set()
        stopped: set[int] = set()
        CALL.eager, CALL.depth, CALL.whole = set(), CALL.depth + 1, self.whole
        CALL.recorded, CALL.stopped = (recorded, stopped) if records else (None, None)
        try:
            with watch_recompile_limit() as limits, state_across_modules() if self.across else nullcontext():
                output = self.run(*args, **kwargs)
        finally:
            eager, CALL.depth = CALL.eager or set(), CALL.depth - 1
            found = kind if CALL.whole and not self.whole else None
            CALL.eager, CALL.recorded, CALL.stopped, CALL.whole = previous
            self.handle.captures.after_call(found, eager, limits)
            for message in limits:
                warnings.warn(RecompileLimitWarning(message), stacklevel=3)
        if records:
            self.handle.lint.after_call(output, recorded, stopped, self.handle.graphs)
        return output


class Prologue:
    """Installed as ``_compiled_call_impl`` of a module; also kept in its ``__dict__`` so that copies re-arm.

    torch drops ``_compiled_call_impl`` when a module is copied or pickled. This object is copied with the
    module's ``__dict__`` and installs itself on the copy.
    """

    KEY = "_adaptc_prologue"

    def __init__(self, handle: Handle, owner: nn.Module, entry: str) -> None:
        self.handle, self.owner, self.entry = handle, owner, entry
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
        self.handle.check_data_parallel(self.handle)
        return self.handle.captures.call(self.entry, self.owner._call_impl, args, kwargs)

    def _run_plainly(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The call as ordinary module calls, for ``torch.jit.trace``: neither the model nor a block is captured."""
        before = CALL.depth, CALL.whole
        CALL.depth, CALL.whole = CALL.depth + 1, True
        try:
            return self.owner._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]
        finally:
            CALL.depth, CALL.whole = before

    def __deepcopy__(self, memo: dict[int, Any]) -> Prologue | None:
        owner, handle = memo.get(id(self.owner)), self.handle
        if owner is None or id(handle.model) not in memo:
            return None  # part of the model is copied on its own: it keeps its adapters and runs eagerly
        new = object.__new__(type(self))
        memo[id(self)] = new
        new.handle, new.owner, new.entry, new.previous = handle.__deepcopy__(memo), owner, self.entry, None
        new.arm()
        return new

    def __getstate__(self) -> dict[str, Any]:
        return {"handle": self.handle, "owner": self.owner, "entry": self.entry, "previous": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.arm()


class EntryMethod:
    """A method of the model that bypasses its forward (``get_text_features``), captured as well."""

    def __init__(self, handle: Handle, name: str) -> None:
        self.handle, self.name = handle, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model = self.handle.model
        method = getattr(type(model), self.name).__get__(model)
        if torch.compiler.is_compiling() or CALL.depth > 0:
            return method(*args, **kwargs)
        return self.handle.captures.call(self.name, method, args, kwargs)
