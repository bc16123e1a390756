"""ATen lowerings against the bodies of their ops, and the GEMMs that a training step really has."""

from __future__ import annotations

import collections
import copy
import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import adaptc
from adaptc.codegen.ops import registry
from adaptc.ir import dialect
from adaptc.ir.sites import dialect_nodes
from adaptc.passes.contract import Context
from adaptc.passes.lower import lower
from tests.ir import formulas
from tests.ir.formulas import in_double, leaves, outputs
from tests.reference import check_against_reference

OPS = tuple(formulas.FORMULAS)
aten = torch.ops.aten


def graph_of(name, args, mode="fake"):
    """A graph with one call of the op, as AOTAutograd writes it."""
    op = dialect.get(name).overload
    flat, tree = torch.utils._pytree.tree_flatten(list(args))
    tensors = leaves(args)

    def call(*given):
        values = iter(given)
        filled = [next(values) if isinstance(v, torch.Tensor) else v for v in flat]
        return outputs(op(*torch.utils._pytree.tree_unflatten(filled, tree)))

    gm = make_fx(call, tracing_mode=mode)(*tensors)
    assert len(dialect_nodes(gm)) == 1
    return gm, tensors


def gemms(gm):
    targets = (aten.mm.default, aten.addmm.default)
    return collections.Counter(n.target for n in gm.graph.nodes if n.target in targets)


WHOLE = {name: registry.row(name).whole for name in OPS}


def stays_if(patch, name, whole):
    patch.setitem(registry.ROWS, name, dataclasses.replace(registry.row(name), whole=whole))


@pytest.fixture(autouse=True, scope="module")
def written_out():
    """Every op, also those that a CPU runs whole."""
    with pytest.MonkeyPatch.context() as patch:
        for name in OPS:
            stays_if(patch, name, lambda *args: False)
        yield


@pytest.mark.parametrize("name", OPS)
@given(data=st.data())
def test_lowering_computes_the_body(name, data):
    op = dialect.get(name)
    args = op.sample(data.draw)
    gm, tensors = graph_of(name, args)
    assert len(lower(gm, Context()).applied) == 1 + (registry.row(name).split is not None)
    assert dialect_nodes(gm) == []
    formula = formulas.FORMULAS[name]
    cases = zip(
        gm(*tensors), outputs(op.body(*args)), outputs(formula(*in_double(args))),
        outputs(formula(*in_double(args, absolute=True))), strict=True,
    )  # fmt: skip
    for got, body, want, magnitude in cases:
        assert (got.shape, got.stride(), got.dtype) == (body.shape, body.stride(), body.dtype)
        # A library may sum in another order for another layout, which moves a rounding by one unit; in fp64 the formula
        # has one of its own.
        dtype = tensors[0].dtype
        unit = (2 if dtype == torch.float64 else 1) * torch.finfo(dtype).eps * magnitude
        error, error_of_body = (got.double() - want).abs(), (body.double() - want).abs()
        assert bool((error <= op.tolerances * error_of_body + unit).all()), f"{name}: {error.max()}"


PARTS = {
    "one of several in the middle": lambda t: t[:, :1],
    "some of several in the middle": lambda t: t[:, 1:],
    "every other row": lambda t: t[:, :, ::2],
    "rows of other rows": lambda t: t.transpose(0, 1),
    "a row for all": lambda t: t[:, :, :1].expand(-1, -1, 4, -1),
    "a gap in front": lambda t: t[1:],
}


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("mode", ["fake", "symbolic"])
def test_rows_that_lie_unevenly(name, mode):
    """ProphetNet's predicting stream is a slice in the middle of a batch."""
    torch.manual_seed(0)
    x, y = (PARTS[name](torch.randn(2, 3, 4, width)) for width in (8, 6))
    args = (x, y, torch.randn(3, 8), torch.randn(6, 3), torch.tensor([0.5]), "r")
    gm, tensors = graph_of("lora_linear", args, mode)
    lower(gm, Context())
    for got, body in zip(gm(*tensors), outputs(dialect.get("lora_linear").body(*args)), strict=True):
        torch.testing.assert_close(got, body, rtol=1e-5, atol=1e-5)
    copies = len(gm.graph.find_nodes(op="call_function", target=aten.clone.default))
    assert copies == (0 if name in ("a gap in front", "every other row") else 2)


@pytest.mark.parametrize("name", OPS)
@given(data=st.data())
@settings(max_examples=30)
def test_new_nodes_know_what_they_compute(name, data):
    args = dialect.get(name).sample(data.draw)
    gm, tensors = graph_of(name, args)
    lower(gm, Context())

    class Compare(torch.fx.Interpreter):
        def run_node(self, n):
            value = super().run_node(n)
            if isinstance(value, torch.Tensor) and n.op == "call_function":
                assert kind(value) == kind(n.meta["val"]), n.format_node()
            return value

    def kind(t):
        # The stride of a dimension of one element says nothing, and torch's own ops differ in it.
        return t.shape, [s for s, size in zip(t.stride(), t.shape, strict=True) if size != 1], t.dtype

    Compare(gm).run(*tensors)


def layouts(batch=(4, 5)):
    """x, y, A, B, scale of which the activations are transposed in memory."""
    def activation(n):
        return torch.randn(n, *reversed(batch), dtype=torch.float64).permute(*range(len(batch), -1, -1))

    return [activation(7), activation(6), *(torch.randn(s, dtype=torch.float64) for s in ((3, 7), (6, 3), (1,)))]


@pytest.mark.parametrize("scale_at", ["n", "r"])
@pytest.mark.parametrize("batch", [(), (5,), (4, 5), (2, 4, 5)])
@pytest.mark.parametrize("mode", ["fake", "symbolic"])
def test_layouts_and_ranks(batch, scale_at, mode):
    gm, tensors = graph_of("lora_linear", [*layouts(batch), scale_at], mode)
    lower(gm, Context())
    got = gm(*tensors)
    torch.testing.assert_close(tuple(got), formulas.lora_linear(*tensors, scale_at))
    assert all(t.is_contiguous() for t in got)


@pytest.mark.parametrize("name", OPS)
def test_one_symbolic_graph_serves_every_size(name):
    def args_for(batch):
        x, y, A, B, scale = layouts(batch)
        return {
            "lora_linear": [x, y, A, B, scale, "n"],
            "lora_bottleneck_grad": [y, B, scale],
            "lora_factor_grad": [y, x, torch.float64],
            "lora_input_grad": [torch.einsum("...n,nr->...r", y, B), A],
            "lora_shrink": [x, [A, 2 * A], [scale, scale], [], []],
            "lora_expand": [y, torch.einsum("...k,rk->...r", x, A), B],
            "lora_factor_grads": [[y, x], x, torch.float64, [], []],
            "lora_merged_weight": [B @ A, A, B, scale, False],
            "lora_dense_grads": [B @ A, A, B, scale],
            "lora_input_grads": [x, [y[..., :3], y[..., 3:]], [A, 2 * A], [], []],
            "lora_linear_expand": [x.reshape(-1, 7), A.t(), A[:, 0], y[..., :2], B[:3, :2]],
            "lora_bottleneck_grads": [y, x[..., :3], B, scale, torch.float64],
            "lora_linear_input_grads": [
                [y[..., :3].reshape(-1, 3), y[..., 3:].reshape(-1, 3)], [A, 2 * A], [y[..., :3]], [A], [], []
            ],
        }[name]

    gm, _ = graph_of(name, args_for((4, 5)), "symbolic")
    lower(gm, Context())
    assert dialect_nodes(gm) == []
    assert not any(isinstance(a, torch.SymInt) for n in gm.graph.nodes for a in torch.utils._pytree.tree_leaves(n.args))
    for batch in ((4, 5), (2, 9), (7, 3)):
        args = args_for(batch)
        tensors = leaves(args)
        for got, want in zip(gm(*tensors), outputs(formulas.FORMULAS[name](*args)), strict=True):
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    "name, args, expected",
    [
        ("lora_linear", lambda x, y, A, B, s: [x, y, A, B, s, "n"], {aten.mm.default: 2}),
        ("lora_linear", lambda x, y, A, B, s: [x, y, A, B, s, "r"], {aten.mm.default: 1, aten.addmm.default: 1}),
        ("lora_bottleneck_grad", lambda x, y, A, B, s: [y, B, s], {aten.mm.default: 1}),
        ("lora_factor_grad", lambda x, y, A, B, s: [y, x, torch.float64], {aten.mm.default: 1}),
        ("lora_input_grad", lambda x, y, A, B, s: [y @ B, A], {aten.mm.default: 1}),
        ("lora_shrink", lambda x, y, A, B, s: [x, [A, A], [s, s], [], []], {aten.mm.default: 1}),
        ("lora_expand", lambda x, y, A, B, s: [y, y @ B, B], {aten.addmm.default: 1}),
        ("lora_factor_grads", lambda x, y, A, B, s: [[y, y], x, torch.float64, [], []], {aten.mm.default: 1}),
        ("lora_input_grads", lambda x, y, A, B, s: [x, [y @ B, y @ B], [A, A], [], []], {aten.addmm.default: 1}),
        ("lora_linear_expand", lambda x, y, A, B, s: [x, A.t(), None, y @ B, B[:3]],
         {aten.mm.default: 1, aten.addmm.default: 1}),
        ("lora_linear_expand", lambda x, y, A, B, s: [x, A.t(), A[:, 0], y @ B, B[:3]], {aten.addmm.default: 2}),
        ("lora_bottleneck_grads", lambda x, y, A, B, s: [y, y @ B, B, s, torch.float64], {aten.mm.default: 2}),
        ("lora_linear_input_grads", lambda x, y, A, B, s: [[y @ B] * 2, [A, A], [y @ B], [A], [], []],
         {aten.mm.default: 2, aten.addmm.default: 1}),
    ],
)
def test_gemms_of_one_op(name, args, expected):
    gm, _ = graph_of(name, args(*layouts()))
    lower(gm, Context())
    assert gemms(gm) == expected


def test_a_contiguous_activation_is_not_copied():
    x, y, A, B, scale = layouts()
    gm, _ = graph_of("lora_linear", [x.contiguous(), y.contiguous(), A, B, scale, "n"])
    lower(gm, Context())
    assert not gm.graph.find_nodes(op="call_function", target=aten.clone.default)


@pytest.mark.parametrize("sites", [1, 2])
@pytest.mark.parametrize("name", ["lora_shrink", "lora_factor_grads", "lora_input_grads"])
@pytest.mark.parametrize("drops", [False, True])
def test_products_of_several_sites_and_with_dropout_are_one_node_on_a_cpu(name, sites, drops, monkeypatch):
    """Joining and cutting small tensors would be a C++ kernel each to compile; a kernel drops what it reads."""
    x, y, A, _, scale = layouts()
    seeds = [[torch.tensor([7])] * sites, [0.5] * sites] if drops else [[], []]
    args = {
        "lora_shrink": [x, [A] * sites, [scale] * sites, *seeds],
        "lora_factor_grads": [[y] * sites, x, torch.float64, *seeds],
        "lora_input_grads": [x, [y[..., :3]] * sites, [A] * sites, *seeds],
    }[name]
    gm, _ = graph_of(name, args)
    stays_if(monkeypatch, name, WHOLE[name])
    assert len(lower(gm, Context()).applied) == (0 if drops or sites > 1 else 1)
    assert not WHOLE[name](torch.device("cuda"), *args)


class Site(nn.Module):
    """One linear layer whose input may or may not need a gradient."""

    def __init__(self, inputs=6, outputs=5):
        super().__init__()
        self.fc = nn.Linear(inputs, outputs)

    def forward(self, x):
        return torch.tanh(self.fc(x))


LORA = adaptc.LoRA(r=3, alpha=6, init="random", targets="fc")
#: base product, bottleneck, corrected output; then bottleneck gradient, dA and dB
WITHOUT_INPUT_GRADIENT = 6
#: and then the input's gradient through the base and through the adapter
WITH_INPUT_GRADIENT = 8


def adapted(base=None, dynamic=None, **options):
    base = base or Site()
    model = copy.deepcopy(base)
    return base, adaptc.compile(model, adaptc.LoRA(**{**vars(LORA), **options}), backend="aot_eager", dynamic=dynamic)


@pytest.mark.parametrize("batch", [(4,), (2, 4)], ids=["2-D", "3-D"])
@pytest.mark.parametrize(
    "needs_grad, expected", [(False, WITHOUT_INPUT_GRADIENT), (True, WITH_INPUT_GRADIENT)], ids=["leaf", "inner"]
)
def test_gemms_of_a_training_step(batch, needs_grad, expected):
    base, model = adapted()
    x = torch.randn(*batch, 6, requires_grad=needs_grad)
    check_against_reference(model, base, x)
    joint = model.adaptc.graphs[0].graph_module("lower")
    assert dialect_nodes(joint) == []
    assert sum(gemms(joint).values()) == expected
    assert (x.grad is not None) == needs_grad


def test_no_gradient_of_a_frozen_weight_is_computed():
    _, model = adapted()
    model(torch.randn(4, 6)).sum().backward()
    gm = model.adaptc.graphs[0].graph_module("lower")
    shapes = [tuple(n.meta["val"].shape) for n in gm.graph.nodes if n.target in (aten.mm.default, aten.addmm.default)]
    assert sorted(shapes) == sorted([(4, 5), (4, 3), (4, 5), (4, 3), (3, 6), (5, 3)])
    assert (5, 6) not in shapes and (6, 5) not in shapes


def test_an_inference_graph_has_no_backward():
    base, model = adapted()
    with torch.no_grad():
        check_against_reference(model.eval(), base.eval(), torch.randn(4, 6))
    assert sum(gemms(model.adaptc.graphs[0].graph_module("lower")).values()) == 3


@pytest.mark.parametrize("noncontiguous", [False, True])
def test_dynamic_batches_share_one_graph(noncontiguous):
    base, model = adapted(dynamic=True)
    for rows, columns in ((4, 3), (7, 5), (2, 9)):
        x = torch.randn(columns, rows, 6)
        x = x.transpose(0, 1) if noncontiguous else x.reshape(rows, columns, 6)
        check_against_reference(model, base, x)
    (graph,) = model.adaptc.graphs
    joint = graph.graph_module("lower")
    assert dialect_nodes(joint) == []
    symbolic = [n for n in joint.graph.nodes if isinstance(n.meta.get("val"), torch.SymInt)]
    assert symbolic, "the sizes are symbolic"


def test_bf16_gemms_have_bf16_operands():
    base = Site().to(torch.bfloat16)
    _, model = adapted(base)
    model(torch.randn(4, 6, dtype=torch.bfloat16)).sum().backward()
    joint = model.adaptc.graphs[0].graph_module("lower")
    for node in joint.graph.nodes:
        if node.target in (aten.mm.default, aten.addmm.default):
            assert {a.meta["val"].dtype for a in node.all_input_nodes} == {torch.bfloat16}
    assert model.fc.adapters.default.lora_A.grad.dtype == torch.float32
