"""Batches whose rows use different adapters against each row by itself with its adapter live, in fp64."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

import adaptc
from adaptc.errors import NewSignatureWarning
from tests.methods.in_fp64 import randomise
from tests.models import hosts, towers
from tests.sites.moe import qwen3_moe

#: Host -> (the model, inputs of so many rows, the output that counts).
HOSTS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], dict[str, Any]]]] = {
    "llama": (lambda: hosts.short("llama"), lambda rows: _tokens(rows)),
    "qwen3_moe": (lambda: _moe("batched_mm"), lambda rows: _tokens(rows)),
    "vit": (lambda: towers.build("vit"), lambda rows: {"pixel_values": towers.batch("vit", rows=rows)["pixel_values"]}),
}


def _moe(how: str) -> nn.Module:
    model = qwen3_moe()
    model.set_experts_implementation(how)  # torch's grouped product knows no fp64
    return model


def _tokens(rows: int) -> dict[str, Any]:
    with hosts.seeded(5):
        return {"input_ids": torch.randint(3, hosts.VOCAB, (rows, 7))}


def doubled(inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {n: t.double() if torch.is_tensor(t) and t.is_floating_point() else t for n, t in inputs.items()}


def adapted(base: nn.Module, plans: Mapping[str, Any], **options: Any) -> nn.Module:
    """A copy of ``base`` with an adapter for each of ``plans``, none of whose parameters is at its initial value."""
    names = list(plans)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = adaptc.compile(copy.deepcopy(base), plans[names[0]], name=names[0], **options)
        for name in names[1:]:
            model.adaptc.add(name, plans[name])
    randomise(model)
    return model


def logits(output: Any) -> torch.Tensor:
    return output.logits if hasattr(output, "logits") else output


def row(inputs: Mapping[str, Any], i: int) -> dict[str, Any]:
    return {name: value[i : i + 1] for name, value in inputs.items()}


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def alone(model: nn.Module, inputs: Mapping[str, Any], name: str | None, weight: torch.Tensor) -> Any:
    """(logits, gradients) of one row with one adapter live."""
    model.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NewSignatureWarning)
        model.adaptc.switch(name)
    found = logits(model(**inputs))
    if name is not None:
        (found * weight).sum().backward()
    return found.detach(), gradients(model)


def check(model: nn.Module, inputs: Mapping[str, Any], names: Sequence[str | None], *, tolerance: float = 1e-9) -> None:
    """Every row is what it is alone with its adapter, and so are the gradients; rows of the base are its own to the
    bit; adapters without a row have no gradient. Nothing else changes."""
    with torch.no_grad(), model.adaptc.batch([None] * len(names)):
        base = logits(model(**inputs))
    weight = torch.linspace(-1, 1, base[0].numel(), dtype=base.dtype).reshape(base[:1].shape)
    want = [alone(model, row(inputs, i), name, weight) for i, name in enumerate(names)]
    live, flags = model.adaptc.live, [p.requires_grad for p in model.parameters()]
    model.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NewSignatureWarning)
        with model.adaptc.batch(names):
            found = logits(model(**inputs))
            with torch.no_grad():
                again = logits(model(**inputs))
    if any(name is not None for name in names):
        (found * weight).sum().backward()
    got = gradients(model)
    for i, name in enumerate(names):
        torch.testing.assert_close(found[i : i + 1].detach(), want[i][0], rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(again[i : i + 1], want[i][0], rtol=tolerance, atol=tolerance)
        assert torch.equal(again[i], base[i]) == (name is None), f"row {i}: {name}"
    total: dict[str, torch.Tensor] = {}
    for _, one in want:
        for name, gradient in one.items():
            total[name] = total.get(name, 0) + gradient
    assert got.keys() == total.keys()
    for name, gradient in total.items():
        torch.testing.assert_close(got[name], gradient, rtol=tolerance, atol=tolerance, msg=name)
    assert (model.adaptc.live, [p.requires_grad for p in model.parameters()]) == (live, flags)
