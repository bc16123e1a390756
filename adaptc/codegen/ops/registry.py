"""What each op of the dialect becomes: one row an op, of those that have more than a body."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from adaptc.codegen.ops import dora, dropout, lora, lora_fused, lora_rows, lora_split, onednn_linear
from adaptc.codegen.ops.inline import inline
from adaptc.codegen.ops.row import Row, chosen
from adaptc.ir import dialect
from adaptc.ir.code_hash import code_hash
from adaptc.ir.dialect import Cost

_BODY = Row()
ROWS: dict[str, Row] = {
    **lora.ROWS, **lora_split.ROWS, **lora_fused.ROWS, **lora_rows.ROWS, **dora.ROWS,
    **dropout.ROWS, **onednn_linear.ROWS,
}  # fmt: skip


def row(name: str) -> Row:
    """The row of the op called ``name``; that of one which is its body if it has none."""
    return ROWS.get(name, _BODY)


def lowering(name: str) -> Callable[..., tuple[fx.Node, ...]]:
    """What writes the op called ``name`` out in ATen ops."""
    return row(name).lowering or inline(name)


def kernel_for(name: str, device: torch.device, *args: Any) -> Callable[..., Any] | None:
    """What runs the op called ``name`` on ``device`` in place of its body, or None."""
    kernel = chosen(row(name).kernels, device, *args)
    return None if kernel is None else kernel.run


dialect.kernel_for = kernel_for


def cost_of(name: str, device: torch.device, *args: Any) -> Callable[..., Cost] | None:
    """What the op called ``name`` costs on ``device``; None: what its body calls."""
    kernels = [kernel for kernel in row(name).kernels if kernel.cost is not None]
    kernel = chosen(kernels, device, *args)
    return dialect.get(name).cost if kernel is None else kernel.cost


def fingerprint() -> str:
    """A hash of every row's code, beside ``dialect.fingerprint``: part of every cache key."""
    digest = hashlib.sha256()
    for name, one in ROWS.items():
        digest.update(name.encode())
        for part in (one.lowering, one.whole, one.split, *(p for k in one.kernels for p in vars(k).values())):
            digest.update(b"none" if part is None else code_hash(part))
    return digest.hexdigest()
