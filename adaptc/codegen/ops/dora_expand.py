"""What the correction of a DoRA site with its factor per column becomes: a kernel for pairs of bf16."""

from __future__ import annotations

from typing import Any

import torch

from adaptc.codegen.cpp import pairs, takes
from adaptc.codegen.ops.row import Kernel, Row, on_cpu


def _takes(
    y: torch.Tensor, base: torch.Tensor | None, bias: torch.Tensor | None, h: torch.Tensor, B: torch.Tensor,
    *others: Any,
) -> bool:  # fmt: skip
    return all(takes.takes(pairs.NAME, z, B.shape[1]) for z in (y, base) if z is not None)


ROWS = {
    "dora_expand": Row(
        kernels=(Kernel(pairs.dora_expand, _takes, pairs.is_there),),
        whole=lambda device, y, base, bias, h, B, *others: on_cpu(device) and takes.stays(y, B.shape[1], pairs.NAME),
    ),
}
