"""Real classes whose linear layers are quantised by bitsandbytes or torchao, and the same models with the weights that
the codes stand for, written out.

    NF4      W[n, k] = table[code] * absmax[block of 64]     (Dettmers et al. 2023, appendix E)
    int8     W[n, k] = code * absmax[n] / 127                (Dettmers et al. 2022, section 2.1)
    torchao  W[n, k] = code * scale[n]
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from tests.models import hosts

#: Information-theoretically optimal levels for normal weights; the index is the code.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
BLOCK = 64
#: Kind of base -> how ``explain()`` names it.
KINDS = {
    "nf4": "bitsandbytes NF4",
    "nf4-nested": "bitsandbytes NF4, scales quantised too",
    "int8": "bitsandbytes int8",
    "torchao": "torchao Int8Tensor",
}
#: Heads stay dense, as transformers leaves them.
HEADS = ("lm_head", "classifier", "score")


@pytest.fixture(autouse=True)
def eagerly() -> Iterator[None]:
    """For files whose subject are not graphs: calls run without capture."""
    with torch.compiler.set_stance("force_eager"):
        yield


def plain(host: str = "llama", **options: Any) -> Any:
    """The tiny model ``host``, its widths multiples of a block: where blocks go over the end of a row, bitsandbytes'
    AVX-512 code reads wrong scales."""
    return hosts.build(host, intermediate_size=2 * BLOCK, **options)


def build(kind: str, host: str = "llama", **options: Any) -> nn.Module:
    """:func:`plain` with quantised linear layers."""
    return quantise(plain(host, **options), kind)


def quantise(model: nn.Module, kind: str) -> nn.Module:
    """Quantise every ``nn.Linear`` of ``model`` but its head, in place."""
    linear = {path: m for path, m in model.named_modules() if type(m) is nn.Linear and path not in HEADS}
    if kind == "torchao":
        quantize_(model, Int8WeightOnlyConfig(), filter_fn=lambda module, path: path in linear)
        return model
    for path, module in linear.items():
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, _bnb_layer(module, kind))
    model.is_loaded_in_8bit, model.is_loaded_in_4bit = kind == "int8", kind != "int8"
    return model


def _bnb_layer(module: nn.Linear, kind: str) -> nn.Module:
    sizes, bias = (module.in_features, module.out_features), module.bias is not None
    if kind == "int8":
        new: nn.Module = bnb.nn.Linear8bitLt(*sizes, bias=bias, has_fp16_weights=False)
        new.weight = bnb.nn.Int8Params(module.weight.detach().clone(), requires_grad=False, has_fp16_weights=False)
    else:
        nested = kind == "nf4-nested"
        new = bnb.nn.Linear4bit(*sizes, bias=bias, quant_type="nf4", compress_statistics=nested)
        options = {"quant_type": "nf4", "compress_statistics": nested, "requires_grad": False, "module": new}
        new.weight = bnb.nn.Params4bit(module.weight.detach().clone(), **options)
    if bias:
        new.bias = nn.Parameter(module.bias.detach().clone(), requires_grad=False)
    return new.to("cpu").train(module.training)


def quantised(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of the quantised layers."""
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and type(module.weight) is not nn.Parameter:
            yield path, module


def dense(model: nn.Module) -> nn.Module:
    """A copy of ``model`` (without adapters) whose layers are ``nn.Linear`` with the weights that the codes mean."""
    twin = copy.deepcopy(model)
    for path, module in list(quantised(model)):
        weight = dequantised(module)
        linear = nn.Linear(*reversed(weight.shape), bias=module.bias is not None, dtype=torch.float64)
        with torch.no_grad():
            linear.weight.copy_(weight)
            if module.bias is not None:
                linear.bias.copy_(module.bias)
        parent, _, name = path.rpartition(".")
        setattr(twin.get_submodule(parent), name, linear)
    return twin


def dequantised(module: nn.Module) -> torch.Tensor:
    """The weight (N, K) that the codes of ``module`` mean, in fp64."""
    weight, shape = module.weight, (module.out_features, module.in_features)
    if isinstance(module, bnb.nn.Linear4bit):
        packed = weight.data.flatten()
        codes = torch.stack([packed >> 4, packed & 15], 1).flatten().long()
        blocks = torch.tensor(NF4, dtype=torch.float64)[codes].view(-1, BLOCK)
        return (blocks * scales(weight.quant_state)[:, None]).view(shape)
    if isinstance(module, bnb.nn.Linear8bitLt):
        absmax = weight.SCB if weight.SCB is not None else module.state.SCB
        return weight.data.double() * absmax.double()[:, None] / 127
    return weight.qdata.double() * weight.scale.double().view(-1, 1)


def scales(state: Any) -> torch.Tensor:
    """The largest absolute value of every block, in fp64: as it is, or itself in 8-bit codes of blocks of 256."""
    if not state.nested:
        return state.absmax.double()
    values = state.state2.code.double()[state.absmax.long()]
    per_block = state.state2.absmax.double().repeat_interleave(state.state2.blocksize)[: values.numel()]
    return values * per_block + float(state.offset)


def logits(model: nn.Module) -> torch.Tensor:
    """Logits of a Llama in eval mode; the mode is left as it was."""
    training = model.training
    with torch.no_grad():
        found = model.eval()(**hosts.batch("llama")).logits
    model.train(training)
    return found
