"""Adapters that can never learn are named: zero factors, sites that nobody calls or that the loss does not read."""

from __future__ import annotations

import contextlib
import warnings

import pytest
import torch
from torch import nn

import adaptc
from adaptc.errors import AdaptcWarning, NoGradientWarning
from adaptc.runtime.calls.lint import dead_parameters
from tests.models import hosts
from tests.reference import loss_of


class Host(nn.Module):
    """``used`` reaches the output, ``unused`` is called for nothing, ``idle`` is not called."""

    def __init__(self):
        super().__init__()
        self.used, self.unused, self.idle = nn.Linear(6, 5), nn.Linear(6, 5), nn.Linear(6, 5)

    def forward(self, x):
        self.unused(x)
        return self.used(x)


def compiled(host=None, method=None, **options):
    torch.manual_seed(0)
    method = method or adaptc.LoRA(r=2, init="random", targets="all-linear")
    return adaptc.compile(host or Host(), method, **{"backend": "aot_eager", **options}).train()


def adapters(model, name="default"):
    return [a for site in model.adaptc.sites for a in site.of(name)]


# ------------------------------------------------------------------------------------- zero factors

METHODS = {
    "lora": (adaptc.LoRA(r=2, targets=["used"]), ("lora_A", "lora_B")),
    "dora": (adaptc.LoRA(r=2, dora=True, targets=["used"]), ("lora_A", "lora_B")),
    "vera": (adaptc.VeRA(r=2, targets=["used"]), ("vera_lambda_d", "vera_lambda_b")),
    "hydra": (adaptc.Hydra(r=2, bias=False, targets=["used"]), ("parallel_A", "parallel_B")),
    "bottleneck": (adaptc.Bottleneck(r=2, bias=False, activation="gelu", targets=["used"]), ("down", "up")),
}


@pytest.mark.parametrize("method, names", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("zeros", [(), (0,), (1,), (0, 1)])
@pytest.mark.parametrize("frozen", [(), (0,), (1,)])
def test_dead_parameters_are_those_whose_gradient_stays_zero(method, names, zeros, frozen):
    """The claim against autograd: many steps of descent move a parameter, or it is named."""
    model = compiled(method=method)
    (adapter,) = adapters(model)
    torch.manual_seed(1)
    factors = [adapter.get_parameter(name) for name in names]
    with torch.no_grad():
        for i, factor in enumerate(factors):
            factor.zero_() if i in zeros else factor.normal_()
    for i in frozen:
        factors[i].requires_grad_(False)
    named = set(dead_parameters(adapter))
    before = {name: p.detach().clone() for name, p in zip(names, factors, strict=True)}
    optimizer = torch.optim.SGD([p for p in adapter.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        x = torch.randn(7, 6)
        y = adapter.apply_to(model.used, x, x.sin() @ model.used.weight.mT)
        (y * torch.randn(7, 5)).sum().backward()
        optimizer.step()
    still = {n for n, p in zip(names, factors, strict=True) if p.requires_grad and torch.equal(p, before[n])}
    assert named == still


def test_zero_factors_are_named_when_they_are_loaded(tmp_path):
    model = compiled(method=adaptc.LoRA(r=2, init="random", targets=["used", "idle"]))
    with torch.no_grad():
        for parameter in model.used.adapters.default.parameters():
            parameter.zero_()
    model.adaptc.save(tmp_path)
    assert "cannot learn" not in str(model.adaptc.explain())
    with pytest.warns(NoGradientWarning) as caught:
        model.adaptc.load(tmp_path)
    (warning,) = caught
    assert "both factors are zero" in str(warning.message)
    assert "used.adapters" not in str(warning.message) and "used.lora_A, used.lora_B" in str(warning.message)
    assert "cannot learn (both factors are zero, so each one's gradient is zero too): used.lora_A" in str(
        model.adaptc.explain()
    )
    with pytest.warns(NoGradientWarning, match="both factors are zero"):
        compiled(None, str(tmp_path))


@pytest.mark.parametrize("name", ["lora", "vera", "hydra", "bottleneck"])
def test_fresh_adapters_are_no_reason_to_warn(name):
    compiled(method=METHODS[name][0])  # warnings are errors in these tests


def test_factors_at_other_kinds_of_sites():
    class Kinds(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.conv = nn.Embedding(7, 4), nn.Conv1d(4, 6, 3)
            self.mha = nn.MultiheadAttention(6, 2, batch_first=True)

        def forward(self, ids):
            h = self.conv(self.table(ids).mT).mT
            return self.mha(h, h, h)[0]

    model = compiled(Kinds(), adaptc.LoRA(r=2, targets=["table", "conv", "mha"]))
    found = {}
    for site in model.adaptc.sites:
        with torch.no_grad():
            for parameter in site.adapters["default"].parameters():
                parameter.zero_()
        found[site.path] = sorted(dead_parameters(site.adapters["default"]))
    assert found == {
        "table": ["lora_embedding_A", "lora_embedding_B"],
        "conv": ["lora_A", "lora_B"],
        "mha": ["lora_A", "lora_B", "out_proj.lora_A", "out_proj.lora_B"],
    }


# ------------------------------------------------------------------------------------ dead branches


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_sites_without_a_gradient_are_named_after_the_first_backward(backend):
    model = compiled(backend=backend)
    loss = model(torch.randn(4, 6)).sum()
    with pytest.warns(NoGradientWarning) as caught:
        loss.backward()
    texts = sorted(str(w.message) for w in caught)
    assert len(texts) == 2
    assert texts[0].startswith("no gradient in the first backward: the loss does not depend on its output: unused (")
    assert texts[1].startswith("no gradient in the first backward: was not called in any forward: idle (")
    rows = str(model.adaptc.explain())
    assert "no gradient in the first backward (the loss does not depend on its output): unused" in rows
    model(torch.randn(4, 6)).sum().backward()  # said once


def test_a_branch_that_only_the_loss_leaves_out():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 5), nn.Linear(6, 5)

        def forward(self, x):
            return {"a": self.a(x), "b": self.b(x)}

    model = compiled(Two())
    output = model(torch.randn(4, 6))
    with pytest.warns(NoGradientWarning, match=r"does not depend on its output: b \("):
        output["a"].sum().backward()
    model(torch.randn(4, 6))["b"].sum().backward()
    assert "no gradient in the first backward" not in str(model.adaptc.explain())


def test_a_first_loss_of_zero_says_nothing_of_the_adapters():
    """As when every advantage of a batch is zero: warnings are errors in these tests."""

    class Weighted(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(6, 5)

        def forward(self, x):
            return self.a(x)

    model = compiled(Weighted())
    (0 * model(torch.randn(4, 6)).sum()).backward()
    model(torch.randn(4, 6)).sum().backward()
    assert model.adaptc.captures.lint.silent == {}


def test_an_expert_that_no_token_reached_is_in_the_report_alone():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(6, 5) for _ in range(3))

        def forward(self, x):
            return self.experts[1](x)

    model = compiled(Experts())
    model(torch.randn(4, 6)).sum().backward()  # warnings are errors in these tests
    assert "no gradient in the first backward (was not called in any forward): experts.{0,2}" in str(
        model.adaptc.explain()
    )


def test_gradients_taken_by_hand_say_nothing():
    model = compiled()
    loss = model(torch.randn(4, 6)).sum()
    torch.autograd.grad(loss, list(model.used.adapters.parameters()))
    with pytest.warns(NoGradientWarning):  # the next backward is looked at
        model(torch.randn(4, 6)).sum().backward()


def test_a_forward_without_gradients_is_not_looked_at():
    model = compiled()
    with torch.no_grad():
        model(torch.randn(4, 6))
    assert model.adaptc.captures.lint.silent == {}


@pytest.mark.parametrize("host", hosts.slowly(["llama", "bert"], also=["bert"]))
def test_real_models_that_train_as_a_whole_say_nothing(host):
    model = compiled(hosts.short(host))
    model.train()
    with warnings.catch_warnings():
        warnings.simplefilter("error", AdaptcWarning)
        for _ in range(2):
            loss_of(model(**hosts.batch(host))).backward()
    assert "gradient" not in dict(model.adaptc.explain().to_dict()).get("attention", "")


# ----------------------------------------------------------------------- no_grad outside of a graph


@torch.compiler.disable
def run_eagerly(module, x):
    return module(x)


class Broken(nn.Module):
    """A part without gradients that is not captured."""

    def __init__(self):
        super().__init__()
        self.tower, self.head = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x):
        with torch.no_grad():
            h = run_eagerly(self.tower, x)
        return self.head(h)


def test_an_eager_site_without_gradients_is_warned_of():
    model = compiled(Broken(), adaptc.LoRA(r=2, init="random", targets=["tower", "head"]))
    with pytest.warns(NoGradientWarning, match=r"runs under torch.no_grad that does not begin in .*: tower \("):
        loss = model(torch.randn(4, 6)).sum()
    loss.backward()
    assert all(p.grad is None for p in model.tower.adapters.parameters())
    assert all(p.grad is not None for p in model.head.adapters.parameters())
    rows = str(model.adaptc.explain())
    assert "runs under torch.no_grad that does not begin in its captured graph" in rows and "there: tower" in rows


def test_a_call_without_gradients_is_no_reason_to_warn():
    model = compiled(Broken())
    with torch.no_grad():
        model(torch.randn(4, 6))
    with contextlib.suppress(KeyError):
        assert "no_grad" not in str(model.adaptc.explain().to_dict()["attention"])
