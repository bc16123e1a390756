"""Quantised bases: which modules store their weight in few bits, how, and what that rules out.

An adapter that reads a module's input and output works on any base. What reads or writes the weight's own values does
not: on a quantised base they exist only as codes and scales, and writing them rounds to the codes' grid, by as much as
an adapter moves them. Modules are recognised by the names of classes: bitsandbytes and torchao are never imported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

if TYPE_CHECKING:
    from adaptc.methods.base import Method

#: Class of bitsandbytes' parameters -> bits of a code.
_BNB_BITS = {"Params4bit": 4, "Int8Params": 8}


class Refusal(NamedTuple):
    """Why a method cannot act on a base, and what to do instead."""

    reason: str
    do: str


def describe(module: nn.Module) -> str | None:
    """How ``module`` stores its weight ("bitsandbytes NF4"), or None where it is not quantised."""
    weight = module._parameters.get("weight")
    if weight is None:
        return None
    if _bits(weight) == 4:
        kind = str(getattr(weight, "quant_type", "4-bit")).upper()
        nested = getattr(getattr(weight, "quant_state", None), "nested", False)
        return f"bitsandbytes {kind}{', scales quantised too' if nested else ''}"
    if _bits(weight) == 8:
        threshold = float(getattr(getattr(module, "state", None), "threshold", 0.0))
        return f"bitsandbytes int8{f', inputs above {threshold:g} apart' if threshold > 0 else ''}"
    if type(weight).__module__.partition(".")[0] == "torchao":
        return f"torchao {type(weight).__name__}"
    return None


def refusal(method: Method, module: nn.Module) -> Refusal | None:
    """Why ``method`` cannot act on ``module`` because of how its base is quantised, or None.

    A method that does not train on a quantised base refuses modules with one inside as well (``train: full``).
    """
    needs = method.reads_weight()
    for name, inner in [("", module)] if method.quantised else module.named_modules():
        if (how := describe(inner)) is None:
            continue
        if needs is not None:
            which = f"that of its {name}" if name else "this one"
            return Refusal(
                f"{needs} needs the values of the weight, and {which} is quantised ({how})",
                f"leave {needs} out, or load the base without quantisation",
            )
        if _is_pending(inner):
            return Refusal(
                f"this {type(inner).__name__} of bitsandbytes is not quantised yet",
                "move the model to its device first, which quantises it: model.to(device)",
            )
    return None


def has_codes_of_4_bits(module: nn.Module) -> bool:
    return _bits(module._parameters.get("weight")) == 4


def loses_gradients(module: nn.Module) -> bool:
    """Whether bitsandbytes has repacked a 4-bit layer for inference: on a CPU with AVX512-BF16 its first call in eval
    mode without gradients does so for good, and the product of that form has no backward."""
    return bool(getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False))


def numel(parameter: torch.Tensor) -> int:
    """How many weights a parameter stands for: 4-bit codes are packed into elements of another dtype."""
    packed = _bits(parameter) == 4 and getattr(parameter, "bnb_quantized", True)
    return parameter.numel() * parameter.element_size() * 2 if packed else parameter.numel()


def _bits(weight: Any) -> int | None:
    """Bits of a code in a parameter of bitsandbytes; None for any other."""
    names = [t.__name__ for t in type(weight).__mro__ if t.__module__.partition(".")[0] == "bitsandbytes"]
    return next((_BNB_BITS[name] for name in names if name in _BNB_BITS), None)


def _is_pending(module: nn.Module) -> bool:
    """Whether a layer of bitsandbytes has no codes yet: it is quantised when it is moved to its device."""
    weight: Any = module.weight
    if _bits(weight) == 4:
        return not getattr(weight, "bnb_quantized", True)
    return _bits(weight) == 8 and not weight.has_fp16_weights and bool(weight.is_floating_point())
