"""Compute a LoRA layer in the association order that is the fastest for its shape.

before:  %y = mm(%x, W^T);  %y2, %h = lora_linear(%x, %y, A, B, s, "r")
         %q = lora_bottleneck_grad(%g, B, s);  %dB = lora_factor_grad(%g, %h);  %dA = lora_factor_grad(%q, %x)
         %a = lora_input_grad(%q, A);  %b = mm(%g, W);  %dx = add(%a, %b)
after:   %E = lora_merged_weight(W, A, B, s);  %y2 = mm(%x, %E^T)                             "merge", in the backward:
         %h = lora_shrink(%x, A, s);  %q, %dB, %dA as before;  %dx = mm(%g, %E)
or       %Z = lora_factor_grad(%g, %x);  %dA, %dB = lora_dense_grads(%Z, A, B, s);  %dx = mm(%g, %E)        "dense"

The orders are predicted by the roofline of this host; those that promise to be faster are timed, once for each shape,
with as many rows as the graph was captured with, to the next power of two. E is made again for the backward. Another
library may make the frozen products, but not those with E, so that the usual order is timed with either.

Legal where nothing is dropped, weight and factors are of one dtype of 32 bits or more (a smaller one would round the
correction away beside the weight), and nothing else reads the frozen layer's output.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Mapping

import torch
from torch import fx

from adaptc.codegen import choices
from adaptc.codegen.choices import Choice
from adaptc.codegen.roofline import Rates, finished, on, rates
from adaptc.ir.code_hash import code_hash
from adaptc.ir.edit import Result
from adaptc.ir.sites import lora_nodes, site_of
from adaptc.passes.contract import Context, Contract, everywhere
from adaptc.passes.reassociate import plans
from adaptc.passes.reassociate.site import Site, read
from adaptc.passes.reassociate.write import write
from adaptc.torch_internals import may_call_onednn, node_value, onednn_linear, product_precision, size_hint

CONTRACT = Contract(level="joint", numerics="reassociates", conflicts=frozenset({"shared", "fused", "aten"}))

#: Multiplications of the frozen product below which an order is not worth asking for.
WORTH = 1 << 25
#: The part of the usual order's time that another must be predicted to take to be timed: what a timing alone says of
#: less than that does not hold in a whole step, where others share a value and memory is used again.
GAIN = 0.93
#: Seconds that the usual order may be predicted to take for any to be timed, and elements of the largest weight.
MOST, LARGEST = 0.25, 1 << 27
#: The usual order with the frozen products of the other library, where the pass ``library`` may call that.
ONEDNN = "split by oneDNN"


def reassociate(gm: fx.GraphModule, context: Context) -> Result:
    return everywhere(gm, (_reassociate,), context)


def _reassociate(gm: fx.GraphModule, context: Context, result: Result) -> None:
    for node in lora_nodes(gm):
        site = read(node)
        reason = site if isinstance(site, str) else _illegal(site)
        if not isinstance(site, Site) or reason is not None:
            if _could_gain(node):
                result.refuse(site_of(node), str(reason))
            continue
        choice = _choose(site)
        if choice is None:
            continue
        context.choices.append(dataclasses.replace(choice, sites=(site_of(node),)))
        if choice.chosen == choice.usual:
            continue
        if not context.spend():
            result.refuse(site_of(node), "limit reached")
            continue
        result.applied.append(write(gm, site, choice.chosen, record=context.record))


def _illegal(site: Site) -> str | None:
    if site.grads is None and not isinstance(node_value(site.product.node).shape[0], int):
        return "the number of rows is not fixed: a prompt's may be followed by single ones"
    _, _, A, B = site.operands
    values = [node_value(n) for n in (site.product.node, site.product.right, A, B)]
    if len({value.dtype for value in values}) > 1:
        return "weight, factors and output are not of one dtype"
    if values[0].dtype.itemsize < 4 or product_precision(values[0].device.type, values[0].dtype) != "ieee":
        return "a weight with its correction would be rounded to fewer digits than fp32 has, and lose it"
    return None


def _could_gain(node: fx.Node) -> bool:
    """Whether another order has fewer multiplications."""
    y, A, B = (node_value(node.args[i]) for i in (1, 2, 3))  # type: ignore[arg-type]
    k, n, r = (size_hint(size) for size in (A.shape[1], *B.shape))
    m = math.prod(map(size_hint, y.shape[:-1]))
    counts = {plan: plans.multiplications(plan, m, k, n, r) for plan in plans.PLANS}
    return m * k * n >= WORTH and min(counts.values()) < counts["split"]


def _choose(site: Site) -> Choice | None:
    m, k, n, r = site.sizes
    value = node_value(site.product.node)
    rate = rates(value.device, value.dtype) if m * k * n >= WORTH and k * n <= LARGEST else None
    if rate is None:
        return None
    rows, trained = choices.bucket(m), site.grads is not None
    input_grad = site.grads is not None and site.grads.dx is not None
    kind = "" if input_grad else ", no gradient of x" if trained else ", forward"
    dtype = str(value.dtype).removeprefix("torch.")
    question = f"LoRA {rows} x {k} x {n}, rank {r}{kind}, {dtype}{on(value.device)}"
    shapes = ((rows, k), (rows, n) if trained else None, (n, k), (r, k), (n, r))
    names = plans.names(trained=trained)
    predicted = _predicted(rate, names, shapes, value.dtype, input_grad)
    saved = {name: plans.saved(name, m, k, r, value.dtype.itemsize) for name in names} if trained else {}
    choice = Choice(question, {}, predicted, saved)
    usual = choice.usual
    timed = [name for name in names if name == usual or predicted[name] <= GAIN * predicted[usual]]
    if len(timed) == 1 or predicted[usual] > MOST:
        return choice
    if value.device.type == "cpu" and value.dtype == torch.float32 and may_call_onednn():
        timed.append(ONEDNN)

    def make() -> choices.Ways:
        operands = *_operands(shapes, value.dtype, value.device), input_grad
        return {name: finished(functools.partial(_RUN[name], *operands), value.device) for name in timed}

    # What is timed is written here: another version of it is another question.
    version = hashlib.sha256(b"".join(map(code_hash, _RUN.values()))).hexdigest()[:8]
    seconds = choices.measure(f"{question}: {', '.join(timed)} ({version})", make)
    return choice if seconds is None else dataclasses.replace(choice, seconds=_as_run(seconds))


def _by_onednn(x: torch.Tensor, W: torch.Tensor) -> torch.Tensor:
    return onednn_linear(x, W, None)


_RUN: dict[str, Callable[..., None]] = {**plans.PLANS, ONEDNN: functools.partial(plans.split, linear=_by_onednn)}


def _as_run(seconds: Mapping[str, float]) -> dict[str, float]:
    """What each order takes with the frozen products of the library that is faster."""
    found = dict(seconds)
    found["split"] = min(found["split"], found.pop(ONEDNN, math.inf))
    return found


Shapes = tuple[tuple[int, int] | None, ...]


@functools.lru_cache(maxsize=256)
def _predicted(
    rate: Rates, names: tuple[str, ...], shapes: Shapes, dtype: torch.dtype, input_grad: bool
) -> dict[str, float]:
    operands = _operands(shapes, dtype, torch.device("meta"))
    return {name: rate.seconds(plans.PLANS[name], *operands, input_grad) for name in names}


def _operands(shapes: Shapes, dtype: torch.dtype, device: torch.device) -> list[torch.Tensor | None]:
    return [None if shape is None else torch.ones(shape, dtype=dtype, device=device) for shape in shapes]
