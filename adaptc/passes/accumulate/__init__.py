"""Accumulate into a product where it is, on the graphs that the compiler is about to lower.

before:  %y = mm(%x, %W);  %out = addmm(%y, %h, %B);  f(%out)        the library copies y, then adds to the copy
after:   %y = mm(%x, %W);  add_product_(%y, %h, %B);  f(%y)

the same for ``lora_input_grads(%dx, ...)``,

before:  %a = mm(%g, %W);  %b = mm(%h, %V);  %dx = add(%a, %b)       two results, and a pass over both
after:   %a = mm(%g, %W);  add_product_(%a, %h, %V)

as the gradients of one input by q, k and v are, and

before:  %g = mul(...);  %dy, %dm = dora_rescale_grad(%g, %y, ...)
after:   %g = mul(...);  %dm = rescale_grad_(%g, %y, ...);  f(%g)

and the same for ``dora_output_grads``,

before:  %y = mm(%x, %W);  %out, %h = lora_rows(%x, %y, ...)
after:   %y = mm(%x, %W);  %h = lora_rows_(%y, %x, ...);  f(%y)

where %g is new memory, as that of a product or of what a loop writes. Where nothing else reads it, and it has the shape
of the result. On a GPU only the first, where a copy takes longer than Python does around the call, and where Inductor
does not write products itself, which add as they write. After partitioning, because what runs before that must be
functional; for the same reason translation validation, which runs a rewrite by itself, is not asked for.
"""

from __future__ import annotations

from torch import fx

from adaptc.ir.edit import Result
from adaptc.passes.accumulate.gradients import scale_gradients
from adaptc.passes.accumulate.rows import add_rows
from adaptc.passes.accumulate.sums import add_products, sum_products
from adaptc.passes.contract import Context, Contract
from adaptc.passes.walk import walk

CONTRACT = Contract(level="final", numerics="reassociates")
REWRITES = (add_rows, sum_products, add_products, scale_gradients)


def accumulate(gm: fx.GraphModule, context: Context) -> Result:
    result = Result()
    for rewrite in REWRITES:
        walk(gm, rewrite, context, result)
    return result
