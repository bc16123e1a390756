"""Whether blocks of one class and of equal shapes are copies for Dynamo too: Python values that a forward reads (a drop
rate, the number of the layer in the formula) are constants of its code, so that each value has a graph of its own.

``values_read`` tells before anything is captured; ``Copies`` while it is, of what could not be read from the code.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from adaptc.capture.call import CALL
from adaptc.runtime.calls.state import Calls

#: What torch keeps on every module.
_TORCHS = frozenset(vars(nn.Module()))
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, type)
#: How deep values in values are compared.
_DEEPEST = 3


def values_read(blocks: Mapping[str, nn.Module], cache_names: Iterable[str]) -> dict[str, tuple[object, ...]]:
    """For each block, of one class, what it reads in its forward and does not have in common with all others.

    Number ``i`` of block ``i`` counts as read only where that is not for a cache, whose arguments have ``cache_names``:
    a call without one does not read it.
    """
    found = [dict(_values(block)) for block in blocks.values()]
    differing: list[list[object]] = []
    for key in dict.fromkeys(key for values in found for key in values):
        kind, _, name = key
        column = [values.get(key) for values in found]
        if all(value is column[0] for value in column):
            continue
        frozen = [_frozen(value) for value in column]
        if all(value == frozen[0] for value in frozen):
            continue
        named, beside_cache = _names_read(kind, frozenset(cache_names))
        if name in named or (name in beside_cache and not _is_numbering(column)):
            differing.append(frozen)
    return {path: tuple(column[i] for column in differing) for i, path in enumerate(blocks)}


def _values(block: nn.Module) -> Iterator[tuple[tuple[type, str, str], object]]:
    """((class, path of the module in the block, attribute), value) of what is not torch's or an adapter's."""
    for path, module in block.named_modules():
        if ".adapters." not in f".{path}.":
            for name, value in vars(module).items():
                if name not in _TORCHS and not name.startswith("_adaptc"):
                    yield (type(module), path, name), value


def _frozen(value: object, depth: int = 0) -> object:
    """Equal for values that Dynamo would not tell apart, as far as they are plain; None of what is not."""
    if isinstance(value, _PLAIN):
        return type(value), value
    if depth == _DEEPEST or isinstance(value, torch.Tensor | nn.Module | types.FunctionType | types.MethodType):
        return None
    if isinstance(value, Mapping):
        return type(value), tuple((_frozen(k, depth + 1), _frozen(v, depth + 1)) for k, v in value.items())
    if isinstance(value, list | tuple):
        return type(value), tuple(_frozen(v, depth + 1) for v in value)
    return type(value), _frozen(getattr(value, "__dict__", None), depth + 1)


def _is_numbering(column: Sequence[object]) -> bool:
    """Whether a column of values numbers the blocks."""
    numbers = [value for value in column if type(value) is int]
    return len(numbers) == len(column) == len(set(numbers))


@functools.cache
def _names_read(kind: type, cache_names: frozenset[str]) -> tuple[set[str], set[str]]:
    """The names in the forward of a class and in what of the class it calls; and those that stand only in code which
    takes a cache."""
    named: set[str] = set()
    beside_cache: set[str] = set()
    seen, todo = {"forward"}, ["forward"]
    while todo:
        for code in _codes(inspect.getattr_static(kind, todo.pop(), None)):
            names = set(code.co_names)
            takes_cache = not cache_names.isdisjoint({*names, *code.co_varnames, *code.co_freevars})
            (beside_cache if takes_cache else named).update(names)
            todo += names - seen
            seen |= names
    return named, beside_cache - named


def _codes(member: object) -> Iterator[types.CodeType]:
    """The code of a function or property of a class, and what is defined in it."""
    function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
    code = getattr(inspect.unwrap(function), "__code__", None) if callable(function) else None
    todo = [] if code is None else [code]
    while todo:
        code = todo.pop()
        yield code
        todo += [inner for inner in code.co_consts if isinstance(inner, types.CodeType)]


class Copies:
    """The backend for blocks that are to share their graphs. Where one call captures more of them one by one than
    ``expected``, they are no copies: this call goes on op by op, and all others are captured whole."""

    def __init__(
        self, calls: Calls, backend: Callable[..., Any], blocks: Mapping[str, nn.Module], expected: int
    ) -> None:
        self.calls, self.backend, self.expected = calls, backend, expected
        self._owners = {id(p): path for path, block in blocks.items() for p in block.parameters()}
        self._call, self._captured = -1, set[str]()

    def __call__(self, gm: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        compiled: Callable[..., Any] = self.backend(gm, inputs)
        call = self.calls.counts["calls"]
        if self._call != call:
            self._call, self._captured = call, set()
        if CALL.depth > 0:
            self._captured.update(path for path in map(self._owners.get, map(id, inputs)) if path is not None)
            if len(self._captured) > self.expected:
                CALL.whole = True
                self.calls.stop_sharing()
        return compiled
