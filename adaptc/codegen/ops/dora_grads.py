"""What the gradients of a DoRA site's output become: a kernel for pairs of bf16, which may leave dz where grad was."""

from __future__ import annotations

from typing import Any

import torch

from adaptc.codegen.cpp import pairs, takes
from adaptc.codegen.ops.row import Kernel, Row, on_cpu
from adaptc.ir.ops.dora_grads import grads_body


def _takes(
    grad: torch.Tensor, z: torch.Tensor, bias: torch.Tensor | None, h: torch.Tensor, B: torch.Tensor, *others: Any
) -> bool:
    return all(takes.takes(pairs.NAME, t, B.shape[1]) for t in (grad, z))


def _grads(*args: Any) -> tuple[torch.Tensor, ...]:
    dz = torch.empty_like(args[0], memory_format=torch.contiguous_format)
    q, dB, dm = pairs.dora_output_grads(*(*args, dz))
    return q, dB, dz, dm


def _kernel_in_place(grad: torch.Tensor, z: torch.Tensor, *others: Any) -> tuple[torch.Tensor, ...]:
    grad = grad.view(z.shape)
    return pairs.dora_output_grads(*(grad, z, *others, grad))


def grads_in_place(grad: torch.Tensor, z: torch.Tensor, *others: Any) -> tuple[torch.Tensor, ...]:
    """The op with dz in the memory of ``grad``, which is contiguous, in any shape; returns the others."""
    grad = grad.view(z.shape)
    q, dB, dz, dm = grads_body(grad, z, *others)
    grad.copy_(dz)
    return q, dB, dm


IN_PLACE = (Kernel(_kernel_in_place, _takes, pairs.is_there),)
ROWS = {
    "dora_output_grads": Row(
        kernels=(Kernel(_grads, _takes, pairs.is_there),),
        whole=lambda device, grad, z, bias, h, B, *others: on_cpu(device) and takes.stays(grad, B.shape[1], pairs.NAME),
    ),
}
