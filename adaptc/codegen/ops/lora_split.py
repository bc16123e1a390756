"""What LoRA's products on their own become: kernels of a CPU, or products of the library."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from adaptc.codegen.cpp import pairs, skinny
from adaptc.codegen.cpp import takes as table
from adaptc.codegen.ops import emit
from adaptc.codegen.ops.inline import inline
from adaptc.codegen.ops.lora import factor_grad, input_grad
from adaptc.codegen.ops.row import Kernel, Row, on_cpu
from adaptc.ir.edit import Edit
from adaptc.ir.ops.lora import rows
from adaptc.ir.ops.lora_split import Tensors, input_grads_body, joined
from adaptc.torch_internals import cpu_emulates, node_value

aten = torch.ops.aten
_drop = inline("seeded_dropout")
Rates = Sequence[float]


def _dropped(edit: Edit, x: fx.Node, seeds: Sequence[fx.Node], p: Sequence[float]) -> list[fx.Node]:
    """What each site reads of ``x`` (..., k), as rows."""
    return [emit.rows(edit, _drop(edit, x, seed, one)[0]) for seed, one in zip(seeds, p, strict=True)]


def shrink(
    edit: Edit, x: fx.Node, A: Sequence[fx.Node], scale: Sequence[fx.Node], seeds: Sequence[fx.Node], p: Sequence[float]
) -> tuple[fx.Node, ...]:
    factors = [emit.cast(edit, a, node_value(x).dtype) for a in A]
    if seeds:
        pairs = zip(_dropped(edit, x, seeds, p), factors, strict=True)
        parts = [edit.call(aten.mm.default, one, emit.transposed(edit, a)) for one, a in pairs]
    else:
        wide = edit.call(aten.mm.default, emit.rows(edit, x), emit.transposed(edit, emit.joined(edit, factors, 0)))
        parts = emit.parts(edit, wide, [emit.size_of(edit, a, 0) for a in A], 1)
    found = []
    for part, one in zip(parts, scale, strict=True):
        h = emit.scaled(edit, part, one)
        if not node_value(h).is_contiguous():
            h = emit.contiguous(edit, h)
        found.append(emit.like(edit, h, x))
    return tuple(found)


def expand(edit: Edit, y: fx.Node, h: fx.Node, B: fx.Node) -> tuple[fx.Node, ...]:
    factor = emit.transposed(edit, emit.cast(edit, B, node_value(h).dtype))
    return (emit.like(edit, edit.call(aten.addmm.default, emit.rows(edit, y), emit.rows(edit, h), factor), y),)


def factor_grads(
    edit: Edit, left: Sequence[fx.Node], right: fx.Node, dtype: torch.dtype, seeds: Sequence[fx.Node],
    p: Sequence[float],
) -> tuple[fx.Node, ...]:  # fmt: skip
    if seeds:
        pairs = zip(left, _dropped(edit, right, seeds, p), strict=True)
        return tuple(factor_grad(edit, q, one, dtype)[0] for q, one in pairs)
    wide = emit.joined(edit, [emit.rows(edit, q) for q in left], 1)
    product = emit.cast(edit, edit.call(aten.mm.default, emit.transposed(edit, wide), emit.rows(edit, right)), dtype)
    # Each a tensor of its own: they become the gradients of parameters.
    sizes = [emit.size_of(edit, q, -1) for q in left]
    return tuple(emit.contiguous(edit, part) for part in emit.parts(edit, product, sizes, 0))


def input_grads(
    edit: Edit, dx: fx.Node, q: Sequence[fx.Node], A: Sequence[fx.Node], seeds: Sequence[fx.Node], p: Sequence[float]
) -> tuple[fx.Node, ...]:
    if seeds:
        for one, a, seed, rate in zip(q, A, seeds, p, strict=True):
            product = input_grad(edit, one, a)[0]
            dx = edit.call(aten.add.Tensor, dx, _drop(edit, product, seed, rate)[0])
        return (dx if node_value(dx).is_contiguous() else emit.contiguous(edit, dx),)
    wide = emit.joined(edit, [emit.rows(edit, one) for one in q], 1)
    factors = emit.joined(edit, [emit.cast(edit, a, node_value(dx).dtype) for a in A], 0)
    return (emit.like(edit, edit.call(aten.addmm.default, emit.rows(edit, dx), wide, factors), dx),)


#: (arguments) -> what the small sides multiply, the ranks of all sites together, and whether it is dropped.
Operands = Callable[..., tuple[torch.Tensor, int, bool]]


def product_kernels(run: str, operands: Operands, most: float = math.inf) -> tuple[Kernel, ...]:
    """The functions called ``run`` of both libraries, as kernels of an op for up to ``most`` ranks."""

    def kernel(library: Any) -> Kernel:
        def takes(*args: Any) -> bool:
            x, ranks, drops = operands(*args)
            return ranks <= most and table.takes(library.NAME, x, ranks, drops)

        return Kernel(getattr(library, run), takes, library.is_there)

    return kernel(pairs), kernel(skinny)


def _ranks(factors: Tensors, dim: int) -> int:
    return sum(t.shape[dim] for t in factors)


#: Of ``lora_input_grads`` in the memory of ``dx``, which is contiguous.
UPDATES = product_kernels("update", lambda dx, q, A, seeds, p: (dx, _ranks(A, 0), bool(seeds)))


def _to_new_memory(update: Kernel) -> Kernel:
    def run(dx: torch.Tensor, *args: Any) -> torch.Tensor:
        total = dx.detach().clone(memory_format=torch.contiguous_format)
        update.run(total, *args)
        return total

    return dataclasses.replace(update, run=run)


def add_input_grads(dx: torch.Tensor, q: Tensors, A: Tensors, seeds: Tensors, p: Rates) -> None:
    """What no kernel adds to ``dx``, in its memory."""
    if seeds:
        dx.copy_(input_grads_body(dx, q, A, seeds, p))
    else:
        rows(dx).addmm_(*joined(dx, q, A))


def is_made_alone(x: torch.Tensor, ranks: int) -> bool:
    """Whether a kernel makes the product of one site faster than a library: in bf16 those are as fast."""
    return on_cpu(x.device) and x.dtype == torch.float32 and table.stays(x, ranks)


def is_made_again(x: torch.Tensor, *, drops: bool) -> bool:
    """Whether making ``x`` again in the backward, where a loop makes it, is as fast as keeping it. Without dropout that
    was measured on CPUs alone."""
    return drops or on_cpu(x.device)


def _are_whole(
    device: torch.device, x: torch.Tensor, parts: Tensors, seeds: Tensors, ranks: int | None = None
) -> bool:
    """On a CPU, what a kernel does, and several sites together: joining and cutting are kernels that take longer to
    compile than to run. Not where products are better made in another dtype, which needs them in the graph. Of one site
    alone if its ``ranks`` are given."""
    if len(parts) > 1 or seeds:
        return on_cpu(device) and (x.dtype in skinny.DTYPES or not cpu_emulates(x.dtype))
    return on_cpu(device) and ranks is not None and is_made_alone(x, ranks)


ROWS = {
    "lora_shrink": Row(
        shrink, product_kernels("shrink", lambda x, A, scale, seeds, p: (x, _ranks(A, 0), bool(seeds))),
        whole=lambda device, x, A, scale, seeds, p: _are_whole(device, x, A, seeds, A[0].shape[0]),
    ),
    "lora_expand": Row(expand),
    "lora_factor_grads": Row(
        factor_grads,
        product_kernels("gradient", lambda left, right, dtype, seeds, p: (right, _ranks(left, -1), bool(seeds))),
        whole=lambda device, left, right, dtype, seeds, p: _are_whole(device, right, left, seeds, left[0].shape[-1]),
    ),
    "lora_input_grads": Row(
        input_grads, tuple(map(_to_new_memory, UPDATES)),
        whole=lambda device, dx, q, A, seeds, p: _are_whole(device, dx, q, seeds),
    ),
}  # fmt: skip
