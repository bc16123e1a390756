"""Quantised bases: which modules store their weight in few bits, how, and what that rules out.

An adapter that reads a module's input and output works on any base. What reads or writes the weight's own values does
not: on a quantised base they exist only as codes and scales, and writing them rounds to the codes' grid, by as much as
an adapter moves them. Modules are recognised by the names of classes: bitsandbytes and torchao are never imported.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

#: Class of bitsandbytes' parameters -> bits of a code.
_BNB_BITS = {"Params4bit": 4, "Int8Params": 8}
#: What libraries keep instead of ``weight``: compressed-tensors (until the first forward), GPTQ and AWQ, HQQ.
_INSTEAD = ("weight_packed", "qweight", "W_q")


class Refusal(NamedTuple):
    """Why a method cannot act on a base, or be merged into it; what to do instead; and what was found, where the reason
    does not say it."""

    reason: str
    do: str | None = None
    found: str | None = None


def describe(module: nn.Module) -> str | None:
    """How ``module`` stores its weight ("bitsandbytes NF4"), or None where it is not quantised."""
    weight = module._parameters.get("weight")
    if weight is None:
        return _describe_packed(module)
    if _bits(weight) == 4:
        kind = str(getattr(weight, "quant_type", "4-bit")).upper()
        nested = getattr(getattr(weight, "quant_state", None), "nested", False)
        return f"bitsandbytes {kind}{', scales quantised too' if nested else ''}"
    if _bits(weight) == 8:
        threshold = float(getattr(getattr(module, "state", None), "threshold", 0.0))
        return f"bitsandbytes int8{f', inputs above {threshold:g} apart' if threshold > 0 else ''}"
    if _library(weight) == "torchao":
        return f"torchao {type(weight).__name__}"
    if _library(module) == "optimum" and (qtype := getattr(module, "weight_qtype", None)) is not None:
        frozen = _library(weight) == "optimum"
        return f"quanto {getattr(qtype, 'name', qtype)}{'' if frozen else ', not frozen'}"
    return None


def _describe_packed(module: nn.Module) -> str | None:
    """As :func:`describe`, of a module that keeps something else in the place of a weight."""
    if (name := packed_as(module)) is None:
        return None
    scheme = getattr(module, "quantization_scheme", None)
    if scheme is not None:
        form = getattr(scheme, "format", None)
        return f"compressed-tensors {getattr(form, 'value', form) or ''}".rstrip() + f", kept as {name}"
    library = _library(module)
    return f"{'' if library == 'torch' else f'{library} '}{type(module).__name__}, kept as {name}"


def packed_as(module: nn.Module) -> str | None:
    """The name by which ``module`` keeps the codes of a weight that it does not have; None for any other module."""
    if module._parameters.get("weight") is not None:
        return None
    kept = {**module._parameters, **module._buffers}
    return next((name for name in _INSTEAD if kept.get(name) is not None), None)


def _library(value: object) -> str:
    return type(value).__module__.partition(".")[0]


def refusal(module: nn.Module, needs: str | None, inside: bool) -> Refusal | None:
    """Why a method cannot act on ``module`` because of how it is quantised, or None.

    Args:
        needs: what of the method needs the values of the weight, in words of a plan; None when nothing does.
        inside: whether it needs those of the modules inside as well (``train: full``).
    """
    for name, inner in module.named_modules() if inside else [("", module)]:
        if (how := describe(inner)) is None:
            continue
        if needs is not None:
            which = f"that of its {name}" if name else "this one"
            return Refusal(
                f"{needs} needs the values of the weight, and {which} is quantised ({how})",
                f"leave {needs} out, or load the base without quantisation",
            )
        if isinstance(inner, nn.Linear) and packed_as(inner) is not None:
            return Refusal(
                f"this {type(inner).__name__} has no weight before its first forward ({how})",
                "call the model once before, which unpacks what its library unpacks, or load the base dequantised"
                " (CompressedTensorsConfig(dequantize=True))",
            )
        if _is_pending(inner):
            return Refusal(
                f"this {type(inner).__name__} of bitsandbytes is not quantised yet",
                "move the model to its device first, which quantises it: model.to(device)",
            )
    return None


def may_lose_gradients(module: nn.Module) -> bool:
    """Whether the product with the module's weight may have no backward: see :func:`loses_gradients`."""
    weight = module._parameters.get("weight")
    return _bits(weight) == 4 or _is_opaque(weight)


def loses_gradients(module: nn.Module) -> Refusal | None:
    """Why no gradient flows through a layer of 4-bit codes, or None where it does.

    On a CPU with AVX512-BF16 bitsandbytes' first call in eval mode without gradients repacks the codes for good, and
    the product of that form has no backward. torchao's opaque codes, which only their kernel reads, have none either.
    """
    if _is_opaque(module._parameters.get("weight")):
        return Refusal(
            f"the product with torchao's opaque codes ({type(module.weight).__name__}) has no backward",
            'train on another base (Int4WeightOnlyConfig(int4_packing_format="plain"), int8 or dense), and load the'
            " adapter on this one for inference",
        )
    if bool(getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False)):
        return Refusal(
            "bitsandbytes has repacked its weight for inference on this CPU",
            "load the base again and set support_avx512bf16_for_cpu = False on its Linear4bit layers before"
            " calling it in eval mode; what was trained is in the adapter (model.adaptc.save)",
        )
    return None


def _is_opaque(weight: object) -> bool:
    return _library(weight) == "torchao" and "Opaque" in type(weight).__name__


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
    weight: Any = module._parameters.get("weight")
    if _bits(weight) == 4:
        return not getattr(weight, "bnb_quantized", True)
    return _bits(weight) == 8 and not weight.has_fp16_weights and bool(weight.is_floating_point())
