"""Reading adapter nodes in a graph."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from adaptc.ir import dialect
from adaptc.torch_internals import OpOverload


def LORA_LINEAR() -> OpOverload:
    """The registered op, defined on first use."""
    return dialect.get("lora_linear").overload


def calls_of(gm: fx.GraphModule, name: str) -> list[fx.Node]:
    """The nodes of one graph that call a dialect op, in order (nested bodies excluded)."""
    return list(gm.graph.find_nodes(op="call_function", target=dialect.get(name).overload))


def lora_nodes(gm: fx.GraphModule) -> list[fx.Node]:
    return calls_of(gm, "lora_linear")


def items_of(node: fx.Node) -> list[fx.Node]:
    """The nodes that take a result out of the tuple that ``node`` returns."""
    return [user for user in node.users if user.target is operator.getitem]


def dialect_nodes(gm: fx.GraphModule) -> list[fx.Node]:
    """Every node of one graph that calls a dialect op, in order."""
    return [n for n in gm.graph.nodes if n.op == "call_function" and dialect.of_target(n.target) is not None]


def site_of(node: fx.Node) -> str:
    """The module path that a node was inserted for."""
    custom: dict[str, Any] = node.meta.get("custom") or {}
    return str(custom.get("adaptc", "(unknown site)"))


def mark_anchor(function: Callable[..., Any]) -> None:
    """Say of a function that its calls bring an adapter into a captured graph."""
    function._adaptc_anchor = True  # type: ignore[attr-defined]


def is_anchor(node: fx.Node) -> bool:
    """Whether a node is the call that brings an adapter into a captured graph."""
    return getattr(node.target, "_adaptc_anchor", False) is True


def is_inserted(node: fx.Node) -> bool:
    """Whether a pass added the node for an adapter."""
    return "adaptc" in (node.meta.get("custom") or {})


def cast_dtype(node: fx.Node) -> torch.dtype | None:
    """The dtype that ``tensor.to(dtype)`` or ``tensor.to(dtype=dtype)`` casts to; None for any other node."""
    if node.op != "call_method" or node.target != "to" or set(node.kwargs) - {"dtype"}:
        return None
    named = [*node.args[1:], *node.kwargs.values()]
    return named[0] if len(named) == 1 and isinstance(named[0], torch.dtype) else None


def is_cast(node: fx.Node) -> bool:
    return cast_dtype(node) is not None


def adapter_below(y: object) -> fx.Node | None:
    """The adapter whose corrected output ``y`` is, directly or through casts."""
    while isinstance(y, fx.Node) and is_cast(y):
        y = y.args[0]
    if not (isinstance(y, fx.Node) and y.target is operator.getitem and y.args[1] == 0):
        return None
    first = y.args[0]
    return first if isinstance(first, fx.Node) and first.target is LORA_LINEAR() else None


def dropout_of(node: fx.Node) -> tuple[fx.Node, float, bool] | None:
    """(what is dropped, p, training) of a call of ``torch.nn.functional.dropout``; None for another node, for one in
    place, and where p or the mode is not known."""
    if node.target is not F.dropout:
        return None
    given = dict(zip(("input", "p", "training", "inplace"), node.args, strict=False)) | node.kwargs
    x, p, training = given.get("input"), given.get("p", 0.5), given.get("training", True)
    if given.get("inplace", False) or not (isinstance(x, fx.Node) and isinstance(training, bool)):
        return None
    return (x, float(p), training) if isinstance(p, float | int) else None
