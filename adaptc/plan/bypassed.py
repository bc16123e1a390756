"""Modules whose weight is read past their call: an adapter at the call has no effect there.

Kernels of state-space layers take ``self.out_proj.weight`` as an argument, and a layer without such kernels calls the
module. Which of the two runs depends on the host, so what an adapter does is read off the source.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import textwrap
from typing import Any

from torch import nn

#: Model types and names of modules that PEFT 0.21.2 refuses LoRA for; their kernels read the weights.
MODEL_TYPES = frozenset({"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"})
NAMES = frozenset({"out_proj", "conv1d"})
#: What may be asked of a weight without computing with it.
_FACTS = frozenset({"dtype", "device", "shape", "ndim", "is_meta", "requires_grad", "size", "dim", "numel", "data_ptr"})


@dataclasses.dataclass(frozen=True)
class Reading:
    """``where``: the class and method that read the weight; ``called``: whether the module is called elsewhere."""

    where: str
    called: bool


def reading(parent: nn.Module, name: str) -> Reading | None:
    """Whether ``parent`` computes with the weight of its module ``name`` past the module's call."""
    kind: Any = type(parent)  # mypy takes a class of modules for something that cannot be hashed
    return _reading(kind, name)


def idle(model: nn.Module, path: str) -> str | None:
    """Why an adapter at the call of the module at ``path`` can never act, or None when it can."""
    holder, _, name = path.rpartition(".")
    found = reading(model.get_submodule(holder), name)
    if found is None or found.called:
        return None
    return f"{found.where} reads its weight and never calls it, so that an adapter there does nothing"


def refusal(model: nn.Module, path: str) -> str | None:
    """Why a module of one of PEFT's model types cannot be adapted at its call, or None."""
    holder, _, name = path.rpartition(".")
    if name not in NAMES or _model_type(model, holder) not in MODEL_TYPES:
        return None
    found = reading(model.get_submodule(holder), name)
    if found is None:
        return None
    return f"fast kernels read its weight past its call ({found.where}), where an adapter does nothing; nor has PEFT it"


def _model_type(model: nn.Module, path: str) -> str | None:
    """The type by the configuration that is nearest: a model can lie inside another one."""
    while True:
        config = getattr(model.get_submodule(path), "config", None)
        if (found := getattr(config, "model_type", None)) is not None:
            return str(found)
        if not path:
            return None
        path = path.rpartition(".")[0]


@functools.lru_cache(maxsize=1024)
def _reading(kind: type[nn.Module], name: str) -> Reading | None:
    where, called = None, False
    for cls in kind.__mro__:
        if cls.__module__.partition(".")[0] in ("torch", "builtins"):
            continue
        for function in _functions(cls):
            uses = _Uses(name)
            uses.visit(function)
            called = called or uses.called
            where = where or (f"{cls.__name__}.{function.name}" if uses.read else None)
    return None if where is None else Reading(where, called)


@functools.lru_cache(maxsize=1024)
def _functions(cls: type) -> tuple[ast.FunctionDef, ...]:
    """The methods that can be part of a forward, as written; none where there is no source."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    except (OSError, TypeError, SyntaxError):
        return ()
    found = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    return tuple(f for f in found if "init" not in f.name and not f.name.startswith("reset"))


class _Uses(ast.NodeVisitor):
    """What a method does with ``self.<name>``: computes with its weight, or anything else, such as calling it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.read = self.called = False

    def visit_Attribute(self, node: ast.Attribute) -> None:
        inner = node.value
        if node.attr in _FACTS and isinstance(inner, ast.Attribute) and self._is_module(inner.value):
            return
        if self._is_module(inner):
            self.read = self.read or node.attr == "weight"
        elif self._is_module(node):
            self.called = True
        else:
            self.generic_visit(node)

    def _is_module(self, node: ast.AST) -> bool:
        return (
            isinstance(node, ast.Attribute)
            and node.attr == self.name
            and isinstance(node.value, ast.Name)
            and node.value.id == "self"
        )
