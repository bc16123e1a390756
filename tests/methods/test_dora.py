"""DoRA against PEFT on real classes, and its ops against their formulas."""

from __future__ import annotations

import copy
import dataclasses
import re
import warnings

import peft
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import adaptc
from adaptc.codegen.ops import dora, registry
from adaptc.codegen.ops.dora import bf16_parts
from adaptc.errors import SiteError, UnsupportedError
from adaptc.ir import dialect
from adaptc.ir.ops.dora import row_norm
from tests.models import hosts
from tests.passes.graphs import ops
from tests.passes.models import adapted, trained_graph
from tests.reference import check_all_rewritten, relative_errors, step

LOSS, GRADIENT = 1e-6, 1e-5
OPTIONS = {"r": 3, "alpha": 6, "init": "random", "dora": True, "targets": "all-linear"}
OURS = re.compile(r"^base_model\.model\.(.*)\.(lora_A|lora_B|lora_magnitude)(?:_vector)?\.(\w+)\.weight$")
VIEWS = {"permute", "t", "transpose", "slice", "view", "split", "getitem", "unsqueeze"}


def randomise_magnitudes(model):
    """Away from the row norms, so that the factor m / n is not one."""
    with torch.no_grad():
        for site in model.adaptc.sites:
            for adapter in site.adapters.values():
                adapter.lora_magnitude.mul_(1 + 0.3 * torch.rand_like(adapter.lora_magnitude))


def copy_values(model, twin, name="default"):
    for site in model.adaptc.sites:
        adapter, layer = site.adapters[name], twin.base_model.model.get_submodule(site.path)
        with torch.no_grad():
            layer.lora_A[name].weight.copy_(adapter.lora_A)
            layer.lora_B[name].weight.copy_(adapter.lora_B)
            layer.lora_magnitude_vector[name].weight.copy_(adapter.lora_magnitude)


def config_of(model, **options):
    return peft.LoraConfig(
        r=3, lora_alpha=6, use_dora=True, target_modules=[s.path for s in model.adaptc.sites], **options
    )


def peft_twin(base, model, **options):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to False")
        twin = peft.get_peft_model(base, config_of(model, **options))
    copy_values(model, twin)
    return twin


def by_our_names(gradients):
    return {OURS.sub(r"\1.adapters.\3.\2", name): g for name, g in gradients.items()}


def check_same(model, twin, batch):
    loss, got = step(model, batch)
    want_loss, want = step(twin, batch)
    want = by_our_names(want)
    assert len(got) == len(list(model.adaptc.parameters()))
    assert abs(loss / want_loss - 1) < LOSS
    errors = relative_errors(got, want)
    assert max(errors.values()) < GRADIENT, max(errors, key=errors.get)


@pytest.mark.parametrize("host", hosts.slowly(["llama", "gpt2", "bert"], also=("gpt2", "bert")))
def test_every_class_computes_what_peft_computes(host):
    base = hosts.short(host, train=True)
    model = adaptc.compile(copy.deepcopy(base), adaptc.LoRA(**OPTIONS), backend="aot_eager")
    randomise_magnitudes(model)
    twin = peft_twin(base, model)
    for train in (True, False):
        check_same(model.train(train), twin.train(train), hosts.batch(host))
    check_all_rewritten(model, {"llama": 7, "gpt2": 4, "bert": 7}[host])
    if host == "llama":  # the others' frames are cut, or captured again, by transformers itself
        assert len(model.adaptc.graphs) == 2, "one for training, one for evaluation"


@pytest.mark.parametrize("host", hosts.slowly(["llama", "gpt2"], also=["gpt2"]))
def test_dropout_is_pefts(host):
    """Equal seeds draw equal masks, because both draw one a site in the order of the calls."""
    plan = adaptc.Plan([adaptc.LoRA(**OPTIONS, dropout=0.25)], passes={"skip": ["seed_dropout"]})
    model = adaptc.compile(hosts.short(host, train=True), plan, backend="eager")
    randomise_magnitudes(model)
    twin = peft_twin(hosts.short(host), model, lora_dropout=0.25).train()
    batch = hosts.batch(host)
    torch.manual_seed(5)
    loss, got = step(model, batch)
    torch.manual_seed(5)
    want_loss, want = step(twin, batch)
    assert abs(loss / want_loss - 1) < LOSS
    assert max(relative_errors(got, by_our_names(want)).values()) < GRADIENT
    torch.manual_seed(6)
    assert abs(step(model, batch)[0] / want_loss - 1) > 1e-5, "another mask, another loss"
    check_same(model.eval(), twin.eval(), batch)


class Two(nn.Module):
    """Two linear layers, K != N, the second without bias."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(24, 40), nn.Linear(40, 32, bias=False)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def test_starts_as_the_base_to_the_bit():
    base = Two()
    model = adaptc.compile(copy.deepcopy(base), adaptc.LoRA(**{**OPTIONS, "init": "default"}), backend="eager")
    x = torch.randn(3, 24)
    assert torch.equal(model(x), base(x))
    for site in model.adaptc.sites:
        magnitude = site.adapters["default"].lora_magnitude
        want = torch.linalg.vector_norm(site.module.weight.double(), dim=1)
        torch.testing.assert_close(magnitude.double(), want, rtol=1e-6, atol=0)


def test_row_norms_follow_a_weight_that_changes_in_place():
    base = Two()
    model = adaptc.compile(copy.deepcopy(base), adaptc.LoRA(**OPTIONS), backend="aot_eager").eval()
    x = torch.randn(3, 24)
    model(x)
    for module in (base, model):
        with torch.no_grad():
            module.up.weight.mul_(1.5)
    twin = peft_twin(base, model).eval()
    torch.testing.assert_close(model(x), twin(x), rtol=1e-5, atol=1e-6)


def test_two_live_adapters_compose_as_in_peft():
    base = Two()
    model = adaptc.compile(copy.deepcopy(base), adaptc.LoRA(**OPTIONS), backend="aot_eager")
    model.adaptc.add("second", adaptc.LoRA(**OPTIONS))
    randomise_magnitudes(model)
    twin = peft_twin(base, model)
    twin.add_adapter("second", config_of(model))
    copy_values(model, twin, "second")
    x = torch.randn(3, 24)
    found = []
    for order in (["default", "second"], ["second", "default"]):
        model.adaptc.switch(order)
        twin.base_model.set_adapter(order)
        found.append(model(x))
        torch.testing.assert_close(found[-1], twin(x), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(*found), "the order matters"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("kernel", [True, False])
def test_no_node_of_a_training_step_is_as_large_as_the_weight(dtype, dropout, kernel, monkeypatch):
    if not kernel:
        row = dataclasses.replace(registry.row("dora_row_norm"), whole=lambda device, *args: False)
        monkeypatch.setitem(registry.ROWS, "dora_row_norm", row)
    base = nn.Sequential(nn.Linear(48, 40)).to(dtype)
    lora = adaptc.LoRA(**{**OPTIONS, "targets": "0", "dropout": dropout})
    model = adaptc.compile(base, lora, backend="aot_eager")
    x = torch.randn(3, 48, dtype=dtype, requires_grad=True)
    model(x).sum().backward()
    (graph,) = model.adaptc.graphs
    joint = graph.graph_module("lower")
    size = 40 * 48
    values = [(n, n.meta["val"]) for n in joint.graph.nodes if n.op == "call_function"]
    large = {
        n.name for n, v in values
        if isinstance(v, torch.Tensor) and v.numel() >= size and n.target.__name__.split(".")[0] not in VIEWS
    }  # fmt: skip
    assert large == set()
    blocks = [v.numel() for n, v in values if isinstance(v, torch.Tensor) and v.shape[-1] == 48 and v.dim() == 2]
    norms = joint.graph.find_nodes(op="call_function", target=dialect.get("dora_row_norm").overload)
    assert len(norms) == kernel
    assert kernel or max(b for b in blocks if b < size) == size // 8


def test_a_weight_that_is_no_plain_tensor_is_refused():
    class Wrapped(torch.Tensor):
        pass

    base = Two()
    base.up.weight = nn.Parameter(torch.randn(40, 24).as_subclass(Wrapped))
    with pytest.raises(SiteError, match="no plain dense tensor"):
        adaptc.compile(base, adaptc.LoRA(**{**OPTIONS, "targets": "up"}), backend="eager")


def test_delta_is_what_the_layer_computes_more():
    base = Two().double()
    model = adaptc.compile(copy.deepcopy(base), adaptc.LoRA(**OPTIONS), backend="eager").eval()
    randomise_magnitudes(model)
    x = torch.randn(3, 24, dtype=torch.float64)
    for site in model.adaptc.sites:
        layer = base.get_submodule(site.path)
        with torch.no_grad():
            layer.weight += site.adapters["default"].delta(layer.weight)
    torch.testing.assert_close(model(x), base(x), rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="depends on the frozen weight"):
        model.adaptc.sites[0].adapters["default"].delta()


# -- the ops -----------------------------------------------------------------------------------------------


def norm_formula(weight, A, B, scale, transposed):
    W = weight.double().T if transposed else weight.double()
    return torch.linalg.vector_norm(W + scale.double() * (B.double() @ A.double()), dim=1)


@given(data=st.data())
def test_row_norms_are_those_of_the_corrected_weight(data):
    weight, A, B, scale, transposed = dialect.get("dora_row_norm").sample(data.draw)
    got = dialect.get("dora_row_norm").overload(weight, A, B, scale, transposed)
    want = norm_formula(weight, A, B, scale, transposed)
    # Where the correction cancels the weight, what is left is rounding of the two.
    W = weight.double().T if transposed else weight.double()
    size = torch.linalg.vector_norm(W.abs() + scale.double().abs() * (B.double().abs() @ A.double().abs()), dim=1)
    assert got.dtype == (torch.float64 if weight.dtype == torch.float64 else torch.float32)
    eps = torch.finfo(got.dtype).eps
    assert bool(((got.double() ** 2 - want**2).abs() <= 8 * eps * size**2).all())


#: Of a row norm that is a tenth of its terms, whose squares so lose two digits; with two parts of an A it is 7e-4.
CANCELLED = 1e-4


def nearly_cancelled():
    """A weight in bf16 that the correction takes to about a tenth, row by row."""
    torch.manual_seed(0)
    A, B, scale = torch.randn(16, 1000) / 32, torch.randn(300, 16), torch.tensor([0.5])
    return (-0.9 * scale * B @ A).bfloat16(), A, B, scale


@pytest.mark.parametrize("parts, exact", [(3, True), (2, False)])
def test_row_norms_of_a_16_bit_weight_where_its_products_are_summed_in_fp32(parts, exact, monkeypatch):
    """As a GPU does it: what is multiplied is rounded to bf16, what is summed is not."""
    mm = torch.mm

    def of_bf16(left, right, out_dtype):
        assert left.dtype == right.dtype == torch.bfloat16
        return mm(left.to(out_dtype), right.to(out_dtype))

    monkeypatch.setattr(dora, "PARTS", parts)
    monkeypatch.setattr(torch, "mm", of_bf16)
    W, A, B, scale = nearly_cancelled()
    assert dora.IN_BF16.takes(W, A, B, scale, False)
    got = dora.IN_BF16.run(W, A, B, scale, False)
    want = (W.double() + scale.double() * B.double() @ A.double()).norm(dim=1)
    assert got.dtype == torch.float32
    assert (float(((got - want) / want).abs().max()) < CANCELLED) == exact


@pytest.mark.inductor
@pytest.mark.parametrize("compiled", [False, True])
def test_parts_in_bf16_add_up_to_an_fp32(compiled):
    """In generated code too, which computes in fp32 what is cast to bf16 and back."""
    t = torch.randn(3, 1000) * torch.exp(10 * torch.randn(3, 1000))
    t[0, :3] = torch.tensor([0.0, -0.0, 2.0**-100])
    parts = (torch.compile(bf16_parts) if compiled else bf16_parts)(t)
    assert all(part.dtype == torch.bfloat16 for part in parts)
    assert torch.equal(sum(part.double() for part in parts), t.double())


def test_row_norms_of_a_16_bit_weight_are_exact_to_fp32():
    torch.manual_seed(0)
    weight, A, B = torch.randn(33, 200).bfloat16(), torch.randn(4, 200) / 14, torch.randn(33, 4)
    got = dialect.get("dora_row_norm").overload(weight, A, B, torch.tensor([0.5]).double(), False)
    want = norm_formula(weight, A, B, torch.tensor([0.5]), False)
    assert float((got / want - 1).abs().max()) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_row_norms_are_not_cast_by_autocast(dtype):
    """Neither by the first call, which runs through Python, nor by those behind it."""
    W, A, B, scale = torch.randn(20, 30).to(dtype), torch.randn(4, 30), torch.randn(20, 4), torch.tensor([0.5]).double()
    op = dialect.get("dora_row_norm").overload
    with torch.autocast("cpu", torch.bfloat16):
        found = [op(W, A, B, scale, False) for _ in range(2)]
    for got in found:
        torch.testing.assert_close(got.double(), norm_formula(W, A, B, scale, False), rtol=1e-6, atol=0)


def test_row_norms_under_the_transforms_of_torch_func():
    W, A, B, scale = torch.randn(5, 7), torch.randn(3, 2, 7), torch.randn(3, 5, 2), torch.tensor([0.5])
    got = torch.func.vmap(lambda a, b: row_norm(W, a, b, scale, False))(A, B)
    want = torch.stack([norm_formula(W, a, b, scale, False) for a, b in zip(A, B, strict=True)])
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)


def test_a_row_that_the_correction_cancels_has_norm_zero_not_nan():
    A, B = torch.randn(2, 7), torch.randn(5, 2)
    got = dialect.get("dora_row_norm").overload(-(B @ A), A, B, torch.ones(1, dtype=torch.float64), False)
    assert bool(got.isfinite().all()) and float(got.max()) < 1e-2


def linear_formula(x, y, base, bias, A, B, magnitude, norm, scale):
    c = magnitude / norm
    z = base if base is not None else y if bias is None else y - bias
    return y + (c - 1) * z + c * scale * (x @ A.T @ B.T)


@given(data=st.data())
@settings(max_examples=60)
def test_values_and_gradients_are_the_formulas(data):
    args = dialect.get("dora_linear").sample(data.draw)
    # With a base nothing is read of the bias.
    trained = (0, 1, 2, 4, 5, 6) if args[2] is not None else (0, 1, 3, 4, 5, 6)
    got_leaves, leaves = [], []
    for i, a in enumerate(args):
        wants = i in trained
        got_leaves.append(None if a is None else a.clone().requires_grad_(wants))
        leaves.append(None if a is None else a.double().requires_grad_(wants))
    out, h = dialect.get("dora_linear").overload(*got_leaves)
    want = linear_formula(*leaves)
    seed = torch.linspace(-1, 1, want.numel(), dtype=torch.float64).reshape(want.shape)
    used = [i for i in trained if args[i] is not None]
    grads = torch.autograd.grad(out, [got_leaves[i] for i in used], seed.to(out.dtype))
    wants = torch.autograd.grad(want, [leaves[i] for i in used], seed.to(out.dtype).double())
    assert not h.requires_grad and out.is_contiguous()
    eps = torch.finfo(out.dtype).eps
    for got, exact in zip((out, *grads), (want, *wants), strict=True):
        # Every sum here has at most 9 x 16 terms of at most a few hundred.
        bound = 4 * eps * max(1.0, float(exact.detach().abs().max())) * 40
        assert float((got.detach().double() - exact.detach()).abs().max()) <= bound
    assert [g.dtype for g in grads] == [args[i].dtype for i in used]


@pytest.mark.parametrize(
    "name",
    ["dora_linear", "dora_row_norm", "dora_expand", "dora_output_grads", "dora_rescale", "dora_rescale_grad",
     "dora_factor"],
)
@given(data=st.data())
@settings(max_examples=30)
def test_fakes_tell_shapes_and_dtypes(name, data):
    op = dialect.get(name)
    args = op.sample(data.draw)
    meta = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in args]
    found, told = op.body(*args), op.fake(*meta)
    pairs = zip(found, told, strict=True) if isinstance(found, list | tuple) else [(found, told)]
    for got, fake in pairs:
        assert (got.shape, got.dtype, got.stride()) == (fake.shape, fake.dtype, fake.stride())
    if op.cost is None:
        return
    cost = op.cost(*meta)
    assert cost.flops > 0 and cost.read > 0 and cost.written > 0


def test_second_derivatives_are_the_formulas():
    torch.manual_seed(0)
    shapes = [(3, 5), (3, 4), None, (4,), (2, 5), (4, 2), (4,), (4,), (1,)]
    args = [None if s is None else torch.rand(s, dtype=torch.float64) + 0.5 for s in shapes]
    chosen = (0, 1, 3, 4, 5, 6)

    def run(function):
        leaves = [None if a is None else a.clone().requires_grad_(i in chosen) for i, a in enumerate(args)]
        out = function(*leaves)
        first = torch.autograd.grad(out.square().sum(), [leaves[i] for i in chosen], create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), [leaves[i] for i in chosen])

    for got, want in zip(run(lambda *a: dialect.get("dora_linear").overload(*a)[0]), run(linear_formula), strict=True):
        torch.testing.assert_close(got, want)


def test_a_scale_is_refused_a_gradient():
    shapes = [(3, 5), (3, 4), None, (4,), (2, 5), (4, 2), (4,), (4,), (1,)]
    args = [None if s is None else torch.ones(s) for s in shapes]
    args[8].requires_grad_()
    with pytest.raises(UnsupportedError, match="its scale is frozen"):
        dialect.get("dora_linear").overload(*args)


class Biased(nn.Module):
    """Adapted layers with a bias, and others around them."""

    def __init__(self):
        super().__init__()
        self.embed, self.first = nn.Embedding(11, 8), nn.Linear(8, 12)
        self.norm, self.last = nn.LayerNorm(12), nn.Linear(12, 5)

    def forward(self, ids):
        return self.last(self.norm(F.gelu(self.first(self.embed(ids)))))


@pytest.mark.parametrize("dropout", [0.0, 1e-12], ids=["without dropout", "a dropout that drops nothing"])
@pytest.mark.parametrize("backend", [
    "aot_eager", *(pytest.param(b, marks=pytest.mark.slow) for b in ("eager", "inductor")),
])  # fmt: skip
def test_what_a_user_unfreezes_beside_it_has_pefts_gradients(backend, dropout):
    """Biases, norms, weights of adapted and other layers: the row norms are constants all the same."""
    torch.manual_seed(0)
    base, ids = Biased(), torch.randint(0, 11, (3, 4))
    method = adaptc.LoRA(r=3, alpha=6, dora=True, init="random", dropout=dropout, targets=["first", "last"])
    model = adaptc.compile(copy.deepcopy(base), method, backend=backend).train()
    randomise_magnitudes(model)
    twin = peft_twin(base, model, lora_dropout=dropout).double().train()
    for one in (model, twin):
        one.requires_grad_(True)
        one(ids).square().sum().backward()
    got = {n: p.grad for n, p in model.named_parameters() if ".adapters." not in n}
    found = ((n.removeprefix("base_model.model."), p.grad) for n, p in twin.named_parameters() if "lora_" not in n)
    want = {name.replace(".base_layer", ""): gradient for name, gradient in found}
    assert got.keys() == want.keys()
    errors = relative_errors({name: gradient.double() for name, gradient in got.items()}, want)
    assert max(errors.values()) < GRADIENT, max(errors, key=errors.get)


def rescale_formula(y, bias, magnitude, norm):
    c = magnitude / norm
    return c * y + (0 if bias is None else (1 - c) * bias)


@given(data=st.data())
def test_the_factor_per_column_and_its_gradients_are_the_formulas(data):
    args = dialect.get("dora_rescale").sample(data.draw)
    chosen = [i for i in (0, 1, 2) if args[i] is not None]
    leaves = [None if a is None else a.clone().requires_grad_(i in chosen) for i, a in enumerate(args)]
    exact = [None if a is None else a.double().requires_grad_(i in chosen) for i, a in enumerate(args)]
    out, want = dialect.get("dora_rescale").overload(*leaves), rescale_formula(*exact)
    seed = torch.linspace(-1, 1, want.numel(), dtype=torch.float64).reshape(want.shape)
    grads = torch.autograd.grad(out, [leaves[i] for i in chosen], seed.to(out.dtype))
    wants = torch.autograd.grad(want, [exact[i] for i in chosen], seed.to(out.dtype).double())
    assert out.is_contiguous() and grads[0].is_contiguous()
    # At most 16 terms, each of at most 2 x 4, and a quotient of at most 4.
    bound = 64 * 4 * torch.finfo(out.dtype).eps
    for got, one in zip((out, *grads), (want, *wants), strict=True):
        assert got.dtype == out.dtype
        assert float((got.detach().double() - one.detach()).abs().max()) <= bound


@pytest.mark.parametrize("has_bias", [False, True])
def test_second_derivatives_of_the_factor_per_column(has_bias):
    y, bias, m, n = (torch.rand(s, dtype=torch.float64) + 0.5 for s in ((3, 4), (4,), (4,), (4,)))
    y.requires_grad_()
    m.requires_grad_()

    def rescale(y, m):
        return dialect.get("dora_rescale").overload(y, bias if has_bias else None, m, n)

    assert torch.autograd.gradcheck(rescale, (y, m)) and torch.autograd.gradgradcheck(rescale, (y, m))


def test_a_factor_of_one_keeps_every_bit_in_16_bits():
    y, norm = torch.randn(3, 5).bfloat16(), torch.rand(5) + 0.5
    args = y, None, torch.randn(5).bfloat16(), torch.zeros(3, 2).bfloat16(), torch.randn(5, 2), norm, norm
    assert torch.equal(dialect.get("dora_expand").overload(*args), y)
    assert torch.equal(dialect.get("dora_expand").body(*args), y)


def test_a_factor_of_one_keeps_every_bit():
    y, bias, n = torch.randn(3, 5), torch.randn(5), torch.rand(5) + 0.5
    assert torch.equal(dialect.get("dora_rescale").overload(y, bias, n, n), y)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sites_that_read_one_value_share_it(dtype):
    model = hosts.short("llama", train=True).to(dtype)
    model = adaptc.compile(model, adaptc.LoRA(**OPTIONS), backend="aot_eager", verify="raise")
    model(**hosts.batch("llama")).loss.backward()
    (graph,) = model.adaptc.graphs
    gm = graph.graph_module("share")
    shrinks, grads, inputs = (
        gm.graph.find_nodes(op="call_function", target=dialect.get(name).overload)
        for name in ("lora_shrink", "lora_factor_grads", "lora_input_grads")
    )
    # In 16 bits the two sites that share with none have their bottleneck as a node of its own too.
    assert sorted(len(node.args[1]) for node in shrinks) == [1] * (2 * (dtype == torch.bfloat16)) + [2, 3]
    assert sorted(len(node.args[0]) for node in grads) == [2, 3]
    assert max(len(node.args[1]) for node in inputs) == 2, "nothing below the first layer needs a gradient"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_every_rewrite_is_its_reference(dtype, dropout):
    """``insert`` to the bit, the rest in fp64; without dropout in 32 bits the low-rank part is LoRA's."""
    _, model = adapted(dtype=dtype, dora=True, dropout=dropout, verify="raise")
    found = ops(trained_graph(model, dtype=dtype).graph_module("canonicalise"))
    as_lora = dropout == 0 and dtype.itemsize >= 4
    assert (found.get("lora_linear"), found.get("dora_rescale")) == ((2, 2) if as_lora else (None, None))
    assert found.get("dora_linear") == (None if as_lora else 2)
