"""AdaptFormer on real vision classes, against its formula in fp64; its tap; its op by itself."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import adaptc
from adaptc.errors import PlanError, SiteError
from adaptc.methods import adaptformer
from adaptc.methods.adaptformer import ADAPTFORMER, NORMS
from tests.methods.in_fp64 import errors_of, randomise
from tests.models import hosts, towers
from tests.reference import check_all_rewritten, reference_loss, relative_errors, step
from tests.sites.life import check_life

#: Host -> (site, tap): what the model's classes call them.
PLACES = {
    "vit": ("mlp", "layernorm_after"),
    "deit": ("mlp", "layernorm_after"),
    "ast": ("mlp", "layernorm_after"),
    "clip": (r"re:vision_model\.encoder\.layers\.\d+\.mlp", "layer_norm2"),
    "llama": ("mlp", "post_attention_layernorm"),
}


def build(host, **changes):
    return towers.build(host, **changes) if host in towers.TOWERS else hosts.build(host, **changes)


def batch_of(host):
    return towers.batch(host) if host in towers.TOWERS else hosts.batch(host)


def method(host="vit", **options):
    site, tap = PLACES[host]
    return adaptc.AdaptFormer(**{"targets": [site], "tap": tap, "r": 6, "dropout": 0.0, "init": "random", **options})


def branch(t, x, norm="none", mask=1.0):
    """s U relu(D x + d) + s u, with a layer norm before or after."""
    affine = (x.shape[-1:], t.get("norm_weight"), t.get("norm_bias"), 1e-5)
    x = F.layer_norm(x, *affine) if norm == "in" else x
    z = mask * torch.relu(x @ t["down"].T + t["down_bias"])
    out = t["scale"] * (z @ t["up"].T + t["up_bias"])
    return F.layer_norm(out, *affine) if norm == "out" else out


def formula_step(model, base, batch, *, norm="none", mask=1.0):
    """The formula on a copy of ``base`` in fp64: the tap is the argument that a plain hook sees."""
    reference = copy.deepcopy(base).double().requires_grad_(False).train(model.training)
    leaves = {}
    for site in model.adaptc.sites:
        adapter = site.adapters["default"]
        own = {n: p.detach().double().clone().requires_grad_() for n, p in adapter.named_parameters()}
        leaves.update({f"{site.path}.adapters.default.{n}": p for n, p in own.items()})
        own.setdefault("scale", adapter.scale)
        kept = []
        inside = reference.get_submodule(site.path)
        parent = reference.get_submodule(site.path.rpartition(".")[0])
        tapped = getattr(parent, adapter.tap, None) or getattr(inside, adapter.tap)
        tapped.register_forward_pre_hook(lambda m, args, kept=kept: kept.append(args[0]))
        inside.register_forward_hook(lambda m, a, y, own=own, kept=kept: y + branch(own, kept.pop(), norm, mask))
    loss = reference_loss(reference, batch)
    loss.backward()
    return loss.detach(), {name: leaf.grad for name, leaf in leaves.items()}


def check(model, base, batch, **formula):
    (loss, got), (want_loss, want) = step(model, batch), formula_step(model, base, batch, **formula)
    assert abs(loss / want_loss - 1) < 4e-6
    errors = relative_errors(got, want)
    assert len(errors) == len(list(model.adaptc.parameters())) > 0
    assert max(errors.values()) < 1e-5, max(errors, key=errors.get)


@pytest.mark.parametrize("host", ["vit", *(pytest.param(h, marks=pytest.mark.slow) for h in PLACES if h != "vit")])
def test_every_class_computes_the_formula(host):
    base = build(host)
    backend = "aot_eager" if host == "vit" else "eager"
    model = adaptc.compile(copy.deepcopy(base), method(host), backend=backend).train()
    randomise(model)
    check(model, base, batch_of(host))
    check_all_rewritten(model, 2)
    assert model.adaptc.metrics()["graphs"] == 1


@pytest.mark.parametrize("norm, learn", [("in", True), ("out", False)])
def test_norms_and_a_trained_scale(norm, learn):
    base = build("vit", num_hidden_layers=1)
    model = adaptc.compile(copy.deepcopy(base), method(norm=norm, learn_scale=learn), backend="aot_eager").train()
    names = {n.rpartition(".")[2] for n, _ in model.adaptc.named_parameters()}
    assert names == {"down", "up", "down_bias", "up_bias"} | ({"scale"} if learn else set()) | (
        {"norm_weight", "norm_bias"} if norm != "none" else set()
    )
    if learn:
        assert float(model.adaptc.sites[0].adapters["default"].scale.detach()) == pytest.approx(0.1)
    randomise(model)
    check(model, base, batch_of("vit"), norm=norm)


@pytest.mark.slow
def test_the_whole_block_as_the_site_adds_behind_its_dropout():
    """With p > 0 the block drops of mlp(x'), not of the branch: with p = 1 all of the mlp, and none of the branch."""
    base = build("vit", num_hidden_layers=1)
    base.vit.layers[0].dropout = nn.Dropout(1.0)
    block = method(targets=[r"re:vit\.layers\.\d+"])
    model = adaptc.compile(copy.deepcopy(base), block, backend="aot_eager").train()
    randomise(model)
    check(model, base, batch_of("vit"))
    check_all_rewritten(model, 1)


def test_dropout_acts_behind_relu(monkeypatch):
    base, batch = build("vit", num_hidden_layers=1), batch_of("vit")
    mask = torch.tensor([0.0, 2.0, 2.0, 0.0, 2.0, 2.0]).expand(3, 5, 6)
    real = F.dropout

    def dropout(t, p=0.5, training=True, inplace=False):
        return mask.to(t) if t.shape == mask.shape else real(t, p, training)

    monkeypatch.setattr(adaptformer.F, "dropout", dropout)
    model = adaptc.compile(copy.deepcopy(base), method(dropout=0.5), backend="eager").train()
    randomise(model)
    loss, got = step(model, batch)
    want_loss, want = formula_step(model, base, batch, mask=mask.double())
    assert abs(loss / want_loss - 1) < 4e-6
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-6)
    model.eval()
    check_eval, _ = step(model, batch)
    assert abs(check_eval / formula_step(model, base, batch)[0] - 1) < 4e-6


@pytest.mark.slow
def test_dropout_draws_a_mask_a_step():
    model = adaptc.compile(build("vit"), method(dropout=0.5), backend="aot_eager").train()
    randomise(model)
    batch = batch_of("vit")
    assert not torch.equal(model(**batch).logits, model(**batch).logits)
    model.eval()
    assert torch.equal(model(**batch).logits, model(**batch).logits)


def test_a_new_adapter_is_the_identity():
    base, batch = build("vit"), batch_of("vit")
    model = adaptc.compile(copy.deepcopy(base), method(init="default", r=64), backend="eager")
    assert torch.equal(model(**batch).logits, base(**batch).logits)
    down = model.adaptc.sites[0].adapters["default"].down.detach()
    assert 0.9 / math.sqrt(32) < float(down.abs().max()) <= 1 / math.sqrt(32)


@pytest.mark.slow
def test_it_bears_what_every_kind_of_site_must():
    check_life(lambda: build("vit"), adaptc.Plan([method()]), batch_of("vit"), sites=2, unmergeable="cannot be folded")


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_a_checkpointed_block_computes_the_same(backend):
    base, batch = build("vit"), batch_of("vit")
    model = adaptc.compile(copy.deepcopy(base), method(), backend=backend).train()
    randomise(model)
    plain = step(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    again = step(model, batch)
    assert torch.equal(plain[0], again[0])
    assert max(relative_errors(again[1], plain[1]).values()) < 1e-6
    check_all_rewritten(model, 2)
    assert model.adaptc.sites[0].adapters["default"].tapped.value is None


@pytest.mark.slow
def test_sixteen_bit_arithmetic_is_as_exact_as_the_body_op_by_op():
    base = build("vit", num_hidden_layers=1).to(torch.bfloat16).train()
    model = adaptc.compile(copy.deepcopy(base), method(norm="in"), backend="aot_eager")
    plain = adaptc.compile(copy.deepcopy(base), method(norm="in"), backend="eager")
    assert {p.dtype for p in model.adaptc.parameters()} == {torch.float32}
    plain.load_state_dict(model.state_dict())
    batch = batch_of("vit")
    batch["pixel_values"] = batch["pixel_values"].bfloat16()
    want = formula_step(model, base, batch, norm="in")
    assert 0 < errors_of(*step(model, batch), want) <= 1.1 * errors_of(*step(plain, batch), want)


def test_files_round_trip(tmp_path):
    base, batch = build("vit"), batch_of("vit")
    model = adaptc.compile(copy.deepcopy(base), method(norm="out", learn_scale=True), backend="eager")
    randomise(model)
    model.adaptc.save(tmp_path)
    again = adaptc.compile(copy.deepcopy(base), str(tmp_path), backend="eager")
    assert torch.equal(again(**batch).logits, model(**batch).logits)
    assert not torch.equal(again(**batch).logits, base(**batch).logits)


class Late(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.first(x))


def test_a_tap_that_is_not_there_or_runs_too_late_is_an_error():
    with pytest.raises(SiteError, match=r"no module 'ln_2' to read from[\s\S]*layernorm_after"):
        adaptc.compile(build("vit"), method(tap="ln_2"), backend="eager")
    model = adaptc.compile(Late(), adaptc.AdaptFormer(targets=["first"], tap="norm", r=2), backend="eager")
    with pytest.raises(Exception, match="reads the input of norm, which has not run"):
        model(torch.ones(2, 4))


def test_what_it_refuses():
    with pytest.raises(SiteError, match="the width of Dropout is not known: say features="):
        adaptc.compile(build("vit"), method(targets=["dropout"]), backend="eager")


ILLEGAL = [
    ("r", 0), ("scale", float("nan")), ("learn_scale", 1), ("dropout", 1.0), ("norm", "both"), ("init", "bert"),
    ("tap", ""), ("features", 0),
]  # fmt: skip


@pytest.mark.parametrize("option, value", ILLEGAL)
def test_illegal_options_are_named(option, value):
    with pytest.raises(PlanError, match=f"AdaptFormer: {option} is not legal"):
        method(**{option: value})


@given(st.data())
def test_op_and_gradients_are_the_formula(data):
    """In fp64, to rounding, with autograd of torch through the formula written above."""
    args = list(ADAPTFORMER.sample(data.draw))
    args = [a.double().requires_grad_() if isinstance(a, torch.Tensor) else a for a in args]
    h, residual, down, up, down_bias, up_bias, scale, mask, weight, bias, norm = args
    leaves = [a for a in args if isinstance(a, torch.Tensor)]
    grad = torch.linspace(-1, 2, residual.numel(), dtype=torch.float64).view(residual.shape)
    got = torch.ops.adaptc.adaptformer(*args)
    found = [got.detach(), *torch.autograd.grad(got, leaves, grad)]
    named = {"down": down, "up": up, "down_bias": down_bias, "up_bias": up_bias, "scale": scale}
    named |= {"norm_weight": weight, "norm_bias": bias}
    formula = residual + branch(named, h, norm, 1.0 if mask is None else mask)
    want = [formula.detach(), *torch.autograd.grad(formula, leaves, grad)]
    for mine, theirs in zip(found, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("norm", NORMS)
def test_op_passes_gradcheck(norm):
    shapes = [(2, 3, 4), (2, 3, 4), (2, 4), (4, 2), (2,), (4,), (1,), (2, 3, 2)]
    shapes += [] if norm == "none" else [(4,), (4,)]
    tensors = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    args = (*tensors, *[None] * (10 - len(tensors)), norm)
    assert torch.autograd.gradcheck(torch.ops.adaptc.adaptformer, args)
    torch.library.opcheck(torch.ops.adaptc.adaptformer.default, args)
