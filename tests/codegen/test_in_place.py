"""Sums of products in the memory of the first, where nothing else reads it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import adaptc
from adaptc.codegen.in_place import ADD_PRODUCT, ADD_PRODUCTS, accumulate_in_place
from adaptc.ir import dialect

aten = torch.ops.aten


def operands():
    torch.manual_seed(0)
    return torch.randn(4, 6), torch.randn(6, 5), torch.randn(4, 2), torch.randn(2, 5)


def rewritten(function, *inputs):
    gm = make_fx(function)(*inputs)
    count = accumulate_in_place(gm.graph)
    gm.graph.lint()
    gm.recompile()
    torch.testing.assert_close(gm(*inputs), function(*inputs), rtol=0, atol=0)
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


class Residual(nn.Module):
    """Layers without a bias and a skip connection: Inductor makes one product of y + y W."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        y = self.a(x)
        return self.head(y + self.b(y)).square().sum()


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
