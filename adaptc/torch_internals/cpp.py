"""Inductor's C++ compiler, and the threads in which it works ahead."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib
import os
import signal
import threading
import warnings
from collections.abc import Callable
from typing import Any

from adaptc.errors import AdaptcWarning
from adaptc.torch_internals.inductor import inductor_missing


def load_cpp(source: str, *others: str) -> Any:
    """C++ code as a ``ctypes.CDLL``, compiled by Inductor's compiler with its flags and cache; None without one.
    ``others`` are tried in their order where it does not compile. 2.11 to 2.15."""
    if inductor_missing() is not None:
        return None
    from torch._inductor.codecache import CppCodeCache

    try:
        return CppCodeCache.load(source)
    except Exception as error:  # of a compiler that fails; torch raises several types
        if others:
            return load_cpp(*others)
        first = str(error).strip().split("\n")[0]
        message = f"adaptc's own C++ kernels are left out, and slower ones run: they do not compile ({first})"
        warnings.warn(AdaptcWarning(message), stacklevel=2)
        return None


def import_inductor() -> None:
    """Import what of Inductor imports itself in circles, which is no thing for two threads. 2.11 to 2.15."""
    importlib.import_module("torch._inductor.compile_fx")


def compile_cpp(source: str) -> None:
    """Compile C++ code that :func:`load_cpp` is going to be asked for, in any thread, without loading it: its ops would
    appear while others are called. What the compiler raises is raised. 2.11 to 2.15."""
    from torch._inductor.codecache import CppCodeCache

    left: list[Callable[[], None]] = []
    CppCodeCache.load_async(source, submit_fn=left.append)
    for work in left:  # not at once: it locks the file, which is locked there; who loads it waits for that
        work()


def compile_headers() -> None:
    """Compile what all of Inductor's loops on a CPU include, which it keeps, in any thread. 2.11 to 2.15."""
    from torch._inductor.codecache import CppPythonBindingsCodeCache

    # Of a loop that is never compiled itself.
    CppPythonBindingsCodeCache.load_async("#include <torch/csrc/inductor/cpp_prefix.h>", submit_fn=lambda work: None)


def probe_cpu() -> Callable[[], object]:
    """What has Inductor find out which vector instructions it may use, in any thread: it compiles and loads a program
    for each kind of them, in seconds. 2.11 to 2.15."""
    from torch._inductor import cpu_vec_isa

    _probe_at_once()
    return cpu_vec_isa.pick_vec_isa


@functools.cache
def _probe_at_once() -> None:
    """Have Inductor probe all kinds of vector instructions at the same time from now on, and once, whichever threads
    ask: probing changes what it reads. 2.11 to 2.15."""
    from torch._inductor import cpu_vec_isa

    find = cpu_vec_isa.valid_vec_isa_list
    lock = threading.Lock()
    probing: list[threading.Thread | None] = []

    @functools.wraps(find)
    def find_at_once() -> Any:
        with lock:
            if not probing:
                flags = set(cpu_vec_isa.x86_isa_checker())
                kinds = [kind for kind in cpu_vec_isa.supported_vec_isa_list if set(str(kind).split()) <= flags]
                probing.extend(in_thread(functools.partial(bool, kind)) for kind in kinds)  # which remember it
        for thread in filter(None, probing):  # who is interrupted here finds them again
            thread.join()
        with lock:
            return find()

    def forget() -> None:  # a forked process does not have the threads, of which one may hold the lock
        nonlocal lock
        lock = threading.Lock()
        probing.clear()

    find_at_once.cache_clear = find.cache_clear  # type: ignore[attr-defined]
    cpu_vec_isa.valid_vec_isa_list = find_at_once  # type: ignore[assignment]
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=forget)


def in_thread(work: Callable[[], object]) -> threading.Thread | None:
    """``work`` in a thread, in the caller's context, as Inductor's settings are part of that; None where no thread can
    be had. What it raises is dropped.

    A Ctrl-C is not for it, nor for the programs that it starts: to Inductor one that dies is an instruction that this
    CPU lacks.
    """
    context = contextvars.copy_context()

    def run() -> None:
        if hasattr(signal, "pthread_sigmask"):
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        with contextlib.suppress(BaseException):
            context.run(work)

    # Not a daemon: the interpreter waits for it, as half a file must not be left in a cache.
    thread = threading.Thread(target=run, name="adaptc-build")
    try:
        thread.start()
    except RuntimeError:
        return None
    return thread
