"""LoRA on nn.MultiheadAttention: W + s B A in fp64, PEFT, torch's fused encoder layer."""

from __future__ import annotations

import copy
import warnings

import peft
import pytest
import torch
from torch import nn

import adaptc
from adaptc.errors import AdaptcWarning, SiteError
from tests.models import hosts
from tests.reference import relative_errors
from tests.sites.life import check_life

WIDTH = 12
NAMES = ("lora_A", "lora_B", "out_proj.lora_A", "out_proj.lora_B")


def lora(**options):
    return adaptc.LoRA(**{"r": 3, "alpha": 6, "init": "random", "targets": ["re:.*attn"], **options})


class Attend(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.attn = nn.MultiheadAttention(WIDTH, 3, batch_first=True, **options)
        nn.init.normal_(self.attn.in_proj_bias)
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x):
        y, weights = self.attn(x, x + 1, x * 2, need_weights=False)
        assert weights is None
        return self.head(y)


def encoder(layers=2):
    layer = nn.TransformerEncoderLayer(WIDTH, 3, 20, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


def weighted(out):
    return (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)).sum()


def model_step(model, x):
    model.zero_grad()
    loss = weighted(model(x))
    loss.backward()
    return loss.detach().double(), {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}


def formula_step(model, base, x, dtype=torch.float64):
    """The host with W + s B A in the place of both weights of every attention; below fp64 under autocast."""
    host = copy.deepcopy(base).to(dtype).requires_grad_(False)
    leaves = {}
    for site in model.adaptc.sites:
        adapter, attention = site.adapters["default"], host.get_submodule(site.path)
        values = [adapter.get_parameter(n).detach().to(dtype, copy=True).requires_grad_() for n in NAMES]
        leaves.update({f"{site.path}.adapters.default.{n}": v for n, v in zip(NAMES, values, strict=True)})
        changed = attention.in_proj_weight + 2.0 * values[1] @ values[0]
        del attention.in_proj_weight
        attention.in_proj_weight = changed
        changed = attention.out_proj.weight + 2.0 * values[3] @ values[2]
        del attention.out_proj.weight
        attention.out_proj.weight = changed
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float64):
            loss = weighted(host(x.to(dtype)))
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    loss.backward()
    return loss.detach(), {n: v.grad.double() for n, v in leaves.items()}


@pytest.mark.parametrize("backend", [pytest.param("eager", marks=pytest.mark.slow), "aot_eager"])
@pytest.mark.parametrize("build", [Attend, encoder])
def test_computes_the_formula(build, backend):
    base = build()
    model = adaptc.compile(copy.deepcopy(base), lora(), backend=backend)
    for train in (True, False):
        model.train(train)
        for shape in ((2, 5, WIDTH), (3, 4, WIDTH)):
            x = torch.randn(shape)
            (loss, got), (want_loss, want) = model_step(model, x), formula_step(model, base, x)
            assert got.keys() == want.keys() and len(want) == 4 * len(model.adaptc.sites)
            torch.testing.assert_close(loss, want_loss, rtol=1e-5, atol=1e-5)
            for name, gradient in want.items():
                size = float(gradient.abs().max())
                assert size > 0
                torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-5 * size)
    adapted = [g for g in model.adaptc.graphs if g.sites]
    assert adapted and all(len(g.sites) == len(model.adaptc.sites) for g in adapted)
    assert all(len(g.reports[0].result.applied) == 2 * len(g.sites) for g in adapted)
    assert not any(g.break_reason for g in model.adaptc.graphs)
    assert (model.adaptc.metrics()["eager_sites"], model.adaptc.idle_sites()) == (0, [])


def test_computes_what_peft_computes():
    """At B = 0 of the output projection: PEFT 0.21 adds that update twice (its merge of the attention adds it, then
    merges the projection as well), which the second half shows."""
    base = Attend()
    model = adaptc.compile(copy.deepcopy(base), lora(), backend="aot_eager")
    inner = model.adaptc.sites[0].adapters["default"].out_proj
    once = inner.lora_B.detach().clone()
    inner.lora_B.data.zero_()
    twin = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(r=3, lora_alpha=6, target_modules=["attn"], init_lora_weights=False)
    )
    layer, adapter = twin.base_model.model.attn, model.adaptc.sites[0].adapters["default"]
    named = dict(zip(NAMES, (layer.lora_A, layer.lora_B, layer.base_layer.out_proj.lora_A,
                             layer.base_layer.out_proj.lora_B), strict=True))  # fmt: skip
    with torch.no_grad():
        for name, theirs in named.items():
            theirs["default"].weight.copy_(adapter.get_parameter(name))
    x = torch.randn(2, 7, WIDTH)
    loss, _ = model_step(model, x)
    want = weighted(twin(x))
    want.backward()
    torch.testing.assert_close(loss.float(), want.detach())
    for name, theirs in named.items():
        torch.testing.assert_close(adapter.get_parameter(name).grad, theirs["default"].weight.grad)
        assert adapter.get_parameter(name).grad.any() or name == "out_proj.lora_A"
    with torch.no_grad():
        named["out_proj.lora_B"]["default"].weight.copy_(once)
        inner.lora_B.copy_(2 * once)
        torch.testing.assert_close(weighted(model(x)), weighted(twin(x)))


@pytest.mark.parametrize("fused", [True, False])
def test_the_fused_encoder_layer_never_passes_the_adapters_by(fused):
    """In eval mode without gradients torch's layer reads the weights without calling the attention."""
    base = encoder().eval()
    model = adaptc.compile(copy.deepcopy(base), lora(), backend="aot_eager")
    x = torch.randn(2, 5, WIDTH)
    want = formula_step(model, base, x)[0]
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(fused)
    try:
        with torch.no_grad():
            torch.testing.assert_close(weighted(model(x)).double(), want, rtol=1e-5, atol=1e-5)
            assert abs(float(weighted(base(x)).double() - want)) > 1e-2
        with torch.inference_mode():
            torch.testing.assert_close(weighted(model(x)).double(), want, rtol=1e-5, atol=1e-5)
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
    assert model.adaptc.idle_sites() == []


def test_lives_as_other_sites_do():
    def build():
        with hosts.seeded(3):
            return Attend()

    check_life(build, lora(), torch.randn(2, 5, WIDTH), sites=1)


def test_autocast_is_as_exact_as_the_formula_on_the_host():
    ours, plain = [], []
    for seed in range(6):
        torch.manual_seed(seed)
        base = Attend()
        model = adaptc.compile(copy.deepcopy(base), lora(), backend="aot_eager")
        x = torch.randn(2, 7, WIDTH)
        _, want = formula_step(model, base, x)
        with torch.autocast("cpu", torch.bfloat16):
            _, got = model_step(model, x)
        _, yardstick = formula_step(model, base, x, torch.float32)
        assert len(model.adaptc.graphs) == 1
        ours += relative_errors(got, want).values()
        plain += relative_errors(yardstick, want).values()
    assert 1e-4 < sum(ours) <= 1.1 * sum(plain)


def test_refuses_what_it_would_get_wrong():
    def refused(module, **options):
        with pytest.raises(SiteError) as error:
            adaptc.compile(nn.ModuleDict({"attn": module}), lora(targets=["attn"], **options), backend="eager")
        return str(error.value)

    class Own(nn.MultiheadAttention):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    assert "dropout has no input to act on" in refused(nn.MultiheadAttention(4, 2), dropout=0.1)
    assert "three weights instead of one" in refused(nn.MultiheadAttention(4, 2, kdim=3))
    assert "Own has a forward of its own" in refused(Own(4, 2))
    assert "dora is for linear layers" in refused(nn.MultiheadAttention(4, 2), dora=True)


def test_another_adapter_cannot_act_inside_what_one_replaces():
    model = adaptc.compile(Attend(), lora(), backend="eager")
    model.adaptc.add("whole", {"rules": [{"match": {"targets": ["attn"]}, "train": "full"}]})
    with pytest.raises(SiteError, match="attn is replaced by 'whole', inside of which 'default' cannot act"):
        model.adaptc.switch(["default", "whole"])
    model.adaptc.switch("whole")


def test_what_peft_computes_from_the_same_file_is_told(tmp_path):
    """When such a folder or model of PEFT is read, and when one is written; doubled, the values give PEFT's outputs."""
    told = r"attn is another function in PEFT: PEFT 0\.21\.2 adds the update of out_proj twice"
    base, x = Attend(), torch.randn(2, 5, WIDTH)
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["attn"], init_lora_weights=False)
    twin = peft.get_peft_model(copy.deepcopy(base), config).eval()
    want = twin(x).detach()
    twin.save_pretrained(tmp_path / "theirs")
    with pytest.warns(AdaptcWarning, match=told):
        model = adaptc.compile(copy.deepcopy(base), tmp_path / "theirs", backend="eager").eval()
    with pytest.warns(AdaptcWarning, match=told):
        model.adaptc.load(tmp_path / "theirs")
    with pytest.warns(AdaptcWarning, match=told):
        adaptc.compile(twin, backend="eager")
    assert (model(x) - want).abs().max() > 1e-2
    for name, parameter in model.adaptc.named_parameters():
        if name.endswith("out_proj.lora_B"):
            parameter.data.mul_(2)
    torch.testing.assert_close(model(x), want, rtol=1e-5, atol=1e-5)
    with pytest.warns(AdaptcWarning, match=told):
        model.adaptc.save(tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("error", AdaptcWarning)
        adaptc.compile(copy.deepcopy(base), tmp_path / "ours", backend="eager")
