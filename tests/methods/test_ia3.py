"""(IA)^3 on real classes, against its formula in fp64 and against PEFT, and its op by itself."""

from __future__ import annotations

import copy
import re
import warnings

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import adaptc
from adaptc.errors import SiteError
from adaptc.methods.ia3 import SCALE
from tests.methods.in_fp64 import check_against_formula, errors_of, formula_step, randomise
from tests.models import hosts
from tests.reference import check_all_rewritten, step

#: Host -> (keys and values, second feed-forward products), as the paper places the vectors.
PLACES = {
    "llama": (["k_proj", "v_proj"], ["down_proj"]),
    "gpt2": (["c_attn"], ["re:.*mlp\\.c_proj"]),
    "bert": (["key", "value"], ["re:.*layer\\.\\d+\\.output\\.dense"]),
    "t5": (["k", "v"], ["wo"]),
    "clip": (["k_proj", "v_proj"], ["fc2"]),
}
COUNT = {"llama": 3, "gpt2": 2, "bert": 3, "t5": 8, "clip": 12}


def plan(host):
    outputs, inputs = PLACES[host]
    return adaptc.Plan([adaptc.IA3(targets=outputs), adaptc.IA3(targets=inputs, feedforward=True)])


def after(tensors, module, x, y):
    return y * tensors["ia3_l"]


def before(tensors, module, x):
    return x * tensors["ia3_l"]


def peft_twin(base, model):
    """``base`` wrapped by PEFT, with the values of the compiled ``model``."""
    sites = {site.path: site.adapters["default"] for site in model.adaptc.sites}
    forward = [path for path, adapter in sites.items() if adapter.acts_before]
    config = peft.IA3Config(target_modules=list(sites), feedforward_modules=forward)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to False")
        twin = peft.get_peft_model(base, config)
    for path, adapter in sites.items():
        layer = twin.base_model.model.get_submodule(path)
        assert layer.is_feedforward == adapter.acts_before
        with torch.no_grad():
            layer.ia3_l["default"].copy_(adapter.ia3_l.view_as(layer.ia3_l["default"]))
    return twin


def peft_step(twin, batch):
    loss, gradients = step(twin, batch)
    ours = re.compile(r"^base_model\.model\.(.*)\.ia3_l\.default$")
    return loss, {ours.sub(r"\1.adapters.default.ia3_l", name): g.flatten() for name, g in gradients.items()}


@pytest.mark.parametrize("host", hosts.slowly(PLACES))
def test_every_class_computes_the_formula(host):
    base = hosts.short(host)
    model = adaptc.compile(copy.deepcopy(base), plan(host), backend="eager")
    randomise(model)
    check_against_formula(model.train(), base, hosts.batch(host), after=after, before=before)
    check_all_rewritten(model, COUNT[host])


@pytest.mark.parametrize("host", ["llama", "gpt2"])
def test_the_lowered_graph_computes_what_peft_computes(host):
    model = adaptc.compile(hosts.short(host, train=True), plan(host), backend="aot_eager")
    randomise(model)
    twin = peft_twin(hosts.short(host), model).train()
    batch = hosts.batch(host)
    (loss, got), (want_loss, want) = step(model, batch), peft_step(twin, batch)
    assert got.keys() == want.keys() and len(got) == COUNT[host]
    assert abs(loss / want_loss - 1) < 1e-6
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient, rtol=5e-6, atol=5e-6 * float(gradient.norm()))
    check_all_rewritten(model, COUNT[host])


@pytest.mark.parametrize("kind", ["bf16-base", pytest.param("autocast", marks=pytest.mark.slow)])
def test_sixteen_bit_arithmetic_is_as_exact_as_pefts(kind):
    base = hosts.short("llama", train=True)
    if kind == "bf16-base":
        base = base.to(torch.bfloat16)
    ours, theirs = [], []
    for seed in range(3):
        model = adaptc.compile(copy.deepcopy(base), plan("llama"), backend="aot_eager")
        assert {p.dtype for p in model.adaptc.parameters()} == {torch.float32}
        randomise(model, seed=seed)
        twin = peft_twin(copy.deepcopy(base), model).train()
        batch = hosts.batch("llama", rows=4, length=12, seed=seed)
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
            got, peft_got = step(model, batch), peft_step(twin, batch)
        want = formula_step(model, base, batch, after=after, before=before)
        ours.append(errors_of(*got, want))
        theirs.append(errors_of(*peft_got, want))
        check_all_rewritten(model, COUNT["llama"])
    assert 0 < sum(ours) <= 1.1 * sum(theirs)


def test_vectors_of_ones_are_the_identity():
    base = hosts.short("llama")
    batch = hosts.batch("llama")
    model = adaptc.compile(copy.deepcopy(base), plan("llama"), backend="aot_eager")
    assert torch.equal(model(**batch).logits, base(**batch).logits)


def test_random_initial_values_are_asked_for():
    model = adaptc.compile(hosts.short("llama"), adaptc.IA3(targets=["k_proj"], init="random"), backend="eager")
    values = torch.cat([p.detach() for p in model.adaptc.parameters()])
    assert values.numel() == 32 and 0.5 < float(values.std()) < 1.5


def test_on_other_modules_it_refuses():
    with pytest.raises(SiteError, match="LlamaRMSNorm is not a linear layer"):
        adaptc.compile(hosts.short("llama"), adaptc.IA3(targets=["input_layernorm"]), backend="eager")


@given(st.data())
def test_op_and_gradients_are_the_formula(data):
    """t' = t * l, dt = g * l, dl = the sum of g * t over everything but the last dimension."""
    t, scale = SCALE.sample(data.draw)
    grad = torch.linspace(-1, 2, t.numel(), dtype=torch.float64).reshape(t.shape).to(t.dtype)
    t.requires_grad_(), scale.requires_grad_()
    got = torch.ops.adaptc.ia3_scale(t, scale)
    dt, dscale = torch.autograd.grad(got, (t, scale), grad)
    t64, s64, g64 = t.detach().double(), scale.detach().double(), grad.double()
    eps = max(torch.finfo(t.dtype).eps, torch.finfo(scale.dtype).eps)
    assert (got.dtype, dt.dtype, dscale.dtype) == (t.dtype, t.dtype, scale.dtype)
    torch.testing.assert_close(got.double(), t64 * s64, rtol=eps, atol=0)
    torch.testing.assert_close(dt.double(), g64 * s64, rtol=eps, atol=0)
    rows = (g64 * t64).reshape(-1, t.shape[-1])
    bound = (2 + len(rows)) * eps * rows.abs().sum(0)
    assert ((dscale.double() - rows.sum(0)).abs() <= bound).all()


def test_op_passes_gradcheck():
    t = torch.randn(3, 2, 5, dtype=torch.float64, requires_grad=True)
    scale = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(torch.ops.adaptc.ia3_scale, (t, scale))
    assert torch.autograd.gradgradcheck(torch.ops.adaptc.ia3_scale, (t, scale))
    torch.library.opcheck(torch.ops.adaptc.ia3_scale.default, (t, scale))
