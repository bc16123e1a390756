"""Ops, trees, and what stands for a tensor: fake, wrapped and symbolic values."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

#: What a graph node calls: a registered op, an op with all its overloads, an op that takes functions. These
#: types have no public name. 2.11 to 2.15.
OpOverload = torch._ops.OpOverload
OpOverloadPacket = torch._ops.OpOverloadPacket
HigherOrderOperator = torch._ops.HigherOrderOperator


def tree_leaves(tree: Any) -> list[Any]:
    """Everything in nested lists, tuples and dicts, in order. 2.11 to 2.15."""
    return torch.utils._pytree.tree_leaves(tree)


def tree_map(fn: Callable[[Any], Any], tree: Any) -> Any:
    """``tree`` with every leaf replaced by ``fn(leaf)``. 2.11 to 2.15."""
    return torch.utils._pytree.tree_map(fn, tree)


def node_value(node: fx.Node) -> Any:
    """The fake value of a node: ``example_value`` on Dynamo's graph, ``val`` on AOTAutograd's."""
    return node.meta["val"] if "val" in node.meta else node.meta.get("example_value")


def fake_mode_of(values: Sequence[Any]) -> Any:
    """The FakeTensorMode of the first fake tensor among ``values``, or a new one. 2.11 to 2.15."""
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    for value in values:
        if isinstance(value, FakeTensor):
            return value.fake_mode
    return FakeTensorMode(allow_non_fake_inputs=True)


def as_fake(mode: Any, value: Any) -> Any:
    """A tensor as a fake one of ``mode``, anything else as it is. 2.11 to 2.15."""
    return mode.from_tensor(value) if isinstance(value, torch.Tensor) and not is_fake(value) else value


def is_fake(value: Any) -> bool:
    """Whether a value is a fake tensor. 2.11 to 2.15."""
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(value, FakeTensor)


def size_hint(size: int | torch.SymInt) -> int:
    """The size that a graph was captured with, without adding a guard; 1 when only data decides it. 2.11 to 2.15."""
    if isinstance(size, int):
        return size
    return int(size.node.hint) if size.node.has_hint() else 1


def size_text(size: Any) -> str:
    """A symbolic size as its formula, in the symbols of its graph. 2.11 to 2.15."""
    return str(size.node.expr)


def storage_key(tensor: torch.Tensor) -> int:
    """Equal for tensors that share memory, fake ones and those under vmap or grad too; its own for one that has
    none (sparse). 2.11 to 2.15."""
    while is_wrapped(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    try:
        return int(tensor.untyped_storage()._cdata)
    except NotImplementedError:
        return id(tensor)


def storage_bytes(tensor: torch.Tensor) -> int:
    """Bytes of the memory that a tensor, which may be fake, is in or a part of. 2.11 to 2.15."""
    try:
        return size_hint(tensor.untyped_storage().nbytes())
    except NotImplementedError:  # a sparse one
        return tensor._nnz() * tensor.element_size()


def printable(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, as fx can write it into a graph's code: ``Function.apply`` of torch 2.14 has no module, by which
    fx would call it. 2.11 to 2.15."""
    owner = getattr(function, "__self__", None)
    is_apply = isinstance(owner, type) and issubclass(owner, torch.autograd.Function)
    return _apply_of(owner) if is_apply and function.__name__ == "apply" else function


@functools.cache
def _apply_of(owner: Any) -> Callable[..., Any]:
    def apply(*args: Any) -> Any:
        return owner.apply(*args)

    apply.__module__ = owner.__module__
    apply.__name__ = apply.__qualname__ = f"{owner.__name__}_apply"
    return apply


def not_views(results: Any) -> Any:
    """What an op returns (a tensor, or a tuple or list), without a view of a tensor that it made on the way: autograd
    refuses writes to one, and the memory is no other's. 2.11 to 2.15."""
    if isinstance(results, torch.Tensor):
        return results.data if results._is_view() else results
    return type(results)(map(not_views, results)) if type(results) in (tuple, list) else results


def is_wrapped(tensor: torch.Tensor) -> bool:
    """Whether a tensor stands for another under vmap, grad or jvp. 2.11 to 2.15."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(tensor))
