"""Ops of compiled code that leave one result of an op of the dialect in the memory of their first argument.

They return none of their arguments: Inductor takes the result of ``addmm_`` for another buffer than its argument, and
gives its memory away while the other is still read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch

from adaptc.codegen.ops import dora, lora_rows
from adaptc.codegen.ops.lora_split import UPDATES, add_input_grads
from adaptc.codegen.ops.row import Kernel, chosen
from adaptc.ir import dialect
from adaptc.torch_internals import OpOverload

_LIBRARY = torch.library.Library("adaptc_lowered", "DEF")  # type: ignore[no-untyped-call]


def _define(
    name: str, arguments: str, kernels: tuple[Kernel, ...], otherwise: Callable[..., Any], result: str = "()",
    fake: Callable[..., Any] = lambda *arguments: None,
) -> OpOverload:  # fmt: skip
    schema = f"(Tensor(a!) total, {arguments}) -> {result}"
    torch.library.define(f"adaptc_lowered::{name}", schema, lib=_LIBRARY, tags=torch.Tag.pt2_compliant_tag)

    def run(total: torch.Tensor, *args: Any) -> Any:
        kernel = chosen(kernels, total.device, total, *args)
        return (otherwise if kernel is None else kernel.run)(total, *args)

    dialect.implement(_LIBRARY, name, schema, run)
    torch.library.register_fake(f"adaptc_lowered::{name}", fake, lib=_LIBRARY)
    return cast(OpOverload, getattr(torch.ops.adaptc_lowered, name).default)


def _one(kernel: Kernel) -> Kernel:
    """Of one product without dropout."""
    return Kernel(
        lambda total, left, right: kernel.run(total, [left], [right], [], []),
        lambda total, left, right: kernel.takes(total, [left], [right], [], []),
        kernel.platform,
    )


ADD_PRODUCT = _define(
    "add_product_", "Tensor left, Tensor right", tuple(map(_one, UPDATES)),
    lambda total, left, right: add_input_grads(total, [left], [right], [], []),
)  # fmt: skip
ADD_PRODUCTS = _define(
    "add_products_", "Tensor[] left, Tensor[] right, Tensor[] seeds, float[] p", UPDATES, add_input_grads
)
RESCALE_GRAD = _define(
    "rescale_grad_", "Tensor y, Tensor? bias, Tensor magnitude, Tensor norm", dora.RESCALE_GRAD,
    dora.rescale_grad_in_place, "Tensor",
    lambda total, y, bias, magnitude, norm: magnitude.new_empty(magnitude.shape),
)  # fmt: skip
OUTPUT_GRADS = _define(
    "dora_output_grads_",
    "Tensor z, Tensor? bias, Tensor h, Tensor B, Tensor magnitude, Tensor norm, Tensor scale, bool of_base",
    dora.OUTPUT_GRADS, dora.output_grads_in_place, "(Tensor, Tensor, Tensor)",
    lambda total, z, bias, h, B, magnitude, *others: (
        z.new_empty((*z.shape[:-1], B.shape[1])), B.new_empty(B.shape), magnitude.new_empty(magnitude.shape)
    ),
)  # fmt: skip
LORA_ROWS = _define(
    "lora_rows_", "Tensor x, Tensor[] A, Tensor[] B, Tensor[] scale, Tensor ids, int[] numbers", lora_rows.ADD_ROWS,
    lora_rows.add_rows, "Tensor",
    lambda total, x, A, *others: x.new_empty((x.shape[0], max(a.shape[0] for a in A))),
)  # fmt: skip
