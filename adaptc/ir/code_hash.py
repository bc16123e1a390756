"""What a function does, as a hash: for cache keys, which must change whenever it does."""

from __future__ import annotations

import functools
import hashlib
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

_SCALARS = (int, float, complex, str, bytes, type(None), type(Ellipsis), torch.dtype)
_CONTAINERS = (tuple, list, dict, set, frozenset)


def code_hash(fn: Callable[..., Any]) -> bytes:
    """A hash of ``fn``: its bytecode, its constants and defaults, and what it closes over, binds or calls.

    Called functions and constants are followed through globals and through modules (``costs.matmul``), except
    into torch and the standard library, which change with their versions. Objects that are neither functions
    nor plain data count by their type only. The hash is the same in every process.
    """
    digest = hashlib.sha256()
    _add(fn, digest, {})
    return digest.digest()


def _add(value: Any, digest: Any, seen: dict[int, tuple[int, Any]]) -> None:
    """Feed one value to ``digest``. ``seen``: id of a container or function that was fed already -> (how many were
    before it, itself: an id is another object's as soon as its own is gone)."""
    digest.update(type(value).__name__.encode() + b"(")
    if isinstance(value, _SCALARS):
        digest.update(repr(value).encode())
    elif id(value) in seen:
        digest.update(b"again%d" % seen[id(value)][0])
    else:
        seen[id(value)] = len(seen), value
        for part in _parts(value):
            _add(part, digest, seen)
        if isinstance(value, set | frozenset):
            # Their order differs between processes.
            digest.update(b"".join(sorted(_alone(item) for item in value)))
    digest.update(b")")


def _alone(item: Any) -> bytes:
    digest = hashlib.sha256()
    _add(item, digest, {})
    return digest.digest()


def _parts(value: Any) -> Iterator[Any]:
    """What a value is made of, as far as it decides what a function does."""
    if isinstance(value, types.FunctionType):
        yield from _code_parts(value.__code__)
        yield value.__defaults__
        yield value.__kwdefaults__
        for cell in value.__closure__ or ():
            yield cell.cell_contents
        yield from _read_by(value)
    elif isinstance(value, types.MethodType):
        yield value.__func__
        yield value.__self__
    elif isinstance(value, functools.partial):
        yield from (value.func, value.args, value.keywords)
    elif isinstance(value, tuple | list):
        yield from value
    elif isinstance(value, Mapping):
        # Registries of objects fill up as modules are loaded: only plain entries are part of the meaning.
        yield from ((str(key), entry) for key, entry in value.items() if _is_plain(entry))
    elif isinstance(value, set | frozenset):
        return
    elif isinstance(getattr(value, "__wrapped__", None), types.FunctionType):
        yield value.__wrapped__
    elif isinstance(call := vars(type(value)).get("__call__"), types.FunctionType) and _is_plain(call):
        yield from (call, getattr(value, "__dict__", None))
    else:
        yield str(getattr(value, "__qualname__", type(value).__qualname__))


def _code_parts(code: types.CodeType) -> Iterator[Any]:
    yield code.co_code
    yield code.co_names
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            yield from _code_parts(const)
        else:
            yield const


def _all_names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            yield from _all_names(const)


def _read_by(fn: types.FunctionType) -> Iterator[Any]:
    """The functions and constants that ``fn`` reads from its module and from modules it names."""
    names = list(dict.fromkeys(_all_names(fn.__code__)))
    for name in names:
        value = fn.__globals__.get(name)
        if isinstance(value, types.ModuleType):
            if not _is_foreign(value.__name__):
                yield from (v for n in names if _is_plain(v := vars(value).get(n)))
        elif _is_plain(value):
            yield value


def _is_plain(value: Any) -> bool:
    if isinstance(value, (*_SCALARS, *_CONTAINERS)):
        return True
    wrapped = getattr(value, "__wrapped__", value)
    return isinstance(wrapped, types.FunctionType) and not _is_foreign(wrapped.__module__)


def _is_foreign(module: str | None) -> bool:
    top = (module or "").partition(".")[0]
    return top in ("torch", "functorch") or top in sys.stdlib_module_names
