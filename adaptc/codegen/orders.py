"""The association orders of a LoRA layer (RunLoRA, arXiv 2312.03415): what each computes, and which is the fastest.

    split   y = x W^T + (x A^T) B^T            dx = g W + (g B) A    dA = (g B)^T x    dB = g^T (x A^T)
    merge   y = x E^T,  E = W + B A            dx = g E              dA, dB as in split
    dense   y = x E^T                          dx = g E              Z = g^T x,  dA = B^T Z,  dB = Z A^T

The scale is left out: it is one more factor on what is small. ``merge`` makes E, of the size of W, twice, and no sums
of the size of x and y: for many rows. ``dense`` makes the gradient of a dense weight besides: for ranks near the width.
The other orders double a large product for no less of the small ones.

An order is the function that is timed. The roofline of this host predicts what its calls take; those that promise to
be faster are timed, once for each shape, with as many rows as asked for, to the next power of two. Another library may
make the frozen products, but not those with E, so that the usual order is timed with either.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Mapping

import torch

from adaptc.codegen import choices
from adaptc.codegen.choices import Choice
from adaptc.codegen.cost import call_costs
from adaptc.codegen.roofline import Rates, finished, on, rates
from adaptc.ir.code_hash import code_hash
from adaptc.ir.dialect import nbytes
from adaptc.torch_internals import may_call_onednn, onednn_linear

#: Multiplications of the frozen product below which an order is not worth asking for.
WORTH = 1 << 25
#: The part of the usual order's time that another must be predicted to take to be timed: what a timing alone says of
#: less than that does not hold in a whole step, where others share a value and memory is used again.
GAIN = 0.93
#: Seconds that the usual order may be predicted to take for any to be timed, and elements of the largest weight.
MOST, LARGEST = 0.25, 1 << 27
#: The usual order with the frozen products of the other library, where the pass ``library`` may call that.
ONEDNN = "split by oneDNN"

Tensor = torch.Tensor
#: What an order keeps of activations for the backward.
Kept = tuple[Tensor, ...]


def _linear(x: Tensor, W: Tensor) -> Tensor:
    return x @ W.t()


def split(
    x: Tensor, g: Tensor | None, W: Tensor, A: Tensor, B: Tensor, input_grad: bool,
    linear: Callable[[Tensor, Tensor], Tensor] = _linear,
) -> Kept:  # fmt: skip
    """``linear``: what makes the frozen products, (x, W) -> x W^T."""
    y, h = linear(x, W), x @ A.t()
    torch.addmm(y, h, B.t(), out=y)
    if g is not None:
        q = _factor_grads(x, g, A, B, h)
        if input_grad:
            dx = linear(g, W.t())
            torch.addmm(dx, q, A, out=dx)
    return x, h


def merge(x: Tensor, g: Tensor | None, W: Tensor, A: Tensor, B: Tensor, input_grad: bool) -> Kept:
    x @ torch.addmm(W, B, A).t()
    if g is not None:
        _factor_grads(x, g, A, B, x @ A.t())
        if input_grad:
            g @ torch.addmm(W, B, A)
    return (x,)


def _factor_grads(x: Tensor, g: Tensor, A: Tensor, B: Tensor, h: Tensor) -> Tensor:
    q = g @ B
    q.t() @ x
    g.t() @ h
    return q


def dense(x: Tensor, g: Tensor | None, W: Tensor, A: Tensor, B: Tensor, input_grad: bool) -> Kept:
    x @ torch.addmm(W, B, A).t()
    if g is not None:
        Z = g.t() @ x
        B.t() @ Z
        Z @ A.t()
        if input_grad:
            g @ torch.addmm(W, B, A)
    return (x,)


def _by_onednn(x: Tensor, W: Tensor) -> Tensor:
    return onednn_linear(x, W, None)


#: The usual one first.
ORDERS: dict[str, Callable[..., Kept]] = {"split": split, "merge": merge, "dense": dense}
_RUN: dict[str, Callable[..., Kept]] = {**ORDERS, ONEDNN: functools.partial(split, linear=_by_onednn)}


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer of ``m`` rows, ``k`` inputs, ``n`` outputs and rank ``r``; whether its factors are trained, and something
    asks for the gradient of its input."""

    m: int
    k: int
    n: int
    r: int
    trained: bool
    input_grad: bool

    def operands(self, dtype: torch.dtype, device: torch.device) -> tuple[Tensor | bool | None, ...]:
        """Those of an order."""
        ones = functools.partial(torch.ones, dtype=dtype, device=device)
        x, g = ones(self.m, self.k), ones(self.m, self.n) if self.trained else None
        return x, g, ones(self.n, self.k), ones(self.r, self.k), ones(self.n, self.r), self.input_grad

    @property
    def names(self) -> tuple[str, ...]:
        """Of the orders that differ."""
        return tuple(ORDERS) if self.trained else ("split", "merge")

    @property
    def is_worth_it(self) -> bool:
        return self.m * self.k * self.n >= WORTH and self.k * self.n <= LARGEST


def could_gain(layer: Layer) -> bool:
    """Whether another order of a layer that is not too small has fewer operations than the usual one."""
    if layer.m * layer.k * layer.n < WORTH:
        return False
    counts = {name: operations(name, layer) for name in ORDERS}
    return min(counts.values()) < counts["split"]


@functools.lru_cache(maxsize=256)
def operations(name: str, layer: Layer) -> int:
    """Those of all calls of an order."""
    operands = layer.operands(torch.float32, torch.device("meta"))
    return sum(cost.flops for cost in call_costs(ORDERS[name], operands, {}))


@functools.lru_cache(maxsize=256)
def _predicted(rate: Rates, layer: Layer, dtype: torch.dtype) -> dict[str, float]:
    operands = layer.operands(dtype, torch.device("meta"))
    return {name: rate.seconds(ORDERS[name], *operands) for name in layer.names}


def _saved(layer: Layer, dtype: torch.dtype) -> dict[str, int]:
    """Bytes of activations that each order keeps for the backward."""
    operands = layer.operands(dtype, torch.device("meta"))
    return {name: nbytes(*ORDERS[name](*operands)) for name in layer.names} if layer.trained else {}


def choose(layer: Layer, dtype: torch.dtype, device: torch.device) -> Choice | None:
    """The order of ``layer`` on ``device``; None where it is not worth asking, or nothing is to be timed."""
    rate = rates(device, dtype) if layer.is_worth_it else None
    if rate is None:
        return None
    rows = choices.bucket(layer.m)
    kind = "" if layer.input_grad else ", no gradient of x" if layer.trained else ", forward"
    size = f"{rows} x {layer.k} x {layer.n}, rank {layer.r}"
    question = f"LoRA {size}{kind}, {str(dtype).removeprefix('torch.')}{on(device)}"
    asked = dataclasses.replace(layer, m=rows)
    predicted = _predicted(rate, asked, dtype)
    choice = Choice(question, {}, predicted, _saved(layer, dtype))
    usual = choice.usual
    timed = [name for name in layer.names if name == usual or predicted[name] <= GAIN * predicted[usual]]
    if len(timed) == 1 or predicted[usual] > MOST:
        return choice
    if device.type == "cpu" and dtype == torch.float32 and may_call_onednn():
        timed.append(ONEDNN)

    def make() -> choices.Ways:
        operands = asked.operands(dtype, device)
        return {name: finished(functools.partial(_RUN[name], *operands), device) for name in timed}

    # What is timed is written here: another version of it is another question.
    version = hashlib.sha256(b"".join(map(code_hash, _RUN.values()))).hexdigest()[:8]
    seconds = choices.measure(f"{question}: {', '.join(timed)} ({version})", make)
    return choice if seconds is None else dataclasses.replace(choice, seconds=_as_run(seconds))


def _as_run(seconds: Mapping[str, float]) -> dict[str, float]:
    """What each order takes with the frozen products of the library that is faster."""
    found = dict(seconds)
    found["split"] = min(found["split"], found.pop(ONEDNN, math.inf))
    return found
