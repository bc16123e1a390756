"""The lowering of an op that is written out as what its body calls."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx

from adaptc.ir import dialect
from adaptc.ir.edit import Edit
from adaptc.torch_internals import node_value, trace_body


def inline(name: str, function: Callable[..., Any] | None = None) -> Callable[..., tuple[fx.Node, ...]]:
    """The lowering that writes the body of the op called ``name`` out in ATen ops, or ``function`` in place of it."""

    def lower(edit: Edit, *args: Any) -> tuple[fx.Node, ...]:
        found: list[fx.Node] = []
        fx.map_arg(args, found.append)
        nodes = list(dict.fromkeys(found))

        def run(*values: Any) -> Any:
            given = dict(zip(nodes, values, strict=True))
            return (function or dialect.get(name).body)(*fx.map_arg(args, lambda n: given[n]))

        values, traced = [node_value(n) for n in nodes], _TRACED.get()
        key = None if traced is None else _call_key(name, args, nodes, values)
        body = None if traced is None else traced.get(key)
        if body is None:
            body = trace_body(run, values)
            if traced is not None and key is not None:
                traced[key] = body
        return tuple(edit.copy_in(body, nodes))

    return lower


#: Call -> its traced body, in ``tracing_once``.
_TRACED: contextvars.ContextVar[dict[Any, fx.Graph] | None] = contextvars.ContextVar("traced", default=None)


@contextlib.contextmanager
def tracing_once() -> Iterator[None]:
    """A block, on one graph, in which equal bodies are traced once: sites of one shape have one."""
    token = _TRACED.set({})
    try:
        yield
    finally:
        _TRACED.reset(token)


def _call_key(name: str, args: tuple[Any, ...], nodes: Sequence[fx.Node], values: Sequence[Any]) -> Any:
    """What a traced body depends on: equal for two calls only if it is the same; None where a size is symbolic."""
    if not all(isinstance(v, torch.Tensor) for v in values):
        return None
    sizes = [(*v.shape, *v.stride()) for v in values]
    if not all(isinstance(s, int) for size in sizes for s in size):
        return None
    place = {n: i for i, n in enumerate(nodes)}
    call = repr(fx.map_arg(args, lambda n: f"%{place[n]}"))
    return name, call, tuple(sizes), tuple((v.dtype, v.device, v.requires_grad) for v in values)
