"""What LoRA by rows becomes on a CPU: one product for each stretch of rows that has one adapter, and nothing made of
the rows that have none.

A row of a batch is many rows of a product, so that the stretches are mostly long as they are. Where they are short and
adapters have several, rows are sorted first, those of one adapter in their order.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch

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


def _always(*args: Any) -> bool:
    return True


_FORWARD = (Kernel(products, _always, on_cpu),)
ROWS = {
    "lora_rows": Row(kernels=_FORWARD, whole=on_cpu),
    "lora_rows_grads": Row(kernels=(Kernel(grads, _always, on_cpu),), whole=on_cpu),
}
