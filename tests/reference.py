"""The formula, written out: a copy of a base model in fp64 whose adapted layers compute

    y = x W^T + b + s * (x A^T) B^T

with plain autograd. Nothing here is imported from adaptc.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


class ReferenceLoRA(nn.Module):
    def __init__(self, base: nn.Module, A: torch.Tensor, B: torch.Tensor, scale: float) -> None:
        super().__init__()
        self.base = base
        self.A = nn.Parameter(A.detach().double().clone())
        self.B = nn.Parameter(B.detach().double().clone())
        self.scale = scale

    @property
    def weight(self) -> torch.Tensor:
        return self.base.weight

    @property
    def bias(self) -> torch.Tensor | None:
        return self.base.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.scale * ((x @ self.A.T) @ self.B.T)


def reference_model(
    base: nn.Module, factors: Mapping[str, list[tuple[torch.Tensor, torch.Tensor, float]]]
) -> nn.Module:
    """fp64 copy of ``base`` (untouched by adaptc) with the formula at every path of ``factors``."""
    model = copy.deepcopy(base).double().requires_grad_(False)
    for path, adapters in factors.items():
        parent_path, _, name = path.rpartition(".")
        parent = model.get_submodule(parent_path)
        layer = parent.get_submodule(name)
        for A, B, scale in adapters:
            layer = ReferenceLoRA(layer, A, B, scale)
        setattr(parent, name, layer)
    return model


def as_double(batch: Any) -> Any:
    """Floating tensors of a batch in fp64."""
    if isinstance(batch, torch.Tensor):
        return batch.double() if batch.is_floating_point() else batch
    if isinstance(batch, Mapping):
        return {k: as_double(v) for k, v in batch.items()}
    if isinstance(batch, list | tuple):
        return type(batch)(as_double(v) for v in batch)
    return batch


def factors_of(model: nn.Module, name: str = "default") -> dict[str, list[Any]]:
    """The values of an adaptc adapter, read from the model's parameters by their documented names."""
    found: dict[str, list[Any]] = {}
    for site in model.adaptc.sites:
        adapter = site.adapters.get(name)
        if adapter is not None:
            found[site.path] = [(adapter.lora_A, adapter.lora_B, adapter.method.scaling)]
    return found


def loss_of(output: Any) -> torch.Tensor:
    """The loss of a transformers output, or a weighted sum of a tensor output."""
    loss = getattr(output, "loss", None)
    if loss is not None:
        return loss
    tensor = output if isinstance(output, torch.Tensor) else output[0]
    weight = torch.linspace(-1, 1, tensor.numel(), dtype=torch.float64).reshape(tensor.shape)
    return (tensor * weight.to(tensor.dtype)).sum()


def reference_loss(reference, batch) -> torch.Tensor:
    """The loss of a :func:`reference_model` on the batch in fp64."""
    double = as_double(batch)
    # torch's fused encoder layer reads weights past the formula, and autocast would round it.
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.autocast("cpu", enabled=False):
            return loss_of(reference(**double) if isinstance(batch, Mapping) else reference(double))
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)


def reference_step(model, base, batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """:func:`step` of the formula with the adapter values of ``model``."""
    factors = factors_of(model)
    reference = reference_model(base, factors).train(model.training)
    loss = reference_loss(reference, batch)
    loss.backward()
    return loss.detach(), {
        f"{path}.adapters.default.lora_{factor}": getattr(reference.get_submodule(path), factor).grad
        for path in factors
        for factor in "AB"
    }


def check_against_reference(model, base, batch, *, name="default", rtol=1e-5, atol=1e-6):
    """Loss and every adapter gradient of ``model`` (adapted by adaptc) against the formula in fp64."""
    model.zero_grad()
    reference = reference_model(base, factors_of(model, name)).train(model.training)
    loss = loss_of(model(**batch) if isinstance(batch, Mapping) else model(batch))
    expected = reference_loss(reference, batch)
    torch.testing.assert_close(loss.double(), expected.double(), rtol=rtol, atol=atol)
    if not model.training:
        return
    loss.backward()
    expected.backward()
    for site in model.adaptc.sites:
        adapter, ref = site.adapters[name], reference.get_submodule(site.path)
        for got, want in ((adapter.lora_A.grad, ref.A.grad), (adapter.lora_B.grad, ref.B.grad)):
            assert got is not None and want.abs().max() > 0, site.path
            torch.testing.assert_close(got.double(), want, rtol=rtol, atol=max(atol, rtol * float(want.abs().max())))
    assert all(p.grad is None for n, p in model.named_parameters() if ".adapters." not in n)


def step(model, batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of one forward and backward, the gradients by parameter name, both in fp64."""
    model.zero_grad()
    loss = loss_of(model(**batch))
    loss.backward()
    found = {n: p.grad.double() for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    return loss.detach().double(), found


def relative_errors(got: Mapping[str, torch.Tensor], want: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Name -> |got - want| / |want|; both have the same names, and no ``want`` is zero."""
    assert got.keys() == want.keys() and all(w.any() for w in want.values())
    return {name: float((got[name] - w).norm() / w.norm()) for name, w in want.items()}


def check_steps_agree(got, want, *, loss: float = 2e-6, gradient: float = 2e-5) -> None:
    """Two results of :func:`step` agree to the relative errors; the defaults are fp32's through two layers."""
    assert abs(got[0] / want[0] - 1) < loss
    errors = relative_errors(got[1], want[1])
    worst = max(errors, key=errors.get)
    assert errors[worst] < gradient, worst


def check_all_rewritten(model, sites: int, calls: int | None = None) -> None:
    """Every graph with sites holds all ``sites``, whose ``calls`` anchors were all rewritten: nothing is left out."""
    handle = model.adaptc
    assert (len(handle.sites), handle.eager_sites(), handle.idle_sites()) == (sites, [], [])
    assert handle.metrics()["recompile_limits_hit"] == 0
    adapted = [graph for graph in handle.graphs if graph.sites]
    assert adapted
    for graph in adapted:
        insert = graph.reports[0]
        assert (insert.name, len(insert.result.applied), insert.result.refused) == ("insert", calls or sites, [])
        assert {r.site for r in insert.result.applied} == set(graph.sites) == {s.path for s in handle.sites}
