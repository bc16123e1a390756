"""Bottleneck adapters on real classes, against their formula in fp64; their closed forms; their op by itself."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import adaptc
from adaptc.errors import PlanError, SiteError, UnsupportedError
from adaptc.methods.bottleneck import ACTIVATIONS, BOTTLENECK, PLACEMENTS
from tests.methods.in_fp64 import check_against_formula, errors_of, formula_step, randomise
from tests.models import hosts
from tests.reference import check_all_rewritten, step

SCALE = 0.75
ACT = {
    "relu": torch.relu, "gelu": F.gelu, "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"), "silu": F.silu,
    "tanh": torch.tanh, "identity": lambda z: z,
}  # fmt: skip
#: Host -> (sites that are not square, activation, whether the bottleneck has biases).
PLACES = {
    "llama": (["k_proj", "down_proj"], "tanh", False),
    "gpt2": (["c_fc", "re:.*mlp\\.c_proj"], "gelu", True),
    "bert": (["intermediate.dense"], "relu", True),
    "t5": (["q", "wo"], "identity", True),
    "clip": (["fc1"], "gelu_tanh", True),
}
SITES = {"llama": 2, "gpt2": 2, "bert": 1, "t5": 5, "clip": 4}


def f(tensors, h, act):
    z = h @ tensors["down"].T + tensors.get("down_bias", 0)
    return ACT[act](z) @ tensors["up"].T + tensors.get("up_bias", 0)


def formulas(placement, act, scale=SCALE):
    def after(tensors, module, x, y):
        return y + scale * f(tensors, y if placement == "series_out" else x, act)

    def before(tensors, module, x):
        return x + scale * f(tensors, x, act)

    return {"after": after, "before": before}


def bottleneck(host="llama", **options):
    targets, act, bias = PLACES[host]
    chosen = {"r": 3, "activation": act, "bias": bias, "scale": SCALE, "init": "random", "targets": targets, **options}
    return adaptc.Bottleneck(**chosen)


@pytest.mark.parametrize("host, placement", hosts.slowly(PLACES, [*PLACEMENTS, *PLACEMENTS[1:]]))
def test_every_class_computes_the_formula(host, placement):
    base = hosts.short(host)
    model = adaptc.compile(copy.deepcopy(base), bottleneck(host, placement=placement), backend="eager").train()
    randomise(model)
    check_against_formula(model, base, hosts.batch(host), **formulas(placement, PLACES[host][1]))
    check_all_rewritten(model, SITES[host])


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_the_lowered_graph_computes_the_formula(placement):
    base = hosts.short("llama")
    model = adaptc.compile(copy.deepcopy(base), bottleneck(placement=placement, bias=True), backend="aot_eager").train()
    randomise(model)
    check_against_formula(model, base, hosts.batch("llama"), **formulas(placement, "tanh"))
    check_all_rewritten(model, 2)


def test_sixteen_bit_arithmetic_is_as_exact_as_the_body_op_by_op():
    base = hosts.short("llama", train=True).to(torch.bfloat16)
    model = adaptc.compile(copy.deepcopy(base), bottleneck(placement="parallel", bias=True), backend="aot_eager")
    plain = adaptc.compile(copy.deepcopy(base), bottleneck(placement="parallel", bias=True), backend="eager")
    assert {p.dtype for p in model.adaptc.parameters()} == {torch.float32}
    plain.load_state_dict(model.state_dict())
    batch = hosts.batch("llama", rows=4, length=12)
    want = formula_step(model, base, batch, **formulas("parallel", "tanh"))
    assert 0 < errors_of(*step(model, batch), want) <= 1.1 * errors_of(*step(plain, batch), want)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_new_adapter_is_the_identity(placement):
    base, batch = hosts.short("llama"), hosts.batch("llama")
    model = adaptc.compile(copy.deepcopy(base), bottleneck(placement=placement, init="default"), backend="eager")
    assert torch.equal(model(**batch).logits, base(**batch).logits)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_without_activation_it_is_a_low_rank_change_of_the_weight(placement):
    """s U D beside, s W U D before and s U D W after the frozen W."""
    base, batch = hosts.short("llama").double(), hosts.batch("llama")
    method = bottleneck(placement=placement, activation="identity", bias=False)
    model = adaptc.compile(copy.deepcopy(base), method, backend="eager")
    for site in model.adaptc.sites:
        adapter, W = site.adapters["default"], base.get_submodule(site.path).weight
        UD = SCALE * adapter.up @ adapter.down
        with torch.no_grad():
            W.add_(UD if placement == "parallel" else W @ UD if placement == "series_in" else UD @ W)
    torch.testing.assert_close(model(**batch).logits, base(**batch).logits, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("init, std", [("bert", 0.02), ("houlsby", 0.88e-3)])
def test_initial_values(init, std):
    """A normal cut at two standard deviations has 0.88 of its standard deviation."""
    model = adaptc.compile(hosts.short("llama"), bottleneck(r=64, init=init, bias=True), backend="eager")
    named = dict(model.adaptc.named_parameters())
    for name in ("down", "up"):
        values = torch.cat([p.detach().flatten() for n, p in named.items() if n.endswith(f".{name}")])
        assert 0.97 * std < float(values.std()) < 1.03 * std
        assert init == "bert" or float(values.abs().max()) <= 2e-3
    assert not any(p.any() for n, p in named.items() if n.endswith("bias"))


def test_a_module_that_does_not_say_its_width_is_told():
    """Houlsby's place in BERT: after the dropout that follows the dense layer, before the residual sum."""
    places = ["attention.output.dropout", "re:.*layer\\.\\d+\\.output\\.dropout"]
    with pytest.raises(SiteError, match="say features="):
        adaptc.compile(hosts.short("bert"), bottleneck("bert", targets=places), backend="eager")
    base = hosts.short("bert")
    method = bottleneck("bert", targets=places, features=64)
    model = adaptc.compile(copy.deepcopy(base), method, backend="eager").train()
    randomise(model)
    check_against_formula(model, base, hosts.batch("bert"), **formulas("series_out", "relu"))
    check_all_rewritten(model, 2)


def test_dropout_acts_on_the_bottleneck_only():
    base, batch = hosts.short("llama"), hosts.batch("llama")
    method = bottleneck(dropout=0.5, placement="parallel")
    model = adaptc.compile(copy.deepcopy(base), method, backend="eager").train()
    assert not torch.equal(model(**batch).logits, model(**batch).logits)
    model.eval()
    assert torch.equal(model(**batch).logits, model(**batch).logits)
    with torch.no_grad():
        for site in model.adaptc.sites:
            site.adapters["default"].up.zero_()
    assert torch.equal(model.train()(**batch).logits, base(**batch).logits)


def test_casting_keeps_the_scale():
    model = adaptc.compile(hosts.short("llama"), bottleneck(scale=1 / 3), backend="eager")
    model.to(torch.bfloat16)
    adapter = model.adaptc.sites[0].adapters["default"]
    assert (adapter.down.dtype, adapter.scale.dtype, float(adapter.scale)) == (torch.bfloat16, torch.float64, 1 / 3)


ILLEGAL = [
    ("r", 0), ("placement", "after"), ("activation", "sine"), ("dropout", 1.0), ("scale", float("inf")), ("bias", 1),
    ("init", ""), ("features", 0),
]  # fmt: skip


@pytest.mark.parametrize("option, value", ILLEGAL)
def test_illegal_options_are_named(option, value):
    with pytest.raises(PlanError, match=f"Bottleneck: {option} is not legal"):
        bottleneck(**{option: value})


DERIVATIVE = {
    "relu": lambda z: (z > 0).double(),
    "gelu": lambda z: (1 + torch.erf(z / 2**0.5)) / 2 + z * torch.exp(-z * z / 2) / (2 * torch.pi) ** 0.5,
    "silu": lambda z: torch.sigmoid(z) * (1 + z * (1 - torch.sigmoid(z))),
    "tanh": lambda z: 1 - torch.tanh(z) ** 2,
    "identity": torch.ones_like,
}


@given(st.data())
def test_op_and_gradients_are_the_formula(data):
    """In fp64, to rounding: dU = s g' a, dD = (s g U * act') ' h, and so on, written out."""
    args = list(BOTTLENECK.sample(data.draw))
    args[:6] = [None if t is None else t.double().requires_grad_() for t in args[:6]]
    h, residual, D, U, d, u, scale, act = args
    if act == "gelu_tanh":
        args[-1] = act = "gelu"
    grad = torch.linspace(-1, 2, residual.numel(), dtype=torch.float64).view(residual.shape)
    got = torch.ops.adaptc.bottleneck(*args)
    leaves = [t for t in args[:6] if t is not None]
    found = [got.detach(), *torch.autograd.grad(got, leaves, grad)]
    with torch.no_grad():
        rows, g = h.reshape(-1, h.shape[-1]), grad.reshape(-1, grad.shape[-1])
        z = rows @ D.T + (0 if d is None else d)
        a = ACT[act](z)
        out = a @ U.T + (0 if u is None else u)
        dz = (scale * g @ U) * DERIVATIVE[act](z)
        want = [residual + (scale * out).view_as(residual), (dz @ D).view_as(h), grad, dz.T @ rows, scale * g.T @ a]
        want += [] if d is None else [dz.sum(0), scale * g.sum(0)]
    for mine, formula in zip(found, want, strict=True):
        torch.testing.assert_close(mine, formula, rtol=1e-10, atol=1e-11)


@given(st.data())
def test_op_rounds_little(data):
    args = BOTTLENECK.sample(data.draw)
    h, residual, D, U, d, u, scale, act = (t.double() if isinstance(t, torch.Tensor) else t for t in args)
    got = torch.ops.adaptc.bottleneck(*args)
    a = ACT[act](h @ D.T + (0 if d is None else d))
    want = residual + scale * (a @ U.T + (0 if u is None else u))
    z = h.abs() @ D.abs().T + (0 if d is None else d.abs())  # no activation grows faster than 1.13 z
    size = residual.abs() + scale.abs() * (1.13 * z @ U.abs().T + (0 if u is None else u.abs()))
    dtype = args[1].dtype
    eps = torch.finfo(dtype).eps * (8 + h.shape[-1] + D.shape[0])
    assert (got.dtype, got.shape) == (dtype, residual.shape)
    assert ((got.double() - want).abs() <= eps * size).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_op_passes_gradcheck(activation):
    shapes = [(2, 3, 4), (2, 3, 5), (2, 4), (5, 2), (2,), (5,)]
    tensors = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    args = (*tensors, torch.tensor([SCALE], dtype=torch.float64), activation)
    assert torch.autograd.gradcheck(torch.ops.adaptc.bottleneck, args)
    torch.library.opcheck(torch.ops.adaptc.bottleneck.default, args)


def test_the_op_refuses_an_activation_it_does_not_have():
    t = torch.ones(1, 1)
    with pytest.raises(UnsupportedError, match="no activation 'sine'"):
        torch.ops.adaptc.bottleneck(t, t, t, t, None, None, torch.ones(1), "sine")
