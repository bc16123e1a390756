"""PEFT's format, both ways: the oracle is PEFT 0.21.2 itself."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from adaptc import Bias, LoRA, Match, Plan, Rule
from adaptc.errors import UnsupportedError
from adaptc.files import checkpoint, peft_keys
from adaptc.methods.patterns import value_at
from adaptc.plan.peft.writing import rules_to_config
from adaptc.runtime.names import adapter_directory
from tests.files.peft_cases import Adapted, load, logits, peft_load, peft_model, peft_save, plan_of
from tests.models import hosts

#: name -> (host, LoraConfig options, options of the host)
WRITTEN_BY_PEFT: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "names": ("llama", {"target_modules": ["q_proj", "down_proj"], "r": 3, "lora_alpha": 5}, {}),
    "expression": ("llama", {"target_modules": r".*layers\.1\..*_proj", "r": 2}, {}),
    "all-linear": ("llama", {"target_modules": "all-linear", "r": 2}, {}),
    "long list": ("llama", {"target_modules": "all-linear", "r": 2}, {"num_hidden_layers": 4}),
    "exclude": (
        "llama",
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]}, {},
    ),
    "exclude expression": ("llama", {"target_modules": ["q_proj"], "exclude_modules": r".*\.0\..*"}, {}),
    "layers": ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1]}, {}),
    "one layer": ("llama", {"target_modules": ["q_proj"], "layers_to_transform": 0}, {}),
    "layers pattern": (
        "t5",
        {"target_modules": ["q", "v"], "layers_to_transform": [0], "layers_pattern": ["encoder.block"]}, {},
    ),
    "full path beside layers": (
        "llama",
        {"target_modules": ["q_proj", "model.layers.0.mlp.up_proj"], "layers_to_transform": [1]}, {},
    ),
    "rank and alpha patterns": (
        "llama",
        {
            "target_modules": ["q_proj", "k_proj", "v_proj"], "r": 4,
            "rank_pattern": {"layers.0.*q_proj": 2, "^model.layers.1.self_attn.k_proj": 3},
            "alpha_pattern": {"v_proj": 7.5},
        }, {},
    ),
    "rsLoRA": ("llama", {"target_modules": ["o_proj"], "r": 5, "use_rslora": True, "lora_alpha": 3}, {}),
    "lora_only": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "bias": "lora_only"}, {}),
    "fan_in_fan_out": ("gpt2", {"target_modules": ["c_proj"], "fan_in_fan_out": True}, {}),
    "lm_head": ("llama", {"target_modules": ["lm_head", "q_proj"]}, {}),
    "bias all": ("bert", {"target_modules": ["query"], "bias": "all"}, {}),
    "modules_to_save": ("bert", {"target_modules": ["query"], "modules_to_save": ["classifier"]}, {}),
    "classifier": ("bert", {"target_modules": ["query", "dense"], "task_type": "SEQ_CLS"}, {}),
    "classifier with layers": ("roberta", {"target_modules": ["query", "dense"], "task_type": "SEQ_CLS"}, {}),
    "any end": ("bert", {"target_modules": ["query"], "modules_to_save": ["ssifier", "pooler.dense"]}, {}),
    "bias lora_only and classifier": (
        "bert", {"target_modules": ["key"], "bias": "lora_only", "modules_to_save": ["classifier"]}, {},
    ),
    "shared layers": ("albert", {"target_modules": ["query", "ffn"]}, {}),
    "expression on t5": ("t5", {"target_modules": r"decoder\..*\.(q|wo)"}, {}),
    "clip": ("clip", {"target_modules": ["q_proj", "visual_projection"]}, {}),
    "DoRA": ("llama", {"target_modules": ["q_proj", "down_proj"], "r": 3, "use_dora": True}, {}),
    "DoRA on conv1d": ("gpt2", {"target_modules": ["c_attn"], "r": 3, "use_dora": True, "bias": "lora_only"}, {}),
    "lora_bias": ("llama", {"target_modules": ["q_proj", "lm_head"], "r": 3, "lora_bias": True}, {}),
    "eva values": ("llama", {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal"}, {}),
}  # fmt: skip


@pytest.fixture(params=sorted(WRITTEN_BY_PEFT))
def written(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path, torch.Tensor, dict[str, Any]]:
    """host, folder that PEFT saved to, PEFT's output, host options."""
    host, config, changes = WRITTEN_BY_PEFT[request.param]
    model = peft_model(host, config, **changes)
    return host, peft_save(model, tmp_path / "peft"), logits(model, host), changes


def test_what_peft_writes_gives_the_same_outputs(written: Any) -> None:
    host, folder, expected, changes = written
    found = logits(load(host, folder, **changes), host)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    plain = logits(hosts.build(host, **changes).double(), host)
    assert (plain - expected).abs().max() > 1e-3, "the adapter does nothing, so this shows nothing"


def test_loading_and_saving_changes_no_byte(written: Any, tmp_path: Path) -> None:
    host, folder, _, changes = written
    adapted = load(host, folder, **changes)
    original = checkpoint.read_adapter(folder).config
    adapted.save(tmp_path / "ours", original=original)
    names = ["adapter_config.json"]
    if "lm_head" not in original["target_modules"]:  # PEFT adds the head's frozen weight to the file
        names.append("adapter_model.safetensors")
    for name in names:
        assert (tmp_path / "ours" / name).read_bytes() == (folder / name).read_bytes(), name


def test_what_was_read_and_is_written_anew_is_read_by_peft(written: Any, tmp_path: Path) -> None:
    """The config is built from the plan and the sites, not copied."""
    host, folder, expected, changes = written
    adapted = load(host, folder, **changes)
    adapted.save(tmp_path / "ours")
    again = peft_load(host, tmp_path / "ours", **changes)
    torch.testing.assert_close(logits(again, host), expected, rtol=1e-10, atol=1e-10)


def test_values_survive_in_float32_bit_for_bit(tmp_path: Path) -> None:
    model = peft_model("llama", {"target_modules": ["q_proj"]}, double=False)
    folder = peft_save(model, tmp_path / "a")
    load("llama", folder, double=False).save(tmp_path / "b")
    first, second = checkpoint.read_adapter(folder).tensors, checkpoint.read_adapter(tmp_path / "b").tensors
    assert first.keys() == second.keys()
    assert all(torch.equal(first[k], second[k]) and first[k].dtype == torch.float32 for k in first)


def test_the_attention_of_a_mixture_of_experts(tmp_path: Path) -> None:
    """In float32: the experts' kernel has no double."""
    model = peft_model("mixtral", {"target_modules": ["q_proj", "o_proj"]}, double=False)
    found = load("mixtral", peft_save(model, tmp_path), double=False)
    torch.testing.assert_close(logits(found, "mixtral"), logits(model, "mixtral"), rtol=1e-5, atol=1e-5)


def test_an_adapter_in_a_sub_folder(tmp_path: Path) -> None:
    model = peft_model("llama", {"target_modules": ["q_proj"]})
    model.add_adapter("sft", peft.LoraConfig(target_modules=["v_proj"], init_lora_weights=False))
    model.set_adapter("sft")
    expected = logits(model, "llama")
    peft_save(model, tmp_path)
    found = load("llama", adapter_directory(tmp_path, "sft"))
    assert sorted(found.adapters) == [f"model.layers.{i}.self_attn.v_proj" for i in (0, 1)]
    torch.testing.assert_close(logits(found, "llama"), expected, rtol=1e-10, atol=1e-10)
    assert (
        load("llama", adapter_directory(tmp_path, "default")).adapters.keys()
        != found.adapters.keys()
    )


# -- what adaptc writes -----------------------------------------------------------------------------------

CLASSIFIER = Rule(Match("classifier"), train="full")
#: name -> (host, rules, what the config must say)
WRITTEN_BY_ADAPTC: dict[str, tuple[str, list[Any], dict[str, Any]]] = {
    "names": (
        "llama", [LoRA(r=3, alpha=5, dropout=0.25, targets=["q_proj", "up_proj"])],
        {"target_modules": ["q_proj", "up_proj"], "r": 3, "lora_alpha": 5, "lora_dropout": 0.25},
    ),
    "wildcard": (
        "llama", [LoRA(targets=["layers.*.mlp.*_proj"])],
        {"target_modules": ["down_proj", "gate_proj", "up_proj"]},
    ),
    "all-linear": (
        "llama", [LoRA(targets="all-linear")],
        {"target_modules": ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]},
    ),
    "expression": (
        "llama", [LoRA(targets=[r"re:.*\.1\..*_proj"])], {"target_modules": r".*\.1\..*_proj"},
    ),
    "expression that covers more than linear layers": (
        "llama", [LoRA(targets=[r"re:.*\.1\.self_attn.*"])],
        {"target_modules": ["k_proj", "o_proj", "q_proj", "v_proj"], "layers_to_transform": [1]},
    ),
    "layers": (
        "llama", [LoRA(targets=["q_proj"], layers="1")],
        {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    ),
    "open layers": (
        "llama", [LoRA(targets=["q_proj"], layers="1-")],
        {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    ),
    "exclude": (
        "llama", [LoRA(targets=["q_proj", "v_proj"], exclude=["layers.0.self_attn.q_proj"])],
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
    ),
    "uneven sites": (
        "llama", [LoRA(targets=["layers.0.self_attn.q_proj", "layers.1.mlp.up_proj"])],
        {"target_modules": ["layers.0.self_attn.q_proj", "layers.1.mlp.up_proj"]},
    ),
    "rules of different rank": (
        "llama",
        [
            LoRA(r=4, alpha=8, targets=["q_proj"], layers="0"),
            LoRA(r=2, alpha=8, targets=["q_proj", "v_proj"]),
        ],
        {
            "target_modules": ["q_proj", "v_proj"], "r": 2, "lora_alpha": 8, "alpha_pattern": {},
            "rank_pattern": {r"^model\.layers\.0\.self_attn\.q_proj": 4},
        },
    ),
    "patterns": (
        "llama",
        [
            LoRA(r=4, targets=["q_proj", "v_proj"], rank_pattern={"q_proj": 2},
                 alpha_pattern={"layers.0.*": 3}),
        ],
        {"r": 4, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.0.*": 3}},
    ),
    "patterns whose order counts": (
        "llama", [LoRA(r=4, targets=["q_proj", "v_proj"], rank_pattern={"q_proj": 2, "layers.0.*": 3})],
        {
            "r": 2,
            "rank_pattern": {rf"^model\.layers\.{i}\.self_attn\.v_proj": 3 + i for i in (0, 1)},
        },
    ),
    "rsLoRA": ("llama", [LoRA(r=5, rslora=True, targets=["o_proj"])], {"use_rslora": True}),
    "gaussian": ("llama", [LoRA(init="gaussian", targets=["o_proj"])], {"init_lora_weights": "gaussian"}),
    "random": ("llama", [LoRA(init="random", targets=["o_proj"])], {"init_lora_weights": False}),
    "orthogonal": (
        "llama", [LoRA(init="orthogonal", targets=["o_proj"])], {"init_lora_weights": "orthogonal"},
    ),
    "DoRA": ("llama", [LoRA(r=3, dora=True, targets=["q_proj"])], {"use_dora": True}),
    "DoRA on conv1d": ("gpt2", [LoRA(r=3, dora=True, targets=["c_attn"])], {"use_dora": True}),
    "lora_bias": ("bert", [LoRA(r=3, lora_bias=True, bias="lora_only", targets=["query"])], {"lora_bias": True}),
    "lora_only": ("bert", [LoRA(bias="lora_only", targets=["query"])], {"bias": "lora_only"}),
    "conv1d": ("gpt2", [LoRA(targets=["c_attn"])], {"fan_in_fan_out": True}),
    "full": (
        "bert", [LoRA(targets=["query"]), CLASSIFIER],
        {"target_modules": ["query"], "modules_to_save": ["classifier"]},
    ),
    "full container": (
        "roberta", [CLASSIFIER, LoRA(targets=["dense"])],
        {"target_modules": ["dense"], "modules_to_save": ["classifier"]},
    ),
    "full by path": (
        "bert", [Rule(Match("bert.encoder.layer.0.output.dense"), train="full"), LoRA(targets=["query"])],
        {"modules_to_save": ["bert.encoder.layer.0.output.dense"]},
    ),
    "some linears of a name": (
        "bert", [LoRA(targets=["output.dense"], exclude=["attention.output.dense"])],
        {"target_modules": ["output.dense"], "exclude_modules": ["attention.output.dense"]},
    ),
    "shared layers": ("albert", [LoRA(targets=["query"])], {"target_modules": ["query"]}),
}  # fmt: skip


@pytest.fixture(params=sorted(WRITTEN_BY_ADAPTC))
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Adapted, Path, dict[str, Any]]:
    host, rules, expected = WRITTEN_BY_ADAPTC[request.param]
    adapted = Adapted(host, Plan(rules))
    generator = torch.Generator().manual_seed(3)
    for adapter in adapted.adapters.values():
        for tensor in peft_keys.tensors_of(adapter).values():
            tensor.data.add_(0.1 * torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype))
    return host, adapted, adapted.save(tmp_path / "ours"), expected


def test_peft_reads_what_adaptc_writes(saved: Any) -> None:
    host, adapted, folder, expected = saved
    config = json.loads((folder / "adapter_config.json").read_text())
    assert {key: config[key] for key in expected} == expected
    model = peft_load(host, folder)
    torch.testing.assert_close(logits(model, host), logits(adapted, host), rtol=1e-10, atol=1e-10)
    paths = {n.removeprefix("base_model.model.") for n, m in model.named_modules() if hasattr(m, "lora_A")}
    assert paths == {path for path, a in adapted.adapters.items() if a.method.kind == "lora"}


def test_adaptc_reads_what_adaptc_writes(saved: Any) -> None:
    host, adapted, folder, _ = saved
    again = load(host, folder)
    assert again.adapters.keys() == adapted.adapters.keys()
    assert torch.equal(logits(again, host), logits(adapted, host))
    assert Plan.from_dict(checkpoint.read_adapter(folder).plan) == adapted.plan


def test_full_paths_are_written_without_the_host() -> None:
    adapted = Adapted("llama", Plan(LoRA(targets=["q_proj"])))
    config = rules_to_config(adapted.plan.rules, adapted.sites)
    assert config["target_modules"] == [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]


def test_a_path_that_ends_another_is_written_as_an_expression() -> None:
    inner = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), inner)
    plan = Plan(LoRA(targets=["re:0"]))
    config = rules_to_config(plan.rules, plan.resolve(model).sites, model=model)
    assert config["target_modules"] == "0"
    plan = Plan([LoRA(r=2, targets=["re:0"]), LoRA(r=2, targets=["re:1.1"])])
    config = rules_to_config(plan.rules, plan.resolve(model).sites, model=model)
    assert config["target_modules"] == r"0|1\.1"
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=config["target_modules"]))
    paths = [n for n, m in wrapped.base_model.model.named_modules() if hasattr(m, "lora_A")]
    assert paths == ["0", "1.1"]


def test_the_config_file_is_the_one_peft_writes(tmp_path: Path) -> None:
    """Byte for byte, for a plan with one target (PEFT's lists come from sets, in no order)."""
    peft_save(peft_model("llama", {"target_modules": ["q_proj"], "r": 2, "lora_alpha": 6}), tmp_path / "a")
    Adapted("llama", Plan(LoRA(r=2, alpha=6, targets=["q_proj"]))).save(tmp_path / "b")
    a, b = ((tmp_path / name / "adapter_config.json").read_bytes() for name in "ab")
    assert a == b


def test_every_key_of_peft_is_written_with_its_default() -> None:
    config = Adapted("llama", Plan(LoRA(targets=["q_proj"]))).config()
    theirs = peft.LoraConfig(target_modules=["q_proj"]).to_dict()
    assert config.keys() == theirs.keys()
    differs = {key for key in theirs if json.dumps(config[key]) != json.dumps(_plain(theirs[key]))}
    assert differs == {"auto_mapping", "inference_mode"}


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else value


def test_the_task_is_kept_only_with_the_head_it_makes_peft_train(tmp_path: Path) -> None:
    without = Adapted("bert", Plan(LoRA(targets=["query"]))).config(task_type="SEQ_CLS")
    assert without["task_type"] is None
    assert without["auto_mapping"]["base_model_class"] == "BertForSequenceClassification"
    adapted = Adapted("bert", Plan([CLASSIFIER, LoRA(targets=["query"])]))
    assert adapted.config(task_type="SEQ_CLS")["task_type"] == "SEQ_CLS"
    adapted.save(tmp_path, task_type="SEQ_CLS", base_model_name="some/bert")
    model = peft_load("bert", tmp_path)
    assert type(model) is peft.PeftModelForSequenceClassification
    torch.testing.assert_close(logits(model, "bert"), logits(adapted, "bert"), rtol=1e-10, atol=1e-10)
    assert (
        json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "some/bert"
    )


def test_a_changed_plan_keeps_what_does_not_matter_of_the_original(tmp_path: Path) -> None:
    config = {"target_modules": ["q_proj"], "base_model_name_or_path": "some/llama", "revision": "abc"}
    original = json.loads(json.dumps({"peft_type": "LORA", "peft_version": "0.10.0", **config}))
    adapted = Adapted("llama", Plan(LoRA(targets=["v_proj"])))
    written = adapted.config(original=original)
    assert written["target_modules"] == ["v_proj"]
    assert (written["base_model_name_or_path"], written["revision"]) == ("some/llama", "abc")
    assert written["peft_version"] == "0.21.2"
    same = Adapted("llama", Plan(LoRA(targets=["q_proj"]))).config(original=original)
    assert same == original


def test_a_scale_that_was_changed_by_hand_is_written() -> None:
    original = {"peft_type": "LORA", "target_modules": ["q_proj"], "lora_alpha": 4}
    adapted = Adapted("llama", plan_of(original))
    assert adapted.config(original=original) == original
    first = adapted.sites[0]
    adapted.sites[0] = dataclasses.replace(first, method=dataclasses.replace(first.method, alpha=6.5))
    config = adapted.config(original=original)
    alphas = [
        value_at(config["alpha_pattern"], s.path, config["lora_alpha"])
        for s in adapted.sites
    ]
    assert alphas == [6.5, 4]


def test_a_plan_that_was_read_without_the_host_means_its_config_too() -> None:
    """Without the host "score" cannot be known to be nowhere, so the rule differs, not what it does."""
    original = {"peft_type": "LORA", "target_modules": ["query"], "modules_to_save": ["classifier", "score"]}
    bare = plan_of(original, loading=True)
    adapted = Adapted("bert", bare)
    assert bare != plan_of(original, loading=True, model=adapted.base)
    assert adapted.config(original=original) == original


@pytest.mark.parametrize(
    ("host", "rules", "text"),
    [
        (
            "llama", [LoRA(dropout=0.1, targets=["q_proj"]), LoRA(targets=["v_proj"])],
            "one dropout for all LoRA sites",
        ),
        ("llama", [LoRA(rslora=True, targets=["q_proj"]), LoRA(targets=["v_proj"])], "one rslora for all"),
        ("bert", [LoRA(bias="lora_only", targets=["query"]), LoRA(targets=["key"])], "one bias for all LoRA"),
        ("bert", [CLASSIFIER], "needs at least one adapted site"),
        (
            "llama", [LoRA(targets=["q_proj"]), Rule(Match(("q_proj",)), LoRA(r=2), stack=True)],
            "no place for two methods on one module: model.layers.0.self_attn.q_proj",
        ),
        (
            "bert", [LoRA(targets=["query"]), Bias(targets=["bert.encoder.layer.0.attention.output.dense"])],
            "cannot say which biases are trained",
        ),
    ],
)  # fmt: skip
def test_what_peft_cannot_express_is_refused(host: str, rules: list[Any], text: str) -> None:
    model = hosts.build(host)
    plan = Plan(rules)
    with pytest.raises(UnsupportedError, match=text):
        rules_to_config(plan.rules, plan.resolve(model).sites, model=model)


def test_a_name_that_ends_another_module_cannot_be_saved_as_a_whole() -> None:
    model = torch.nn.ModuleDict(
        {"a": torch.nn.Linear(2, 2), "ba": torch.nn.Linear(2, 2), "q": torch.nn.Linear(2, 2)}
    )
    plan = Plan([Rule(Match("re:a"), train="full"), LoRA(targets=["q"])])
    with pytest.raises(UnsupportedError, match="cannot name the fully trained modules") as error:
        rules_to_config(plan.rules, plan.resolve(model).sites, model=model)
    assert "ba too" in str(error.value)
