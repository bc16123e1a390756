"""Plain things that a user does to a compiled model: right, or refused before anything changes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import adaptc
from adaptc.codegen import toolchain
from adaptc.errors import AdaptcWarning, NewSignatureWarning, PipelineError, SiteError, UnsupportedError

pytestmark = pytest.mark.filterwarnings("ignore::adaptc.errors.NewSignatureWarning")


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.blk = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
        self.o = nn.Linear(4, 3)

    def forward(self, x):
        return self.o(self.blk(x))


def lora(*targets, r=2):
    return adaptc.LoRA(r=r, init="random", targets=list(targets))


def full(*targets):
    return {"match": {"targets": list(targets)}, "train": "full"}


def compiled(*rules, base=None, backend="aot_eager", **options):
    return adaptc.compile(base or Outer(), list(rules), backend=backend, **options)


X = torch.linspace(-1, 1, 18).reshape(3, 6)


def eagerly(model):
    return model._call_impl(X)


def test_a_compiled_part_is_refused_and_kept():
    model = Outer()
    adaptc.compile(model.blk, lora("0"), backend="aot_eager")
    before = model.blk[0].adapters["default"]
    with pytest.raises(UnsupportedError, match="blk was compiled by adaptc on its own"):
        adaptc.compile(model, lora("0", "o", r=3), backend="aot_eager")
    assert model.blk[0].adapters["default"] is before and before.lora_A.requires_grad
    assert not hasattr(model, "adaptc") and model.o.weight.requires_grad


def test_a_method_added_where_a_copy_was_trained_acts():
    model = compiled(full("o"))
    model(X)
    with model.adaptc.disable_adapter():
        base = model(X)
    model.adaptc.add("l", lora("o"))
    model.adaptc.switch("l")
    torch.testing.assert_close(model(X), eagerly(model))
    assert (model(X) - base).abs().max() > 1e-3


@pytest.mark.parametrize("order", [("default", "l"), ("l", "default")])
def test_an_adapter_inside_a_trained_copy_is_refused(order):
    model = compiled(full("blk"))
    model.adaptc.add("l", lora("blk.0"))
    with pytest.raises(SiteError, match=r"blk.0 is inside blk, of which 'default' trains a copy: 'l' would be lost"):
        model.adaptc.switch(order)
    assert model.adaptc.live == ("default",)


@pytest.mark.parametrize("what", ["warmup", "preview"])
def test_compiling_ahead_between_forward_and_backward(what):
    model = compiled(lora("o"), example_inputs=(X,))
    loss = model(X).sum()
    getattr(model.adaptc, what)()
    loss.backward()
    assert all(p.grad is not None for p in model.adaptc.parameters())


def test_buffers_that_a_warmup_changes_are_put_back():
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4))
    model = adaptc.compile(model, lora("0"), backend="aot_eager", example_inputs=(X,))
    before = copy.deepcopy(model.state_dict())
    model.adaptc.warmup()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_detach_after_the_model_got_a_new_head():
    model = compiled(lora("o"))
    model.head = nn.Linear(2, 2)
    assert not hasattr(model.adaptc.detach(), "adaptc")
    assert all(p.requires_grad for p in model.parameters())


def test_a_replaced_module_is_no_site_any_more():
    model = compiled(lora("0", "o"), base=Outer())
    model(X)
    model.o = nn.Linear(4, 3)
    with pytest.warns(AdaptcWarning, match="o was replaced or removed"):
        assert [site.path for site in model.adaptc.sites] == ["blk.0"]
    model(X).sum().backward()
    torch.testing.assert_close(model(X), eagerly(model))
    model.adaptc.switch(None)
    model.adaptc.detach()
    assert not hasattr(model, "adaptc")


def test_a_removed_layer_leaves_the_rest():
    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    model = adaptc.compile(Stack(), adaptc.LoRA(r=2, init="random", targets="all-linear"), backend="aot_eager")
    model(X)
    del model.layers[1]
    with pytest.warns(AdaptcWarning, match="layers.2 was replaced or removed"):
        torch.testing.assert_close(model(X), eagerly(model))
    assert len(model.adaptc.sites) == 2


def test_a_late_failure_leaves_the_model_as_it_was():
    class Strange(Outer):
        config = type("Config", (), {"is_encoder_decoder": True})()

        def get_encoder(self):
            raise RuntimeError("no encoder yet")

    model = Strange()
    attributes = set(model.__dict__)
    with pytest.raises(RuntimeError, match="no encoder yet"):
        adaptc.compile(model, lora("o"), backend="aot_eager")
    assert set(model.__dict__) == attributes and not hasattr(model.o, "adapters")
    assert all(p.requires_grad for p in model.parameters()) and len(model.o._forward_hooks) == 0


@pytest.mark.parametrize(
    "options, error",
    [
        ({"backend": "induktor"}, "no compile backend named 'induktor'"),
        ({"mode": "turbo"}, "no compile mode named 'turbo'"),
    ],
)
def test_what_the_first_call_would_refuse_is_refused_at_once(options, error):
    model = Outer()
    with pytest.raises(UnsupportedError, match=error):
        adaptc.compile(model, lora("o"), **options)
    assert not hasattr(model, "adaptc") and model.o.weight.requires_grad


def test_passes_that_cannot_run_are_refused_at_once():
    model = Outer()
    with pytest.raises(PipelineError, match="canonicalise needs inserted"):
        adaptc.compile(model, adaptc.Plan([lora("o")], passes={"order": ["canonicalise"]}), backend="aot_eager")
    assert not hasattr(model, "adaptc") and not hasattr(model.o, "adapters")


def test_the_users_own_compile_comes_back():
    model = Outer()
    model.compile(backend="eager")
    own = model._compiled_call_impl
    adaptc.compile(model, lora("o"), backend="aot_eager")
    model(X)
    clone = copy.deepcopy(model)
    model.adaptc.detach()
    assert model._compiled_call_impl is own
    clone.adaptc.detach()
    assert clone.__dict__.get("_compiled_call_impl") is None


def test_an_adapter_removed_while_adapters_are_off():
    model = compiled(lora("o"))
    with model.adaptc.disable_adapter():
        model.adaptc.remove("default")
    assert model.adaptc.live == ()


def test_adapters_made_in_inference_mode_can_be_trained():
    model = Outer()
    with torch.inference_mode():
        adaptc.compile(model, lora("o"), backend="aot_eager")
    model(X).sum().backward()
    assert all(p.grad is not None for p in model.adaptc.parameters())


def test_compiling_again_with_other_options_is_refused():
    model = compiled(lora("o"))
    with pytest.raises(UnsupportedError, match="the model is compiled already, with another backend"):
        adaptc.compile(model, lora("o"), backend="eager")
    assert adaptc.compile(model, lora("o")) is model


def test_a_new_signature_is_still_announced():
    model = compiled(lora("o"))
    model(X)
    with pytest.warns(NewSignatureWarning):
        model.adaptc.switch(None)


class Block(nn.Module):
    def __init__(self, breaks):
        super().__init__()
        self.a, self.breaks = nn.Linear(6, 6), breaks

    def forward(self, x):
        y = torch.tanh(self.a(x))
        if self.breaks:
            torch._dynamo.graph_break()
        return torch.relu_(y * 1.0)


class Checkpointed(nn.Module):
    def __init__(self, breaks):
        super().__init__()
        self.block = Block(breaks)

    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(self.block, x, use_reentrant=False)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("breaks", [False, True], ids=["captured", "broken"])
@pytest.mark.parametrize("way", ["there and back", "away"])
def test_switching_before_a_checkpoint_recomputes(backend, breaks, way):
    model = adaptc.compile(Checkpointed(breaks), lora("a"), backend=backend)
    model.adaptc.add("o", lora("a"))
    x = X.clone().requires_grad_()

    def gradients(switches):
        model.zero_grad()
        y = model(x)
        for name in switches:
            model.adaptc.switch(name)
        y.square().sum().backward()
        return [p.grad.clone() for p in model.adaptc.parameters("default")]

    expected = gradients([])
    if way == "away" and breaks:
        with pytest.raises(torch.utils.checkpoint.CheckpointError, match="different metadata"):
            gradients(["o"])
        return
    found = gradients(["o", "default"] if way == "there and back" else ["o"])
    assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))


def test_the_users_own_capture_follows_new_sites():
    model = compiled(lora("blk.0"))
    captured = torch.compile(model, backend="eager", fullgraph=True)
    inside = torch.compile(lambda x: 2 * model(x), backend="eager", fullgraph=True)
    captured(X), inside(X)
    model.adaptc.add("b", lora("o"))
    model.adaptc.switch(("default", "b"))
    torch.testing.assert_close(captured(X), eagerly(model))
    torch.testing.assert_close(inside(X), 2 * eagerly(model))


def test_a_module_that_returns_no_tensor_is_named():
    class Pair(nn.Linear):
        def forward(self, x):
            return super().forward(x), x

    model = nn.Sequential(Pair(6, 4))
    adaptc.compile(model, lora("0"), backend="eager")
    with pytest.raises(Exception, match="a Pair returned a tuple"):
        model(X)


def test_without_a_compiler_the_graphs_run_op_by_op(monkeypatch):
    monkeypatch.setattr(toolchain, "inductor_missing", lambda: "it needs a C++ compiler, and found none")
    model = Outer()
    with pytest.warns(AdaptcWarning, match="Inductor cannot run here: it needs a C\\+\\+ compiler.*aot_eager"):
        adaptc.compile(model, lora("o"))
    torch.testing.assert_close(model(X), eagerly(model))
    report = model.adaptc.explain().to_dict()
    assert "Inductor cannot run here" in report["backend aot_eager"][1]
    assert "lower" in model.adaptc.graphs[0].stages
    assert adaptc.compile(model, lora("o")) is model
