"""Tensors that do not fit: refused with the key's name, at every position, before anything is changed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from adaptc import LoRA, Match, Plan, Rule
from adaptc.errors import MissingKeyError, NonFiniteError, TensorShapeError, UnexpectedKeyError
from adaptc.files import checkpoint, peft_keys
from tests.files.peft_cases import Adapted, load, logits, peft_model, peft_save

PLAN = Plan([Rule(Match("classifier"), train="full"), LoRA(r=2, bias="lora_only", targets=["query"])])
PREFIX = "base_model.model."


def fresh() -> Adapted:
    return Adapted("bert", PLAN, double=False)


def other_values() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    tensors = peft_keys.encode(fresh().adapters)
    return {key: torch.randn(tensor.shape, generator=generator) for key, tensor in tensors.items()}


KEYS = sorted(other_values())


def test_the_keys_are_those_of_peft() -> None:
    config = {"target_modules": ["query"], "bias": "lora_only", "modules_to_save": ["classifier"]}
    theirs = peft.get_peft_model_state_dict(peft_model("bert", config, double=False))
    assert sorted(theirs) == KEYS
    assert len(KEYS) == 8


def refused(tensors: dict[str, torch.Tensor], kind: type[Exception], text: str) -> str:
    """Decode must raise, and the adapter must be what it was, bit for bit."""
    adapted = fresh()
    before = {key: tensor.clone() for key, tensor in peft_keys.encode(adapted.adapters).items()}
    with pytest.raises(kind) as error:
        adapted.load(tensors)
    assert type(error.value) is kind and text in str(error.value)
    after = peft_keys.encode(adapted.adapters)
    assert all(torch.equal(before[key], after[key]) for key in before)
    return str(error.value)


def test_good_values_are_loaded() -> None:
    adapted, values = fresh(), other_values()
    adapted.load(values)
    found = peft_keys.encode(adapted.adapters)
    assert all(torch.equal(found[key], values[key]) for key in KEYS)


@pytest.mark.parametrize("key", KEYS)
def test_a_missing_tensor(key: str) -> None:
    tensors = other_values()
    del tensors[key]
    refused(tensors, MissingKeyError, f"lacks 1 of 8 tensors, first {key}")


@pytest.mark.parametrize("key", KEYS)
def test_an_extra_tensor(key: str) -> None:
    extra = key.replace("layer.0", "layer.7").replace("classifier", "classifier2")
    tensors = {**other_values(), extra: torch.ones(1)}
    if extra == key:
        return
    refused(tensors, UnexpectedKeyError, f"holds a tensor that no site of the model takes: {extra}")


@pytest.mark.parametrize("key", KEYS)
def test_a_misspelt_tensor_names_the_nearest(key: str) -> None:
    tensors = other_values()
    tensors[key[:-1] + "x"] = tensors.pop(key)
    refused(tensors, UnexpectedKeyError, f"{key[:-1]}x; nearest: {key}")


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("fault", ["longer", "dimension", "transposed", "integers"])
def test_a_tensor_that_does_not_fit(key: str, fault: str) -> None:
    tensors = other_values()
    good = tensors[key]
    if fault == "longer":
        tensors[key] = torch.cat([good, good])
    elif fault == "dimension":
        tensors[key] = good[None]
    elif fault == "transposed" and good.dim() == 2:
        tensors[key] = good.T.contiguous()
    else:
        tensors[key] = torch.ones(good.shape, dtype=torch.int64)
    message = refused(tensors, TensorShapeError, f"tensor {key} in the adapter does not fit its site")
    assert f"float32{list(good.shape)}" in message and f"{list(tensors[key].shape)}" in message


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_tensor_that_is_not_finite(key: str, value: float) -> None:
    tensors = other_values()
    tensors[key].view(-1)[-1] = value
    refused(tensors, NonFiniteError, f"tensor {key} in the adapter holds NaN or infinity")


@pytest.mark.parametrize("key", KEYS)
def test_a_number_too_large_for_the_adapter(key: str) -> None:
    tensors = {name: tensor.double() for name, tensor in other_values().items()}
    tensors[key].view(-1)[0] = 1e300
    refused(
        tensors,
        NonFiniteError,
        f"tensor {key} in the adapter holds numbers that are infinite in torch.float32",
    )


def test_many_faults_are_counted() -> None:
    message = refused({}, MissingKeyError, "lacks 8 of 8 tensors")
    assert " and 3 more" in message
    strange = {f"x{i}": torch.ones(1) for i in range(7)}
    assert "... and 2 more" in refused(strange, UnexpectedKeyError, "holds 7 tensors")


@pytest.mark.parametrize("key", [PREFIX + "x", "x", "", PREFIX, "module", "_orig_mod", "a..b", "." * 50])
def test_strange_keys(key: str) -> None:
    refused({**other_values(), key: torch.ones(1)}, UnexpectedKeyError, "that no site of the model takes")


# -- other spellings --------------------------------------------------------------------------------------


def spelt(rename: Any) -> dict[str, torch.Tensor]:
    return {rename(key): value for key, value in other_values().items()}


@pytest.mark.parametrize(
    "rename",
    [
        lambda key: key.replace("lora_A.", "lora_A.sft.").replace("lora_B.", "lora_B.sft."),
        lambda key: key.replace(PREFIX, PREFIX + "_orig_mod."),
        lambda key: "_orig_mod." + key,
        lambda key: key.removeprefix(PREFIX),
        lambda key: "module." + key,
        lambda key: "module._orig_mod." + key.replace("query", "_fsdp_wrapped_module.query"),
        lambda key: key.replace("classifier.", "classifier.modules_to_save.default."),
        lambda key: key.replace("classifier.", "classifier.modules_to_save."),
        lambda key: key.replace("query.base_layer.bias", "query.bias"),
    ],
)
def test_other_spellings_of_the_keys_are_read(rename: Any) -> None:
    assert sorted(map(rename, KEYS)) != KEYS
    adapted, values = fresh(), other_values()
    adapted.load(spelt(rename))
    found = peft_keys.encode(adapted.adapters)
    assert all(torch.equal(found[key], values[key]) for key in KEYS)


def test_one_tensor_under_two_spellings() -> None:
    key = next(k for k in KEYS if "lora_A" in k)
    tensors = {**other_values(), "_orig_mod." + key: torch.ones(2, 64)}
    refused(tensors, UnexpectedKeyError, "holds one tensor under two keys")


def test_the_tensors_of_two_adapters() -> None:
    first, second = (k for k in KEYS if "lora_A" in k)
    tensors = other_values()
    tensors[first.replace("lora_A.", "lora_A.one.")] = tensors.pop(first)
    tensors[second.replace("lora_A.", "lora_A.two.")] = tensors.pop(second)
    message = refused(tensors, UnexpectedKeyError, "holds the tensors of several adapters")
    assert "one (" in message and "two (" in message


# -- frozen weights in the file ---------------------------------------------------------------------------


def test_frozen_weights_that_are_the_models_are_passed_over() -> None:
    adapted = fresh()
    frozen = adapted.base.bert.pooler.dense.weight.detach().clone()
    adapted.load({**other_values(), PREFIX + "bert.pooler.dense.weight": frozen})
    message = refused(
        {**other_values(), PREFIX + "bert.pooler.dense.weight": frozen + 1e-3},
        UnexpectedKeyError,
        "changes the frozen base: bert.pooler.dense.weight is not the model's bert.pooler.dense.weight",
    )
    assert "give the base the adapter was trained on" in message


def test_an_adapter_of_the_head_brings_its_frozen_weight(tmp_path: Path) -> None:
    """PEFT saves ``lm_head.base_layer.weight`` when the head has LoRA."""
    folder = peft_save(peft_model("llama", {"target_modules": ["lm_head"]}), tmp_path)
    tensors = checkpoint.read_adapter(folder).tensors
    assert PREFIX + "lm_head.base_layer.weight" in tensors
    adapted = load("llama", folder)
    with pytest.raises(UnexpectedKeyError, match="no site of the model takes"):
        peft_keys.decode(tensors, adapted.adapters)
    other = Adapted("llama", adapted.plan)
    with torch.no_grad():
        other.base.lm_head.weight.add_(1)
    decoded = peft_keys.decode(tensors, other.adapters, model=other.base)
    assert torch.equal(decoded[peft_keys.EMBEDDINGS]["lm_head.weight"], tensors[PREFIX + "lm_head.base_layer.weight"])


def test_what_peft_writes_for_all_biases_and_a_full_head(tmp_path: Path) -> None:
    """The head's biases three times over: as a module, as a bias of the copy, and the frozen original."""
    config = {"target_modules": ["query"], "bias": "all", "modules_to_save": ["classifier"]}
    model = peft_model("bert", config)
    folder = peft_save(model, tmp_path)
    keys = checkpoint.read_adapter(folder).tensors
    assert {k for k in keys if "classifier" in k} == {
        PREFIX + "classifier." + name
        for name in ("weight", "bias", "modules_to_save.bias", "original_module.bias")
    }
    found = load("bert", folder)
    torch.testing.assert_close(logits(found, "bert"), logits(model, "bert"), rtol=1e-10, atol=1e-10)


def test_buffers_of_a_full_copy_travel_too() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))
    plan = Plan([LoRA(r=2, targets=["0"]), Rule(Match("1"), train="full")])
    sites = plan.resolve(model).sites
    adapters = {s.path: s.method.build(s.path, s.module, dtype=None, site_id=i) for i, s in enumerate(sites)}
    adapters["1"].copy.running_mean.add_(3)
    adapters["1"].copy.num_batches_tracked.add_(9)
    tensors = {key: tensor.clone() for key, tensor in peft_keys.encode(adapters).items()}
    theirs = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"]))
    assert tensors.keys() == peft.get_peft_model_state_dict(theirs).keys()
    decoded = peft_keys.decode(tensors, adapters)
    assert decoded["1"]["num_batches_tracked"].item() == 9
    assert torch.equal(decoded["1"]["running_mean"], torch.full((4,), 3.0))


def test_a_half_precision_file_is_read_into_float32() -> None:
    adapted = fresh()
    adapted.load({key: value.to(torch.bfloat16) for key, value in other_values().items()})
    found = peft_keys.encode(adapted.adapters)
    assert all(torch.equal(found[k], v.to(torch.bfloat16).float()) for k, v in other_values().items())
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
