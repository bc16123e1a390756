"""What DoRA's ops become: kernels of a CPU; and norms of products in bf16 where those are summed in fp32."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import fx

from adaptc.codegen.cpp import pairs, rescale, skinny, takes
from adaptc.codegen.ops import emit
from adaptc.codegen.ops.inline import inline
from adaptc.codegen.ops.row import Kernel, Row, chosen, on_cpu
from adaptc.ir import dialect
from adaptc.ir.dialect import Cost
from adaptc.ir.edit import Edit
from adaptc.ir.ops.dora import norm_dtype, row_norm_body, row_norm_cost
from adaptc.ir.ops.dora_grads import grads_body
from adaptc.ir.ops.dora_rescale import grad_body as rescale_grad_body
from adaptc.torch_internals import node_value, sums_bf16_in_fp32

aten = torch.ops.aten

#: Of eight significant bits each: as many as an fp32 has. A bf16 is the upper half of one.
PARTS, _UPPER_HALF = 3, -(1 << 16)


def bf16_parts(t: torch.Tensor) -> list[torch.Tensor]:
    """Tensors in bf16 whose sum is ``t`` in fp32, but for what is below the smallest normal number.

    Cut by bits: generated code need not round where a value is cast and read again.
    """
    parts: list[torch.Tensor] = []
    for _ in range(PARTS):
        upper = (t.view(torch.int32) & _UPPER_HALF).view(torch.float32)
        parts.append(upper.to(torch.bfloat16))
        t = t - upper
    return parts


def _reads_bf16(W: torch.Tensor, A: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The squares of the rows of a W in bf16, and W A^T of an A in fp32: units for products of bf16 sum in fp32, so
    that only A is split."""
    length = torch.linalg.vector_norm(W, dim=1, dtype=A.dtype)
    products = torch.mm(W, torch.cat(bf16_parts(A)).t(), out_dtype=A.dtype)
    return length * length, products.view(W.shape[0], PARTS, A.shape[0]).sum(1)


def _in_bf16(
    weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scale: torch.Tensor, transposed: bool
) -> torch.Tensor:
    return row_norm_body(weight, A, B, scale, transposed, _reads_bf16)


def _takes_bf16(weight: torch.Tensor, A: torch.Tensor, *others: Any) -> bool:
    return weight.dtype == torch.bfloat16 and norm_dtype(weight, A) == torch.float32


def _cost_in_bf16(weight: torch.Tensor, A: torch.Tensor, *others: Any) -> Cost:
    """W is read as it is, and multiplied by each part of A."""
    plain, n = row_norm_cost(weight, A, *others), weight.numel()
    wide = n * torch.float32.itemsize
    flops = plain.flops + 2 * n * (PARTS - 1) * int(A.shape[0])
    return dataclasses.replace(plain, flops=flops, read=plain.read - wide, written=plain.written - wide)


def _one_pass(
    weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scale: torch.Tensor, transposed: bool
) -> torch.Tensor:
    return skinny.row_norms(weight.detach(), A, B, scale)


def _takes_one_pass(
    weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scale: torch.Tensor, transposed: bool
) -> bool:
    """Where the rows of W lie in memory."""
    known = type(weight.detach()) is torch.Tensor and weight.numel() > 0
    return known and _is_read_by_rows(weight, A, transposed) and weight.stride(1) == 1


def _is_read_by_rows(weight: torch.Tensor, A: torch.Tensor, transposed: bool) -> bool:
    return not transposed and weight.dtype in skinny.DTYPES and norm_dtype(weight, A) == torch.float32


IN_BF16 = Kernel(_in_bf16, _takes_bf16, sums_bf16_in_fp32, _cost_in_bf16)


def _lower_row_norm(edit: Edit, *args: Any) -> tuple[fx.Node, ...]:
    """The kernel is written in torch: compiled code has it written out."""
    values = fx.map_arg(args, node_value)
    found = chosen([IN_BF16], values[0].device, *values)
    return inline("dora_row_norm", None if found is None else found.run)(edit, *args)


def _takes_expand(
    y: torch.Tensor, base: torch.Tensor | None, bias: torch.Tensor | None, h: torch.Tensor, B: torch.Tensor,
    *others: Any,
) -> bool:  # fmt: skip
    return all(takes.takes(pairs.NAME, z, B.shape[1]) for z in (y, base) if z is not None)


def _takes_grads(
    grad: torch.Tensor, z: torch.Tensor, bias: torch.Tensor | None, h: torch.Tensor, B: torch.Tensor, *others: Any
) -> bool:
    return all(takes.takes(pairs.NAME, t, B.shape[1]) for t in (grad, z))


def _output_grads(*args: Any) -> tuple[torch.Tensor, ...]:
    dz = torch.empty_like(args[0], memory_format=torch.contiguous_format)
    q, dB, dm = pairs.dora_output_grads(*(*args, dz))
    return q, dB, dz, dm


def _output_grads_in_place(grad: torch.Tensor, z: torch.Tensor, *others: Any) -> tuple[torch.Tensor, ...]:
    grad = grad.view(z.shape)
    return pairs.dora_output_grads(*(grad, z, *others, grad))


def output_grads_in_place(grad: torch.Tensor, z: torch.Tensor, *others: Any) -> tuple[torch.Tensor, ...]:
    """The op with dz in the memory of ``grad``, which is contiguous, in any shape; returns the others."""
    grad = grad.view(z.shape)
    q, dB, dz, dm = grads_body(grad, z, *others)
    grad.copy_(dz)
    return q, dB, dm


def _takes_rescale(grad: torch.Tensor, y: torch.Tensor, bias: torch.Tensor | None, *others: Any) -> bool:
    return takes.are_plain(grad, y, bias) and grad.numel() > 0


def _rescale_grad(
    grad: torch.Tensor, y: torch.Tensor, bias: torch.Tensor | None, magnitude: torch.Tensor, norm: torch.Tensor,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    dy, total = rescale.gradient(grad, y, bias, magnitude / norm, out)
    return dy, (total / norm).to(magnitude.dtype)


def _rescale_grad_in_place(grad: torch.Tensor, y: torch.Tensor, *others: Any) -> torch.Tensor:
    grad = grad.view(y.shape)
    return _rescale_grad(*(grad, y, *others, grad))[1]


def rescale_grad_in_place(grad: torch.Tensor, y: torch.Tensor, *others: Any) -> torch.Tensor:
    """The op with dy in the memory of ``grad``, which is contiguous, in any shape; returns dmagnitude."""
    grad = grad.view(y.shape)
    dy, dm = rescale_grad_body(grad, y, *others)
    grad.copy_(dy)
    return dm


def _lower_rescale(
    edit: Edit, y: fx.Node, bias: fx.Node | None, magnitude: fx.Node, norm: fx.Node
) -> tuple[fx.Node, ...]:
    """The body with its quotient as ``dora_factor``."""
    value = node_value(y)
    c = edit.call(dialect.get("dora_factor").overload if on_cpu(value.device) else aten.div.Tensor, magnitude, norm)
    scaled = edit.call(aten.mul.Tensor, y, emit.cast(edit, c, value.dtype))
    if bias is not None:
        rest = edit.call(aten.mul.Tensor, edit.call(aten.add.Tensor, edit.call(aten.neg.default, c), 1), bias)
        scaled = edit.call(aten.add.Tensor, scaled, emit.cast(edit, rest, value.dtype))
    return (scaled if node_value(scaled).is_contiguous() else emit.contiguous(edit, scaled),)


#: Kernels that leave the gradient of z, or of y, in the memory of the one that is given.
OUTPUT_GRADS = (Kernel(_output_grads_in_place, _takes_grads, pairs.is_there),)
RESCALE_GRAD = (Kernel(_rescale_grad_in_place, _takes_rescale, rescale.is_there),)
ROWS = {
    "dora_row_norm": Row(
        _lower_row_norm, (Kernel(_one_pass, _takes_one_pass, skinny.is_there), IN_BF16),
        whole=lambda device, weight, A, B, scale, transposed: (
            on_cpu(device) and _is_read_by_rows(weight, A, transposed)
        ),
    ),
    "dora_expand": Row(
        kernels=(Kernel(pairs.dora_expand, _takes_expand, pairs.is_there),),
        whole=lambda device, y, base, bias, h, B, *others: on_cpu(device) and takes.stays(y, B.shape[1], pairs.NAME),
    ),
    "dora_output_grads": Row(
        kernels=(Kernel(_output_grads, _takes_grads, pairs.is_there),),
        whole=lambda device, grad, z, bias, h, B, *others: on_cpu(device) and takes.stays(grad, B.shape[1], pairs.NAME),
    ),
    "dora_factor": Row(whole=on_cpu),
    "dora_rescale": Row(_lower_rescale),
    "dora_rescale_grad": Row(kernels=(Kernel(_rescale_grad, _takes_rescale, rescale.is_there),), whole=on_cpu),
}  # fmt: skip
