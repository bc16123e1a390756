"""Hooks, methods and modules that a user changes after the first call act from the next call on."""

from __future__ import annotations

import contextlib
import copy
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook, register_module_full_backward_hook

import adaptc
from adaptc.errors import RecompileLimitWarning
from tests.models import hosts
from tests.reference import check_against_reference

PLACES = ("act", "first", "head", "")


class Act(nn.Module):
    def curve(self, x):
        return x.tanh()

    def forward(self, x):
        return self.curve(x)


class Net(nn.Module):
    def __init__(self, outputs=5):
        super().__init__()
        self.first, self.act, self.head = nn.Linear(8, 6), Act(), nn.Linear(6, outputs)

    def forward(self, x):
        return self.head(self.act(self.first(x)))


class ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.factor, None


def formula(model, x, factors, curve=torch.tanh):
    """The output, where values or gradients are multiplied at a module's input or output: (place, what) -> factor."""

    def at(place, run, value):
        value = ScaleGradient.apply(value * factors.get((place, "input"), 1), factors.get((place, "to input"), 1))
        value = run(value) * factors.get((place, "output"), 1)
        return ScaleGradient.apply(value, factors.get((place, "to output"), 1))

    adapter = model.first.adapters["default"]
    first, head = model.first, model.head

    def adapted(x):
        return x @ first.weight.T + first.bias + adapter.scale * (x @ adapter.lora_A.T @ adapter.lora_B.T)

    def whole(x):
        return at("head", lambda h: h @ head.weight.T + head.bias, at("act", curve, at("first", adapted, x)))

    return at("", whole, x)


def compiled(backend="eager", net=Net, **options):
    torch.manual_seed(0)
    plan = adaptc.LoRA(r=3, alpha=2, targets=["first"], init="random", compute_dtype=None)
    return adaptc.compile(net().double(), plan, backend=backend, **options)


def values(model, run):
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    output = run(x)
    return [output, *torch.autograd.grad(output.square().sum(), [x, *model.adaptc.parameters()])]


def check(model, factors=None, **options):
    got = values(model, model)
    torch.testing.assert_close(got, values(model, lambda x: formula(model, x, factors or {}, **options)))


def epochs(model):
    return model.adaptc.metrics()["epochs"]


def _times(factor):
    return {
        "forward": lambda m: m.register_forward_hook(lambda m, args, y: y * factor),
        "forward, with keywords": lambda m: m.register_forward_hook(lambda m, a, k, y: y * factor, with_kwargs=True),
        "forward, always": lambda m: m.register_forward_hook(lambda m, args, y: y * factor, always_call=True),
        "pre": lambda m: m.register_forward_pre_hook(lambda m, args: (args[0] * factor,)),
        "pre, with keywords": lambda m: m.register_forward_pre_hook(
            lambda m, args, kwargs: ((args[0] * factor,), kwargs), with_kwargs=True
        ),
        "backward": lambda m: m.register_full_backward_hook(lambda m, into, out: (into[0] * factor,)),
        "backward pre": lambda m: m.register_full_backward_pre_hook(lambda m, out: (out[0] * factor,)),
    }


ACTS_ON = {
    "forward": "output", "forward, with keywords": "output", "forward, always": "output", "pre": "input",
    "pre, with keywords": "input", "backward": "to input", "backward pre": "to output",
}  # fmt: skip
ESSENTIAL = ("forward", "pre, with keywords", "backward")


def _marked(kinds):
    return [kind if kind in ESSENTIAL else pytest.param(kind, marks=pytest.mark.slow) for kind in kinds]


def check_hooks(model, kind):
    """Add hooks at every place, replace one, and remove them."""
    check(model)
    what = ACTS_ON[kind]
    handles = {place: _times(1.5)[kind](model.get_submodule(place)) for place in PLACES}
    factors = dict.fromkeys(((place, what) for place in PLACES), 1.5)
    check(model, factors)
    handles["act"].remove()
    handles["act"] = _times(3)[kind](model.act)
    check(model, {**factors, ("act", what): 3})
    for places in (("act", ""), ("first", "head")):
        for place in places:
            handles[place].remove()
            del factors[place, what]
        check(model, factors)


@pytest.mark.parametrize("kind", _marked(ACTS_ON))
def test_hooks_act_from_the_next_call_on(kind):
    check_hooks(compiled(), kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ESSENTIAL)
def test_hooks_act_under_autograd_of_the_compiler(kind):
    check_hooks(compiled("aot_eager"), kind)


@pytest.mark.slow
@pytest.mark.inductor
def test_hooks_act_under_inductor():
    model, kinds = compiled("inductor"), ("forward", "backward", "backward pre")
    check(model)
    for kind in kinds:
        _times(1.5)[kind](model.act)
    check(model, {("act", ACTS_ON[kind]): 1.5 for kind in kinds})


def test_hooks_around_every_call_are_captured_once():
    model = compiled()
    for turn in range(3):
        check(model)
        handle = model.act.register_forward_hook(lambda m, args, y, factor=turn % 2 + 2: y * factor)
        check(model, {("act", "output"): turn % 2 + 2})
        handle.remove()
    assert epochs(model) == 2
    check(model)
    for register, hook, what in (
        (register_module_forward_pre_hook, lambda m, args: (args[0] * 2,) if isinstance(m, Act) else None, "input"),
        (
            register_module_full_backward_hook,
            lambda m, into, out: (into[0] * 2,) if isinstance(m, Act) else None,
            "to input",
        ),
    ):
        for _ in range(2):
            with register(hook):
                check(model, {("act", what): 2})
            check(model)
    assert epochs(model) == 4


def test_hooks_put_aside_and_back_without_a_handle():
    model = compiled()
    check(model)
    model.act.register_forward_hook(lambda m, args, y: y * 2)
    twice = {("act", "output"): 2}
    for _ in range(2):
        check(model, twice)
        aside, model.act._forward_hooks = model.act._forward_hooks, OrderedDict()
        check(model)
        model.act._forward_hooks = aside
        check(model, twice)
    model.act._forward_hooks.clear()
    check(model)
    model.act._forward_hooks[0] = lambda m, args, y: y * 3
    check(model, {("act", "output"): 3})


def test_methods_of_classes_act_from_the_next_call_on():
    model = compiled()
    check(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Act, "curve", lambda self, x: x.sigmoid())
        check(model, curve=torch.sigmoid)
        patch.setattr(Act, "forward", lambda self, x: self.curve(x) * 2)
        check(model, {("act", "output"): 2}, curve=torch.sigmoid)
    check(model)
    call = nn.Module.__call__

    def doubled(self, *args, **kwargs):
        return call(self, *args, **kwargs) * (2 if isinstance(self, Act) else 1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, "__call__", doubled)
        check(model, {("act", "output"): 2})
        patch.setattr(Act, "__call__", call, raising=False)
        check(model)
    assert epochs(model) == 5
    check(model)
    assert epochs(model) == 5, "as before the first change"


@pytest.mark.slow
def test_ever_other_methods_are_told_of_once():
    model = compiled()
    check(model)
    with pytest.MonkeyPatch.context() as patch, pytest.warns(RecompileLimitWarning, match="9th time") as told:
        for i in range(11):
            patch.setattr(Act, "forward", lambda self, x, i=i: self.curve(x) * i)
            check(model, {("act", "output"): i})
    assert len(told) == 1
    assert model.adaptc.metrics()["past_graphs"] >= 2


def test_another_module_and_a_forward_of_an_instance_act():
    model = compiled()
    check(model)
    forward = model.act.forward
    model.act.forward = lambda x: forward(x) * 2
    check(model, {("act", "output"): 2})
    del model.act.forward
    check(model)
    other = Act()
    other.register_forward_hook(lambda m, args, y: y * 3)
    check(model)
    own, model.act = model.act, other
    check(model, {("act", "output"): 3})
    model.act = own
    check(model)
    model.act = nn.ReLU()
    check(model, curve=torch.relu)
    model.act.register_forward_hook(lambda m, args, y: y * 3)
    check(model, {("act", "output"): 3}, curve=torch.relu)


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.nets = nn.ModuleList(Net(8) for _ in range(3))

    def forward(self, x):
        for net in self.nets:
            x = net(x)
        return x


def test_code_behind_a_break_that_modules_share_knows_their_hooks():
    model = compiled(net=Stack, regional=False)
    # Dynamo breaks at backward hooks, and then compiles the forward of a Net for all of them.
    model.nets[1].act.register_full_backward_hook(lambda m, into, out: (into[0] * 1.5,))
    model.nets[2].act.register_forward_hook(lambda m, args, y: y * 3)
    factors = {}, {("act", "to input"): 1.5}, {("act", "output"): 3}

    def expected(x):
        for net, each in zip(model.nets, factors, strict=True):
            x = formula(net, x, each)
        return x

    for _ in range(2):
        torch.testing.assert_close(values(model, model), values(model, expected))


def test_hooks_of_a_copy_are_its_own():
    model = compiled()
    check(model)
    model.act.register_forward_hook(lambda m, args, y: y * 2)
    check(model, {("act", "output"): 2})
    other = copy.deepcopy(model)
    other.head.register_forward_hook(lambda m, args, y: y * 3)
    check(other, {("act", "output"): 2, ("head", "output"): 3})
    check(model, {("act", "output"): 2})


@pytest.mark.slow
@pytest.mark.parametrize("regional", [False, True])
@pytest.mark.parametrize("around", ["", "generate", "checkpointing", "autocast"])
def test_hooks_in_blocks(around, regional):
    base = hosts.build("llama", train=around != "generate", num_hidden_layers=2)
    model = adaptc.compile(
        copy.deepcopy(base), adaptc.LoRA(r=3, init="random", targets="all-linear"), backend="eager",
        regional=regional,
    )  # fmt: skip
    if around == "checkpointing":
        for each in (model, base):
            each.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    context = torch.autocast("cpu", torch.bfloat16) if around == "autocast" else contextlib.nullcontext()
    batch = hosts.batch("llama")

    def same():
        if around == "autocast":
            with context:
                model(**batch).logits.sum().backward()
            return
        check_against_reference(model, base, batch)

    same()
    if around == "generate":
        model.generate(batch["input_ids"], max_new_tokens=2, do_sample=False)
    for each in (model, base):
        each.model.layers[1].mlp.register_forward_hook(lambda m, args, y: y * 1.5)
        each.model.layers[0].mlp.act_fn.register_full_backward_hook(lambda m, into, out: (into[0] * 1.5,))
    same()
