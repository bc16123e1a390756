"""SSF on real classes at each of its insertion points, against its formula in fp64; its folds; its op by itself."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import adaptc
from adaptc.errors import PlanError, SiteError
from adaptc.methods.ssf import SSF_AFFINE
from tests.methods.in_fp64 import check_against_formula, errors_of, formula_step, randomise
from tests.models import hosts
from tests.reference import check_all_rewritten, loss_of, step

#: Host -> sites of each kind (linear, norm, convolution, embedding), and how many.
PLACES = {
    # Not q_proj: its gradient here is a small difference of large terms, in fp32 exact to 3e-5 only.
    "llama": (["v_proj", "o_proj", "down_proj", "input_layernorm", "norm"], 5),
    "gpt2": (["c_attn", "c_fc", "ln_1", "wte"], 4),
    "bert": (["query", "attention.output.dense", "LayerNorm"], 5),
    "t5": (["q", "wo", "layer_norm", "final_layer_norm"], 12),
    "clip": (["patch_embedding", "q_proj", "layer_norm1", "fc2", "pre_layrnorm"], 14),
}


def after(tensors, module, x, y):
    scale, shift = tensors["ssf_scale"], tensors["ssf_shift"]
    if isinstance(module, nn.Conv2d):
        scale, shift = scale[:, None, None], shift[:, None, None]
    return scale * y + shift


def ssf(host, **options):
    return adaptc.SSF(targets=PLACES[host][0], **options)


@pytest.mark.parametrize("host", hosts.slowly(PLACES))
def test_every_class_computes_the_formula(host):
    base = hosts.short(host)
    backend = "aot_eager" if host in ("llama", "clip") else "eager"
    model = adaptc.compile(copy.deepcopy(base), ssf(host), backend=backend).train()
    randomise(model)
    check_against_formula(model, base, hosts.batch(host), after=after)
    check_all_rewritten(model, PLACES[host][1])


def test_sixteen_bit_result_is_rounded_once():
    base = hosts.short("llama", train=True).to(torch.bfloat16)
    model = adaptc.compile(copy.deepcopy(base), ssf("llama"), backend="aot_eager")
    assert {p.dtype for p in model.adaptc.parameters()} == {torch.float32}
    batch = hosts.batch("llama", rows=4, length=12)
    want = formula_step(model, base, batch, after=after)
    got = step(model, batch)
    # The same body on the same base, by plain hooks, op by op.
    plain = copy.deepcopy(base).requires_grad_(False)
    leaves = {}
    for site in model.adaptc.sites:
        own = {n: p.detach().clone().requires_grad_() for n, p in site.adapters["default"].named_parameters()}
        leaves.update({f"{site.path}.adapters.default.{n}": p for n, p in own.items()})
        plain.get_submodule(site.path).register_forward_hook(
            lambda m, args, y, own=own: (y * own["ssf_scale"] + own["ssf_shift"]).to(y.dtype)
        )
    loss = loss_of(plain(**batch))
    loss.backward()
    body = loss.detach().double(), {n: p.grad.double() for n, p in leaves.items()}
    assert 0 < errors_of(*got, want) <= 1.1 * errors_of(*body, want)


class Layers(nn.Module):
    """Modules whose channels lie in different dimensions, and torch's attention, which returns a pair."""

    def __init__(self) -> None:
        super().__init__()
        self.convolve = nn.Conv1d(3, 6, 2)
        self.batch = nn.BatchNorm1d(6)
        self.group = nn.GroupNorm(2, 6)
        self.image = nn.Conv2d(6, 4, (1, 2))
        self.attend = nn.MultiheadAttention(4, 2, batch_first=True)
        self.embed = nn.Embedding(7, 4)

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        h = self.group(self.batch(self.convolve(x)))
        h = self.image(h[:, :, None]).flatten(2).transpose(1, 2) + self.embed(ids)
        return self.attend(h, h, h)[0]


def test_channels_lie_where_the_module_puts_them():
    torch.manual_seed(1)
    base = Layers()
    x, ids = torch.randn(5, 3, 8), torch.randint(0, 7, (5, 6))
    method = adaptc.SSF(targets=[name for name, _ in base.named_children()])
    model = adaptc.compile(copy.deepcopy(base), method, backend="aot_eager")
    randomise(model)
    want = copy.deepcopy(base).double()
    for site in model.adaptc.sites:
        adapter = site.adapters["default"]
        scale, shift = adapter.ssf_scale.detach().double(), adapter.ssf_shift.detach().double()

        def correct(module, args, y, scale=scale, shift=shift):
            if isinstance(y, tuple):
                return (y[0] * scale + shift, *y[1:])
            first = isinstance(module, nn.Conv1d | nn.Conv2d | nn.BatchNorm1d | nn.GroupNorm)
            shape = (-1, *[1] * (y.dim() - 2 if first else 0))
            return y * scale.view(shape) + shift.view(shape)

        want.get_submodule(site.path).register_forward_hook(correct)
    torch.testing.assert_close(model(x, ids).double(), want(x.double(), ids), rtol=1e-5, atol=1e-5)
    assert len(model.adaptc.sites) == 6 and model.adaptc.idle_sites() == [] and model.adaptc.eager_sites() == []


def test_identity_is_the_base_and_default_is_not():
    base, batch = hosts.short("llama"), hosts.batch("llama")
    same = adaptc.compile(copy.deepcopy(base), ssf("llama", init="identity"), backend="eager")
    assert torch.equal(same(**batch).logits, base(**batch).logits)
    drawn = adaptc.compile(copy.deepcopy(base), ssf("llama"), backend="eager")
    scales = torch.cat([p.detach() for n, p in drawn.adaptc.named_parameters() if n.endswith("scale")])
    shifts = torch.cat([p.detach() for n, p in drawn.adaptc.named_parameters() if n.endswith("shift")])
    assert abs(float(scales.mean()) - 1) < 4e-3 and abs(float(shifts.mean())) < 4e-3
    assert 0.017 < float(scales.std()) < 0.023 and 0.017 < float(shifts.std()) < 0.023


@pytest.mark.slow
def test_it_folds_into_linear_layers_convolutions_and_norms():
    """W' = diag(gamma) W, b' = gamma * b + beta, exact in real numbers: the fp64 model agrees to rounding."""
    base = hosts.short("clip").double()
    batch = hosts.batch("clip")
    batch["pixel_values"] = batch["pixel_values"].double()
    model = adaptc.compile(copy.deepcopy(base), ssf("clip"), backend="eager")
    randomise(model)
    for site in model.adaptc.sites:
        adapter, layer = site.adapters["default"], base.get_submodule(site.path)
        with torch.no_grad():
            scale = adapter.ssf_scale.view(-1, *[1] * (layer.weight.dim() - 1))
            layer.weight.mul_(scale)
            bias = torch.zeros_like(adapter.ssf_shift) if layer.bias is None else layer.bias
            layer.bias = nn.Parameter(adapter.ssf_scale * bias + adapter.ssf_shift)
    torch.testing.assert_close(model(**batch).logits_per_image, base(**batch).logits_per_image, rtol=1e-9, atol=1e-9)


def test_what_it_refuses():
    with pytest.raises(SiteError, match="the channels of LlamaMLP are not known"):
        adaptc.compile(hosts.short("llama"), adaptc.SSF(targets=["mlp"]), backend="eager")
    with pytest.raises(PlanError, match="SSF: init is not legal"):
        adaptc.SSF(targets=["q_proj"], init="ones")


@given(st.data())
def test_op_and_gradients_are_the_formula(data):
    """y' = y * c + s, dy = g * c, dc = sum g * y, ds = sum g, the sums over all but the channel."""
    y, scale, shift, first = SSF_AFFINE.sample(data.draw)
    grad = torch.linspace(-1, 2, y.numel(), dtype=torch.float64).reshape(y.shape).to(y.dtype)
    for t in (y, scale, shift):
        t.requires_grad_()
    got = torch.ops.adaptc.ssf_affine(y, scale, shift, first)
    found = [got.detach(), *torch.autograd.grad(got, (y, scale, shift), grad)]
    y64, c, s, g = (t.detach().double() for t in (y, scale, shift, grad))
    channel = 1 if first else y.dim() - 1
    shape = [y.shape[i] if i == channel else 1 for i in range(y.dim())]
    others = [i for i in range(y.dim()) if i != channel]
    want = [y64 * c.view(shape) + s.view(shape), g * c.view(shape), (g * y64).sum(others), g.sum(others)]
    size = [
        (y64 * c.view(shape)).abs() + s.view(shape).abs(), (g * c.view(shape)).abs(),
        (g * y64).abs().sum(others), g.abs().sum(others),
    ]  # fmt: skip
    eps = torch.finfo(y.dtype).eps * (3 + y.numel() // y.shape[channel])
    for mine, formula, magnitude, like in zip(found, want, size, (y, y, scale, shift), strict=True):
        assert (mine.dtype, mine.shape) == (like.dtype, like.shape)
        assert ((mine.double() - formula).abs() <= eps * magnitude).all()


@pytest.mark.parametrize("first", [True, False])
def test_op_passes_gradcheck(first):
    y, scale, shift = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 3, 3), (3,), (3,)))
    assert torch.autograd.gradcheck(torch.ops.adaptc.ssf_affine, (y, scale, shift, first))
    torch.library.opcheck(torch.ops.adaptc.ssf_affine.default, (y, scale, shift, first))
