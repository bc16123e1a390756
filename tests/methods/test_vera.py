"""VeRA on real classes, against its formula in fp64 and against PEFT; its shared matrices; its op by itself."""

from __future__ import annotations

import copy
import math
import pickle
import re
import warnings

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import adaptc
from adaptc.errors import PlanError, SiteError
from adaptc.methods.vera import VERA
from tests.methods.in_fp64 import check_against_formula, errors_of, formula_step, randomise
from tests.models import hosts
from tests.reference import check_all_rewritten, relative_errors, step

#: Host -> sites of different shapes, how many, and the largest input and output among them.
PLACES = {
    "llama": (["q_proj", "k_proj", "down_proj"], 3, 96, 64),
    "gpt2": (["c_attn", "c_proj"], 3, 96, 192),
    "bert": (["query", "intermediate.dense"], 2, 64, 96),
    "t5": (["q", "wo"], 5, 96, 64),
    "clip": (["q_proj", "fc2"], 8, 80, 64),
}
R, KEY = 5, 7


def vera(host="llama", **options):
    options = {"r": R, "projection_prng_key": KEY, "init": "random", "targets": PLACES[host][0], **options}
    return adaptc.VeRA(**options)


def matrices(r, inputs, outputs, key):
    """A then B from one generator, uniform on +-sqrt(6 / fan_in), in fp32."""
    generator = torch.Generator().manual_seed(key)
    bounds = [math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(fan)) for fan in (inputs, r)]
    shapes = [(r, inputs), (outputs, r)]
    return [torch.empty(s).uniform_(-b, b, generator=generator) for s, b in zip(shapes, bounds, strict=True)]


def formula(host, dtype=torch.float32):
    """With matrices that were rounded to ``dtype``."""
    A, B = (t.to(dtype).double() for t in matrices(R, *PLACES[host][2:], KEY))

    def after(tensors, module, x, y):
        d, b = tensors["vera_lambda_d"], tensors["vera_lambda_b"]
        return y + (x @ A[:, : x.shape[-1]].T * d) @ B[: y.shape[-1]].T * b

    return after


def projections(model):
    return [site.adapters["default"].projections for site in model.adaptc.sites]


def peft_twin(base, model, **options):
    """``base`` wrapped by PEFT, with the vectors of the compiled ``model`` (not its matrices)."""
    sites = {site.path: site.adapters["default"] for site in model.adaptc.sites}
    config = peft.VeraConfig(**{"r": R, "target_modules": list(sites), "projection_prng_key": KEY, **options})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to False")
        twin = peft.get_peft_model(base, config)
    for path, adapter in sites.items():
        layer = twin.base_model.model.get_submodule(path)
        with torch.no_grad():
            layer.vera_lambda_b["default"].copy_(adapter.vera_lambda_b)
            layer.vera_lambda_d["default"].copy_(adapter.vera_lambda_d)
    return twin


def peft_step(twin, batch):
    loss, gradients = step(twin, batch)
    ours = re.compile(r"^base_model\.model\.(.*)\.(vera_lambda_[bd])\.default$")
    return loss, {ours.sub(r"\1.adapters.default.\2", name): g for name, g in gradients.items()}


@pytest.mark.parametrize("host", hosts.slowly(PLACES, also=["gpt2"]))
def test_every_class_computes_the_formula(host):
    base = hosts.short(host)
    model = adaptc.compile(copy.deepcopy(base), vera(host), backend="eager").train()
    randomise(model)
    check_against_formula(model, base, hosts.batch(host), after=formula(host))
    check_all_rewritten(model, PLACES[host][1])


@pytest.mark.parametrize("host", hosts.slowly(["llama", "gpt2"], also=["gpt2"]))
def test_the_lowered_graph_computes_what_peft_computes(host):
    model = adaptc.compile(hosts.short(host, train=True), vera(host), backend="aot_eager")
    randomise(model)
    twin = peft_twin(hosts.short(host), model).train()
    batch = hosts.batch(host)
    (loss, got), (want_loss, want) = step(model, batch), peft_step(twin, batch)
    assert len(want) == 2 * PLACES[host][1]
    assert abs(loss / want_loss - 1) < 1e-6
    assert max(relative_errors(got, want).values()) < 5e-6
    check_all_rewritten(model, PLACES[host][1])
    ours, theirs = projections(model)[0], twin.base_model
    assert torch.equal(ours.vera_A, theirs.vera_A["default"]) and torch.equal(ours.vera_B, theirs.vera_B["default"])


@pytest.mark.parametrize("key", [0, 3])
@pytest.mark.parametrize("r", [1, 6, 256])
def test_matrices_are_pefts_bit_for_bit(r, key):
    base = hosts.short("llama")
    model = adaptc.compile(copy.deepcopy(base), vera(r=r, projection_prng_key=key), backend="eager")
    twin = peft_twin(base, model, r=r, projection_prng_key=key).base_model
    for name, want in zip(("vera_A", "vera_B"), matrices(r, 96, 64, key), strict=True):
        got = getattr(projections(model)[0], name)
        assert torch.equal(got, getattr(twin, name)["default"]) and torch.equal(got, want)


@pytest.mark.parametrize("kind", ["bf16-base", pytest.param("autocast", marks=pytest.mark.slow)])
def test_sixteen_bit_arithmetic_is_as_exact_as_pefts(kind):
    base = hosts.short("llama", train=True)
    if kind == "bf16-base":
        base = base.to(torch.bfloat16)
    ours, theirs = [], []
    for seed in range(3):
        torch.manual_seed(seed)
        model = adaptc.compile(copy.deepcopy(base), vera(), backend="aot_eager" if seed == 0 else "eager")
        assert {p.dtype for p in model.adaptc.parameters()} == {torch.float32}
        with torch.no_grad():  # a correction smaller than the base's own output
            for site in model.adaptc.sites:
                site.adapters["default"].vera_lambda_b.mul_(0.05)
        twin = peft_twin(copy.deepcopy(base), model).train()
        layer = twin.base_model.model.model.layers[0].self_attn.q_proj
        assert torch.equal(projections(model)[0].vera_A, layer.vera_A["default"])
        batch = hosts.batch("llama", rows=4, length=12, seed=seed)
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
            got, peft_got = step(model, batch), peft_step(twin, batch)
        want = formula_step(model, base, batch, after=formula("llama", base.dtype))
        ours.append(errors_of(*got, want))
        theirs.append(errors_of(*peft_got, want))
    assert 0 < sum(ours) <= 1.1 * sum(theirs)


def test_a_new_adapter_is_the_identity_and_learns():
    base = hosts.short("llama")
    model = adaptc.compile(copy.deepcopy(base), vera(init="default", d_initial=0.25), backend="aot_eager")
    batch = hosts.batch("llama")
    assert torch.equal(model(**batch).logits, base(**batch).logits)
    adapter = model.adaptc.sites[0].adapters["default"]
    assert adapter.vera_lambda_d.unique().tolist() == [0.25]
    _, gradients = step(model, batch)
    moved = {name.rpartition(".")[2] for name, g in gradients.items() if g.any()}
    assert moved == {"vera_lambda_b"}, "d has no gradient where b is zero"


def test_delta_is_what_the_site_adds_to_its_weight():
    model = adaptc.compile(hosts.short("llama"), vera(), backend="eager")
    randomise(model)
    A, B = (t.double() for t in matrices(R, 96, 64, KEY))
    for site in model.adaptc.sites:
        adapter, (outputs, inputs) = site.adapters["default"], site.module.weight.shape
        b, d = adapter.vera_lambda_b.double().diag(), adapter.vera_lambda_d.double().diag()
        torch.testing.assert_close(adapter.delta(), b @ B[:outputs] @ d @ A[:, :inputs], rtol=1e-12, atol=1e-14)


def test_the_matrices_are_there_once():
    model = adaptc.compile(hosts.short("llama"), vera(), backend="eager")
    shared = projections(model)
    assert all(p is shared[0] for p in shared) and len(shared) == 3
    assert sum("vera_A" in name for name, _ in model.named_buffers(remove_duplicate=False)) == 1
    assert sum("vera_A" in name for name in model.state_dict()) == 1
    assert not any("vera_A" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_has_its_own_matrices_once(clone):
    model = adaptc.compile(hosts.short("llama"), vera(), backend="eager")
    batch = hosts.batch("llama")
    want = model(**batch).logits
    other = clone(model)
    mine, theirs = projections(model)[0], projections(other)
    assert all(p is theirs[0] for p in theirs) and theirs[0] is not mine
    with torch.no_grad():
        mine.vera_A.zero_()
    assert torch.equal(other(**batch).logits, want)
    assert not torch.equal(model(**batch).logits, want)


def test_moving_casting_and_loading_reach_every_site():
    model = adaptc.compile(hosts.short("llama"), vera(), backend="eager")
    other = adaptc.compile(hosts.short("llama"), vera(projection_prng_key=1), backend="eager")
    assert not torch.equal(projections(model)[-1].vera_A, projections(other)[-1].vera_A)
    other.load_state_dict(model.state_dict())
    assert torch.equal(projections(model)[-1].vera_A, projections(other)[-1].vera_A)
    assert torch.equal(model(**hosts.batch("llama")).logits, other(**hosts.batch("llama")).logits)
    model.double()
    assert {p.vera_B.dtype for p in projections(model)} == {torch.float64}
    model.to("meta")
    assert {p.vera_A.device.type for p in projections(model)} == {"meta"}


def test_detach_leaves_no_trace():
    base = hosts.short("llama")
    before = list(base.state_dict())
    model = adaptc.compile(base, vera(), backend="eager")
    assert model.adaptc.detach() is base
    assert list(base.state_dict()) == before and not any("adapters" in n for n, _ in base.named_modules())


def test_adapters_of_two_seeds_have_a_pair_each():
    model = adaptc.compile(hosts.short("llama"), vera(), backend="eager")
    model.adaptc.add("other", vera(projection_prng_key=1))
    batch = hosts.batch("llama")
    first = model(**batch).logits
    model.adaptc.switch("other")
    second = model(**batch).logits
    assert not torch.equal(first, second)
    model.adaptc.remove("default")
    assert torch.equal(model(**batch).logits, second)
    model.adaptc.switch("other")


@pytest.mark.slow
def test_dropout_acts_on_the_adapters_input_only():
    """With b = 0 the site is the base whatever is dropped; in training two calls differ, in evaluation none do."""
    base = hosts.short("llama")
    model = adaptc.compile(copy.deepcopy(base), vera(dropout=0.5), backend="aot_eager")
    batch = hosts.batch("llama")
    plain = adaptc.compile(copy.deepcopy(base), vera(), backend="aot_eager")
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model(**batch).logits, plain(**batch).logits)
    model.train()
    assert not torch.equal(model(**batch).logits, model(**batch).logits)
    with torch.no_grad():
        for site in model.adaptc.sites:
            site.adapters["default"].vera_lambda_b.zero_()
    assert torch.equal(model(**batch).logits, base(**batch).logits)


def test_peft_reads_what_is_saved_and_back(tmp_path):
    base = hosts.short("llama")
    model = adaptc.compile(copy.deepcopy(base), vera(dropout=0.1), backend="eager")
    randomise(model)
    batch = hosts.batch("llama")
    want = model(**batch).logits
    model.adaptc.save(tmp_path / "ours")
    twin = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    torch.testing.assert_close(twin(**batch).logits, want, rtol=1e-5, atol=1e-5)
    assert twin.peft_config["default"].projection_prng_key == KEY
    twin.base_model.vera_A["default"].mul_(2)  # matrices of another system: the file's count, not the seed's
    twin.save_pretrained(tmp_path / "theirs")
    again = adaptc.compile(copy.deepcopy(base), str(tmp_path / "theirs"), backend="eager")
    assert torch.equal(projections(again)[0].vera_A, 2 * projections(model)[0].vera_A)
    torch.testing.assert_close(again(**batch).logits, twin(**batch).logits, rtol=1e-5, atol=1e-5)


def test_without_the_matrices_in_the_file_they_come_from_the_seed(tmp_path):
    base = hosts.short("llama")
    with pytest.warns(UserWarning, match="not save vera_A"):
        options = {"save_projection": False, "init_weights": False, "projection_prng_key": 9}
        config = peft.VeraConfig(r=R, target_modules=["q_proj", "down_proj"], **options)
    twin = peft.get_peft_model(copy.deepcopy(base), config)
    twin.save_pretrained(tmp_path)
    model = adaptc.compile(copy.deepcopy(base), str(tmp_path), backend="eager")
    batch = hosts.batch("llama")
    torch.testing.assert_close(model(**batch).logits, twin.eval()(**batch).logits, rtol=1e-5, atol=1e-5)


ILLEGAL = [("r", 0), ("r", True), ("dropout", 1.0), ("d_initial", math.inf), ("projection_prng_key", 0.5), ("init", "")]


@pytest.mark.parametrize("option, value", ILLEGAL)
def test_illegal_options_are_named(option, value):
    with pytest.raises(PlanError, match=f"VeRA: {option} is not legal"):
        vera(**{option: value})


def test_on_other_modules_it_refuses():
    with pytest.raises(SiteError, match="LlamaRMSNorm is not a linear layer"):
        adaptc.compile(hosts.short("llama"), vera(targets=["norm"]), backend="eager")


def terms(x, y, A, B, d, b, grad):
    """Result and gradients of x, y, d and b, written out."""
    K, N = x.shape[-1], y.shape[-1]
    rows, g = x.reshape(-1, K), grad.reshape(-1, N)
    A, B = A[:, :K], B[:N]
    u = rows @ A.T
    v = (u * d) @ B.T
    back = (g * b) @ B
    return [
        y + (v * b).view_as(y), ((back * d) @ A).view_as(x), grad, (back * u).sum(0), (g * v).sum(0),
    ]  # fmt: skip


@given(st.data())
def test_op_and_gradients_are_the_formula(data):
    args = VERA.sample(data.draw)
    x, y, A, B, d, b = args
    grad = torch.linspace(-1, 2, y.numel(), dtype=torch.float64).reshape(y.shape).to(y.dtype)
    for t in (x, y, d, b):
        t.requires_grad_()
    got = torch.ops.adaptc.vera_linear(*args)
    found = [got.detach(), *torch.autograd.grad(got, (x, y, d, b), grad)]
    double = [t.detach().double() for t in (*args, grad)]
    magnitude = terms(*(t.abs() for t in double))
    # Roundings on the way to any entry: one a product or cast, one a summand.
    eps = torch.finfo(x.dtype).eps * (12 + sum(x.shape) + sum(y.shape) + A.shape[0])
    for mine, want, size, like in zip(found, terms(*double), magnitude, (y, x, y, d, b), strict=True):
        assert (mine.dtype, mine.shape) == (like.dtype, like.shape)
        assert ((mine.double() - want).abs() <= eps * size).all()


def test_op_passes_gradcheck():
    shapes = [(2, 3, 4), (2, 3, 5), (2, 6), (7, 2), (2,), (5,)]
    args = [torch.randn(s, dtype=torch.float64, requires_grad=i not in (2, 3)) for i, s in enumerate(shapes)]
    assert torch.autograd.gradcheck(torch.ops.adaptc.vera_linear, args)
    torch.library.opcheck(torch.ops.adaptc.vera_linear.default, args)
