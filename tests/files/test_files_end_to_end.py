"""Adapter files through the handle of a compiled model; a failed load changes nothing at all."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import adaptc
from adaptc import errors
from adaptc.files import checkpoint
from tests.files.peft_cases import logits, peft_load, peft_model, peft_save, randomise
from tests.models import hosts

CONFIG = {"target_modules": ["query"], "r": 3, "lora_alpha": 5, "modules_to_save": ["classifier"]}
QUERIES = [f"bert.encoder.layer.{i}.attention.self.query" for i in (0, 1)]
KEYS = [
    "base_model.model." + key
    for key in sorted(
        ["classifier.weight", "classifier.bias", *(f"{q}.lora_{f}.weight" for q in QUERIES for f in "AB")]
    )
]
RULES = [
    {"match": {"targets": ["classifier"]}, "train": "full"},
    {"match": {"targets": ["query"]}, "method": {"kind": "lora", "r": 3, "alpha": 5}},
]


def compiled(host: str, plan: Any, *, double: bool = True, backend: str = "eager") -> Any:
    base = hosts.build(host)
    return adaptc.compile(base.double() if double else base, plan, backend=backend)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile_takes_a_folder_of_peft(tmp_path: Path, backend: str) -> None:
    model = peft_model("bert", CONFIG)
    folder = peft_save(model, tmp_path)
    ours = compiled("bert", folder, backend=backend)
    torch.testing.assert_close(logits(ours, "bert"), logits(model, "bert"), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("host", "targets"), [("llama", ["q_proj", "down_proj"]), ("gpt2", ["c_attn", "c_proj"])]
)
def test_peft_reads_what_the_handle_saves(tmp_path: Path, host: str, targets: list[str]) -> None:
    model = compiled(host, adaptc.LoRA(r=3, alpha=5, dropout=0.1, targets=targets)).eval()
    randomise(model)
    model.adaptc.save(tmp_path)
    torch.testing.assert_close(
        logits(peft_load(host, tmp_path), host), logits(model, host), rtol=1e-10, atol=1e-10
    )


def test_a_trained_adapter_survives_the_trip(tmp_path: Path) -> None:
    model = compiled("bert", RULES)
    optimizer = torch.optim.SGD(model.adaptc.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(**hosts.batch("bert")).loss.backward()
        optimizer.step()
    model.adaptc.save(tmp_path)
    again = compiled("bert", tmp_path)
    assert torch.equal(logits(again.eval(), "bert"), logits(model.eval(), "bert"))
    assert again.adaptc.records["default"].plan == model.adaptc.records["default"].plan
    assert sum(p.requires_grad for p in again.parameters()) == len(KEYS)


def test_loading_and_saving_changes_no_byte(tmp_path: Path) -> None:
    folder = peft_save(peft_model("bert", CONFIG), tmp_path / "peft")
    model = compiled("bert", folder)
    model.adaptc.save(tmp_path / "ours")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "ours" / name).read_bytes() == (folder / name).read_bytes()


def test_a_second_adapter_from_a_folder(tmp_path: Path) -> None:
    first = peft_model("bert", CONFIG)
    second = peft_model("bert", {"target_modules": ["value"], "r": 2})
    model = compiled("bert", peft_save(first, tmp_path / "a"))
    model.adaptc.add("second", peft_save(second, tmp_path / "b"))
    torch.testing.assert_close(logits(model, "bert"), logits(first, "bert"), rtol=1e-10, atol=1e-10)
    with pytest.warns(errors.NewSignatureWarning):
        model.adaptc.switch("second")
    torch.testing.assert_close(logits(model, "bert"), logits(second, "bert"), rtol=1e-10, atol=1e-10)


def test_load_replaces_the_values_and_compiles_nothing(tmp_path: Path) -> None:
    model = compiled("bert", RULES, backend="aot_eager")
    plain = logits(model, "bert")
    before = model.adaptc.metrics()["graphs"]
    parameters = list(model.adaptc.parameters())
    theirs = peft_model("bert", CONFIG)
    model.adaptc.load(peft_save(theirs, tmp_path))
    torch.testing.assert_close(logits(model, "bert"), logits(theirs, "bert"), rtol=1e-10, atol=1e-10)
    assert (logits(model, "bert") - plain).abs().max() > 1e-3
    assert model.adaptc.metrics()["graphs"] == before
    assert all(a is b for a, b in zip(parameters, model.adaptc.parameters(), strict=True))


def test_a_folder_of_another_rank_or_scale_is_not_loaded_into_an_adapter(tmp_path: Path) -> None:
    model = compiled("bert", RULES)
    for change in ({"r": 4}, {"lora_alpha": 6}, {"use_rslora": True}, {"target_modules": ["key"]}):
        folder = peft_save(peft_model("bert", {**CONFIG, **change}), tmp_path / next(iter(change)))
        with pytest.raises(errors.CheckpointError):
            model.adaptc.load(folder)


def test_a_folder_that_names_parameters_which_the_model_lacks(tmp_path: Path) -> None:
    """PEFT writes such folders itself, for models with dense layers in place of the experts of their type."""
    theirs = peft_model("llama", {"target_modules": ["q_proj"], "r": 3, "lora_alpha": 5})
    folder = peft_save(theirs, tmp_path)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["target_parameters"] = ["gate_up_proj"]
    config["rank_pattern"], config["alpha_pattern"] = {r".*\.gate_up_proj": 8}, {r".*\.gate_up_proj": 1.0}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.warns(errors.AdaptcWarning) as told:
        model = compiled("llama", folder)
    assert [str(w.message).partition(" of the")[0] for w in told if w.category is errors.AdaptcWarning] == [
        "target_parameters", "rank_pattern", "alpha_pattern",
    ]  # fmt: skip
    torch.testing.assert_close(logits(model, "llama"), logits(theirs, "llama"), rtol=1e-10, atol=1e-10)
    model.adaptc.save(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "adapter_config.json").read_text()) == config
    plain = compiled("llama", adaptc.LoRA(r=3, alpha=5, targets="q_proj"))
    with pytest.warns(errors.AdaptcWarning):
        plain.adaptc.load(folder, "default")
    assert torch.equal(logits(plain, "llama"), logits(model, "llama"))


def test_a_plan_with_an_idle_key_that_was_saved_once_is_read(tmp_path: Path) -> None:
    compiled("llama", adaptc.LoRA(r=3, targets="q_proj")).adaptc.save(tmp_path)
    saved = json.loads((tmp_path / "adaptc_plan.json").read_text())
    saved["plan"]["rules"][0]["method"]["rank_pattern"] = {"q_porj": 2}
    (tmp_path / "adaptc_plan.json").write_text(json.dumps(saved))
    with pytest.warns(errors.AdaptcWarning, match="rank_pattern .* keys that change nothing at its sites: q_porj"):
        model = compiled("llama", tmp_path)
    assert model.adaptc.records["default"].plan == adaptc.Plan(adaptc.LoRA(r=3, targets="q_proj"))


def test_another_base_gives_a_warning(tmp_path: Path) -> None:
    compiled("bert", RULES).adaptc.save(tmp_path)
    other = hosts.build("bert", seed=3).double()
    with pytest.warns(errors.AdaptcWarning, match="the frozen weights have other values at 3 of 3 sites"):
        adaptc.compile(other, tmp_path, backend="eager")


# -- a failed load ----------------------------------------------------------------------------------------


def missing(key: str, tensors: dict[str, torch.Tensor]) -> None:
    del tensors[key]


def extra(key: str, tensors: dict[str, torch.Tensor]) -> None:
    tensors[key + "_"] = tensors[key].clone()


def misspelt(key: str, tensors: dict[str, torch.Tensor]) -> None:
    tensors[key.replace("weight", "wieght").replace("bias", "bais")] = tensors.pop(key)


def misshaped(key: str, tensors: dict[str, torch.Tensor]) -> None:
    tensors[key] = torch.cat([tensors[key], tensors[key]])


def integers(key: str, tensors: dict[str, torch.Tensor]) -> None:
    tensors[key] = torch.ones(tensors[key].shape, dtype=torch.int32)


def nan(key: str, tensors: dict[str, torch.Tensor]) -> None:
    tensors[key].view(-1)[-1] = math.nan


def unsafe_name(key: str, tensors: dict[str, torch.Tensor]) -> None:
    tensors[key + "/../../x"] = tensors.pop(key)


TENSOR_FAULTS: dict[Callable[[str, dict[str, torch.Tensor]], None], type[Exception]] = {
    missing: errors.MissingKeyError,
    extra: errors.UnexpectedKeyError,
    misspelt: errors.UnexpectedKeyError,
    misshaped: errors.TensorShapeError,
    integers: errors.TensorShapeError,
    nan: errors.NonFiniteError,
    unsafe_name: errors.UnsafePathError,
}


def state(model: Any) -> dict[str, Any]:
    """All that a load could touch, in a form that compares bit for bit."""
    return {
        "tensors": {k: (v.dtype, v.clone()) for k, v in model.state_dict().items()},
        "trained": {k: (id(p), p.requires_grad) for k, p in model.named_parameters()},
        "modules": {k: (id(m), m.training) for k, m in model.named_modules()},
        "adapters": (list(model.adaptc.records), model.adaptc.live),
        "metrics": model.adaptc.metrics(),
        "rng": torch.get_rng_state(),
    }


def assert_unchanged(before: dict[str, Any], after: dict[str, Any]) -> None:
    tensors, now = before.pop("tensors"), after.pop("tensors")
    assert tensors.keys() == now.keys()
    assert all(dtype is now[k][0] and torch.equal(value, now[k][1]) for k, (dtype, value) in tensors.items())
    assert torch.equal(before.pop("rng"), after.pop("rng"))
    assert before == after


@pytest.fixture(scope="module")
def victim() -> Any:
    """A model with one adapter, in training mode but for one module."""
    model = compiled("bert", RULES, double=False).train()
    model.bert.pooler.eval()
    return model


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return peft_save(peft_model("bert", CONFIG, double=False), tmp_path_factory.mktemp("good"))


def refuse(model: Any, folder: Path, expected: type[Exception], *, into: str) -> None:
    before = state(model)
    with pytest.raises(expected) as error:
        if into == "default":
            model.adaptc.load(folder)
        else:
            model.adaptc.add(into, folder)
    assert type(error.value) is expected
    assert_unchanged(before, state(model))


@pytest.mark.parametrize("into", ["default", "fresh"])
@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("fault", TENSOR_FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_at_any_tensor_changes_nothing(
    victim: Any, good: Path, tmp_path: Path, fault: Any, key: str, into: str
) -> None:
    tensors = checkpoint.read_adapter(good).tensors
    assert sorted(tensors) == KEYS
    fault(key, tensors)
    (tmp_path / "adapter_config.json").write_bytes((good / "adapter_config.json").read_bytes())
    safetensors.torch.save_file(tensors, tmp_path / "adapter_model.safetensors")
    refuse(victim, tmp_path, TENSOR_FAULTS[fault], into=into)


@pytest.mark.parametrize("into", ["default", "fresh"])
@pytest.mark.parametrize("key", KEYS)
def test_a_file_cut_inside_any_tensor_changes_nothing(
    victim: Any, good: Path, tmp_path: Path, key: str, into: str
) -> None:
    whole = (good / "adapter_model.safetensors").read_bytes()
    length = int.from_bytes(whole[:8], "little")
    begin, _ = json.loads(whole[8 : 8 + length])[key]["data_offsets"]
    (tmp_path / "adapter_config.json").write_bytes((good / "adapter_config.json").read_bytes())
    (tmp_path / "adapter_model.safetensors").write_bytes(whole[: 8 + length + begin + 1])
    refuse(victim, tmp_path, errors.TruncatedFileError, into=into)


@pytest.mark.parametrize("into", ["default", "fresh"])
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"use_magic": True}, errors.UnknownConfigKeyError),
        ({"use_qalora": True}, errors.UnsupportedKindError),
        ({"peft_type": "LOHA"}, errors.UnsupportedKindError),
        ({"r": "3"}, errors.ConfigTypeError),
        ({"init_lora_weights": "pissa"}, errors.UnsupportedKindError),
    ],
)
def test_a_config_that_is_refused_changes_nothing(
    victim: Any, good: Path, tmp_path: Path, change: dict[str, Any], expected: type[Exception], into: str
) -> None:
    config = json.loads((good / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **change}))
    (tmp_path / "adapter_model.safetensors").write_bytes((good / "adapter_model.safetensors").read_bytes())
    refuse(victim, tmp_path, expected, into=into)


def test_a_pickle_and_a_wrong_header_length_change_nothing(victim: Any, good: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_bytes((good / "adapter_config.json").read_bytes())
    torch.save({}, tmp_path / "adapter_model.bin")
    refuse(victim, tmp_path, errors.PickleRefusedError, into="fresh")
    whole = (good / "adapter_model.safetensors").read_bytes()
    (tmp_path / "adapter_model.safetensors").write_bytes((7).to_bytes(8, "little") + whole[8:])
    refuse(victim, tmp_path, errors.HeaderLengthError, into="fresh")


def test_the_good_folder_is_loaded_after_all_of_that(victim: Any, good: Path) -> None:
    victim.adaptc.load(good)
    expected = checkpoint.read_adapter(good).tensors
    for path in QUERIES:
        adapter = victim.get_submodule(path).adapters["default"]
        assert torch.equal(adapter.lora_A, expected[f"base_model.model.{path}.lora_A.weight"])
        assert torch.equal(adapter.lora_B, expected[f"base_model.model.{path}.lora_B.weight"])
    head = victim.classifier.adapters["default"].copy
    assert torch.equal(head.weight, expected["base_model.model.classifier.weight"])
