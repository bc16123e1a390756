"""Prepare what a model's first step on a CPU is going to need beside its tracing, which takes one thread.

A second one has Inductor find out what the CPU can do, and compiles the kernels that products will call and what all
loops include. Kernels are loaded where they are first called, as ever: what is not ready then is waited for or compiled
there, and what does not compile is reported there.
"""

from __future__ import annotations

import collections
import contextlib
import contextvars
import functools
import os
import threading
from collections.abc import Callable, Iterable, Iterator

import torch
from torch.nn.parameter import is_lazy

from adaptc import torch_internals
from adaptc.codegen.cpp import skinny
from adaptc.codegen.cpp.sources import text_of

Work = Callable[[], object]


class Line:
    """Work that is done one piece after the other, in a thread of its own."""

    def __init__(self) -> None:
        self._turn = threading.Condition()
        self._left: collections.deque[Work] = collections.deque()
        #: Whether there is a thread, whether it is in a piece, and how many want that it begins with none.
        self._runs, self._busy, self._held = False, False, 0

    def add(self, pieces: Iterable[Work]) -> None:
        """Do ``pieces`` behind what is there, each in the caller's context. What they raise is dropped; where no
        thread can be had they wait for the next call."""
        with self._turn:
            self._left.extend(functools.partial(contextvars.copy_context().run, piece) for piece in pieces)
            if self._left and not self._runs:
                self._runs = True
                self._runs = torch_internals.in_thread(self._run) is not None

    def _run(self) -> None:
        while (piece := self._next()) is not None:
            with contextlib.suppress(BaseException):
                piece()
            with self._turn:
                self._busy = False
                self._turn.notify_all()

    def _next(self) -> Work | None:
        with self._turn:
            while self._held and threading.main_thread().is_alive():
                self._turn.wait(1.0)
            # At the interpreter's end, which waits for the thread, no more is begun with.
            self._runs = self._busy = bool(self._left) and threading.main_thread().is_alive()
            return self._left.popleft() if self._busy else None

    @contextlib.contextmanager
    def hold(self, *, settled: bool) -> Iterator[None]:
        """Begin with no piece meanwhile; if ``settled``, be in none either."""
        with self._turn:
            self._held += 1
        try:
            with self._turn:
                self._turn.wait_for(lambda: not (settled and self._busy))
            yield
        finally:
            with self._turn:
                self._held -= 1
                self._turn.notify_all()


_line = Line()
_begun: set[str] = set()
_one_begins = threading.Lock()


def begin(parameters: Iterable[torch.Tensor]) -> None:
    """Begin with what a training step of a model with ``parameters`` needs if its largest one is on a CPU (norms and
    adapters may be elsewhere, and in another dtype), once a process. Not where Inductor times kernels of its own."""
    known = [p for p in parameters if not is_lazy(p)]
    largest = max(known, key=torch.Tensor.numel, default=None)
    if largest is None or largest.device.type != "cpu" or torch_internals.writes_products():
        return
    if torch_internals.inductor_missing() is not None:
        return
    with _one_begins:
        torch_internals.import_inductor()
        pieces = {name: piece for name, piece in _pieces(largest.dtype) if name not in _begun}
        _begun.update(pieces)
        _line.add(pieces.values())


def hold() -> contextlib.AbstractContextManager[None]:
    """Begin with nothing more meanwhile: several timings are not to wait for a piece each."""
    return _line.hold(settled=False)


def quiet() -> contextlib.AbstractContextManager[None]:
    """Do nothing in this process beside what is timed meanwhile, which would be mistaken for slow."""
    return _line.hold(settled=True)


def _pieces(dtype: torch.dtype) -> Iterator[tuple[str, Work]]:
    """By name. Last what the caller's thread makes as well when it is there, while kernels are compiled here."""
    yield "probe", torch_internals.probe_cpu()
    for source in _sources(dtype):
        yield source, functools.partial(torch_internals.compile_cpp, source)
    yield "headers", torch_internals.compile_headers


def _sources(dtype: torch.dtype) -> Iterator[str]:
    if dtype == torch.float32 and torch_internals.may_call_onednn():
        yield text_of("onednn.cpp")
    if dtype == torch.bfloat16 and torch_internals.has_avx512_bf16():
        yield text_of("pairs.cpp")
    if dtype in skinny.DTYPES:
        yield text_of("products.cpp")
        yield text_of("skinny.cpp")


def _forget_the_thread() -> None:
    """A forked process has no such thread, and nobody to give back its locks."""
    global _line, _one_begins
    _line, _one_begins = Line(), threading.Lock()
    _begun.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_the_thread)
