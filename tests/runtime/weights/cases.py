"""Tiny real models whose base holds every kind of number, adapters with values, and comparison by bits."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

import adaptc
from tests.files.peft_cases import randomise
from tests.models import hosts, towers
from tests.sites.moe import qwen3_moe

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
IDS = {"input_ids": torch.tensor([[1, 5, 9, 4, 7, 3], [8, 6, 2, 5, 1, 7]])}
#: Quiet and signalling NaNs with payloads, infinities, -0.0, the smallest and the largest denormal.
ODD = {
    torch.float32: [0x7FC12345, 0x7F812345, -0x3EDCBB, 0x7F800000, -0x800000, -0x80000000, 1, 0x007FFFFF],
    torch.float16: [0x7E55, 0x7D55, -0x1AB, 0x7C00, -0x400, -0x8000, 1, 0x03FF],
    torch.bfloat16: [0x7FC5, 0x7F85, -0x3B, 0x7F80, -0x80, -0x8000, 1, 0x007F],
}


def llama(**changes: Any) -> nn.Module:
    with hosts.seeded(0):
        return hosts.llama(hidden_size=16, intermediate_size=24, **changes).eval()


def moe() -> nn.Module:
    model = qwen3_moe(hidden_size=16, intermediate_size=24, moe_intermediate_size=12, head_dim=4).eval()
    model.set_experts_implementation("eager")  # grouped products do not exist in fp64
    return model


def vit() -> nn.Module:
    return towers.build("vit")


def images(rows: int = 3) -> dict[str, torch.Tensor]:
    return {"pixel_values": towers.batch("vit", rows=rows)["pixel_values"]}


def tokens(rows: int) -> dict[str, torch.Tensor]:
    with hosts.seeded(5):
        return {"input_ids": torch.randint(3, 33, (rows, 6))}


def compiled(model: nn.Module, plan: Any, name: str = "a", **options: Any) -> nn.Module:
    """With values that are neither zero nor what the base has."""
    model = adaptc.compile(model, plan, name=name, backend="eager", **options)
    randomise(model)
    return model


def odd_numbers(model: nn.Module) -> None:
    """Put every kind of number into the first entries of the matrices of a model."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2 and parameter.dtype in ODD:
                values = torch.tensor(ODD[parameter.dtype], dtype=torch.int64)
                whole = parameter.view(INTEGERS[parameter.element_size()]).view(-1)
                whole[: len(values)] = values.to(whole.dtype)


def odd_tensor(dtype: torch.dtype) -> torch.Tensor:
    """Every kind of number."""
    values = torch.tensor(ODD[dtype], dtype=torch.int64)
    return values.to(INTEGERS[dtype.itemsize]).view(dtype)


def odd_rows(model: nn.Module, head: str) -> None:
    """Put every kind of number into rows that only their own column of the output, or no output at all, depends on:
    the last one of the layer ``head`` and, of a language model, of the table of tokens."""
    tables = [m for n, m in model.named_modules() if n.split(".")[-1] == head or isinstance(m, nn.Embedding)]
    with torch.no_grad():
        for module in tables:
            weight = module.weight
            values = odd_tensor(weight.dtype)
            weight.view(INTEGERS[weight.element_size()])[-1, : len(values)] = values.view(
                INTEGERS[weight.element_size()]
            )


def is_ours(name: str) -> bool:
    return ".adapters." in f".{name}"


def base_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Path -> copy of every parameter and buffer of the base, as they are in memory."""
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return {name: copy.deepcopy(tensor.detach()) for name, tensor in named if not is_ours(name)}


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    kind = INTEGERS[a.element_size()]
    return torch.equal(a.detach().contiguous().view(kind), b.detach().contiguous().view(kind))


def differing(model: nn.Module, base: dict[str, torch.Tensor]) -> list[str]:
    """The paths of the base's tensors that have other bits than in ``base``."""
    now = base_of(model)
    assert now.keys() == base.keys()
    return [name for name, tensor in base.items() if not same_bits(now[name], tensor)]


def logits(model: nn.Module, batch: dict[str, torch.Tensor] = IDS) -> torch.Tensor:
    """What the model computes op by op: nothing is captured, which would take most of a test's time."""
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        return model(**batch).logits
