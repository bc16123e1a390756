"""What the factor per column of a DoRA site becomes. Its gradients are one pass on a CPU, and dy may take the memory of
the gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from adaptc.codegen.cpp import rescale
from adaptc.codegen.cpp.takes import are_plain
from adaptc.codegen.ops import emit
from adaptc.codegen.ops.row import Kernel, Row, on_cpu
from adaptc.ir import dialect
from adaptc.ir.edit import Edit
from adaptc.ir.ops.dora_rescale import grad_body
from adaptc.torch_internals import node_value

aten = torch.ops.aten


def _takes(grad: torch.Tensor, y: torch.Tensor, bias: torch.Tensor | None, *others: Any) -> bool:
    return are_plain(grad, y, bias) and grad.numel() > 0


def _grad(
    grad: torch.Tensor, y: torch.Tensor, bias: torch.Tensor | None, magnitude: torch.Tensor, norm: torch.Tensor,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    dy, total = rescale.gradient(grad, y, bias, magnitude / norm, out)
    return dy, (total / norm).to(magnitude.dtype)


def _kernel_in_place(grad: torch.Tensor, y: torch.Tensor, *others: Any) -> torch.Tensor:
    grad = grad.view(y.shape)
    return _grad(*(grad, y, *others, grad))[1]


def grad_in_place(grad: torch.Tensor, y: torch.Tensor, *others: Any) -> torch.Tensor:
    """The op with dy in the memory of ``grad``, which is contiguous, in any shape; returns dmagnitude."""
    grad = grad.view(y.shape)
    dy, dm = grad_body(grad, y, *others)
    grad.copy_(dy)
    return dm


def _lower(edit: Edit, y: fx.Node, bias: fx.Node | None, magnitude: fx.Node, norm: fx.Node) -> tuple[fx.Node, ...]:
    """The body with its quotient as ``dora_factor``."""
    value = node_value(y)
    c = edit.call(dialect.get("dora_factor").overload if on_cpu(value.device) else aten.div.Tensor, magnitude, norm)
    scaled = edit.call(aten.mul.Tensor, y, emit.cast(edit, c, value.dtype))
    if bias is not None:
        rest = edit.call(aten.mul.Tensor, edit.call(aten.add.Tensor, edit.call(aten.neg.default, c), 1), bias)
        scaled = edit.call(aten.add.Tensor, scaled, emit.cast(edit, rest, value.dtype))
    return (scaled if node_value(scaled).is_contiguous() else emit.contiguous(edit, scaled),)


IN_PLACE = (Kernel(_kernel_in_place, _takes, rescale.is_there),)
ROWS = {
    "dora_factor": Row(whole=on_cpu),
    "dora_rescale": Row(_lower),
    "dora_rescale_grad": Row(kernels=(Kernel(_grad, _takes, rescale.is_there),), whole=on_cpu),
}
