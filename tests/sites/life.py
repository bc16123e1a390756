"""What every kind of site must bear: switching, state dicts, copies, pickles, detaching; one graph each."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import adaptc
from adaptc.errors import NewSignatureWarning, UnsupportedError
from tests.reference import loss_of


def run(model: nn.Module, batch: Any) -> torch.Tensor:
    return loss_of(model(**batch) if isinstance(batch, dict) else model(batch))


def gradients(model: nn.Module, batch: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = run(model, batch)
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def check_life(
    build: Callable[[], nn.Module], plan: Any, batch: Any, *, sites: int, graphs: int = 1, unmergeable: str = ""
) -> None:
    """``build`` gives equal models each time; ``plan`` must not start as the identity.

    ``unmergeable``: what the refusal to fold the adapters into the weights says; without it they are folded.
    """
    base = build().train()
    plain = run(base, batch).detach()
    keys = list(base.state_dict())
    flags = {n: p.requires_grad for n, p in base.named_parameters()}
    model = adaptc.compile(base, plan, backend="aot_eager")
    loss, grads = gradients(model, batch)
    assert len(model.adaptc.sites) == sites and model.adaptc.idle_sites() == []
    assert (model.adaptc.metrics()["graphs"], model.adaptc.metrics()["eager_sites"]) == (graphs, 0)
    names = [n for n, _ in model.adaptc.named_parameters()]
    assert sorted(grads) == sorted(names), "adapter parameters have gradients, and nothing else"
    assert all(g.any() for g in grads.values())
    assert not torch.equal(loss, plain)
    assert [k for k in model.state_dict() if ".adapters." not in f".{k}"] == keys

    # Another adapter of the same signature: no recompilation; then none, which is the base model.
    model.adaptc.add("other", plan)
    model.adaptc.switch("other")
    other, _ = gradients(model, batch)
    assert not torch.equal(other, loss)
    assert model.adaptc.metrics()["recompiles"] == 0
    model.adaptc.switch("default")
    assert torch.equal(gradients(model, batch)[0], loss)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NewSignatureWarning)
        model.adaptc.switch(None)
        torch.testing.assert_close(run(model, batch).detach(), plain, rtol=1e-6, atol=1e-6)
        model.adaptc.switch(["default", "other"])
        both, _ = gradients(model, batch)
        assert not torch.equal(both, loss) and not torch.equal(both, other)
        model.adaptc.switch("default")
    model.adaptc.remove("other")
    assert torch.equal(gradients(model, batch)[0], loss)

    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        got, got_grads = gradients(twin, batch)
        assert torch.equal(got, loss)
        assert all(torch.equal(got_grads[n], g) for n, g in grads.items())
        assert twin.adaptc.idle_sites() == [] and twin.adaptc.metrics()["graphs"] == graphs
        next(twin.adaptc.parameters()).data.mul_(-2.0).add_(1.0)
        assert not torch.equal(run(twin, batch), loss)
        assert torch.equal(run(model, batch), loss), "a copy has parameters of its own"

    stored = io.BytesIO()
    torch.save(model.state_dict(), stored)
    stored.seek(0)
    fresh = adaptc.compile(build().train(), plan, backend="aot_eager")
    assert not torch.equal(run(fresh, batch), loss)
    fresh.load_state_dict(torch.load(stored))
    assert torch.equal(run(fresh, batch), loss)

    if unmergeable:
        with pytest.raises(UnsupportedError, match=unmergeable):
            fresh.adaptc.merge_and_unload()
        assert torch.equal(run(fresh, batch), loss), "nothing has changed"
    else:
        merged = fresh.adaptc.merge_and_unload()
        assert list(merged.state_dict()) == keys
        torch.testing.assert_close(run(merged, batch).detach(), loss, rtol=1e-5, atol=1e-5)

    attributes = set(model.__dict__)
    back = model.adaptc.detach()
    assert back is model and "adaptc" not in model.__dict__ and attributes
    assert torch.equal(run(model, batch).detach(), plain)
    assert list(model.state_dict()) == keys
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert not any("forward" in m.__dict__ or m._forward_hooks or m._forward_pre_hooks for m in model.modules())
