"""LoRA's options: initial values from the weight, biases, optimizer groups; against PEFT and the mathematics."""

from __future__ import annotations

import copy
import types
import warnings

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.optimizers import create_loraplus_optimizer
from peft.tuners.lora.config import CordaConfig
from torch import nn
from transformers.pytorch_utils import Conv1D

import adaptc
from adaptc.errors import PlanError, SiteError
from adaptc.methods.lora import initial as lora_init
from adaptc.runtime.calibrate import covariances

FROM_WEIGHT = ["pissa", "pissa_niter_4", "olora", "corda"]


class Host(nn.Module):
    """Two projections of one input, one of another; K != N everywhere."""

    def __init__(self, kind=nn.Linear):
        super().__init__()
        if kind is Conv1D:
            self.q, self.k, self.out = Conv1D(10, 12), Conv1D(6, 12), Conv1D(7, 10)
        else:
            self.q, self.k, self.out = nn.Linear(12, 10), nn.Linear(12, 6, bias=False), nn.Linear(10, 7)

    def forward(self, x):
        hidden = torch.tanh(x)
        return self.out(torch.tanh(self.q(hidden))) + self.k(hidden).mean(-1, keepdim=True)


def host(kind=nn.Linear, seed=0):
    torch.manual_seed(seed)
    model = Host(kind)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) / 3)
    return model


def lora(init, **options):
    return adaptc.LoRA(**{"r": 2, "alpha": 3, "init": init, "targets": ["q", "k", "out"], **options})


def batches(count=5, rows=1):
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(rows, 9, 12, generator=generator) for _ in range(count)]


def compiled(base, init, backend="eager", **options):
    calibration = batches() if init == "corda" else None
    return adaptc.compile(base, lora(init, **options), backend=backend, calibration=calibration)


def adapters(model):
    return {site.path: site.adapters["default"] for site in model.adaptc.sites}


def give_eigens(base):
    """What PEFT's preparation leaves on each layer: the first directions of W (C + damping), in fp32."""
    seen = {path: [] for path in ("q", "k", "out")}
    hooks = [
        base.get_submodule(p).register_forward_pre_hook(lambda m, args, p=p: seen[p].append(args[0][0])) for p in seen
    ]
    with torch.no_grad():
        for batch in batches():
            base(batch)
    for hook in hooks:
        hook.remove()
    for path, inputs in seen.items():
        scaled = [x / x.max().abs() for x in inputs]
        C = sum(x.T @ x for x in scaled) / len(scaled)
        damped = C + 0.01 * C.diagonal().mean() * torch.eye(len(C))
        U, S, Vt = torch.linalg.svd(base.get_submodule(path).weight.detach() @ damped, full_matrices=False)
        V = (Vt @ torch.linalg.inv(damped)).T
        base.get_submodule(path).eigens = types.SimpleNamespace(
            U_WC=U[:, :2].clone(), S_WC=S[:2].clone(), V_WC=V[:, :2].clone()
        )


def peft_twin(base, init, **options):
    config = peft.LoraConfig(
        r=2, lora_alpha=3, init_lora_weights=init, target_modules=["q", "k", "out"], **options,
        corda_config=CordaConfig(corda_method="ipm") if init == "corda" else None,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if init == "corda":
            give_eigens(base)
        return peft.get_peft_model(base, config)


def rows_of(module):
    weight = module.weight.detach()
    return weight.T if isinstance(module, Conv1D) else weight


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
@pytest.mark.parametrize("init", FROM_WEIGHT)
def test_starts_as_the_base_and_leaves_it_alone(init, kind):
    base = host(kind)
    model = compiled(copy.deepcopy(base), init)
    x = torch.randn(3, 12)
    assert torch.equal(model(x), base(x)), "not a bit of the output changes"
    with torch.no_grad():
        for p in model.adaptc.parameters():
            p.add_(0.3 * torch.randn_like(p))
    assert not torch.allclose(model(x), base(x))
    with pytest.warns(adaptc.errors.NewSignatureWarning):
        model.adaptc.switch(None)
    assert torch.equal(model(x), base(x))
    model.adaptc.switch("default")
    model.adaptc.detach()
    assert torch.equal(model(x), base(x))
    for name, value in base.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)


@pytest.mark.parametrize("init", ["pissa", "olora", "corda"])
def test_factors_and_training_are_pefts(init):
    """PEFT's singular vectors may have the other sign; the function and its gradients do not see it."""
    model, twin = compiled(host(), init, "aot_eager"), peft_twin(host(), init)
    for path, adapter in adapters(model).items():
        layer = twin.base_model.model.get_submodule(path)
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        torch.testing.assert_close(adapter.lora_B @ adapter.lora_A, B @ A, rtol=1e-3, atol=2e-5)
        torch.testing.assert_close(adapter.lora_A.abs(), A.abs(), rtol=1e-3, atol=2e-4)
        with torch.no_grad():  # the same values from here on, to the bit
            residual = rows_of(model.get_submodule(path)) - 1.5 * adapter.initial_B @ adapter.initial_A
            layer.base_layer.weight.copy_(residual)
            for own, theirs in ((adapter.lora_A, A), (adapter.lora_B, B)):
                own.add_(0.1 * torch.randn_like(own))
                theirs.copy_(own)
    x = torch.randn(3, 12)
    got, want = model(x), twin(x)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    got.square().sum().backward()
    want.square().sum().backward()
    for path, adapter in adapters(model).items():
        layer = twin.base_model.model.get_submodule(path)
        torch.testing.assert_close(adapter.lora_A.grad, layer.lora_A["default"].weight.grad, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(adapter.lora_B.grad, layer.lora_B["default"].weight.grad, rtol=1e-4, atol=1e-4)
    assert [p for p in model.parameters() if p.requires_grad] == list(model.adaptc.parameters())


def test_pissa_with_dora_is_dora_of_the_change():
    base = host().double()
    model = compiled(copy.deepcopy(base), "pissa", dora=True)
    with torch.no_grad():
        for p in model.adaptc.parameters():
            p.add_(0.2 * torch.randn_like(p))
    x = torch.randn(3, 12, dtype=torch.float64)
    hidden, outputs = torch.tanh(x), {}
    for path, a in adapters(model).items():
        module = base.get_submodule(path)
        V = module.weight + 1.5 * (a.lora_B @ a.lora_A - a.initial_B @ a.initial_A)
        W = (a.lora_magnitude / V.norm(dim=1))[:, None] * V
        value = torch.tanh(outputs["q"]) if path == "out" else hidden
        outputs[path] = nn.functional.linear(value, W, module.bias)
    torch.testing.assert_close(model(x), outputs["out"] + outputs["k"].mean(-1, keepdim=True))


def test_pissa_of_full_rank_is_the_whole_weight():
    W = torch.randn(5, 8, dtype=torch.float64)
    A, B = lora_init.from_weight("pissa", W, 5, 0.7)
    torch.testing.assert_close(0.7 * B @ A, W)
    torch.testing.assert_close(A @ A.T, B.T @ B, msg="both factors hold the root of the singular values")


def test_pissa_niter_approaches_the_svd():
    W = torch.randn(30, 4, dtype=torch.float64) @ torch.randn(4, 20, dtype=torch.float64)
    A, B = lora_init.from_weight("pissa_niter_3", W, 4, 2.0)
    torch.testing.assert_close(2 * B @ A, W)
    torch.manual_seed(3)
    got = lora_init.from_weight("pissa_niter_1", torch.eye(6, 9) + W[:6, :9].float(), 2, 1.0)
    torch.manual_seed(3)
    U, S, V = torch.svd_lowrank(torch.eye(6, 9) + W[:6, :9].float(), 2, niter=1)
    torch.testing.assert_close(got, (S.sqrt()[:, None] * V.T, U * S.sqrt()))


def test_orthogonal_is_pefts():
    torch.manual_seed(4)
    A, B = lora_init.orthogonal(4, 12, 10)
    layer = peft.get_peft_model(host(), peft.LoraConfig(r=4, target_modules=["q"])).base_model.model.q
    torch.manual_seed(4)
    layer.orthogonal_init("default")
    torch.testing.assert_close((A, B), (layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data))
    assert A.any() and B.any()
    torch.testing.assert_close(B @ A, torch.zeros(10, 12), rtol=0, atol=1e-6)
    model = compiled(host(), "orthogonal")
    assert all(bool(p.any()) for p in model.adaptc.parameters())


# -- CorDA -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["ipm", "kpm"])
def test_corda_splits_the_weighted_svd(method):
    torch.manual_seed(0)
    W, X = torch.randn(6, 9, dtype=torch.float64), torch.randn(40, 9, dtype=torch.float64)
    C = X.T @ X / 40
    A, B = lora_init.from_covariance(W, C, 2, 1.0, method=method, path="site")
    damped = C + 0.01 * C.diagonal().mean() * torch.eye(9, dtype=torch.float64)
    S = torch.linalg.svdvals(W @ damped)
    chosen = S[:2] if method == "ipm" else S[-2:]
    torch.testing.assert_close((B @ A @ damped).norm(), chosen.norm())
    full = lora_init.from_covariance(W, C, 6, 1.0, method=method, path="site")
    torch.testing.assert_close(full[1] @ full[0], W)
    # The gauge law: a covariance c times as large moves a factor c^(1/2) from A to B.
    A4, B4 = lora_init.from_covariance(W, 4 * C, 2, 1.0, method=method, path="site")
    torch.testing.assert_close((A4.abs(), B4.abs()), (A.abs() / 2, B.abs() * 2))


def test_covariances_are_the_samples_and_computed_once_per_value():
    base = host()
    inputs = batches(rows=2)
    modules = {path: base.get_submodule(path) for path in ("q", "k", "out")}
    base.train()
    found = covariances(base, modules, iter(inputs))
    assert found.leader == {"q": "q", "k": "q", "out": "out"} and set(found.sums) == {"q", "out"}
    samples = [torch.tanh(x).double() for batch in inputs for x in batch]
    want = sum((x / x.max()).T @ (x / x.max()) for x in samples) / len(samples)
    torch.testing.assert_close(found.of("k").double(), want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(covariances(base, modules, inputs[::-1]).of("q"), found.of("q"))
    assert base.training and not any(m._forward_pre_hooks for m in base.modules())


def test_an_input_changed_in_place_is_another_value():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x):
            x = x.clone()
            y = self.a(x)
            x.mul_(torch.arange(1.0, 5.0))
            return y + self.b(x)

    model = InPlace()
    found = covariances(model, {"a": model.a, "b": model.b}, [torch.rand(3, 4)])
    assert found.leader == {"a": "a", "b": "b"}
    assert not torch.allclose(found.of("a"), found.of("b"))


def test_sharing_that_changes_between_batches_is_refused():
    class Fickle(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x):
            return self.a(x) + self.b(x if x.shape[0] == 2 else x + 1)

    model = Fickle()
    with pytest.raises(SiteError, match="shared with other modules in some calibration batches only"):
        covariances(model, {"a": model.a, "b": model.b}, [torch.rand(2, 4), torch.rand(3, 4)])


def test_calibration_sees_the_base_when_other_adapters_are_live():
    model = compiled(host(), "random")
    model.adaptc.add("second", lora("corda"), calibration=batches())
    fresh = compiled(host(), "corda")
    for site in model.adaptc.sites:
        assert torch.equal(site.adapters["second"].lora_A, adapters(fresh)[site.path].lora_A)
    assert model.adaptc.live == ("default",)


def test_corda_needs_batches_that_reach_every_site():
    with pytest.raises(PlanError, match="is to start from the covariance of its inputs"):
        adaptc.compile(host(), lora("corda"), backend="eager")
    for bad, message in (
        ([], "no calibration batch reached it"),
        ([torch.full((1, 9, 12), float("nan"))], "not finite"),
    ):
        base = host()
        with pytest.raises(SiteError, match=message):
            adaptc.compile(base, lora("corda"), backend="eager", calibration=bad)
        assert not hasattr(base, "adaptc") and not any(".adapters" in name for name, _ in base.named_modules())


# -- biases and groups -------------------------------------------------------------------------------------


def test_lora_bias_is_pefts():
    model = compiled(host(), "random", "aot_eager", lora_bias=True)
    twin = peft_twin(host(), False, lora_bias=True)
    for path, adapter in adapters(model).items():
        layer = twin.base_model.model.get_submodule(path)
        assert bool(adapter.lora_B_bias.any()), 'init "random" draws the bias too'
        with torch.no_grad():
            layer.lora_A["default"].weight.copy_(adapter.lora_A)
            layer.lora_B["default"].weight.copy_(adapter.lora_B)
            layer.lora_B["default"].bias.copy_(adapter.lora_B_bias)
    x = torch.randn(3, 12)
    got, want = model(x), twin(x)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    got.square().sum().backward()
    want.square().sum().backward()
    for path, adapter in adapters(model).items():
        theirs = twin.base_model.model.get_submodule(path).lora_B["default"].bias
        torch.testing.assert_close(adapter.lora_B_bias.grad, theirs.grad, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(adapter.delta_bias(), 1.5 * adapter.lora_B_bias.double())


def test_lora_plus_groups_are_pefts():
    """Second factors and every one-dimensional parameter learn faster."""
    model = compiled(host(), "default", dora=True, bias="lora_only")
    twin = peft_twin(host(), True, use_dora=True, bias="lora_only")
    ours = model.adaptc.param_groups(lr=1e-3, lr_ratio=16.0)
    theirs = create_loraplus_optimizer(twin, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0).param_groups
    shapes = [{}, {}]
    for found, groups in zip(shapes, (ours, theirs), strict=True):
        for group in groups:
            for parameter in group["params"]:
                found.setdefault(round(group["lr"], 9), []).append(tuple(parameter.shape))
    assert {lr: sorted(s) for lr, s in shapes[0].items()} == {lr: sorted(s) for lr, s in shapes[1].items()}
    assert sorted(shapes[0]) == [1e-3, 16e-3]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"init": "orthogonal", "r": 3}, "an even number"),
        ({"init": "pissa", "dropout": 0.1}, '0 with init "pissa"'),
        ({"init": "corda", "alpha": -1}, "a positive number"),
        ({"init": "pissa_niter_0"}, "init is not legal"),
        ({"corda_method": "both"}, "corda_method is not legal"),
        ({"lora_bias": True, "dora": True}, "no lora_bias with dora"),
        ({"lora_bias": True, "init": "olora"}, "with lora_bias"),
    ],
)
def test_combinations_without_a_meaning_are_refused(options, message):
    with pytest.raises(PlanError, match=message):
        adaptc.LoRA(**options)


def test_a_rank_that_the_weight_has_not_is_refused():
    with pytest.raises(SiteError, match=r"needs as many singular values, and the weight is \(6, 12\)"):
        adaptc.compile(host(), lora("pissa", r=7), backend="eager")


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_correction_written_in_place_is_as_exact_as_the_body(data):
    """In a bank a slot writes into the layer's output."""
    shape = data.draw(st.sampled_from([(5,), (1,), (2, 3), (0, 4), (7, 1)]))
    dtype, stored = (data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64])) for _ in range(2))
    strided, rank = data.draw(st.booleans()), data.draw(st.integers(1, 9))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    layer = torch.nn.Linear(16, 24)
    plan = adaptc.LoRA(r=rank, alpha=data.draw(st.sampled_from([1, 3, 16])), init="random", targets=["x"])
    adapter = plan.build("x", layer, dtype=stored, site_id=0)
    x = torch.randn(*shape, 16).to(dtype)
    y = torch.randn(*shape, 48).to(dtype)[..., ::2] if strided else torch.randn(*shape, 24).to(dtype)
    A, B = (p.detach().to(dtype).double() for p in (adapter.lora_A, adapter.lora_B))
    want = y.double() + adapter.scale.double() * (x.double() @ A.T @ B.T)
    with torch.no_grad():
        by_body = adapter.apply_to(layer, x, y)
        adapter.correct(layer, x, y)
    off = torch.linalg.vector_norm(by_body.double() - want)
    assert torch.linalg.vector_norm(y.double() - want) <= 1.1 * off + 1e-15 * (1 + torch.linalg.vector_norm(want))
