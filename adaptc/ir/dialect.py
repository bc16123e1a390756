"""Dialect ops: pure torch ops that carry a meaning the passes can match, and what is known of each.

An op is one :class:`DialectOp`: a pure-torch body (its meaning, fp64 oracle, and what runs where there
is no kernel), a fake, a gradient formula, a cost, an input generator and tolerances. The registered torch op
calls through the table, so that the body that runs is the body that the cache keys hash.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import math
from collections.abc import Callable
from typing import Any

import torch

from adaptc.ir.code_hash import code_hash
from adaptc.torch_internals import OpOverload, not_views

#: op name -> module that defines it; importing the module registers the op. Methods define their own beside these.
_TABLE = {
    "lora_linear": "adaptc.ir.ops.lora",
    "lora_bottleneck_grad": "adaptc.ir.ops.lora",
    "lora_factor_grad": "adaptc.ir.ops.lora",
    "lora_input_grad": "adaptc.ir.ops.lora",
    "lora_shrink": "adaptc.ir.ops.lora_split",
    "lora_expand": "adaptc.ir.ops.lora_split",
    "lora_factor_grads": "adaptc.ir.ops.lora_split",
    "lora_input_grads": "adaptc.ir.ops.lora_split",
    "lora_merged_weight": "adaptc.ir.ops.lora_merged",
    "lora_dense_grads": "adaptc.ir.ops.lora_merged",
    "lora_linear_expand": "adaptc.ir.ops.lora_fused",
    "lora_bottleneck_grads": "adaptc.ir.ops.lora_fused",
    "lora_linear_input_grads": "adaptc.ir.ops.lora_fused",
    "lora_rows": "adaptc.ir.ops.lora_rows",
    "lora_rows_grads": "adaptc.ir.ops.lora_rows",
    "seeded_dropout": "adaptc.ir.ops.dropout",
    "onednn_linear": "adaptc.ir.ops.onednn_linear",
}

_LIBRARY = torch.library.Library("adaptc", "DEF")  # type: ignore[no-untyped-call]
_PYTHON = torch.library.Library("adaptc_python", "DEF")  # type: ignore[no-untyped-call]
_OPS: dict[str, DialectOp] = {}


@dataclasses.dataclass(frozen=True)
class Cost:
    """Floating-point operations, and bytes read, written and kept for the backward pass."""

    flops: int = 0
    read: int = 0
    written: int = 0
    saved: int = 0

    def __add__(self, other: Cost) -> Cost:
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Cost(*(a + b for a, b in pairs))


def nbytes(*tensors: torch.Tensor | None) -> int:
    """Bytes that ``tensors`` take, for a cost; nothing for None."""
    return sum(math.prod(int(s) for s in t.shape) * t.dtype.itemsize for t in tensors if t is not None)


@dataclasses.dataclass
class DialectOp:
    """One op of the dialect.

    Args:
        schema: torch schema without the name, for example ``(Tensor x) -> Tensor``.
        body: the meaning, in pure torch.
        fake: shapes and dtypes of the outputs.
        save / gradient: ``setup_context`` and ``backward`` of ``torch.library.register_autograd``.
        cost: (arguments with fake values) -> Cost of one execution; None: the sum over what the body calls.
        sample: (draw) -> positional arguments, for tests and benchmarks; ``draw``: hypothesis' ``data.draw``.
        tolerances: factor on the error of the body at the same compute dtype that a lowering may have.
        recomputed: cheaper to compute again in the backward than to keep: its values are never saved.
    """

    name: str
    schema: str
    body: Callable[..., Any]
    fake: Callable[..., Any]
    cost: Callable[..., Cost] | None
    sample: Callable[..., Any]
    save: Callable[..., None] | None = None
    gradient: Callable[..., Any] | None = None
    tolerances: float = 1.1
    recomputed: bool = False

    @property
    def overload(self) -> OpOverload:
        return getattr(torch.ops.adaptc, self.name).default  # type: ignore[no-any-return]


def _no_kernel(name: str, device: torch.device, *args: Any) -> Callable[..., Any] | None:
    return None


#: Gives what runs an op outside a graph in place of its body, or None. Who has kernels (``codegen.ops.registry``) puts
#: its own here, so that an op gives the same bits there as in a graph.
kernel_for: Callable[..., Callable[..., Any] | None] = _no_kernel


def implement(library: torch.library.Library, name: str, schema: str, function: Callable[..., Any]) -> None:
    """``function`` is what the op ``name`` of ``library`` does, wherever C++ does not do it; that calls it by the same
    name in ``adaptc_python`` for what it leaves."""
    torch.library.impl(f"{library.ns}::{name}", "CompositeExplicitAutograd", function, lib=library)
    torch.library.define(f"adaptc_python::{name}", schema, lib=_PYTHON)
    torch.library.impl(f"adaptc_python::{name}", "CompositeExplicitAutograd", function, lib=_PYTHON)


def define(op: DialectOp) -> DialectOp:
    """Register ``op`` with torch and in the table."""
    name = op.name
    _OPS[name] = op
    torch.library.define(f"adaptc::{name}", op.schema, lib=_LIBRARY, tags=torch.Tag.pt2_compliant_tag)

    def run_body(*args: Any, **kwargs: Any) -> Any:
        given = (one for a in args for one in (a if isinstance(a, list) else (a,)))
        device = next(one.device for one in given if isinstance(one, torch.Tensor))
        with torch.autocast(device.type, enabled=False):
            run = kernel_for(name, device, *args) or _OPS[name].body
            return not_views(run(*args, **kwargs))

    implement(_LIBRARY, name, op.schema, run_body)
    torch.library.register_fake(f"adaptc::{name}", lambda *a, **k: _OPS[name].fake(*a, **k), lib=_LIBRARY)
    if op.gradient is not None:
        torch.library.register_autograd(
            f"adaptc::{name}",
            lambda ctx, *grads: _OPS[name].gradient(ctx, *grads),  # type: ignore[misc]
            setup_context=lambda ctx, inputs, output: _OPS[name].save(ctx, inputs, output),  # type: ignore[misc]
            lib=_LIBRARY,
        )
    return op


def get(name: str) -> DialectOp:
    """The op called ``name``, defining it on first use."""
    if name not in _OPS:
        importlib.import_module(_TABLE[name])
    return _OPS[name]


def names() -> list[str]:
    """Every dialect op of the table, and those that methods and others have defined so far."""
    return list(dict.fromkeys([*_TABLE, *_OPS]))


def of_target(target: object) -> DialectOp | None:
    """The dialect op that a graph node's ``target`` calls, or None."""
    if not isinstance(target, OpOverload) or target.namespace != "adaptc":
        return None
    return get(target._schema.name.partition("::")[2])


def fingerprint() -> str:
    """A hash of every body, fake, gradient formula and cost as they are now; part of every cache key.

    Inductor's and AOTAutograd's caches key on the graph's code, in which a dialect op is only a name: without
    this, an edited formula would run as the old, cached kernel.
    """
    digest = hashlib.sha256()
    for name in sorted(names()):
        op = get(name)
        digest.update(f"{name}{op.schema}{op.recomputed}".encode())
        for part in (op.body, op.fake, op.save, op.gradient, op.cost):
            digest.update(b"none" if part is None else code_hash(part))
    return digest.hexdigest()
