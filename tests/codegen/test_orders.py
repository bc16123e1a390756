"""Association orders: what is timed is the order, and what is predicted of it is what it computes."""

from __future__ import annotations

import pytest
import torch

from adaptc.codegen import choices, orders, roofline
from adaptc.codegen.orders import Layer
from adaptc.codegen.roofline import Rates
from tests.passes.test_reassociate import orders as formulas


@pytest.mark.parametrize("forward_only", [False, True])
@pytest.mark.parametrize("plan", orders._RUN)
def test_what_is_timed_is_the_order(plan, forward_only, monkeypatch):
    """The products of each order, in fp64, by what they write: all results of a step."""
    torch.manual_seed(0)
    x, g, W, A, B = (torch.randn(s, dtype=torch.float64) for s in ((9, 5), (9, 7), (7, 5), (2, 5), (7, 2)))
    monkeypatch.setattr(orders, "onednn_linear", lambda x, W, bias: torch.nn.functional.linear(x, W, bias))
    seen = []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            seen.append(out)
            return out

    with Record():
        orders._RUN[plan](x, None if forward_only else g, W, A, B, True)
    name = {"split": "b1", "merge": "b5", "dense": "b4", orders.ONEDNN: "b1"}[plan]
    for want in formulas(x, g, W, A, B, 1.0)[name][: 1 if forward_only else 4]:
        assert any(out.shape == want.shape and torch.allclose(out, want) for out in seen)


@pytest.mark.parametrize("rows, rank, best", [(128, 8, "split"), (1 << 16, 8, "merge"), (1 << 16, 1024, "dense")])
def test_the_roofline_ranks_as_the_tables_do(rows, rank, best):
    """RunLoRA's break-even: merging beats the chain for many rows whatever the rank, a dense gradient at high ranks."""
    rate = Rates(operations=1e11, bandwidth=1e14, overhead=0.0)
    layer, k = Layer(rows, 1024, 1024, rank, trained=True, input_grad=True), 1024
    found = orders._predicted(rate, layer, torch.float32)
    frozen, small, merged = rows * k * k, 2 * rows * k * rank, k * k * rank
    counts = {"split": 3 * small, "merge": 2 * (small + merged), "dense": frozen + 4 * merged}
    assert min(found, key=found.get) == min(counts, key=counts.get) == best
    assert orders.could_gain(layer) == (best != "split")
    for plan, seconds in found.items():  # additions are not multiplications: a few in a thousand
        operations = orders.operations(plan, layer)
        assert operations == pytest.approx(2 * (2 * frozen + counts[plan]), rel=0.01)
        assert seconds == pytest.approx(operations / 1e11)


def test_the_rates_of_this_host(tmp_path, monkeypatch):
    monkeypatch.setattr(choices.torch_internals, "cache_dir", lambda: str(tmp_path))
    monkeypatch.setattr(choices._MEMORY, "known", {})
    times = {"product": 0.5, "copy": 0.25, "small": 1e-6}
    monkeypatch.setattr(choices, "_time", lambda ways: [run() for run in ways.values()] and times)
    found = roofline.rates(torch.device("cpu"), torch.float32)
    assert found == Rates(2 * 1024**3 / 0.5, 2 * 4 * (1 << 24) / 0.25, 1e-6)
    # y = x W: 2 * 512 * 64 * 64 operations against 4 * (2 * 512 * 64 + 64 * 64) bytes
    x, W = torch.empty(512, 64), torch.empty(64, 64)
    slow = Rates(1.0, 1e30, 0.0), Rates(1e30, 1.0, 0.0), Rates(1e30, 1e30, 3.0)
    assert [rate.seconds(torch.mm, x, W) for rate in slow] == [
        pytest.approx(2 * 512 * 64 * 64), pytest.approx(4 * (2 * 512 * 64 + 64 * 64)), pytest.approx(3),
    ]  # fmt: skip
