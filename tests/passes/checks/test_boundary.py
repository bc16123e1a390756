"""The values on which cut-outs are compared: real where they can be had, as they are at that moment."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import adaptc
from adaptc.ir.edit import copy_graph_module
from adaptc.passes.checks import cutout
from adaptc.passes.checks.boundary import draw, exact_copy, private_randomness, span, vary_constant, visit_rewrites
from adaptc.passes.contract import Context
from adaptc.passes.manager import get
from tests.passes.checks.wrong_passes import adapted, capture

LAYOUTS = {
    "contiguous": lambda: torch.randn(3, 4, 5),
    "transposed": lambda: torch.randn(3, 5, 4).mT,
    "slice": lambda: torch.randn(6, 9, 11)[1::2, 2:6, ::2][:, :, :5],
    "expanded": lambda: torch.randn(3, 1, 5).expand(3, 4, 5),
    "scalar": lambda: torch.randn(()),
    "empty": lambda: torch.randn(0, 4),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_exact_copy_keeps_values_and_strides(layout, dtype):
    tensor = LAYOUTS[layout]().requires_grad_()
    copy = exact_copy(tensor, dtype)
    assert torch.equal(copy, tensor.detach().to(copy.dtype))
    assert copy.stride() == tensor.stride() and copy.dtype == (dtype or tensor.dtype)
    assert not copy.requires_grad
    if tensor.numel():
        span(copy).zero_()
        assert tensor.detach().abs().max() > 0, "the copy has memory of its own"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.int64, torch.bool])
def test_drawn_values_have_the_type_of_the_fake(layout, dtype):
    like = LAYOUTS[layout]()
    fake = torch.empty_strided(like.shape, like.stride(), dtype=dtype, device="meta")
    generator = torch.Generator().manual_seed(0)
    # The device is the one thing that "meta" cannot have values on.
    drawn = draw(torch.empty_strided(fake.shape, fake.stride(), dtype=dtype), generator)
    assert (drawn.shape, drawn.stride(), drawn.dtype) == (fake.shape, fake.stride(), dtype)
    if dtype == torch.int64:
        assert not drawn.any(), "an index of zero is always legal"
    elif like.numel() > 20:
        assert len(drawn.unique()) > 1


def test_constants_are_varied_and_nothing_else():
    generator = torch.Generator().manual_seed(0)
    zeros = vary_constant(torch.zeros(4, 5), generator)
    assert zeros.abs().min() > 0 and zeros.unique().numel() == 20
    ones = vary_constant(torch.full((50,), 2.0), generator)
    assert 2 <= ones.min() < 2.2 and 3.8 < ones.max() < 4
    negative = vary_constant(torch.tensor([-3.0], dtype=torch.float64), generator)
    assert -6 < negative < -3
    expanded = vary_constant(torch.zeros(1, 5).expand(4, 5), generator)
    assert expanded.stride() == (0, 1) and expanded.abs().min() > 0
    for kept in (torch.tensor([1.0, 1.5]), torch.zeros(3, dtype=torch.int64), torch.full((3,), float("inf"))):
        assert torch.equal(vary_constant(kept.clone(), generator), kept)
    assert vary_constant(None, generator) is None and vary_constant(torch.empty(0), generator).numel() == 0


def test_random_state_is_given_back():
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    with private_randomness([torch.zeros(1), None]):
        torch.rand(100)
    assert torch.equal(torch.rand(2), expected)


def visited(model, *args, real=True):
    """site -> boundary values by name of the rewrites that ``insert`` makes."""
    gm, inputs, sites = capture(model, *args)
    original = copy_graph_module(gm)
    result = get("insert").run(gm, Context(sites=sites, record=True))
    found = {}

    def visit(rewrite, values, written):
        assert not written
        (key,) = [n for n in rewrite.before.graph.nodes if n.op == "call_function"]
        names = [n.name for n in rewrite.boundary]
        by_name = dict(zip(names, values, strict=True))
        arguments = ("x", "y", "site_id", "A", "B", "scale")
        operands = [by_name[a.name] for a in key.args[:6] if a.name in by_name]
        found.setdefault(rewrite.site, []).append(dict(zip(arguments, operands, strict=True)))

    visit_rewrites(original, gm, result.applied, inputs if real else None, visit)
    return found


class Mutating(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 5)

    def forward(self, h):
        first = self.layer(h)
        h.mul_(2)
        h[0] = 7
        return first + self.layer(h)


def test_real_values_are_those_of_the_moment():
    torch.manual_seed(0)
    model = adaptc.compile(Mutating(), adaptc.LoRA(r=3, init="random", targets=["layer"]), backend="aot_eager")
    h = torch.randn(4, 6)
    given = h.clone()
    first, second = visited(model, given)["layer"]
    # torch.compile ran the model as well and changed its input; the values come from a copy of what it is now.
    now = given
    torch.testing.assert_close(first["x"], now, rtol=0, atol=0)
    later = 2 * now
    later[0] = 7
    torch.testing.assert_close(second["x"], later, rtol=0, atol=0)
    weight, bias = model.layer.weight, model.layer.bias
    torch.testing.assert_close(first["y"], F.linear(now, weight, bias), rtol=0, atol=0)
    torch.testing.assert_close(second["y"], F.linear(later, weight, bias), rtol=0, atol=0)
    torch.testing.assert_close(second["A"], model.layer.adapters["default"].lora_A.detach(), rtol=0, atol=0)
    assert torch.equal(given, now), "the graph ran on a copy"


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 5)

    def forward(self, x):
        return checkpoint(lambda h: self.inner(torch.tanh(h)), x * 3, use_reentrant=False)


def test_nested_bodies_get_real_values():
    model = adaptc.compile(Checkpointed(), adaptc.LoRA(r=3, init="random", targets=["inner"]), backend="aot_eager")
    x = torch.randn(4, 6)
    (values,) = visited(model, x)["inner"]
    torch.testing.assert_close(values["x"], torch.tanh(3 * x), rtol=0, atol=0)


def test_without_inputs_values_are_drawn_and_repeatable():
    _, model = adapted(dtype=torch.bfloat16)
    x = torch.randn(4, 6, dtype=torch.bfloat16)
    one, other = (visited(model, x, real=False) for _ in range(2))
    for site in ("first", "second"):
        (a,), (b,) = one[site], other[site]
        assert a["x"].dtype == torch.bfloat16 and a["x"].shape == (4, 6) and not torch.equal(a["x"], x)
        assert all(torch.equal(a[k], b[k]) for k in a)


def run_cutout(fn, *values, double):
    gm = torch.fx.symbolic_trace(fn)
    return cutout.run(gm, values, [False] * len(values), double=double).results


@pytest.mark.parametrize("p", [0.3, 1.0])
def test_masks_do_not_depend_on_the_dtype(p):
    def fn(x):
        return (F.dropout(x, p, True), torch.rand_like(x), x.clone().normal_(), torch.bernoulli(x.sigmoid()))

    x = torch.randn(40, 50, dtype=torch.bfloat16)
    for native, double in zip(run_cutout(fn, x, double=False), run_cutout(fn, x, double=True), strict=True):
        assert native.dtype == torch.bfloat16 and double.dtype == torch.float64
        if p < 1 or native.any():
            assert 0 < (native != 0).double().mean() <= 1
        near = (native.double() - double).abs() <= 0.01 * double.abs() + 0.01
        # A probability that is rounded to bf16 may tip a coin.
        assert near.double().mean() > 0.98
    first = run_cutout(fn, x, double=False)
    assert all(torch.equal(a, b) for a, b in zip(first, run_cutout(fn, x, double=False), strict=True))


def test_reference_names_fp64_wherever_the_graph_names_a_dtype():
    def fn(x):
        y = (x.to(torch.bfloat16), x.float(), torch.sum(x, dtype=torch.float32))
        return (*y, x.half(), x.to(torch.int32), torch.zeros(2, dtype=torch.float16))

    native, double = (run_cutout(fn, torch.full((3,), 1 / 3), double=d) for d in (False, True))
    wanted = [torch.bfloat16, torch.float32, torch.float32, torch.float16, torch.int32, torch.float16]
    assert [t.dtype for t in native] == wanted
    assert [t.dtype for t in double] == [torch.int32 if d == torch.int32 else torch.float64 for d in wanted]
    assert float(double[0][0]) == float(torch.tensor(1 / 3)), "not rounded on the way"


def test_reference_runs_without_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        (native,) = run_cutout(lambda x: (x @ x,), torch.randn(3, 3), double=False)
        (double,) = run_cutout(lambda x: (x @ x,), torch.randn(3, 3), double=True)
    assert (native.dtype, double.dtype) == (torch.bfloat16, torch.float64)


def test_gradients_are_those_of_autograd():
    gm = torch.fx.symbolic_trace(lambda a, b, n: (a @ b, a.sum() * n, b.detach()))
    a, b = torch.randn(3, 4), torch.randn(4, 5)
    run = cutout.run(gm, [a, b, 2], [True, False, False], double=True)
    seed = torch.randn(3, 5)
    (gradient,) = run.gradients([seed, torch.ones(()), torch.ones(4, 5)])
    torch.testing.assert_close(gradient, seed.double() @ b.double().T + 2)
