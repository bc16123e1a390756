"""Adapters of quantised bases in files and copies: resuming, PEFT, other bases, what the base itself can."""

from __future__ import annotations

import copy
import warnings

import peft
import pytest
import torch

import adaptc
from adaptc.errors import AdaptcWarning
from tests.methods.in_fp64 import randomise
from tests.models import hosts
from tests.quantised import bases
from tests.quantised.bases import eagerly  # noqa: F401
from tests.quantised.test_training import IA3, LORA

PLANS = {"lora": LORA, "ia3": IA3}


def train(model, optimizer, steps):
    for seed in steps:
        optimizer.zero_grad()
        model(**hosts.batch("llama", seed=seed)).loss.backward()
        optimizer.step()


def adam(model):
    return torch.optim.AdamW(model.adaptc.parameters(), lr=1e-2)


@pytest.mark.parametrize("method", PLANS)
@pytest.mark.parametrize("kind", bases.KINDS)
def test_training_goes_on_to_the_bit_and_peft_reads_the_files(kind, method, tmp_path):
    model = adaptc.compile(bases.build(kind, train=True, num_hidden_layers=1), PLANS[method], backend="eager")
    optimizer = adam(model)
    train(model, optimizer, (0, 1))
    model.adaptc.save(tmp_path)
    state = copy.deepcopy(optimizer.state_dict())
    logits = bases.logits(model)
    train(model, optimizer, (2, 3))

    torch.manual_seed(5)
    fresh = adaptc.compile(bases.build(kind, train=True, num_hidden_layers=1), PLANS[method], backend="eager")
    fresh.adaptc.load(tmp_path)
    assert torch.equal(bases.logits(fresh), logits)
    resumed = adam(fresh)
    resumed.load_state_dict(state)
    train(fresh, resumed, (2, 3))
    want = dict(model.adaptc.named_parameters())
    for name, parameter in fresh.adaptc.named_parameters():
        assert torch.equal(parameter, want[name]), name

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*get_apply_tensor_subclass.*")
        theirs = peft.PeftModel.from_pretrained(bases.build(kind, num_hidden_layers=1), tmp_path)
    torch.testing.assert_close(bases.logits(theirs), logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", bases.KINDS)
def test_an_adapter_moves_to_the_base_without_quantisation_and_says_so(kind, tmp_path):
    model = adaptc.compile(bases.build(kind, num_hidden_layers=1), LORA, backend="eager")
    model.adaptc.save(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adaptc.compile(bases.build(kind, num_hidden_layers=1), str(tmp_path), backend="eager")
    with pytest.warns(AdaptcWarning, match=f"the dtype is float32, it was {bases.KINDS[kind]}"):
        dense = adaptc.compile(bases.plain(num_hidden_layers=1), str(tmp_path), backend="eager")
    for (name, here), (_, there) in zip(dense.adaptc.named_parameters(), model.adaptc.named_parameters(), strict=True):
        assert torch.equal(here, there), name


@pytest.mark.parametrize("kind", bases.KINDS)
def test_the_base_keeps_its_keys_and_detach_gives_it_back(kind):
    base = bases.build(kind, num_hidden_layers=1)
    keys, trained = list(base.state_dict()), {n: p.requires_grad for n, p in base.named_parameters()}
    want = bases.logits(base)
    model = adaptc.compile(base, LORA, backend="eager")
    assert [key for key in model.state_dict() if ".adapters." not in key] == keys
    assert not torch.allclose(bases.logits(model), want)
    assert torch.equal(bases.logits(model.adaptc.detach()), want)
    assert list(base.state_dict()) == keys
    assert {n: p.requires_grad for n, p in base.named_parameters()} == trained


@pytest.mark.parametrize("kind", bases.KINDS)
def test_a_copy_has_its_own_adapters(kind):
    model = adaptc.compile(bases.build(kind, train=True, num_hidden_layers=1), LORA, backend="eager")
    want = bases.logits(model)
    twin = copy.deepcopy(model)
    assert torch.equal(bases.logits(twin), want)
    randomise(twin)
    assert not torch.allclose(bases.logits(twin), want)
    assert torch.equal(bases.logits(model), want)


@pytest.mark.parametrize("kind", bases.KINDS)
def test_a_peft_model_is_taken_over(kind):
    config = peft.LoraConfig(r=3, lora_alpha=6, init_lora_weights=False, target_modules=["q_proj", "down_proj"])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*get_apply_tensor_subclass.*")
        wrapped = peft.get_peft_model(bases.build(kind, num_hidden_layers=1), config)
    want = bases.logits(wrapped)
    model = adaptc.compile(wrapped, backend="eager")
    assert len(model.adaptc.sites) == 2
    torch.testing.assert_close(bases.logits(model), want, rtol=1e-5, atol=1e-5)
