"""``adaptc.compile(peft_model)``: the same adapters, losses and gradients, without the wrapper."""

from __future__ import annotations

import copy
import re
import warnings

import peft
import pytest
import torch

import adaptc
from adaptc.errors import AdaptcError, AdapterNameError, NewSignatureWarning, UnsupportedError
from tests.models import hosts
from tests.reference import step


def lora(**options):
    given = {"r": 3, "lora_alpha": 6, "init_lora_weights": False, "target_modules": ["q_proj"], **options}
    return peft.LoraConfig(**given)


CASES = {
    "lora": ("llama", lora(target_modules=["q_proj", "down_proj"])),
    "rslora": ("llama", lora(use_rslora=True, rank_pattern={"k_proj": 5}, target_modules=["k_proj", "v_proj"])),
    "dora": ("llama", lora(use_dora=True, target_modules=["q_proj", "up_proj"])),
    "lora bias": ("bert", lora(lora_bias=True, target_modules=["query", "value"])),
    "conv1d": ("gpt2", lora(target_modules=["c_attn"], fan_in_fan_out=True)),
    "head": ("bert", lora(target_modules=["query"], task_type="SEQ_CLS")),
    "biases": ("bert", lora(target_modules=["query", "value"], bias="lora_only")),
    "ia3": ("llama", peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])),
}


def ours_to_theirs(name):
    """An adaptc parameter name in PEFT's words."""
    name = re.sub(r"\.adapters\.(\w+)\.copy\.", r".modules_to_save.\1.", name)
    name = re.sub(r"\.adapters\.(\w+)\.(lora_[AB])$", r".\2.\1.weight", name)
    name = re.sub(r"\.adapters\.(\w+)\.lora_magnitude$", r".lora_magnitude_vector.\1.weight", name)
    name = re.sub(r"\.adapters\.(\w+)\.lora_B_bias$", r".lora_B.\1.bias", name)
    name = re.sub(r"\.adapters\.(\w+)\.(ia3_l)$", r".\2.\1", name)
    return "base_model.model." + re.sub(r"\.adapters\.(\w+)\.bias$", r".base_layer.bias", name)


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_are_pefts(case):
    host, config = CASES[case]
    base = hosts.short(host, train=True)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    wrapped = peft.get_peft_model(base, config)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    own = {n: t.clone() for n, t in wrapped.get_base_model().state_dict().items() if n in before}
    twin = copy.deepcopy(wrapped)

    model = adaptc.compile(wrapped, backend="eager")

    assert model is base and not any(type(m).__module__.startswith("peft.") for m in model.modules())
    assert not hasattr(model, "peft_config")
    state = model.state_dict()
    assert own and all(torch.equal(state[name], tensor) for name, tensor in own.items())
    batch = hosts.batch(host)
    want_loss, want = step(twin, batch)
    loss, gradients = step(model, batch)
    torch.testing.assert_close(loss, want_loss, rtol=1e-6, atol=0)
    assert {ours_to_theirs(name) for name in gradients} == set(want)
    for name, gradient in gradients.items():
        theirs = want[ours_to_theirs(name)]
        torch.testing.assert_close(gradient.reshape(theirs.shape), theirs, rtol=2e-5, atol=1e-7)


def several():
    wrapped = peft.get_peft_model(hosts.short("llama"), lora())
    wrapped.add_adapter("sft", lora(r=2, target_modules=["v_proj", "q_proj"]))
    wrapped.set_adapter("sft")
    return wrapped


def logits(model):
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # files are the subject here, not graphs
        return model.eval()(**hosts.batch("llama")).logits


def test_several_adapters_with_the_active_one_live():
    twin = several()
    model = adaptc.compile(copy.deepcopy(twin), backend="eager")
    assert list(model.adaptc.records) == ["default", "sft"] and model.adaptc.live == ("sft",)
    for name in ("sft", "default"):
        twin.set_adapter(name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NewSignatureWarning)  # they have other sites
            model.adaptc.switch(name)
        torch.testing.assert_close(logits(model), logits(twin), rtol=0, atol=1e-6)


def test_requires_grad_as_in_peft():
    wrapped = several()
    for name, parameter in wrapped.named_parameters():
        if "lora_A.sft" in name:
            parameter.requires_grad_(False)
        if name.endswith("model.norm.weight"):
            parameter.requires_grad_(True)
    want = {name for name, p in wrapped.named_parameters() if p.requires_grad}
    model = adaptc.compile(wrapped, backend="eager")
    assert {ours_to_theirs(name) for name, p in model.named_parameters() if p.requires_grad} == want
    assert any("norm" in name for name in want) and not any("default" in name for name in want)


def test_a_changed_scale_and_disabled_adapters():
    wrapped = several()
    for module in wrapped.modules():
        if hasattr(module, "set_scale") and "sft" in module.scaling:
            module.set_scale("sft", 0.25)
    twin = copy.deepcopy(wrapped)
    wrapped.base_model.disable_adapter_layers()
    model = adaptc.compile(wrapped, backend="eager")
    assert model.adaptc.live == ()
    model.adaptc.switch("sft")
    torch.testing.assert_close(logits(model), logits(twin), rtol=0, atol=1e-6)


def merged():
    wrapped = several()
    wrapped.merge_adapter()
    return wrapped


def other_kind():
    return peft.get_peft_model(hosts.short("llama"), peft.PolyConfig(target_modules=["q_proj"]))


def second_does_not_fit():
    wrapped = several()
    with torch.no_grad():
        next(p for n, p in wrapped.named_parameters() if "lora_B.sft" in n).fill_(float("nan"))
    return wrapped


@pytest.mark.parametrize("make", [merged, other_kind, second_does_not_fit])
def test_nothing_changes_when_it_cannot_be_taken_over(make):
    wrapped = make()
    modules = {name: id(module) for name, module in wrapped.named_modules()}
    state = {name: tensor.clone() for name, tensor in wrapped.state_dict().items()}
    flags = {name: p.requires_grad for name, p in wrapped.named_parameters()}
    with pytest.raises(AdaptcError):
        adaptc.compile(wrapped, backend="eager")
    assert {name: id(module) for name, module in wrapped.named_modules()} == modules
    assert all(torch.equal(t.nan_to_num(), state[n].nan_to_num()) for n, t in wrapped.state_dict().items())
    assert {name: p.requires_grad for name, p in wrapped.named_parameters()} == flags


def test_it_names_what_is_wrong():
    with pytest.raises(UnsupportedError, match=r"PEFT has merged sft into the base weight"):
        adaptc.compile(merged())
    with pytest.raises(AdapterNameError, match="no adapter named 'dpo'"):
        adaptc.compile(several(), name="dpo")
    with pytest.raises(UnsupportedError, match="needs a plan"):
        adaptc.compile(hosts.short("llama"))


def test_random_numbers_stay_where_they_were():
    wrapped = several()
    state = torch.random.get_rng_state()
    adaptc.compile(wrapped, backend="eager")
    assert torch.equal(torch.random.get_rng_state(), state)
