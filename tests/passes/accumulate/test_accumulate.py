"""Sums of products in the memory of the first, where nothing else reads it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch._inductor import config as inductor
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.utils import run_and_get_code
from torch.fx.experimental.proxy_tensor import make_fx

import adaptc
from adaptc.codegen.ops.in_place import ADD_PRODUCT, ADD_PRODUCTS, OUTPUT_GRADS, RESCALE_GRAD
from adaptc.ir import dialect
from adaptc.passes.contract import Context
from adaptc.passes.manager import Pipeline, get

aten = torch.ops.aten
convert = torch.ops.prims.convert_element_type


def operands():
    torch.manual_seed(0)
    return torch.randn(4, 6), torch.randn(6, 5), torch.randn(4, 2), torch.randn(2, 5)


def accumulate_in_place(graph):
    """Run the pass through the manager, which checks what it leaves."""
    _, (report,) = Pipeline([get("accumulate")]).run(graph.owning_module, "final", Context())
    return len(report.result.applied)


def rewritten(function, *inputs):
    gm = make_fx(function, tracing_mode="fake")(*inputs)
    count = accumulate_in_place(gm.graph)
    gm.graph.lint()
    gm.recompile()
    # A kernel of adaptc's own may add, which rounds in another order.
    torch.testing.assert_close(gm(*inputs), function(*inputs), rtol=2e-6, atol=2e-6)
    return count, [n.target for n in gm.graph.nodes if n.op == "call_function"]


IN_PLACE = {
    "a product": lambda x, w, h, b: torch.addmm(x @ w, h, b),
    "through views": lambda x, w, h, b: torch.addmm((x @ w).view(2, 2, 5).view(4, 5), h, b),
    "a chain": lambda x, w, h, b: torch.addmm(torch.addmm(x @ w, h, b), h, b).relu(),
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_a_sum_is_made_in_place(name):
    count, targets = rewritten(IN_PLACE[name], *operands())
    assert count == targets.count(ADD_PRODUCT) == (2 if name == "a chain" else 1)
    assert aten.addmm.default not in targets and aten.view.default not in targets


JOINED = {
    "rows": (4,),
    "batches": (2, 2),
}


@pytest.mark.parametrize("name", JOINED)
def test_the_gradients_of_several_adapters_are_added_in_place(name):
    batch = JOINED[name]
    q, A = [torch.randn(*batch, 2), torch.randn(*batch, 3)], [torch.randn(2, 5), torch.randn(3, 5)]
    joined = dialect.get("lora_input_grads").overload

    def total(x, w, q1, q2, a1, a2):
        dx = (x @ w).view(*batch, 5)
        return joined(dx, [q1, q2], [a1, a2], [], []).exp()

    x, w, *_ = operands()
    count, targets = rewritten(total, x, w, *q, *A)
    assert count == targets.count(ADD_PRODUCTS) == 1 and joined not in targets
    torch.testing.assert_close(
        total(x.double(), w.double(), *(t.double() for t in [*q, *A])).log(),
        (x @ w).double().view(*batch, 5) + sum(one.double() @ a.double() for one, a in zip(q, A, strict=True)),
    )

    def read_twice(x, w, q1, q2, a1, a2):
        dx = (x @ w).view(*batch, 5)
        return joined(dx, [q1, q2], [a1, a2], [], []), dx.exp()

    assert rewritten(read_twice, x, w, *q, *A)[0] == 0


def shared(x, w, h, b):
    y = x @ w
    return torch.addmm(y, h, b), y.relu()


def shared_view(x, w, h, b):
    y = (x @ w).view(2, 2, 5)
    return torch.addmm(y.view(4, 5), h, b), y.relu()


def _residual(x):
    y = x @ torch.ones(6, 6)
    return torch.addmm(y, y, torch.ones(6, 6))


def kept(x, w, h, b):
    y = x @ w
    return torch.addmm(y, h, b), y


NOT = {
    "read elsewhere": shared,
    "a view is read elsewhere": shared_view,
    "kept for the backward": kept,
    "a bias, which is broadcast": lambda x, w, h, b: torch.addmm(b[0], x, w),
    "an input of the graph": lambda x, w, h, b: torch.addmm(h @ b, h, b) + torch.addmm(x[:, :5], h, b),
    "its own factor": lambda x, w, h, b: _residual(x),
    "scaled": lambda x, w, h, b: torch.addmm(x @ w, h, b, alpha=2),
    "transposed": lambda x, w, h, b: torch.addmm((w.t() @ x.t()).t(), h, b),
}


@pytest.mark.parametrize("name", NOT)
def test_what_others_read_or_what_has_another_layout_is_not_written_to(name):
    count, _ = rewritten(NOT[name], *operands())
    assert count == (1 if name == "an input of the graph" else 0)


def three_of_one_input(x, w, h, b):
    """As q, k and v: each product in the shape of the activations."""
    parts = [(x + i).mm(w).view(2, 2, 5) for i in range(3)]
    return (parts[0] + parts[1] + parts[2]).exp()


SUMS = {
    "two": (lambda x, w, h, b: (x @ w + h @ b).exp(), 1),
    "three, as they come from a backward": (three_of_one_input, 2),
    "the later one first": (lambda x, w, h, b: (lambda first: h @ b + first)(x @ w), 1),
    "one is read elsewhere": (lambda x, w, h, b: (lambda y: (y + h @ b, y.exp()))(x @ w), 0),
    "a view of one is read elsewhere": (lambda x, w, h, b: (lambda y: (y + h @ b, y[0].exp()))(x @ w), 0),
    "one twice": (lambda x, w, h, b: (lambda y: y + y)(x @ w), 0),
    "scaled": (lambda x, w, h, b: torch.add(x @ w, h @ b, alpha=2), 0),
    "broadcast": (lambda x, w, h, b: x @ w + h[:1] @ b, 0),
    "not a product": (lambda x, w, h, b: x @ w + x[:, :5].exp(), 0),
    "transposed": (lambda x, w, h, b: (w.t() @ x.t()).t() + h @ b, 0),
    "16 bits": (lambda x, w, h, b: (x.bfloat16() @ w.bfloat16() + h.bfloat16() @ b.bfloat16()), 0),
}


@pytest.mark.parametrize("name", SUMS)
def test_products_are_summed_in_the_memory_of_the_first(name):
    function, count = SUMS[name]
    inputs = operands()
    gm = make_fx(function, tracing_mode="fake")(*inputs)
    before = len(gm.graph.find_nodes(op="call_function", target=aten.mm.default))
    assert accumulate_in_place(gm.graph) == count
    gm.graph.lint()
    gm.recompile()
    torch.testing.assert_close(gm(*inputs), function(*inputs))
    exact = function(*(t.double() for t in inputs))
    rtol = 2e-2 if name == "16 bits" else 1e-5
    torch.testing.assert_close(gm(*inputs), exact, check_dtype=False, rtol=rtol, atol=1e-6)
    products = len(gm.graph.find_nodes(op="call_function", target=aten.mm.default))
    sums = gm.graph.find_nodes(op="call_function", target=ADD_PRODUCT)
    assert (products, len(sums)) == (before - count, count)


def a_factor_that_a_sum_overwrites(x, w, h, b):
    """F reads P, and o is made in P's memory before F is added to T."""
    p = x @ w
    o = torch.addmm(p, h, b)
    return o, (x + 1) @ w[:, :3] + p @ w[:5, :3]


def a_factor_that_another_sum_overwrites(x, w, h, b):
    p, q = x @ w, h @ b
    first = (x + 1) @ w[:, :3]
    return first + p @ w[:5, :3], p + q


def a_gradient_that_is_rescaled(x, w, h, b):
    """dy is made in the memory of g, which a product reads as it was."""
    g, y = x[:, :5] * 2, x[:, :5].exp()
    magnitude, norm = b[0].abs() + 1, b[1].abs() + 1
    dy, dm = dialect.get("dora_rescale_grad").overload(g, y, None, magnitude, norm)
    return dy @ w[:5, :3] + g @ w[1:, :3], dm


@pytest.mark.parametrize(
    "function", [a_factor_that_a_sum_overwrites, a_factor_that_another_sum_overwrites, a_gradient_that_is_rescaled]
)
def test_a_factor_of_a_sum_is_not_written_to_before_it_is_read(function):
    inputs = operands()
    gm = make_fx(function, tracing_mode="fake")(*inputs)
    accumulate_in_place(gm.graph)
    gm.graph.lint()
    gm.recompile()
    for got, want in zip(gm(*inputs), function(*inputs), strict=True):
        torch.testing.assert_close(got, want)


BROADCAST = {
    "a matrix and a batch of one": lambda x, w, h, b: x @ w + (h @ b).view(1, 4, 5),
    "numbers": lambda x, w, h, b: (x[:1] @ w[:, :1]).view(()) + (h[:1] @ b[:, :1]).view(()),
}


@pytest.mark.parametrize("name", BROADCAST)
def test_a_sum_keeps_its_shape(name):
    inputs = operands()
    gm = make_fx(BROADCAST[name])(*inputs)
    accumulate_in_place(gm.graph)
    gm.recompile()
    got, want = gm(*inputs), BROADCAST[name](*inputs)
    assert got.shape == want.shape
    torch.testing.assert_close(got, want)


RESCALED = {
    "what a loop writes": (lambda g, f: g * f, 1),
    "through views": (lambda g, f: (g * f).view(8, 5).view(2, 4, 5), 1),
    "a product": (lambda g, f: g @ (f[0, 0][:, None] * f[0, 0]), 1),
    "a cast": (lambda g, f: convert(g.double() * f, g.dtype), 1),
    "a cast that changes nothing": (lambda g, f: convert(g, g.dtype), 0),
    "an input of the graph": (lambda g, f: g, 0),
    "a slice": (lambda g, f: (torch.cat([g, g], -1) * 2)[..., :5], 0),
}


@pytest.mark.parametrize("name", RESCALED)
@pytest.mark.parametrize("has_bias", [False, True])
def test_the_gradient_of_a_rescaled_output_is_made_in_place(name, has_bias):
    torch.manual_seed(0)
    g, f, y = (torch.randn(2, 4, 5) for _ in range(3))
    bias, magnitude, norm = (torch.rand(5) + 0.5 for _ in range(3))
    make, count = RESCALED[name]
    op = dialect.get("dora_rescale_grad").overload

    def both(g, f, y, bias, magnitude, norm):
        dy, dm = op(make(g, f), y, bias if has_bias else None, magnitude, norm)
        return dy.sin(), dm

    found, targets = rewritten(both, g, f, y, bias, magnitude, norm)
    assert found == targets.count(RESCALE_GRAD) == count and targets.count(op) == 1 - count
    dy, dm = both(g, f, y, bias, magnitude, norm)
    exact = make(g.double(), f.double())
    torch.testing.assert_close(dy, (exact * magnitude / norm).sin().float())
    centred = y.double() - (bias if has_bias else 0)
    torch.testing.assert_close(dm, ((exact * centred).sum((0, 1)) / norm).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", RESCALED)
@pytest.mark.parametrize("of_base", [False, True])
def test_the_gradient_of_a_dora_output_is_made_in_place(name, of_base, dtype):
    torch.manual_seed(0)
    g, f, z, h, B = (torch.randn(*s).to(dtype) for s in ((2, 4, 5),) * 3 + ((2, 4, 3), (5, 3)))
    magnitude, norm, scale = torch.rand(5) + 0.5, torch.rand(5) + 0.5, torch.full((1,), 2.0, dtype=torch.float64)
    make, count = RESCALED[name]
    op = dialect.get("dora_output_grads").overload

    def together(g, f, z, h, B, magnitude, norm, scale):
        q, dB, dz, dm = op(make(g, f), z, None, h, B, magnitude, norm, scale, of_base)
        return q, dB, dz.sin(), dm

    given = g, f, z, h, B, magnitude, norm, scale
    found, targets = rewritten(together, *given)
    assert found == targets.count(OUTPUT_GRADS) == count and targets.count(op) == 1 - count
    made = make(g, f)
    q, dB, dz, dm = op(made, z, None, h, B, magnitude, norm, scale, of_base)
    flat, c = made.double().flatten(0, 1), magnitude.double() / norm.double()
    tolerance = {"rtol": 3e-2, "atol": 6e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    wants = [
        (2 * flat @ (c[:, None] * B.double())).view(2, 4, 3), c[:, None] * (flat.t() @ h.double().flatten(0, 1)),
        (c - float(of_base)) * made.double(),
        ((flat * z.double().flatten(0, 1)).sum(0) + ((flat.t() @ h.double().flatten(0, 1)) * B).sum(1)) / norm,
    ]  # fmt: skip
    for got, want in zip((q, dB, dz, dm), wants, strict=True):
        torch.testing.assert_close(got.double(), want, **tolerance)


def test_the_gradients_of_several_adapters_are_added_to_what_a_loop_writes():
    q, A = [torch.randn(2, 4, 2), torch.randn(2, 4, 3)], [torch.randn(2, 5), torch.randn(3, 5)]
    joined = dialect.get("lora_input_grads").overload
    for make in (lambda x: x + 1, lambda x: (x + 1).view(8, 5).view(2, 4, 5)):
        def sums(x, *factors, make=make):
            return joined(make(x), factors[:2], factors[2:], [], []).relu()

        count, targets = rewritten(sums, torch.randn(2, 4, 5), *q, *A)
        assert count == targets.count(ADD_PRODUCTS) == 1
    shared = rewritten(
        lambda x, *factors: (joined(y := x + 1, factors[:2], factors[2:], [], []), y), torch.randn(2, 4, 5), *q, *A
    )
    assert shared[0] == 0, "someone else reads it"


def test_a_gradient_that_others_read_is_not_written_to():
    op = dialect.get("dora_rescale_grad").overload

    def shared(g, y, magnitude, norm):
        twice = g * 2
        dy, dm = op(twice, y, None, magnitude, norm)
        return dy, dm, twice.sin()

    g, y = torch.randn(4, 5), torch.randn(4, 5)
    assert rewritten(shared, g, y, torch.rand(5), torch.rand(5))[0] == 0
    of_itself = rewritten(lambda y, m, n: op(s := y * 2, s, None, m, n), y, torch.rand(5), torch.rand(5))
    assert of_itself[0] == 0


@pytest.mark.inductor
@pytest.mark.slow
def test_dora_in_compiled_code():
    """Loss and gradients of a step whose rescaled gradients are made in place, against V = diag(m / n) (W + s B A)."""
    torch.manual_seed(0)
    base, x = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8, bias=False), nn.Linear(8, 3)), torch.randn(5, 6)
    lora = adaptc.LoRA(r=2, init="random", targets="all-linear", dora=True)
    model = adaptc.compile(copy.deepcopy(base), lora, backend="inductor")
    with torch.no_grad():
        for site in model.adaptc.sites:
            site.adapters["default"].lora_magnitude.mul_(torch.rand_like(site.adapters["default"].lora_magnitude) + 0.5)
    loss = model(x).square().sum()
    loss.backward()
    leaves, h = [], x.double()
    for index, site in zip((0, 2, 3), model.adaptc.sites, strict=True):
        adapter, layer = site.adapters["default"], base[index]
        trained = (adapter.lora_A, adapter.lora_B, adapter.lora_magnitude)
        A, B, m = (p.detach().double().requires_grad_() for p in trained)
        leaves += zip(trained, (A, B, m), strict=True)
        V = layer.weight.double() + adapter.scaling * B @ A
        h = h @ ((m / V.detach().norm(dim=1))[:, None] * V).T + (0 if layer.bias is None else layer.bias.double())
        h = h.tanh() if index == 0 else h
    want = h.square().sum()
    want.backward()
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-6)
    for got, exact in leaves:
        torch.testing.assert_close(got.grad.double(), exact.grad, rtol=1e-4, atol=1e-5)
    assert sum(graph.in_place for graph in model.adaptc.graphs) > 0


class Residual(nn.Module):
    """Layers without a bias and a skip connection: Inductor makes one product of y + y W."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        y = self.a(x)
        return self.head(y + self.b(y)).square().sum()


@pytest.mark.slow
@pytest.mark.inductor
@pytest.mark.parametrize("targets", [["head"], ["a", "b", "head"]])
def test_a_skip_connection_reads_what_was_there(targets):
    base, x = Residual(), torch.randn(5, 6)
    lora = adaptc.LoRA(r=2, init="random", targets=targets)
    model = adaptc.compile(copy.deepcopy(base), lora, backend="inductor")
    with torch.no_grad():
        for site in model.adaptc.sites:
            base.get_submodule(site.path).weight += site.adapters["default"].delta().float()
    torch.testing.assert_close(model(x), base(x), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(model(x), base(x), rtol=1e-5, atol=1e-5)


def test_a_bias_that_is_a_product_is_not_the_memory_of_a_matrix():
    """Of one row, both have as many numbers."""
    z, v, x, w = torch.randn(1, 6), torch.randn(6, 5), torch.randn(1, 3), torch.randn(3, 5)
    assert rewritten(lambda z, v, x, w: torch.addmm((z @ v).view(5), x, w), z, v, x, w)[0] == 0


class InPlace(CustomGraphPass):
    """The rewrite where Inductor would run it, and how many results it moved."""

    count = 0

    def __call__(self, graph):
        self.count += accumulate_in_place(graph)

    def uuid(self):
        return None


@pytest.mark.slow
def test_a_loop_that_inductor_lays_out_in_another_order_is_written_to_in_the_order_of_its_reader():
    def function(x, y, magnitude, norm):
        g = x.transpose(0, 1).contiguous() * y.transpose(0, 1).contiguous()
        dy, dm = dialect.get("dora_rescale_grad").overload(g, y.transpose(0, 1).contiguous(), None, magnitude, norm)
        return dy.sin(), dm

    torch.manual_seed(0)
    given = torch.randn(3, 4, 32), torch.randn(3, 4, 32), torch.randn(32), torch.rand(32) + 1
    rewrite = InPlace()
    torch.compiler.reset()
    with inductor.patch(post_grad_custom_post_pass=rewrite, fx_graph_cache=False), torch.no_grad():
        got = torch.compile(function)(*given)
    assert rewrite.count == 1
    torch.testing.assert_close(got, function(*given), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        torch.clone, lambda x: x + 0, lambda x: x * 1, lambda x: x / 1, lambda x: x + 2,
        lambda x: x.double().float(), lambda x: x.float(), lambda x: convert(x.double().cos(), torch.float32),
    ],
)  # fmt: skip
def test_a_loop_that_changes_nothing_is_not_the_memory_of_what_it_reads(make):
    joined = dialect.get("lora_input_grads").overload

    def function(x, q, A):
        return joined(make(x), [q], [A], [], []).sin(), x.cos()

    torch.manual_seed(0)
    given = torch.randn(3, 4, 32), torch.randn(3, 4, 2), torch.randn(2, 32)
    before = given[0].clone()
    rewrite = InPlace()
    torch.compiler.reset()
    with inductor.patch(post_grad_custom_post_pass=rewrite, fx_graph_cache=False), torch.no_grad():
        got = torch.compile(function)(*given)
    assert torch.equal(given[0], before)
    torch.testing.assert_close(got, function(*given), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_transposed_weight_is_read_where_it_lies():
    def function(g, w, k, v):
        return g @ w.t() + k @ v.t()

    given = torch.randn(8, 6), torch.randn(4, 6), torch.randn(8, 6), torch.randn(4, 6)
    rewrite = InPlace()
    torch.compiler.reset()
    with inductor.patch(post_grad_custom_post_pass=rewrite, fx_graph_cache=False), torch.no_grad():
        got, (code, *_) = run_and_get_code(torch.compile(function), *given)
    assert rewrite.count == 1 and "add_product_.default(" in code and "cpp_fused" not in code, "no loop copies it"
    torch.testing.assert_close(got, function(*given))
