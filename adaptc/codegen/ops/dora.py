"""What the norms of DoRA become: one pass over the weight on a CPU; products in bf16 where their sums are in fp32."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import fx

from adaptc.codegen.cpp import skinny
from adaptc.codegen.ops.inline import inline
from adaptc.codegen.ops.row import Kernel, Row, chosen
from adaptc.ir.dialect import Cost
from adaptc.ir.edit import Edit
from adaptc.ir.ops.dora import norm_dtype, row_norm_body, row_norm_cost
from adaptc.torch_internals import node_value, sums_bf16_in_fp32

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


ROWS = {
    "dora_row_norm": Row(
        _lower_row_norm, (Kernel(_one_pass, _takes_one_pass, skinny.is_there), IN_BF16),
        whole=lambda device, weight, A, B, scale, transposed: (
            device.type == "cpu" and _is_read_by_rows(weight, A, transposed)
        ),
    ),
}  # fmt: skip
