"""What replaces which tensors of a module, as its adapters say it: the numbers; nothing changes; every refusal."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import adaptc
from adaptc import IA3, SSF, Bias, Bottleneck, Hydra, LoRA, Match, Rule, TrainableTokens, VeRA
from adaptc.errors import UnsupportedError
from adaptc.runtime import attach
from adaptc.runtime.folding import folded_state
from tests.files.peft_cases import randomise

pytestmark = pytest.mark.filterwarnings("ignore::adaptc.errors.NewSignatureWarning")

LINEAR = {
    "lora": LoRA(r=2, init="random"),
    "rslora with biases": LoRA(r=2, init="random", rslora=True, lora_bias=True, bias="lora_only"),
    "dora": LoRA(r=2, init="random", dora=True),
    "pissa": LoRA(r=2, init="pissa"),
    "ia3": IA3(init="random"),
    "ia3 on the input": IA3(init="random", feedforward=True),
    "hydra": Hydra(r=2, init="random"),
    "vera": VeRA(r=3),
    "ssf": SSF(),
    "bias": Bias(),
}


def adapted(base, method, targets, *others):
    """An eager model with ``method`` and ``others``, each under a name of its own, all live, with random values."""
    def plan(m):
        return adaptc.Plan([Rule(Match(targets), m)])

    model = adaptc.compile(base, plan(method), backend="eager").eval()
    for number, other in enumerate(others):
        model.adaptc.add(f"other{number}", plan(other))
    model.adaptc.switch(["default", *(f"other{number}" for number in range(len(others)))])
    randomise(model)
    return model


def with_tensors(module, values):
    """A copy of the module without adapters that has ``values``."""
    plain = copy.deepcopy(module)
    for name in list(plain.adapters):
        attach.remove(plain, name)
    for name, value in values.items():
        target = plain.get_parameter(name)
        assert value.dtype == target.dtype and value.shape == target.shape
        target.data.copy_(value)
    return plain


def base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5)).double()


@pytest.mark.parametrize("method", LINEAR.values(), ids=LINEAR)
def test_the_module_alone_computes_with_the_values_what_it_does_with_the_adapter(method):
    model = adapted(base(), method, "0")
    module, x = model[0], torch.randn(4, 6, dtype=torch.float64)
    adapter = module.adapters["default"]
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    assert adapter.merge_refusal(module) is None
    values = adapter.merged(module)
    assert values.keys() <= {"weight", "bias"}
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items()), "nothing changes"
    own = {tensor.data_ptr() for tensor in module.state_dict().values()}
    assert not own.intersection(value.data_ptr() for value in values.values())
    torch.testing.assert_close(with_tensors(module, values)(x), model(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("first", LINEAR.values(), ids=LINEAR)
def test_adapters_beside_each_other_are_merged_as_they_act(first):
    model = adapted(base(), first, "0", LoRA(r=3, init="random"), IA3(init="random"))
    module, x = model[0], torch.randn(4, 6, dtype=torch.float64)
    one, *beside = module.adapters.values()
    assert one.merge_refusal(module, beside) is None
    torch.testing.assert_close(
        with_tensors(module, one.merged(module, beside))(x), model(x), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("module", [nn.Linear(6, 5), nn.LayerNorm(6)], ids=["linear", "norm"])
def test_two_trained_biases_add_what_each_of_them_changed(module):
    model = adapted(nn.Sequential(module), Bias(), "0", Bias())
    x = torch.randn(4, 6)
    want = model(x)
    state = folded_state(model.adaptc.adapters)
    first, second = (a.bias.double() for a in module.adapters.values())
    frozen = module.bias.double()
    assert torch.equal(state["0.bias"], (first + (second - frozen)).float())
    torch.testing.assert_close(model.adaptc.merge_and_unload()(x), want)
    model = adapted(nn.Sequential(module), Bias(), "0")
    state = folded_state(model.adaptc.adapters)
    assert torch.equal(state["0.bias"], module.adapters["default"].bias), "one: to the bit"


def test_one_of_two_loras_can_be_merged_by_itself():
    model = adapted(base(), LoRA(r=2, init="random"), "0", LoRA(r=3, init="random"))
    module, x = model[0], torch.randn(4, 6, dtype=torch.float64)
    want = model(x)
    values = module.adapters["default"].merged(module)
    kept = module.weight.detach().clone()
    module.weight.data.copy_(values["weight"])
    model.adaptc.switch("other0")
    torch.testing.assert_close(model(x), want, rtol=1e-12, atol=1e-12)
    module.weight.data.copy_(kept)
    model.adaptc.switch(["default", "other0"])
    assert torch.equal(model(x), want)


def conv(groups=1):
    return nn.Sequential(nn.Conv2d(4, 4, 3, groups=groups))


TOKENS = TrainableTokens(indices=(1, 3))
REFUSED = {
    "of another kind": (nn.Sequential(nn.Linear(6, 6)), [Bottleneck()], "bottleneck cannot be folded"),
    "beside one of another kind": (
        nn.Sequential(nn.Linear(6, 6)), [LoRA(), Bottleneck()], "bottleneck cannot be folded",
    ),
    "not linear": (nn.Sequential(nn.LayerNorm(6)), [SSF()], "LayerNorm is not a linear layer"),
    "a norm's bias and more": (nn.Sequential(nn.LayerNorm(6)), [Bias(), SSF()], "LayerNorm is not a linear layer"),
    "a constant without a bias": (
        nn.Sequential(nn.Linear(6, 5, bias=False)), [SSF()], "adds a constant, and the layer has no bias",
    ),
    "a grouped convolution": (conv(2), [LoRA(r=2)], "its first factor reads all channels"),
    "the second on a grouped convolution": (conv(2), [LoRA(r=2), LoRA(r=4)], "its first factor reads all channels"),
    "beside the update of a convolution": (conv(), [SSF(), LoRA(r=2)], "beside the update of its weights"),
    "beside trained rows": (nn.Sequential(nn.Embedding(5, 4)), [LoRA(r=2), TOKENS], "beside trained rows"),
    "beside a copy": (nn.Sequential(nn.Linear(6, 5)), [IA3(), "full"], "act around a fully trained module"),
}  # fmt: skip


@pytest.mark.parametrize("module, methods, reason", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_merged_is_refused_before_anything_changes(module, methods, reason):
    plans = [Rule(Match("0"), train="full") if m == "full" else Rule(Match("0"), m) for m in methods]
    model = adaptc.compile(module, adaptc.Plan([plans[0]]), backend="eager")
    for number, plan in enumerate(plans[1:]):
        model.adaptc.add(f"other{number}", adaptc.Plan([plan]))
    model.adaptc.switch(["default", *(f"other{number}" for number in range(len(plans) - 1))])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UnsupportedError, match=r"^0: the adapter cannot be merged") as error:
        model.adaptc.merge_and_unload()
    assert reason in error.value.facts["found"]
    assert error.value.facts["do"] == "save the adapter by itself (merge=False)"
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert len(model.adaptc.sites) == 1
