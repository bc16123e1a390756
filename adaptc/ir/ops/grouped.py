"""Products by groups of rows: what a mixture of experts computes once its rows are sorted by expert.

    grouped_mm     x (S, K), weight (E, K, N), offs (E,) -> (S, N)       every row times the matrix of its group
    grouped_outer  left (S, M), right (S, N), offs (E,) -> (E, M, N)     left_e^T right_e, a sum over the group's rows

Group e is the rows from offs[e - 1] (0 for the first) up to offs[e]; ``offs`` is int32 and does not decrease. Rows
behind the last group give zeros and count for nothing. Matrices may have any strides.

They are ops, because the sizes of the groups are data: a graph holds one node, whatever the routing. Each is the
other's gradient, and the gradient of a matrix that is not trained is never made (transformers' fallback makes one as
large as all experts' weights). Differentiable any number of times.

They are also the gradient of transformers' own fallback, in releases whose gradient cannot be traced: frozen experts
are passed through in every model that has adapters below them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import register_flop_formula

from adaptc.transformers_names import GROUPED_MM, GROUPED_MM_GRADIENT

_LIBRARY = torch.library.Library("adaptc_kernels", "DEF")  # type: ignore[no-untyped-call]
#: A loop over groups reads their sizes on the host, which a CUDA graph cannot record.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe)
#: torch's own kernel reads rows in pieces of this many bytes.
_ALIGNMENT = 16


def groups(offs: torch.Tensor, rows: int) -> Iterator[tuple[int, int, int]]:
    """(group, first row, row behind its last), for the groups that have rows."""
    start = 0
    for group, end in enumerate(offs.tolist()):
        end = min(end, rows)
        if end > start:
            yield group, start, end
            start = end


def mm(x: torch.Tensor, weight: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
    """``grouped_mm`` as a kernel."""
    if x.device.type == "cuda" and is_native(x, weight):
        return native_mm(x, weight, offs)
    out = x.new_empty((x.shape[0], weight.shape[2]))
    end = 0
    with torch.autocast(x.device.type, enabled=False):
        for group, start, end in groups(offs, x.shape[0]):
            torch.mm(x[start:end], weight[group], out=out[start:end])
    out[end:].zero_()
    return out


def outer(left: torch.Tensor, right: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
    """``grouped_outer`` as a kernel."""
    out = left.new_zeros((offs.shape[0], left.shape[1], right.shape[1]))
    with torch.autocast(left.device.type, enabled=False):
        for group, start, end in groups(offs, left.shape[0]):
            torch.mm(left[start:end].t(), right[start:end], out=out[group])
    return out


def is_native(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether torch's kernel takes these: it knows bf16 only, and strides in whole pieces of memory."""
    if x.dtype is not torch.bfloat16 or not x.is_contiguous():
        return False
    rows_or_columns = sorted(weight.stride()[1:])
    strides = (x.stride(0), weight.stride(0), rows_or_columns[1])
    return rows_or_columns[0] == 1 and all(s * x.dtype.itemsize % _ALIGNMENT == 0 for s in strides)


def native_mm(x: torch.Tensor, weight: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
    """torch's kernel, which needs no group sizes on the host; it leaves rows behind the last group as they are."""
    out = F.grouped_mm(x, weight, offs=offs)
    inside = torch.arange(out.shape[0], device=out.device)[:, None] < offs[-1]
    return torch.where(inside, out, 0)


def _define(name: str, schema: str, kernel: Any, fake: Any, save: Any, gradient: Any, flops: Any) -> Any:
    full = f"adaptc_kernels::{name}"
    torch.library.define(full, schema, lib=_LIBRARY, tags=_TAGS)
    torch.library.impl(full, "CompositeExplicitAutograd", kernel, lib=_LIBRARY)
    torch.library.register_fake(full, fake, lib=_LIBRARY)
    torch.library.register_autograd(full, gradient, setup_context=save, lib=_LIBRARY)
    packet = getattr(torch.ops.adaptc_kernels, name)
    register_flop_formula(packet)(flops)
    return packet.default


def _save_both(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    first, second, offs = inputs
    need_first, need_second, *_ = ctx.needs_input_grad
    ctx.save_for_backward(first if need_second else None, second if need_first else None, offs)


def _mm_gradient(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, weight, offs = ctx.saved_tensors
    grad = grad.contiguous()
    dx = None if weight is None else grouped_mm(grad, weight.transpose(1, 2), offs)
    dweight = None if x is None else grouped_outer(x, grad, offs)
    return dx, dweight, None


def _outer_gradient(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    left, right, offs = ctx.saved_tensors
    dleft = None if right is None else grouped_mm(right, grad.transpose(1, 2), offs)
    dright = None if left is None else grouped_mm(left, grad, offs)
    return dleft, dright, None


def _mm_flops(x: Any, weight: Any, offs: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * int(x[0]) * int(weight[1]) * int(weight[2])


def _outer_flops(left: Any, right: Any, offs: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * int(left[0]) * int(left[1]) * int(right[1])


grouped_mm = _define(
    "grouped_mm", "(Tensor x, Tensor weight, Tensor offs) -> Tensor", mm,
    lambda x, weight, offs: x.new_empty((x.shape[0], weight.shape[2])), _save_both, _mm_gradient, _mm_flops,
)  # fmt: skip
grouped_outer = _define(
    "grouped_outer", "(Tensor left, Tensor right, Tensor offs) -> Tensor", outer,
    lambda left, right, offs: left.new_empty((offs.shape[0], left.shape[1], right.shape[1])),
    _save_both, _outer_gradient, _outer_flops,
)  # fmt: skip


def give_fallback_a_gradient() -> None:
    """Let the backward of transformers' fallback be traced, where transformers is loaded and its own cannot be."""
    theirs = torch.ops.transformers
    if hasattr(theirs, GROUPED_MM) and not hasattr(theirs, GROUPED_MM_GRADIENT):
        torch.library.register_autograd(f"transformers::{GROUPED_MM}", _mm_gradient, setup_context=_save_both)
