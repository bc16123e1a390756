"""Which nodes of a captured graph a read must not be moved across.

Dynamo's graph is not functional: ``a(h); h.mul_(2); b(h)`` reads one node twice with two values. A pass that
moves or merges reads asks :func:`barrier` first.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import fx

from adaptc.torch_internals import HigherOrderOperator, OpOverload, OpOverloadPacket

#: ``operator`` functions behind ``h += 1`` and the like; Dynamo emits these, not ``Tensor.add_``.
_IN_PLACE = frozenset(
    {"iadd", "iand", "iconcat", "ifloordiv", "ilshift", "imatmul", "imod"}
    | {"imul", "ior", "ipow", "irshift", "isub", "itruediv", "ixor"}
)
#: Write to an argument in some calls: items, attributes, running statistics.
_WRITERS = frozenset({"setitem", "delitem", "setattr", "batch_norm", "instance_norm"})
#: Modules whose functions keep torch's naming rule for in-place work, or have nothing to write to.
_NAMED_BY_RULE = frozenset({"torch", "math", "builtins", "adaptc"})


def barrier(first: fx.Node, second: fx.Node, *, modes: bool = True) -> str | None:
    """Why a read at ``first`` may not be moved to ``second``, later in the same graph, or None.

    ``modes``: what reads there depends on grad mode and autocast.
    """
    node = first.next
    while node is not second:
        if may_write(node):
            return f"{node.name} may write to memory"
        if modes and _changes_mode(node):
            return f"{node.name} switches a mode of torch"
        node = node.next
    return None


def may_write(node: fx.Node) -> bool:
    """Whether a node of a captured graph may change a tensor that others hold.

    In-place methods and functions end in one underscore; ``out=``, ``inplace=True`` and item assignment write
    too. Modules, higher-order ops and functions from outside torch hide what they do and count as writers.
    """
    if node.op in ("placeholder", "get_attr", "output"):
        return False
    target = node.target
    if node.op == "call_module" or isinstance(target, HigherOrderOperator) or "out" in node.kwargs:
        return True
    if isinstance(target, OpOverload):
        return bool(target._schema.is_mutable)
    if isinstance(target, OpOverloadPacket):
        # `out` overloads are told by their keyword; which of the others runs is not known here.
        names = [n for n in target.overloads() if not n.endswith("out")]  # type: ignore[no-untyped-call]
        return any(getattr(target, name)._schema.is_mutable for name in names)
    name = target if isinstance(target, str) else str(getattr(target, "__name__", ""))
    bare = name.removeprefix("__").removesuffix("__")
    if bare in _WRITERS or bare in _IN_PLACE:
        return True
    module = str(getattr(target, "__module__", None) or "torch").partition(".")[0]
    if module == "_operator":  # `and_`, `or_`, `not_` avoid keywords
        return False
    if bare.endswith("_") and not bare.endswith("__"):
        return True
    return node.op == "call_function" and (module not in _NAMED_BY_RULE or _writes_by_argument(node))


def _writes_by_argument(node: fx.Node) -> bool:
    """``relu(x, inplace=True)``, also with the flag given by position, and ``embedding(max_norm=...)``."""
    arguments: dict[str, Any] = dict(node.kwargs)
    if inspect.isfunction(node.target):
        arguments = dict(inspect.signature(node.target).bind_partial(*node.args, **node.kwargs).arguments)
    return bool(arguments.get("inplace")) or arguments.get("max_norm") is not None


def _changes_mode(node: fx.Node) -> bool:
    """Grad mode and autocast are entered and left by nodes of their own."""
    if node.op != "call_function" or isinstance(node.target, OpOverload):
        return False
    name = str(getattr(node.target, "__name__", ""))
    return name.startswith(("_enter_", "_exit_", "_set_", "set_", "_saved_tensors_hooks_", "_sdpa_kernel"))
