"""A method's formula, written out in a test, on a copy of a real model in fp64.

Nothing here is imported from adaptc: a formula acts through plain hooks of torch on a copy of the base.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from tests.reference import reference_loss, relative_errors, step

#: (tensors of a site by their names, module, input, output) -> the new output
After = Callable[[Mapping[str, torch.Tensor], nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]
#: (tensors of a site by their names, module, input) -> the new input
Before = Callable[[Mapping[str, torch.Tensor], nn.Module, torch.Tensor], torch.Tensor]

#: Two orders of summation in fp32; CLIP multiplies its logits by 14.
LOSS, GRADIENT = 4e-6, 1e-5


def formula_step(
    model: nn.Module, base: nn.Module, batch: Any, *, after: After | None = None, before: Before | None = None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss, and the gradient of every trained tensor by its name in ``model``, of the formula in fp64."""
    reference = copy.deepcopy(base).double().requires_grad_(False).train(model.training)
    leaves: dict[str, torch.Tensor] = {}
    for site in model.adaptc.sites:
        adapter = site.adapters["default"]
        own = {n: b.detach().double() for n, b in adapter.named_buffers() if n != "site_id"}
        for name, parameter in adapter.named_parameters():
            own[name] = leaves[f"{site.path}.adapters.default.{name}"] = (
                parameter.detach().double().clone().requires_grad_()
            )
        hook(reference.get_submodule(site.path), own, adapter, after, before)
    loss = reference_loss(reference, batch)
    loss.backward()
    return loss.detach(), {name: leaf.grad for name, leaf in leaves.items()}


def hook(
    module: nn.Module, tensors: Mapping[str, torch.Tensor], adapter: Any, after: After | None, before: Before | None
) -> None:
    """Let the formula act on ``module``: on its input where the method says so, else on its output."""
    if adapter.acts_before:
        module.register_forward_pre_hook(lambda m, args: (before(tensors, m, args[0]), *args[1:]))
    else:
        module.register_forward_hook(lambda m, args, y: after(tensors, m, args[0] if args else None, y))


def check_against_formula(model: nn.Module, base: nn.Module, batch: Any, **formula: Any) -> dict[str, torch.Tensor]:
    """Loss and every gradient of ``model`` against the formula in fp64; returns the gradients."""
    (loss, got), (want_loss, want) = step(model, batch), formula_step(model, base, batch, **formula)
    assert abs(loss / want_loss - 1) < LOSS
    errors = relative_errors(got, want)
    assert len(errors) == len(list(model.adaptc.parameters())) > 0
    assert max(errors.values()) < GRADIENT, max(errors, key=errors.get)
    return got


def errors_of(
    loss: torch.Tensor, gradients: Mapping[str, torch.Tensor], want: tuple[torch.Tensor, Mapping[str, torch.Tensor]]
) -> float:
    """One number for how far a 16-bit step is from the formula: the norm of its relative errors."""
    want_loss, want_gradients = want
    found = [float(loss / want_loss - 1), *relative_errors(gradients, want_gradients).values()]
    return float(torch.tensor(found, dtype=torch.float64).norm())


def randomise(model: nn.Module, *, seed: int = 3, size: float = 0.3) -> None:
    """Move every trained tensor away from its initial value, so that no term of a formula is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.adaptc.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))


