"""Reading adapter nodes in a graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from adaptc.codegen.torch_internals import OpOverload
from adaptc.ir import dialect


def LORA_LINEAR() -> OpOverload:
    """The registered op, defined on first use."""
    return dialect.get("lora_linear").overload


def lora_nodes(gm: fx.GraphModule) -> list[fx.Node]:
    """The ``lora_linear`` nodes of one graph, in order (nested bodies excluded)."""
    return list(gm.graph.find_nodes(op="call_function", target=LORA_LINEAR()))


def dialect_nodes(gm: fx.GraphModule) -> list[fx.Node]:
    """Every node of one graph that calls a dialect op, in order."""
    return [n for n in gm.graph.nodes if n.op == "call_function" and dialect.of_target(n.target) is not None]


def site_of(node: fx.Node) -> str:
    """The module path that a node was inserted for."""
    custom: dict[str, Any] = node.meta.get("custom") or {}
    return str(custom.get("adaptc", "(unknown site)"))


def is_cast(node: fx.Node) -> bool:
    """True for ``tensor.to(dtype)`` as the passes write it."""
    if node.op != "call_method" or node.target != "to" or len(node.args) != 2 or node.kwargs:
        return False
    return isinstance(node.args[1], torch.dtype)
