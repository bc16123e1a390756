"""Adapters with a convolution on real audio and vision classes, against their formula in fp64; their ops."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import adaptc
from adaptc.errors import PlanError, SiteError
from adaptc.methods import conv_adapter
from adaptc.methods.conv_adapter import CONV_BACK, CONV_FRONT, STYLES
from adaptc.plan.presets import petl_ast_plan
from tests.methods.in_fp64 import check_against_formula, errors_of, formula_step, randomise
from tests.models import towers
from tests.reference import check_all_rewritten, step
from tests.sites.life import check_life


def method(**options):
    return adaptc.ConvAdapter(**{"targets": ["mlp"], "r": 3, "kernel": 4, "dropout": 0.0, "init": "random", **options})


def quick(z):
    return z * torch.sigmoid(1.702 * z)


def convolve(z, kernel, bias):
    """out[t, i] = bias[i] + sum over the window of kernel: zeros beyond the ends, (k - 1) // 2 tokens before t."""
    tokens, size = z.shape[1], kernel.shape[-1]
    out = bias.expand(*z.shape[:2], -1)
    for j in range(size):
        source = torch.arange(tokens) + j - (size - 1) // 2
        there = (source >= 0) & (source < tokens)
        moved = z[:, source.clamp(0, tokens - 1)] * there[:, None]
        weight = kernel[:, :, j]
        out = out + (moved * weight[:, 0] if weight.shape[1] == 1 and z.shape[-1] != 1 else moved @ weight.T)
    return out


def batch_norm(z, t, training):
    if training:
        mean, var = z.mean((0, 1)), z.var((0, 1), unbiased=False)
    else:
        mean, var = t["running_mean"], t["running_var"]
    return (z - mean) / (var + 1e-5).sqrt() * t["bn_weight"] + t["bn_bias"]


def branch(t, h, style, training):
    if style == "conformer":
        h = F.layer_norm(h, h.shape[-1:], t["norm_weight"], t["norm_bias"])
        a, b = (h @ t["down"].T + t["down_bias"]).chunk(2, -1)
        z = batch_norm(convolve(a * torch.sigmoid(b), t["conv"], t["conv_bias"]), t, training)
        return (z * torch.sigmoid(z)) @ t["up"].T + t["up_bias"]
    z = quick(h @ t["down"].T + t["down_bias"])
    return quick(convolve(z, t["conv"], t["conv_bias"])) @ t["up"].T + t["up_bias"]


def after(style, placement, residual, training=True):
    def correct(t, module, x, y):
        if isinstance(y, tuple):
            return (correct(t, module, x, y[0]), *y[1:])
        h = x if placement == "parallel" else y
        base = y if placement == "parallel" else 0
        return base + branch(t, h, style, training) + (h if residual else 0)

    return correct


#: Host, sites, style, placement, residual: the four modes of the paper, in each style, at both halves of a block.
MODES = [
    ("ast", ["mlp"], "conformer", "parallel", False),
    ("ast", ["attention", "mlp"], "conformer", "series", True),
    ("ast", ["attention", "mlp"], "convpass", "parallel", True),
    ("vit", ["mlp"], "convpass", "series", False),
    ("vit", ["attention"], "conformer", "series", False),
]


SOME = [mode if i == 0 else pytest.param(*mode, marks=pytest.mark.slow) for i, mode in enumerate(MODES)]


@pytest.mark.parametrize("host, sites, style, placement, residual", SOME)
def test_every_mode_computes_the_formula(host, sites, style, placement, residual):
    base = towers.build(host)
    chosen = method(targets=sites, style=style, placement=placement, residual=residual)
    backend = "aot_eager" if sites == ["mlp"] else "eager"
    model = adaptc.compile(copy.deepcopy(base), chosen, backend=backend).train()
    randomise(model)
    got = check_conv(model, base, towers.batch(host), after(style, placement, residual))
    check_all_rewritten(model, 2 * len(sites), 4 * len(sites))
    assert len(got) == len(sites) * 2 * (10 if style == "conformer" else 6)


def check_conv(model, base, batch, formula):
    """conv_bias in front of a batch norm in training has gradient 0; every other parameter has another."""
    (loss, got), (want_loss, want) = step(model, batch), formula_step(model, base, batch, after=formula)
    assert abs(loss / want_loss - 1) < 4e-6
    for name, gradient in want.items():
        if gradient.abs().max() < 1e-14:
            assert name.endswith("conv_bias") and got[name].abs().max() < 1e-6
        else:
            assert (got[name] - gradient).norm() / gradient.norm() < 2e-5, name
    return got


@pytest.mark.slow
def test_running_statistics_are_torchs_and_eval_uses_them():
    base, batch = towers.build("ast"), towers.batch("ast")
    model = adaptc.compile(copy.deepcopy(base), method(), backend="aot_eager").train()
    randomise(model)
    site = model.adaptc.sites[0]
    adapter = site.adapters["default"]
    seen = []
    hook = base.get_submodule(site.path).register_forward_hook(lambda m, args, y: seen.append(args[0]))
    base(**batch)
    hook.remove()
    model(**batch)
    t = {n: p.detach() for n, p in adapter.named_parameters()}
    h = F.layer_norm(seen[0], seen[0].shape[-1:], t["norm_weight"], t["norm_bias"])
    a, b = (h @ t["down"].T + t["down_bias"]).chunk(2, -1)
    z = convolve(a * torch.sigmoid(b), t["conv"], t["conv_bias"])
    torch.testing.assert_close(adapter.running_mean, 0.1 * z.mean((0, 1)), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(adapter.running_var, 0.9 + 0.1 * z.var((0, 1)), rtol=1e-4, atol=1e-6)
    model.eval()
    before = adapter.running_mean.clone()
    formula = after("conformer", "parallel", False, training=False)
    check_against_formula(model, base, batch, after=formula)
    assert torch.equal(adapter.running_mean, before)


@pytest.mark.parametrize("style", STYLES)
def test_dropout_is_where_the_paper_has_it(style, monkeypatch):
    base, batch = towers.build("ast", num_hidden_layers=1), towers.batch("ast")
    width = 32 if style == "conformer" else 3
    mask = torch.linspace(0, 2, width).expand(3, 8, width)
    real = F.dropout

    def dropout(t, p=0.5, training=True, inplace=False):
        return mask.to(t) if t.shape == mask.shape and p == 0.5 else real(t, p, training)

    monkeypatch.setattr(conv_adapter.F, "dropout", dropout)
    model = adaptc.compile(copy.deepcopy(base), method(style=style, dropout=0.5), backend="eager").train()
    randomise(model)

    def masked(t, module, x, y):
        if style == "conformer":
            return y + mask.double() * branch(t, x, style, True)
        z = quick(convolve(quick(x @ t["down"].T + t["down_bias"]), t["conv"], t["conv_bias"]))
        return y + (mask.double() * z) @ t["up"].T + t["up_bias"]

    loss, got = step(model, batch)
    want_loss, want = formula_step(model, base, batch, after=masked)
    assert abs(loss / want_loss - 1) < 4e-6
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-6)


def test_initial_values():
    base, batch = towers.build("ast"), towers.batch("ast")
    same = [method(style="convpass", init="default"), method(init="identity")]
    for chosen in same:
        model = adaptc.compile(copy.deepcopy(base), chosen, backend="eager").train()
        assert torch.equal(model(**batch).logits, base(**batch).logits)
    published = adaptc.compile(copy.deepcopy(base), method(init="default", r=16), backend="eager")
    assert not torch.equal(published(**batch).logits, base(**batch).logits)
    adapter = published.adaptc.sites[0].adapters["default"]
    bound = 32**-0.5  # of nn.Linear
    assert 0.9 * bound < float(adapter.down.detach().abs().max()) <= bound
    assert float(adapter.conv_bias.detach().abs().max()) <= 4**-0.5


@pytest.mark.parametrize("style", STYLES)
def test_moved_tokens_give_moved_results_away_from_the_ends(style):
    torch.manual_seed(0)
    layer = nn.Linear(6, 6)
    model = adaptc.compile(nn.Sequential(layer), method(targets=["0"], style=style, kernel=3), backend="eager").eval()
    randomise(model)
    x = torch.randn(1, 12, 6)
    y, moved = model(x), model(x.roll(1, 1))
    torch.testing.assert_close(y[:, 2:-2], moved[:, 3:-1])
    assert not torch.allclose(y[:, 2:-2], moved[:, 2:-2])


@pytest.mark.slow
@pytest.mark.parametrize("style", STYLES)
def test_it_bears_what_every_kind_of_site_must(style):
    plan = adaptc.Plan([method(style=style)])
    check_life(lambda: towers.build("ast"), plan, towers.batch("ast"), sites=2, unmergeable="cannot be folded")


@pytest.mark.slow
def test_published_placement():
    base, batch = towers.build("ast"), towers.batch("ast")
    plan = petl_ast_plan("houlsby", r=3, kernel=3, dropout=0.0)
    model = adaptc.compile(copy.deepcopy(base), plan, backend="aot_eager").train()
    loss, got = step(model, batch)
    names = {s.path.rpartition("layers.")[2] or s.path for s in model.adaptc.sites}
    for layer in "01":
        assert {f"{layer}.{n}" for n in ("attention", "mlp", "layernorm_before", "layernorm_after")} <= names
    trained = {n for n, _ in model.adaptc.named_parameters()}
    assert set(got) == trained and all(g.any() for n, g in got.items() if not n.endswith("conv_bias"))
    assert sum("classifier" in n for n in trained) == 4 and model.adaptc.metrics()["graphs"] == 1
    pfeiffer = petl_ast_plan(r=3).resolve(base).sites
    assert not any(s.path.endswith(("attention", "layernorm_before")) for s in pfeiffer)
    with pytest.raises(PlanError, match="no such placement of PETL-AST"):
        petl_ast_plan("both")


def test_files_hold_the_running_statistics(tmp_path):
    base, batch = towers.build("ast"), towers.batch("ast")
    model = adaptc.compile(copy.deepcopy(base), method(), backend="eager").train()
    randomise(model)
    model(**batch)
    model.eval().adaptc.save(tmp_path)
    again = adaptc.compile(copy.deepcopy(base), str(tmp_path), backend="eager").eval()
    assert torch.equal(again(**batch).logits, model(**batch).logits)


@pytest.mark.slow
def test_sixteen_bit_arithmetic_is_as_exact_as_the_bodies_op_by_op():
    base = towers.build("ast", num_hidden_layers=1).to(torch.bfloat16).train()
    chosen = method(style="convpass")
    model = adaptc.compile(copy.deepcopy(base), chosen, backend="aot_eager")
    plain = adaptc.compile(copy.deepcopy(base), chosen, backend="eager")
    plain.load_state_dict(model.state_dict())
    batch = towers.batch("ast")
    batch["input_values"] = batch["input_values"].bfloat16()
    want = formula_step(model, base, batch, after=after("convpass", "parallel", False))
    assert 0 < errors_of(*step(model, batch), want) <= 1.1 * errors_of(*step(plain, batch), want)


def test_what_it_refuses():
    with pytest.raises(SiteError, match="the width of Dropout is not known: say features="):
        adaptc.compile(towers.build("ast"), method(targets=["dropout"]), backend="eager")
    flat = adaptc.compile(nn.Sequential(nn.Linear(4, 4)), method(targets=["0"]), backend="eager")
    with pytest.raises(Exception, match="convolves along the tokens"):
        flat(torch.ones(3, 4))


ILLEGAL = [
    ("r", 0), ("style", "conv"), ("kernel", 0), ("placement", "after"), ("residual", 1), ("dropout", 1.0),
    ("init", "zero"), ("features", 0),
]  # fmt: skip


@pytest.mark.parametrize("option, value", ILLEGAL)
def test_illegal_options_are_named(option, value):
    with pytest.raises(PlanError, match=f"ConvAdapter: {option} is not legal"):
        method(**{option: value})


def check_op(op, args, formula):
    args = [a.double().requires_grad_() if isinstance(a, torch.Tensor) else a for a in args]
    leaves = [a for a in args if isinstance(a, torch.Tensor)]
    got, want = op(*args), formula(*args)
    grad = torch.linspace(-1, 2, want.numel(), dtype=torch.float64).view(want.shape)
    found = [got.detach(), *torch.autograd.grad(got, leaves, grad)]
    expected = [want.detach(), *torch.autograd.grad(want, leaves, grad)]
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-10)


@given(st.data())
def test_front_and_its_gradients_are_the_formula(data):
    def formula(h, weight, bias, down, down_bias, conv, conv_bias, style):
        if style == "convpass":
            return convolve(quick(h @ down.T + down_bias), conv, conv_bias)
        a, b = (F.layer_norm(h, h.shape[-1:], weight, bias) @ down.T + down_bias).chunk(2, -1)
        return convolve(a * torch.sigmoid(b), conv, conv_bias)

    check_op(torch.ops.adaptc.conv_adapter_front, CONV_FRONT.sample(data.draw), formula)


@given(st.data())
def test_back_and_its_gradients_are_the_formula(data):
    def formula(z, base, up, up_bias, mask, style):
        m = 1.0 if mask is None else mask
        masked = quick(z) * m if style == "convpass" else z * torch.sigmoid(z)
        out = (masked @ up.T + up_bias) * (1.0 if style == "convpass" else m)
        return out if base is None else base + out

    check_op(torch.ops.adaptc.conv_adapter_back, CONV_BACK.sample(data.draw), formula)


@pytest.mark.parametrize("style", STYLES)
def test_ops_pass_gradcheck(style):
    rows = 4 if style == "conformer" else 2
    shapes = [(2, 3, 4), (4,), (4,), (rows, 4), (rows,), (2, 1 if style == "conformer" else 2, 3), (2,)]
    args = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    if style == "convpass":
        args[1] = args[2] = None
    assert torch.autograd.gradcheck(torch.ops.adaptc.conv_adapter_front, (*args, style))
    torch.library.opcheck(torch.ops.adaptc.conv_adapter_front.default, (*args, style))
    shapes = [(2, 3, 2), (2, 3, 5), (5, 2), (5,), (2, 3, 5 if style == "conformer" else 2)]
    args = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    assert torch.autograd.gradcheck(torch.ops.adaptc.conv_adapter_back, (*args, style))
    torch.library.opcheck(torch.ops.adaptc.conv_adapter_back.default, (*args, style))
