"""Rows that a model takes in another order than the batch's are seen, whatever their number is."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import adaptc
from adaptc.errors import BatchError
from tests.runtime.rows import adapted


def by_length(h, x):
    order = x[:, 0, 0].argsort()
    return h[order]


def by_sorting(h, x):
    _, order = torch.sort(x[:, 0, 0])
    return h.index_select(0, order)


def sorted_and_back(h, x):
    order = x[:, 0, 0].argsort()
    return h[order].tanh()[order.argsort()]


pytestmark = pytest.mark.filterwarnings("ignore::adaptc.errors.NewSignatureWarning")
MOVED = {
    "by their length": by_length,
    "by sorting": by_sorting,
    "there and back": sorted_and_back,
    "from the last": lambda h, x: h.flip(0) + 1,
    "by one": lambda h, x: h.roll(1, dims=0),
    "as one list": lambda h, x: h.roll(6),
    "the second half first": lambda h, x: torch.cat([*h.chunk(2)][::-1]),
    "row by row": lambda h, x: torch.stack([h[i] for i in range(len(h))][::-1]),
    "by a draw": lambda h, x: torch.gather(h, 0, torch.randint(len(h), h.shape)),
}
STAYS = {
    "the last step": lambda h, x: h[torch.arange(len(h)), x[:, :, 0].argmax(-1)],
    "the first step": lambda h, x: h[:, 0],
    "other steps": lambda h, x: h[:, [2, 0, 1]].roll(1, dims=1).flip(1),
    "the largest": lambda h, x: h.topk(3).values.repeat(1, 1, 2) + h.sort(1).values,
}


class Model(nn.Module):
    def __init__(self, change):
        super().__init__()
        self.first, self.last, self.change = nn.Linear(4, 6), nn.Linear(6, 3), change

    def forward(self, x):
        return self.last(self.change(self.first(x), x))


def batched(change):
    plans = {name: adaptc.LoRA(r=2, targets=["last"]) for name in "ab"}
    return adapted(Model(change).double().eval(), plans, backend="eager"), torch.randn(4, 3, 4, dtype=torch.float64)


@pytest.mark.parametrize("name", MOVED)
def test_rows_in_another_order_are_refused(name):
    model, x = batched(MOVED[name])
    reason = "last: its rows may be in another order than those of the batch"
    with model.adaptc.batch(["a", None, "b", None]), torch.no_grad(), pytest.raises(BatchError, match=reason):
        model(x)


@pytest.mark.parametrize("name", STAYS)
def test_rows_that_stay_in_order_have_their_adapters(name):
    model, x = batched(STAYS[name])
    names = ["a", None, "b", "a"]
    with torch.no_grad():
        with model.adaptc.batch(names):
            found = model(x)
        for i, one in enumerate(names):
            model.adaptc.switch(one)
            torch.testing.assert_close(found[i : i + 1], model(x)[i : i + 1])


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.before, self.linear, self.after = nn.Identity(), nn.Linear(6, 6), nn.Identity()

    def forward(self, x):
        return self.after(self.linear(self.before(x)))


def plain():
    return adapted(Plain().eval(), {"a": adaptc.LoRA(r=2, targets=["linear"], init="random")}, backend="eager")


def hooked(module, function):
    return module.register_forward_hook(lambda _, args, y: function(y))


def replaced(module, function):
    module.forward = lambda y: function(y)


def kept(y):
    return y


def flipped(y):
    return y.flip(0)


@pytest.mark.parametrize("put", [hooked, replaced])
@pytest.mark.parametrize("first", [None, kept])
def test_what_a_hook_that_is_set_later_does_to_the_rows_is_seen(put, first):
    model, x = plain(), torch.randn(3, 6)
    handles = [put(m, first) for m in (model.before, model.after) if first]
    with model.adaptc.batch(["a", None, None]), torch.no_grad():
        want = model(x)
        for handle in filter(None, handles):
            handle.remove()
        handles = [put(m, flipped) for m in (model.before, model.after)]
        with pytest.raises(BatchError, match="another order"):
            model(x)
        for module, handle in zip((model.before, model.after), handles, strict=True):
            module.__dict__.pop("forward", None)
            if handle:
                handle.remove()
        assert torch.equal(model(x), want)


def test_what_has_failed_once_is_looked_at_again():
    model, x = plain(), torch.randn(3, 6)
    fails = [True, True]

    def flip(y):
        if fails and fails.pop():
            raise RuntimeError("on what has no values")
        return y.flip(0)

    hooked(model.before, flip)
    with model.adaptc.batch(["a", None, None]), torch.no_grad():
        model(x)
        assert not fails
        with pytest.raises(BatchError, match="another order"):
            model(x)
