"""Dialect ops of which only the body is written: fake, gradient and cost come from it.

    y = op(x, ...)                         the body, in pure torch
    dx, ... = op_backward(g, x, ..., need) its vector-Jacobian product: the body again, differentiated

Lowering writes both bodies out in ATen ops; what the backward computes a second time is then one value again,
because AOTAutograd's partitioner merges equal nodes and decides itself what to keep and what to recompute. A
method needs ops of its own (as LoRA has) only where another backward is cheaper than this one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from adaptc.ir import dialect
from adaptc.ir.dialect import DialectOp
from adaptc.torch_internals import autograd_again


def derive(
    name: str, schema: str, body: Callable[..., torch.Tensor], *, sample: Callable[..., Any], tolerances: float = 1.1
) -> DialectOp:
    """Define the op ``adaptc::<name>`` and ``adaptc::<name>_backward``.

    Args:
        schema: ``(Tensor x, Tensor? b, float p) -> Tensor``: tensors (some optional) and constants, one result.
        body: pure: no random numbers, nothing written to; its result shares no memory with an argument.
        sample, tolerances: as in :class:`DialectOp`.
    """
    arguments = schema.partition("->")[0].strip().removeprefix("(").removesuffix(")")
    backward = name + "_backward"

    def backward_body(grad: torch.Tensor, *inputs: Any) -> list[torch.Tensor]:
        *values, need = inputs
        # Under grad mode (create_graph=True) the result itself is differentiated: no fresh leaves then.
        twice = torch.is_grad_enabled()
        leaves = [v if twice and _is_recorded(v) else _leaf(v, flag) for v, flag in zip(values, need, strict=True)]
        wanted = [leaf for leaf, flag in zip(leaves, need, strict=True) if flag]
        with autograd_again():
            result = body(*leaves)
            seed = grad.to(result.dtype)
            found = torch.autograd.grad(result, wanted, seed, allow_unused=True, create_graph=twice)
        return [w.new_zeros(w.shape) if g is None else g.contiguous() for g, w in zip(found, wanted, strict=True)]

    def backward_fake(grad: torch.Tensor, *inputs: Any) -> list[torch.Tensor]:
        *values, need = inputs
        return [v.new_empty(v.shape) for v, flag in zip(values, need, strict=True) if flag]

    def save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.constants = [None if isinstance(v, torch.Tensor) else v for v in inputs]
        ctx.where = [i for i, v in enumerate(inputs) if isinstance(v, torch.Tensor)]
        ctx.save_for_backward(*(inputs[i] for i in ctx.where))

    def gradient(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        values = list(ctx.constants)
        for i, tensor in zip(ctx.where, ctx.saved_tensors, strict=True):
            values[i] = tensor
        need = [bool(n) for n in ctx.needs_input_grad]
        # The op has no second derivative of its own, its body has.
        op = dialect.get(backward)
        found = iter((op.body if torch.is_grad_enabled() else op.overload)(grad, *values, need))
        return tuple(next(found) if flag else None for flag in need)

    dialect.define(
        DialectOp(
            name=backward,
            schema=f"(Tensor grad, {arguments}, bool[] need) -> Tensor[]",
            body=backward_body, fake=backward_fake, cost=None, sample=_backward_sample(body, sample),
        )
    )  # fmt: skip
    return dialect.define(
        DialectOp(
            name=name, schema=schema, body=body, fake=body, cost=None, sample=sample,
            save=save, gradient=gradient, tolerances=tolerances,
        )
    )  # fmt: skip


def _is_recorded(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad


def _leaf(value: Any, wanted: bool) -> Any:
    return value.detach().requires_grad_(wanted) if isinstance(value, torch.Tensor) else value


def _backward_sample(body: Callable[..., torch.Tensor], sample: Callable[..., Any]) -> Callable[..., Any]:
    """Inputs of the backward op from those of the op: a gradient like the result, for every floating tensor."""

    def draw_backward(draw: Any) -> tuple[Any, ...]:
        values = sample(draw)
        need = [isinstance(v, torch.Tensor) and v.is_floating_point() for v in values]
        return (torch.ones_like(body(*values)) / 3, *values, need)

    return draw_backward
