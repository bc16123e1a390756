"""What a frozen layer's product by oneDNN becomes: the call of it."""

from __future__ import annotations

import torch

from adaptc import torch_internals
from adaptc.codegen.cpp import onednn
from adaptc.codegen.cpp.takes import are_plain
from adaptc.codegen.ops.row import Kernel, Row, on_cpu


def _takes(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    return are_plain(x, weight, bias) and x.numel() > 0 and weight.numel() > 0


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    onednn.library()  # takes the calls after this one
    return torch_internals.onednn_linear(x.detach(), weight.detach(), None if bias is None else bias.detach())


ROWS = {"onednn_linear": Row(kernels=(Kernel(_linear, _takes, on_cpu),), whole=on_cpu)}
