"""What LoRA by rows becomes on a CPU: the C++ kernels in fp32 and bf16. Else one product of the library for each
stretch of rows that has one adapter. Either makes nothing of the rows that have none.

A row of a batch is many rows of a product, so that the stretches are mostly long as they are. Where they are short and
adapters have several, rows are sorted first, those of one adapter in their order.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, groupby
from typing import Any

import torch

from adaptc.codegen.cpp import lora_rows, skinny
from adaptc.codegen.ops.row import Kernel, Row, chosen, on_cpu
from adaptc.ir.ops.lora import rows, scaled
from adaptc.ir.ops.lora_rows import body

Tensors = Sequence[torch.Tensor]
#: Rows that a stretch has on average, below which sorting them pays.
_SHORT = 16
#: (place among the adapters, first row, row behind the last)
Stretch = tuple[int, int, int]


def _stretches(ids: Sequence[int], places: dict[int, int]) -> list[Stretch]:
    """Those of ``ids`` that have an adapter."""
    found, start = [], 0
    for number, group in groupby(ids):
        end = start + sum(1 for _ in group)
        if number in places:
            found.append((places[number], start, end))
        start = end
    return found


def _plan(ids: torch.Tensor, numbers: Sequence[int]) -> tuple[list[Stretch], torch.Tensor | None]:
    """Stretches of rows, and the order in which rows are taken for them; None: as they are."""
    values = ids.tolist()
    places = {number: place for place, number in enumerate(numbers)}
    found = _stretches(values, places)
    if len(found) > len({place for place, _, _ in found}) and len(values) < _SHORT * len(found):
        order = torch.sort(ids, stable=True).indices
        return _stretches([values[i] for i in order.tolist()], places), order
    return found, None


def run(
    x: torch.Tensor, y: torch.Tensor, A: Tensors, B: Tensors, scale: Tensors, ids: torch.Tensor, numbers: Sequence[int]
) -> torch.Tensor:
    """y' of ``lora_rows``, op by op: outside a graph and without gradients.

    ``x`` (..., K), ``y`` (..., N) of any floating-point dtype and strides, computed in that of ``y``; ``A``, ``B`` of
    any, one each of ``numbers``, none for no adapter; ``ids`` with the leading dimensions of ``y``, or flat. The result
    is new memory, contiguous.
    """
    with torch.no_grad(), torch.autocast(y.device.type, enabled=False):
        if not A or y.numel() == 0:
            return y.detach().clone(memory_format=torch.contiguous_format)
        flat = rows(x.detach().to(y.dtype)), rows(y.detach())
        kernel = chosen(_FORWARD, y.device, *flat, A, B, scale, ids.reshape(-1), list(numbers))
        found = (body if kernel is None else kernel.run)(*flat, A, B, scale, ids.reshape(-1), list(numbers))[0]
        return found.view(y.shape)


@torch.no_grad()
def products(
    x: torch.Tensor, y: torch.Tensor, A: Tensors, B: Tensors, scale: Tensors, ids: torch.Tensor, numbers: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    stretches, order = _plan(ids, numbers)
    if order is not None:
        x, y = x.index_select(0, order), y.index_select(0, order)
    out = torch.empty_like(y, memory_format=torch.contiguous_format)
    h = x.new_zeros((x.shape[0], max(a.shape[0] for a in A)))
    done = 0
    for place, start, end in stretches:
        if done < start:
            out[done:start] = y[done:start]
        inner = scaled(x[start:end] @ A[place].to(x.dtype).mT, scale[place])
        torch.addmm(y[start:end], inner, B[place].to(x.dtype).mT, out=out[start:end])
        h[start:end, : inner.shape[1]] = inner
        done = end
    out[done:] = y[done:]
    return (out, h) if order is None else (_back(out, order), _back(h, order))


def _back(sorted_rows: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(sorted_rows).index_copy_(0, order, sorted_rows)


@torch.no_grad()
def grads(
    grad: torch.Tensor, x: torch.Tensor, h: torch.Tensor, A: Tensors, B: Tensors, scale: Tensors, ids: torch.Tensor,
    numbers: list[int], need_x: bool, need: list[bool],
) -> list[torch.Tensor]:  # fmt: skip
    stretches, order = _plan(ids, numbers)
    if order is not None:
        grad, x, h = (t.index_select(0, order) for t in (grad, x, h))
    count = len(A)
    dx = torch.zeros_like(x, memory_format=torch.contiguous_format) if need_x else None
    made: dict[int, torch.Tensor] = {}

    def add(which: int, left: torch.Tensor, right: torch.Tensor) -> None:
        if need[which]:
            product = left.mT @ right
            made[which] = product if which not in made else made[which].add_(product)

    for place, start, end in stretches:
        g = grad[start:end]
        if need_x or need[place]:
            q = scaled(g @ B[place].to(g.dtype), scale[place])
            add(place, q, x[start:end])
            if dx is not None:
                torch.mm(q, A[place].to(q.dtype), out=dx[start:end])
        add(count + place, g, h[start:end, : A[place].shape[0]])
    found = []
    for which, (factor, flag) in enumerate(zip([*A, *B], need, strict=True)):
        if flag:
            found.append(made[which].to(factor.dtype) if which in made else factor.new_zeros(factor.shape))
    if dx is None:
        return found
    return [dx if order is None else _back(dx, order), *found]


def add_rows(y: torch.Tensor, x: torch.Tensor, *others: Any) -> torch.Tensor:
    """``products`` with y' in the memory of ``y``, which is contiguous, in any shape; returns h."""
    flat = y.view(-1, y.shape[-1])
    out, h = products(x, flat, *others)
    flat.copy_(out)
    return h


def _always(*args: Any) -> bool:
    return True


def _are_taken(first: torch.Tensor, same: Tensors, ids: torch.Tensor, *factors: Tensors) -> bool:
    """Whether the C++ kernels read all of these: of a subclass the memory may be elsewhere, or nowhere."""
    known = (torch.Tensor, torch.nn.Parameter)
    return (
        first.dtype in skinny.DTYPES and first.numel() > 0 and ids.dtype == torch.int64
        and all(t.dtype == first.dtype and t.numel() > 0 for t in same)
        and all(t.dtype in _FLOATS for each in factors for t in each)
        and all(type(t) in known and t.device == first.device for t in [first, *same, ids, *chain(*factors)])
    )  # fmt: skip


def _takes(
    x: torch.Tensor, y: torch.Tensor, A: Tensors, B: Tensors, scale: Tensors, ids: torch.Tensor, numbers: Sequence[int]
) -> bool:
    return _are_taken(x, [y], ids, A, B, scale)


def _takes_grads(
    grad: torch.Tensor, x: torch.Tensor, h: torch.Tensor, A: Tensors, B: Tensors, scale: Tensors, ids: torch.Tensor,
    *others: Any,
) -> bool:  # fmt: skip
    return _are_taken(x, [grad, h], ids, A, B, scale)


_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_FORWARD = (Kernel(lora_rows.forward, _takes, lora_rows.is_there), Kernel(products, _always, on_cpu))
#: Of y' in the memory of y.
ADD_ROWS = (Kernel(lora_rows.add, lambda y, x, *others: _takes(x, y, *others), lora_rows.is_there),)
ROWS = {
    "lora_rows": Row(kernels=_FORWARD, whole=on_cpu),
    "lora_rows_grads": Row(
        kernels=(Kernel(lora_rows.backward, _takes_grads, lora_rows.is_there), Kernel(grads, _always, on_cpu)),
        whole=on_cpu,
    ),
}
