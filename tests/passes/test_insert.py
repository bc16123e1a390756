"""insert: every anchor is replaced by what its method means."""

from __future__ import annotations

import collections
import copy
import operator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import adaptc
from adaptc.ir.edit import copy_graph_module
from adaptc.ir.ops.lora import draw_tensor
from adaptc.ir.sites import dialect_nodes, lora_nodes, site_of
from adaptc.methods.bias import bias_site
from adaptc.methods.lora.linear import lora_site
from adaptc.passes.contract import Context
from adaptc.passes.insert import insert
from adaptc.torch_internals import watch_calls
from tests.passes.checks.wrong_passes import capture
from tests.passes.graphs import DTYPES, Graph, check_adapters, ops, run, tensors


def anchored(values, *, p=0.0, training=True, compute_dtype=None):
    """A graph with one LoRA anchor, as Dynamo writes it, and the input that carries its site id."""
    build = Graph()
    x, y, a, b, s = (build.input(name, tensor) for name, tensor in values.items())
    site_id = build.input("site_id", torch.zeros(1, dtype=torch.int64))
    out = build.call(lora_site, x, y, site_id, a, b, s, p, training, compute_dtype)
    return build.module(out), site_id


def real(values):
    return [*values.values(), torch.zeros(1, dtype=torch.int64)]


def test_an_anchor_becomes_a_dropout_and_an_adapter():
    values = tensors()
    gm, site_id = anchored(values)
    assert ops(gm) == {"lora_site": 1}
    result = insert(gm, Context(sites={site_id: "layers.0.fc"}))
    assert [r.site for r in result.applied] == ["layers.0.fc"]
    assert result.refused == []
    assert ops(gm) == {"dropout": 1, "lora_linear": 1}
    (node,) = lora_nodes(gm)
    assert node.args[5] == "n"
    assert {site_of(n) for n in gm.graph.nodes if n.op == "call_function"} == {"layers.0.fc"}
    check_adapters(gm, values, real(values))


def test_a_site_whose_path_is_not_known_says_so():
    gm, _ = anchored(tensors())
    assert [r.site for r in insert(gm, Context()).applied] == ["(unknown site)"]
    assert ops(gm) == {"dropout": 1, "lora_linear": 1}


def test_a_graph_without_anchors_is_left_alone():
    build = Graph()
    x = build.input("x", torch.randn(4, 5))
    gm = build.module(build.call(torch.tanh, x))
    text = gm.code
    result = insert(gm, Context())
    assert (result.applied, result.refused, gm.code) == ([], [], text)


def test_dropout_keeps_its_arguments():
    gm, _ = anchored(tensors(), p=0.3, training=False)
    insert(gm, Context())
    (dropout,) = gm.graph.find_nodes(op="call_function", target=F.dropout)
    assert dropout.args[1:] == (0.3, False)


@given(data=st.data())
def test_value_and_gradients(data):
    draw = data.draw
    dtype = draw(st.sampled_from(DTYPES))
    factors = draw(st.sampled_from([dtype, torch.float32 if dtype.itemsize < 4 else dtype]))
    batch = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=2)))
    k, n, r = (draw(st.integers(1, 7)) for _ in range(3))
    values = {
        "x": draw_tensor(draw, (*batch, k), dtype).requires_grad_(draw(st.booleans())),
        "y": draw_tensor(draw, (*batch, n), dtype).requires_grad_(draw(st.booleans())),
        "A1": draw_tensor(draw, (r, k), factors).requires_grad_(),
        "B1": draw_tensor(draw, (n, r), factors).requires_grad_(),
        "s1": draw_tensor(draw, (1,), torch.float64),
    }
    gm, _ = anchored(values)
    assert len(insert(gm, Context()).applied) == 1
    check_adapters(gm, values, real(values))


def test_the_output_is_the_anchors_to_the_last_bit():
    values = tensors(batch=(2, 9), k=33, n=17, ranks=(5,))
    gm, _ = anchored(values)
    g = torch.ones(2, 9, 17)
    before, _ = run(copy_graph_module(gm), real(values), g)
    insert(gm, Context())
    assert torch.equal(run(gm, real(values), g)[0], before)


@pytest.mark.parametrize("base, factors, compute, casts", [
    (torch.float32, torch.float32, None, []),
    (torch.bfloat16, torch.bfloat16, None, []),
    (torch.bfloat16, torch.float32, None, [torch.bfloat16] * 2),
    # x, y, and the result back; the factors have the compute dtype
    (torch.bfloat16, torch.float32, "float32", [torch.float32] * 2 + [torch.bfloat16]),
    (torch.bfloat16, torch.bfloat16, "float32", [torch.float32] * 4 + [torch.bfloat16]),
])  # fmt: skip
def test_casts_are_written_out(base, factors, compute, casts):
    values = tensors(dtype=base, factors=factors)
    gm, _ = anchored(values, compute_dtype=compute)
    insert(gm, Context())
    found = [n.args[1] for n in gm.graph.find_nodes(op="call_method", target="to")]
    assert found == casts
    x, y, a, b = (n.meta["example_value"] for n in lora_nodes(gm)[0].args[:4])
    assert {x.dtype, y.dtype, a.dtype, b.dtype} == {base if compute is None else torch.float32}
    check_adapters(gm, values, real(values))


def test_stops_at_its_limit():
    values = tensors(ranks=(2, 3))
    build = Graph()
    x, y, a1, b1, s1, a2, b2, s2 = (build.input(name, tensor) for name, tensor in values.items())
    ids = [build.input(name, torch.zeros(1, dtype=torch.int64)) for name in ("id1", "id2")]
    y1 = build.call(lora_site, x, y, ids[0], a1, b1, s1, 0.0, True, None)
    gm = build.module(build.call(lora_site, x, y1, ids[1], a2, b2, s2, 0.0, True, None))
    result = insert(gm, Context(sites=dict(zip(ids, ("first", "second"), strict=True)), budget=1))
    assert [r.site for r in result.applied] == ["first"]
    assert result.refused == [("second", "limit reached")]
    assert ops(gm) == {"dropout": 1, "lora_linear": 1, "lora_site": 1}
    check_adapters(gm, values, [*real(values), torch.zeros(1, dtype=torch.int64)])


@pytest.mark.parametrize("trained, products", [
    (["A1", "B1"], {"lora_bottleneck_grad": 1, "lora_factor_grad": 2}),
    (["A1"], {"lora_bottleneck_grad": 1, "lora_factor_grad": 1}),
    (["B1"], {"lora_factor_grad": 1}),
    (["x"], {"lora_bottleneck_grad": 1, "lora_input_grad": 1}),
    (["y"], {}),
])  # fmt: skip
def test_gradients_that_nobody_asks_for_are_not_computed(trained, products):
    values = tensors(trained=False, grad_x=False)
    for name in trained:
        values[name].requires_grad_()
    gm, _ = anchored(values)
    insert(gm, Context())
    found = collections.Counter()

    def note(op, args, kwargs, output):
        if op.namespace == "adaptc" and op._schema.name != "adaptc::lora_linear":
            found[op._schema.name.partition("::")[2]] += 1

    with watch_calls(note):
        run(gm, real(values), torch.ones(4, 3))
    assert found == products
    check_adapters(gm, values, real(values))


@pytest.mark.parametrize("trained", [torch.float32, torch.bfloat16])
def test_a_trained_bias_becomes_plain_torch(trained):
    build = Graph()
    x, y = (build.input(name, torch.randn(4, size).to(torch.bfloat16)) for name, size in (("x", 5), ("y", 3)))
    site_id = build.input("site_id", torch.zeros(1, dtype=torch.int64))
    bias = build.input("bias", torch.randn(3).to(trained).requires_grad_())
    frozen = build.input("frozen", torch.randn(3).to(torch.bfloat16))
    gm = build.module(build.call(bias_site, x, y, site_id, bias, frozen))
    assert [r.site for r in insert(gm, Context(sites={site_id: "norm"})).applied] == ["norm"]
    assert ops(gm) == {"sub": 1, "add": 1, **({"to": 1} if trained == torch.float32 else {})}
    assert dialect_nodes(gm) == []
    out, grads = run(gm, build.inputs, g := torch.randn(4, 3).to(torch.bfloat16))
    assert torch.equal(out, build.inputs[1] + (build.inputs[3] - build.inputs[4]).to(torch.bfloat16))
    want = g.double().sum(0)
    bound = 5 * torch.finfo(torch.bfloat16).eps * g.double().abs().sum(0)
    assert grads.keys() == {"bias"}
    assert grads["bias"].dtype == trained
    assert bool(((grads["bias"].double() - want).abs() <= bound).all())


# -- graphs as Dynamo captures them --------------------------------------------------------------------


class Twice(nn.Module):
    """A layer that runs twice, one that shares its weight, and one under checkpointing. No two sizes are equal."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.last = nn.Linear(6, 5), nn.Linear(5, 6, bias=False), nn.Linear(6, 4)
        self.tied = nn.Linear(5, 6)
        self.tied.weight = self.down.weight

    def block(self, x):
        return torch.tanh(self.tied(torch.tanh(self.up(x))))

    def forward(self, x):
        x = self.down(torch.tanh(self.up(x)))
        return self.last(torch.utils.checkpoint.checkpoint(self.block, x, use_reentrant=False))


def adapted(base, **options):
    options = {"r": 3, "alpha": 6, "init": "random", "targets": "all-linear", **options}
    return adaptc.compile(copy.deepcopy(base), adaptc.LoRA(**options), backend="eager")


def all_lora_nodes(gm):
    return [n for m in gm.modules() if isinstance(m, torch.fx.GraphModule) for n in lora_nodes(m)]


def test_every_call_of_a_site_is_found_in_nested_bodies_too():
    model = adapted(Twice())
    gm, inputs, sites = capture(model, torch.randn(4, 6))
    expected = copy_graph_module(gm)(*inputs)
    assert ops(gm)["lora_site"] == 5
    result = insert(gm, Context(sites=sites))
    assert sorted(r.site for r in result.applied) == ["down", "last", "tied", "up", "up"]
    assert result.refused == []
    assert len(lora_nodes(gm)) == 3 and len(all_lora_nodes(gm)) == 5
    assert "lora_site" not in ops(gm)
    torch.testing.assert_close(gm(*inputs), expected, rtol=0, atol=0)


def test_the_limit_holds_over_nested_bodies():
    gm, _, sites = capture(adapted(Twice()), torch.randn(4, 6))
    result = insert(gm, Context(sites=sites, budget=4))
    assert (len(result.applied), len(all_lora_nodes(gm)), ops(gm)["lora_site"]) == (4, 4, 1)
    ((_, reason),) = result.refused
    assert reason == "limit reached"


def test_a_captured_model_and_its_gradients():
    """Every gradient of y = last(tanh(block)) against autograd of the formula in fp64."""
    model = adapted(nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)))
    gm, inputs, sites = capture(model, x := torch.randn(3, 6))
    insert(gm, Context(sites=sites))
    (gm(*inputs)[0] ** 2).sum().backward()
    double = {n: p.detach().double().requires_grad_(".adapters." in n) for n, p in model.named_parameters()}
    h = x.double()
    for layer in "02":
        W, b, A, B = (double[f"{layer}.{name}"] for name in (
            "weight", "bias", "adapters.default.lora_A", "adapters.default.lora_B"))  # fmt: skip
        h = h @ W.T + b + 2.0 * (h @ A.T @ B.T)
        h = torch.tanh(h) if layer == "0" else h
    (h**2).sum().backward()
    for name, parameter in model.named_parameters():
        if ".adapters." in name:
            torch.testing.assert_close(parameter.grad.double(), double[name].grad, rtol=1e-5, atol=1e-5)
        else:
            assert parameter.grad is None, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_written_out(dtype):
    """The base computes in autocast's dtype, so the adapter's x and factors are cast to it by nodes."""
    model = adapted(nn.Sequential(nn.Linear(6, 5)))
    with torch.autocast("cpu", dtype=dtype):
        gm, inputs, sites = capture(model, torch.randn(3, 6))
        expected = copy_graph_module(gm)(*inputs)
        insert(gm, Context(sites=sites))
        found = gm(*inputs)
    assert [n.args[1] for n in gm.graph.find_nodes(op="call_method", target="to")] == [dtype] * 3
    assert {n.meta["example_value"].dtype for n in lora_nodes(gm)[0].args[:4]} == {dtype}
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_two_adapters_of_a_site_stand_on_each_other():
    model = adapted(nn.Sequential(nn.Linear(6, 5)), targets="0")
    model.adaptc.add("second", adaptc.LoRA(r=2, init="random", targets="0"))
    model.adaptc.switch(["default", "second"])
    gm, _, sites = capture(model, torch.randn(3, 6))
    assert [r.site for r in insert(gm, Context(sites=sites)).applied] == ["0", "0"]
    first, second = lora_nodes(gm)
    assert (second.args[1].target, second.args[1].args) == (operator.getitem, (first, 0))


@torch.compiler.allow_in_graph
def another_site(x, y, site_id):
    return x + y


def test_other_functions_that_dynamo_keeps_whole_stay():
    build = Graph()
    x = build.input("x", torch.randn(4, 5))
    site_id = build.input("site_id", torch.zeros(1, dtype=torch.int64))
    gm = build.module(build.call(another_site, x, x, site_id))
    result = insert(gm, Context(sites={site_id: "fc"}))
    assert (result.applied, result.refused, ops(gm)) == ([], [], {"another_site": 1})
