"""Configs of LoRA that are refused, each by name, and options that are accepted: they change nothing."""

from __future__ import annotations

import dataclasses
from typing import Any

import peft
import pytest
import torch
from peft.utils.peft_types import PeftType

from adaptc import LoRA, Plan
from adaptc.errors import ConfigError, ConfigTypeError, UnknownConfigKeyError, UnsupportedKindError
from adaptc.methods.codec import codecs
from tests.files.peft_cases import plan_of

OPTIONS = codecs()["LORA"].keys()

LEAST = {"peft_type": "LORA", "target_modules": ["q_proj"]}
PLAN = Plan(LoRA(targets=["q_proj"]))


def test_the_least_config_has_the_defaults_of_peft() -> None:
    assert plan_of(LEAST) == PLAN
    assert (PLAN.rules[0].method.r, PLAN.rules[0].method.alpha) == (8, 8)


def test_every_key_of_peft_is_known_with_its_default() -> None:
    theirs = {
        field.name: field.default if field.default is not dataclasses.MISSING else field.default_factory()
        for field in dataclasses.fields(peft.LoraConfig)
        if field.name != "runtime_config"
    }
    # PEFT fills these two in itself.
    assert {
        **{key: option.default for key, option in OPTIONS.items()},
        "peft_type": None,
        "peft_version": None,
    } == {**theirs}


@pytest.mark.parametrize("name", [*sorted(k.value for k in PeftType if k not in codecs()), "SOMETHING_NEW"])
def test_other_kinds_are_refused_by_name(name: str) -> None:
    with pytest.raises(UnsupportedKindError, match=f"PEFT's kind {name} are not in this version"):
        plan_of({"peft_type": name, "target_modules": ["q_proj"]})


def test_a_config_without_a_kind() -> None:
    with pytest.raises(ConfigError, match="does not name its kind"):
        plan_of({"target_modules": ["q_proj"]})


REFUSED = {
    "layer_replication": [[0, 2]],
    "alora_invocation_tokens": [1],
    "arrow_config": {"top_k": 3},
    "kasa_config": {"beta": 1.0},
    "monteclora_config": {"num_samples": 8},
    "velora_config": {"scale": 1.0},
    "use_bdlora": {"nblocks": 2},
    "use_qalora": True,
    "ensure_weight_tying": True,
    "enable_lora": [True, False],
}


def test_every_option_that_changes_the_mathematics_is_tried() -> None:
    roles = {key for key, option in OPTIONS.items() if option.role == "refused"}
    assert roles == set(REFUSED) - {"enable_lora"}


@pytest.mark.parametrize("key", sorted(REFUSED))
@pytest.mark.parametrize("loading", [False, True])
def test_options_that_change_the_mathematics_are_refused_by_name(key: str, loading: bool) -> None:
    with pytest.raises(UnsupportedKindError, match=f"option {key} is not in this version"):
        plan_of({**LEAST, key: REFUSED[key]}, loading=loading)
    for off in (None, False, [], {}):
        assert plan_of({**LEAST, key: off}, loading=loading) == PLAN


@pytest.mark.parametrize(
    ("init", "text"),
    [
        ("loftq", "it changes the base weights"),
        ("lora_ga", "it changes the base weights"),
        ("pissa_niter_x", "it changes the base weights"),
        ("mica", "it freezes lora_B in training"),
        ("something", "not an initialisation of PEFT that adaptc knows"),
    ],
)
@pytest.mark.parametrize("loading", [False, True])
def test_initialisations_that_cannot_be_honoured(init: str, text: str, loading: bool) -> None:
    with pytest.raises(UnsupportedKindError, match=f"init_lora_weights = '{init}' is refused: {text}"):
        plan_of({**LEAST, "init_lora_weights": init}, loading=loading)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_16", "olora", "corda"])
def test_initialisations_from_the_weight_are_for_new_adapters(init: str) -> None:
    """A file of them holds the factors, not the base that they were taken off."""
    config = {**LEAST, "init_lora_weights": init}
    assert plan_of(config) == Plan(LoRA(targets=["q_proj"], init=init))
    with pytest.raises(UnsupportedKindError, match=f"init_lora_weights = '{init}' is refused: it changes the base"):
        plan_of(config, loading=True)


def test_the_method_of_corda() -> None:
    corda = dataclasses.asdict(peft.tuners.lora.config.CordaConfig())
    config = {**LEAST, "init_lora_weights": "corda", "corda_config": corda}
    assert plan_of(config) == Plan(LoRA(targets=["q_proj"], init="corda"))
    config["corda_config"]["corda_method"] = "kpm"
    expected = Plan(LoRA(targets=["q_proj"], init="corda", corda_method="kpm"))
    assert plan_of(config) == expected
    for change in ({"corda_config": {"covariance_file": "x.pt"}}, {"init_lora_weights": True}):
        with pytest.raises(UnsupportedKindError, match="option corda_config is not in this version"):
            plan_of({**config, **change})


@pytest.mark.parametrize("key", ["use_dora", "lora_bias"])
def test_options_with_a_parameter_of_their_own(key: str) -> None:
    field = {"use_dora": "dora", "lora_bias": "lora_bias"}[key]
    assert plan_of({**LEAST, key: True}) == Plan(LoRA(targets=["q_proj"], **{field: True}))
    assert plan_of({**LEAST, key: None}) == PLAN
    with pytest.raises(ConfigTypeError, match=f"{key} in the adapter's config has a value that is not legal"):
        plan_of({**LEAST, key: "yes"})


@pytest.mark.parametrize(
    "changes",
    [
        {"use_dora": True, "lora_bias": True},
        {"lora_bias": True, "init_lora_weights": "orthogonal"},
        {"init_lora_weights": "orthogonal", "r": 3},
        {"init_lora_weights": "pissa", "lora_dropout": 0.1},
    ],
)
def test_options_that_exclude_each_other(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigTypeError, match=r"the adapter's config: LoRA: .* is not legal"):
        plan_of({**LEAST, **changes})


def test_initialisations_that_only_matter_to_a_new_adapter() -> None:
    config = {**LEAST, "init_lora_weights": "eva", "eva_config": {"rho": 2.0}}
    assert plan_of(config, loading=True) == PLAN
    with pytest.raises(UnsupportedKindError, match="not in this version"):
        plan_of({**LEAST, "init_lora_weights": "eva"})
    with pytest.raises(UnsupportedKindError, match="option eva_config is not in this version"):
        plan_of({**LEAST, "eva_config": {"rho": 2.0}})


@pytest.mark.parametrize(
    ("init", "expected"),
    [(True, "default"), (False, "random"), (None, "random"), ("gaussian", "gaussian"),
     ("orthogonal", "orthogonal")],
)  # fmt: skip
def test_initialisations_that_are_honoured(init: Any, expected: str) -> None:
    plan = plan_of({**LEAST, "init_lora_weights": init})
    assert plan == Plan(LoRA(targets=["q_proj"], init=expected))
    if init is None:
        return
    # The oracle: B is zero in PEFT exactly when it is zero here.
    model = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(4, 3)})
    site = plan.resolve(model).sites[0]
    ours = site.method.build("q_proj", site.module, dtype=None, site_id=0)
    theirs = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=init))
    B = theirs.base_model.model["q_proj"].lora_B["default"].weight
    assert bool((ours.lora_B == 0).all()) == bool((B == 0).all())


@pytest.mark.parametrize("value", [True, 1, 0, "x", {"a": 1}, [1], False])
def test_unknown_keys_are_refused(value: Any) -> None:
    with pytest.raises(UnknownConfigKeyError, match="unknown key 'use_magic'") as error:
        plan_of({**LEAST, "use_magic": value})
    assert f"use_magic = {value!r}" in str(error.value)


def test_an_unknown_key_that_is_null_configures_nothing() -> None:
    assert plan_of({**LEAST, "future_config": None}) == PLAN


def test_a_misspelt_key_names_the_nearest() -> None:
    with pytest.raises(UnknownConfigKeyError) as error:
        plan_of({**LEAST, "lora_alhpa": 16})
    assert "did you mean lora_alpha?" in str(error.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("r", 0), ("r", -1), ("r", 2.0), ("r", True), ("r", "8"), ("r", None),
        ("lora_alpha", "16"), ("lora_alpha", float("inf")), ("lora_alpha", None), ("lora_alpha", True),
        ("lora_dropout", 1.0), ("lora_dropout", -0.1), ("lora_dropout", "0"),
        ("use_rslora", 1), ("use_rslora", None), ("bias", "some"), ("bias", None),
        ("target_modules", 3), ("target_modules", ["q", 3]), ("target_modules", [""]),
        ("target_modules", "("), ("target_modules", {"q": 1}), ("exclude_modules", 1),
        ("exclude_modules", ["q", None]),
        ("modules_to_save", "score"), ("modules_to_save", [1]), ("modules_to_save", ["("]),
        ("layers_to_transform", -1), ("layers_to_transform", "0"), ("layers_to_transform", [0.5]),
        ("layers_to_transform", True), ("layers_pattern", 3), ("layers_pattern", "("),
        ("rank_pattern", []), ("rank_pattern", {"q": 0}), ("rank_pattern", {"(": 2}),
        ("alpha_pattern", {"q": "3"}), ("init_lora_weights", 3), ("fan_in_fan_out", "yes"),
        ("trainable_token_indices", [-1]), ("trainable_token_indices", [1, 1]), ("trainable_token_indices", {"q": 1}),
        ("task_type", 3), ("base_model_name_or_path", []), ("auto_mapping", "x"), ("inference_mode", 0),
    ],
)  # fmt: skip
def test_values_of_a_wrong_type_or_range(key: str, value: Any) -> None:
    with pytest.raises(
        ConfigTypeError, match=f"{key} in the adapter's config has a value that is not legal"
    ) as error:
        plan_of({**LEAST, key: value})
    assert repr(value) in str(error.value)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"target_modules": None}, "target_modules is empty"),
        ({"target_modules": []}, "target_modules is empty"),
        ({"target_modules": ".*q", "layers_to_transform": [0]}, "need target_modules as a list"),
        ({"layers_pattern": "layers"}, "layers_pattern without layers_to_transform"),
        ({"target_modules": [".*q_proj"]}, "'.*q_proj' in a list of modules is not a module's name"),
        ({"exclude_modules": ["re.*"]}, "'re.*' in a list of modules is not a module's name"),
    ],
)
def test_combinations_that_mean_nothing(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigTypeError) as error:
        plan_of({**LEAST, **changes})
    assert text in str(error.value)


def test_what_has_no_influence_is_accepted() -> None:
    config = {
        **LEAST,
        "inference_mode": True,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "x/y",
        "revision": "main",
        "peft_version": "0.99.0",
        "auto_mapping": {"base_model_class": "X", "parent_library": "y"},
        "megatron_config": {"a": 1},
        "megatron_core": "megatron.core",
        "qalora_group_size": 32,
        "fan_in_fan_out": True,
        "merge_weights": False,
        "runtime_config": {"ephemeral_gpu_offload": False},
        "rank_pattern": None,
    }
    assert plan_of(config) == PLAN
