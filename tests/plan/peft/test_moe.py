"""Mixtures of experts whose names PEFT replaces: what is saved acts in PEFT, and what PEFT saved acts here."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import adaptc
from adaptc.errors import AdaptcWarning, ConfigError
from adaptc.plan.peft import moe as peft_moe
from tests.models import hosts, mixtures

IDS = torch.arange(8)[None] + 3
#: Layers of the MLPs by their names in all of the types, and the parameters of their routed experts.
LAYERS = ["gate_proj", "up_proj", "down_proj"]
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
#: Types in the default set: one with dense layers and shared experts, and one of the other table.
QUICK = ("deepseek_v3", "mixtral")


def lora(**options: Any) -> adaptc.LoRA:
    return adaptc.LoRA(**{"r": 4, "alpha": 8, "targets": LAYERS, "init": "random", **options})


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits.clone()


def compiled(base: nn.Module, plan: Any) -> nn.Module:
    model = adaptc.compile(copy.deepcopy(base), plan, backend="eager")
    with hosts.seeded(3):
        for parameter in model.adaptc.parameters():
            nn.init.normal_(parameter.data, std=0.2)
    return model


def in_peft(base: nn.Module, folder: Path) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # keys that are missing from the file
        return peft.PeftModel.from_pretrained(copy.deepcopy(base), folder)


def contents(model: nn.Module) -> dict[str, Any]:
    """What makes the adapter's function: kind, scale and tensors of each site."""
    return {
        path: (adapter.parameter, type(adapter), adapter.method.r, adapter.scaling, list(adapter.parameters()))
        for site in model.adaptc.sites for path, adapter in site.parts("default")
    }  # fmt: skip


def check_same(model: nn.Module, other: nn.Module) -> None:
    ours, theirs = contents(model), contents(other)
    assert {path: found[:4] for path, found in ours.items()} == {path: found[:4] for path, found in theirs.items()}
    for path, found in ours.items():
        assert all(map(torch.equal, found[4], theirs[path][4])), path


def without_plan(folder: Path) -> Path:
    """The folder as PEFT would have written it: no file of adaptc's own."""
    for file in folder.iterdir():
        if file.name not in ("adapter_config.json", "adapter_model.safetensors"):
            file.unlink()
    return folder


def merged(base: nn.Module, model: nn.Module) -> nn.Module:
    """The base with the update of each weight added to it."""
    host = copy.deepcopy(base)
    with torch.no_grad():
        for site in model.adaptc.sites:
            for path, adapter in site.parts("default"):
                name = path if adapter.parameter else f"{path}.weight"
                host.get_parameter(name).add_(adapter.delta().to(torch.float32))
    return host


def check_both_ways(base: nn.Module, plan: Any, tmp_path: Path, *, forward: bool = False) -> nn.Module:
    """Saved, read by PEFT, saved there, read here: one function all along, and the same sites. Returns PEFT's model."""
    model = compiled(base, plan)
    want = logits(merged(base, model))
    assert (want - logits(base)).abs().max() > 1e-2, "the adapter does nothing, so this shows nothing"
    if forward:
        torch.testing.assert_close(logits(model), want, rtol=1e-5, atol=1e-5)
    model.adaptc.save(tmp_path / "ours")
    theirs = in_peft(base, tmp_path / "ours")
    torch.testing.assert_close(logits(theirs), want, rtol=1e-5, atol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    for folder in (tmp_path / "ours", without_plan(tmp_path / "ours"), tmp_path / "theirs"):
        again = adaptc.compile(copy.deepcopy(base), folder, backend="eager")
        check_same(model, again)
    again.adaptc.save(tmp_path / "again")
    names = ["adapter_config.json", "adapter_model.safetensors"]
    assert all((tmp_path / "again" / n).read_bytes() == (tmp_path / "theirs" / n).read_bytes() for n in names)
    return theirs


# ------------------------------------------------------------------------------------------- what is saved


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind in QUICK else [pytest.mark.slow]) for kind in mixtures.TYPES]
)
def test_every_layer_of_the_mlps_in_one_file(kind: str, tmp_path: Path) -> None:
    base = mixtures.build(kind)
    named = [name for name in LAYERS if any(n.endswith(f".{name}") for n, _ in base.named_modules())]
    check_both_ways(base, lora(targets=[*named, *EXPERTS]), tmp_path, forward=kind != "mixtral")


#: Plans on a model with a dense layer, routed experts and a shared expert, and how many parameters PEFT sees.
PLANS: dict[str, tuple[Any, int]] = {
    "shared experts alone": (lora(targets=["shared_experts.up_proj"]), 1),
    "the dense layer beside attention": (lora(targets=["q_b_proj", "o_proj", *LAYERS], layers="0"), 3),
    "routers and gates": (lora(targets=["mlp.gate.weight", "gate_proj", "kv_b_proj"]), 3),
    "ranks of their own": (
        [
            lora(targets=EXPERTS, r=2, alpha=6, rank_pattern={"down_proj": 3}),
            lora(targets=LAYERS, rank_pattern={"up_proj": 5}, alpha_pattern={r"layers\.0\..*gate_proj": 3}),
        ], 8,
    ),
    "rsLoRA": (lora(targets=[*LAYERS, *EXPERTS], rslora=True, rank_pattern={"down_proj": 2}), 8),
    "expressions": ([lora(targets=r"re:.*\.0\..*(o|gate)_proj"), lora(targets=r"re:.*\.1\..*experts\.gate_.*")], 2),
    "all-linear": (lora(targets="all-linear"), 6),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANS)
def test_plans_of_every_form(name: str, tmp_path: Path) -> None:
    plan, count = PLANS[name]
    theirs = check_both_ways(mixtures.build("deepseek_v3"), plan, tmp_path)
    wrappers = [module for module in theirs.modules() if type(module).__name__ == "ParamWrapper"]
    assert len(wrappers) == count
    if name == "ranks of their own":
        for wrapper in wrappers:
            wrapper.scaling["default"] = 0.75
        taken = contents(adaptc.compile(theirs, backend="eager"))
        assert {found[3] for found in taken.values()} == {0.75} and len(taken) == count


def test_dropout_is_not_written_and_that_is_said(tmp_path: Path) -> None:
    base = mixtures.build("deepseek_v3")
    model = compiled(base, lora(dropout=0.1))
    with pytest.warns(AdaptcWarning, match=r"lora_dropout = 0: 6 adapted layers, first model\.layers\.0\.mlp\.gate"):
        model.adaptc.save(tmp_path)
    torch.testing.assert_close(logits(in_peft(base, tmp_path)), logits(merged(base, model)), rtol=1e-5, atol=1e-5)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["lora_dropout"] == 0
    again = adaptc.compile(copy.deepcopy(base), tmp_path, backend="eager")
    assert {a.method.dropout for site in again.adaptc.sites for a in site.of("default")} == {0.1}, "from the plan"


@pytest.mark.parametrize("options", [{"dora": True}, {"lora_bias": True}], ids=str)
def test_what_peft_cannot_have_there_is_said_and_read_here(options: dict[str, Any], tmp_path: Path) -> None:
    base = mixtures.build("deepseek_v3")
    model = compiled(base, lora(targets=[*LAYERS, "o_proj"], **options))
    with pytest.warns(AdaptcWarning, match="PEFT 0.21.2 will not read this file right, .* 6 adapted"):
        model.adaptc.save(tmp_path)
    check_same(model, adaptc.compile(copy.deepcopy(base), without_plan(tmp_path), backend="eager"))


def test_files_that_name_the_layers_load_as_they_are_and_are_written_anew(tmp_path: Path) -> None:
    """What PEFT wrote under transformers 4 of shared experts alone, and adaptc of any."""
    base = mixtures.build("deepseek_v3")
    model = compiled(base, lora())
    model.adaptc.save(tmp_path / "old")
    config = json.loads((tmp_path / "old" / "adapter_config.json").read_text())
    config |= {"target_modules": LAYERS, "target_parameters": None}
    (without_plan(tmp_path / "old") / "adapter_config.json").write_text(json.dumps(config))
    again = adaptc.compile(copy.deepcopy(base), tmp_path / "old", backend="eager")
    check_same(model, again)
    again.adaptc.save(tmp_path / "new")
    want = logits(merged(base, model))
    torch.testing.assert_close(logits(in_peft(base, tmp_path / "new")), want, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------- what is read


#: Types of models that transformers 5.23 does not have.
SINCE_5_24 = {"sarvam_mla"}


def test_the_tables_are_pefts() -> None:
    """When this fails PEFT or transformers has other ones: write them down, with the versions."""
    from peft.utils import transformers_weight_conversion as conversion

    found = conversion._MODEL_TO_CONVERSION_PATTERN.items()
    theirs = {kind: layout for kind, layout in found if layout in peft_moe.TABLES}
    classes = {kind for kind in theirs if kind != kind.lower()}  # entries for classes, not for types of models
    known = {kind: layout for kind, layout in peft_moe.LAYOUTS.items() if kind not in SINCE_5_24 or kind in theirs}
    assert {kind: theirs[kind] for kind in theirs.keys() - classes} == known
    assert conversion._MOE_TARGET_MODULE_MAPPING == peft_moe.TABLES


CONFIGS: list[dict[str, Any]] = [
    {"target_modules": LAYERS},
    {"target_modules": ["q_proj", "experts.0.w1", "w3", "o_proj"], "r": 3},
    {"target_modules": ["mlp.gate", "o_proj", "w2", "down_proj"], "target_parameters": ["x.weight"]},
    {"target_modules": "all-linear", "rank_pattern": {"o_proj": 2}},
    {"target_modules": r".*\.(gate|up|down|o)_proj"},
    {"target_modules": r".*layers\.1.*(q_proj|w[13])", "lora_alpha": 3},
    {"target_modules": r".*self_attn.*", "exclude_modules": r".*o_proj"},
    {"target_modules": ["gate_proj", "down_proj", "w1"]},
    {"target_modules": "nothing", "target_parameters": ["experts.down_proj"]},
]


@pytest.mark.parametrize("kind", ["deepseek_v3", "mixtral"])
def test_a_config_is_read_as_peft_reads_it(kind: str) -> None:
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    base = mixtures.build(kind)
    for options in CONFIGS:
        theirs = peft.LoraConfig(**options)
        given = {"task_type": None, **theirs.to_dict()}
        given |= {key: sorted(v) if isinstance(v := given[key], set) else v for key in given}
        try:
            convert_peft_config_for_transformers(theirs, base, None)
        except ValueError as error:
            with pytest.raises(ConfigError, match=r"PEFT refuses .* without"):
                peft_moe.as_read({**given, "peft_type": "LORA"}, base)
            assert "without also targeting" in str(error)
            continue
        ours = peft_moe.as_read({**given, "peft_type": "LORA"}, base)
        for key in ("target_modules", "target_parameters", "rank_pattern", "alpha_pattern"):
            found, wanted = ours[key], getattr(theirs, key)
            if isinstance(wanted, set):
                found, wanted = set(found or ()), set(wanted)
            assert found == wanted, (options, key)


def test_a_config_object_adapts_what_peft_adapts_and_names_what_it_leaves_out() -> None:
    base = mixtures.build("deepseek_v3")
    config = peft.LoraConfig(r=4, target_modules=[*LAYERS, "o_proj"])
    with pytest.warns(AdaptcWarning, match=r"6 layers get no adapter, first model\.layers\.0\.mlp\.gate_proj"):
        model = adaptc.compile(copy.deepcopy(base), copy.deepcopy(config), backend="eager")
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    assert sum(p.numel() for p in model.adaptc.parameters()) == sum(
        p.numel() for p in theirs.parameters() if p.requires_grad
    )
    assert contents(model)["model.layers.1.mlp.experts.gate_up_proj"][2] == 8
