"""What a plan that is wrong says: the rule, what was found, and what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from adaptc import IA3, LoRA, Match, Plan, Rule
from adaptc.errors import AdaptcError, CheckpointNotFoundError, ConfigError, PlanError, SiteError
from adaptc.plan import Passes
from tests.models import hosts


@pytest.mark.parametrize(
    ("host", "method", "message"),
    [
        (
            "llama",
            LoRA(targets=["q_porj"]),
            'rule 2 matches nothing\n  rule   LoRA(targets=["q_porj"])\n'
            "  found  16 adaptable modules; nearest names: q_proj (2), v_proj (2), o_proj (2)\n"
            "  do     correct the name; print(model) lists the modules",
        ),
        ("llama", LoRA(targets=["q_proj", "v_porj"]), 'rule 2: "v_porj" matches nothing'),
        ("llama", LoRA(targets="Q_PROJ"), "nearest names: q_proj (2)"),
        ("llama", LoRA(targets="all_linear"), 'nearest names: "all-linear"'),
        ("llama", LoRA(targets=r"re:.*mlp\.(gate|up)_porj"), "gate_proj (2)"),
        ("llama", LoRA(targets="model.layers.0.self_atn.q_proj"), "names: model.layers.0.self_attn.q_proj, "),
        ("llama", LoRA(targets="zzz"), "16 adaptable modules; names: q_proj (2), k_proj (2), v_proj (2)"),
        ("llama", Rule(Match("nrom"), train="full"), "adaptable modules; nearest names: norm (1)"),
        (
            "mixtral",
            IA3(targets="gate_up_proj"),
            "found  gate_up_proj is a parameter of model.layers.0.mlp.experts (MixtralExperts), and ia3 adapts modules",
        ),
        ("llama", LoRA(targets="q_proj", exclude="v_porj"), 'rule 2: exclude "v_porj" matches nothing'),
        (
            "llama",
            LoRA(targets="q_proj", exclude="*q_proj"),
            'exclude=["*q_proj"])\n  found  2 modules, all of them excluded',
        ),
        (
            "roberta",
            LoRA(targets="dense", exclude="classifier"),
            'rule 2: exclude "classifier" excludes nothing\n'
            '  rule   LoRA(targets=["dense"], exclude=["classifier"])\n'
            "  found  it names classifier, whose inner modules are matched: classifier.dense\n"
            '  do     write "classifier.*" to exclude what is inside',
        ),
        ("llama", LoRA(targets="q_proj", layers="3-5"), "found  2 modules, in layers 0 to 1"),
        ("llama", LoRA(targets=["q_proj", "lm_head"], layers="0-5"), 'rule 2: "lm_head" matches nothing'),
        (
            "llama",
            LoRA(targets=["q_proj", "lm_head"], layers="0-5"),
            "1 module, none of them in a numbered layer",
        ),
        ("llama", LoRA(targets="q_proj", layers=[0, 9]), "rule 2: layers 9 matches nothing"),
        (
            "llama",
            Rule(Match("q_proj", layers=[0], layers_pattern=["layers", "h"]), LoRA()),
            'rule 2: layers_pattern "h" matches nothing',
        ),
        (
            "llama",
            LoRA(targets="q_proj", rank_pattern={"q_porj": 2}),
            'rule 2: rank_pattern "q_porj" matches nothing\n'
            '  rule   LoRA(targets=["q_proj"], rank_pattern={"q_porj": 2})\n'
            "  found  2 sites; nearest names: q_proj (2)\n"
            "  do     correct the key, an expression on the paths of the rule's sites",
        ),
        (
            "llama",
            LoRA(targets="q_proj", alpha_pattern={"q_proj": 4, "k_proj": 2.0}),
            'alpha_pattern "k_proj" matches nothing\n  rule   LoRA(targets=["q_proj"], '
            'alpha_pattern={"q_proj": 4, "k_proj": 2.0})\n'
            "  found  it fits model.layers.0.self_attn.k_proj, which the rule does not adapt",
        ),
        (
            "llama",
            LoRA(targets="q_proj", rank_pattern={"layers.0.*": 3, "0.self_attn.q_proj": 2}),
            'rank_pattern "0.self_attn.q_proj" changes nothing: an earlier key counts',
        ),
        (
            "mixtral",
            LoRA(targets="experts.gate_up_proj", rank_pattern={"down_proj": 2}),
            "found  it fits model.layers.0.mlp.experts.down_proj, which the rule does not adapt",
        ),
    ],
)
def test_a_rule_that_matches_nothing(host: str, method: Any, message: str) -> None:
    first = Rule(Match("*"), LoRA())
    with pytest.raises(PlanError) as error:
        Plan([first, method]).resolve(hosts.build(host))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("host", "targets", "message"),
    [
        (
            "llama",
            "self_attn",
            'rule 1: "self_attn" names 2 modules that cannot be adapted\n'
            '  rule   LoRA(targets=["self_attn"])\n'
            "  found  model.layers.0.self_attn (LlamaAttention): LlamaAttention is not a linear layer "
            "(nn.Linear or transformers' Conv1D)\n",
        ),
        ("llama", "self_attn", 'name what is inside, "self_attn.*" or q_proj, k_proj, v_proj, o_proj'),
        ("llama", "norm", "do     name other modules"),
        ("clip", "*layer_norm*", "... and 4 more"),
        ("roberta", ["query", "output"], '"output" names 4 modules'),
    ],
)
def test_a_named_module_that_cannot_be_adapted(host: str, targets: Any, message: str) -> None:
    with pytest.raises(SiteError) as error:
        Plan(LoRA(targets=targets)).resolve(hosts.build(host))
    assert message in str(error.value)


def test_a_name_of_both_kinds_raises_as_in_peft() -> None:
    from torch import nn

    model = nn.ModuleDict({"a": nn.ModuleDict({"proj": nn.Linear(2, 2)}), "proj": nn.BatchNorm2d(2)})
    with pytest.raises(SiteError, match='"proj" names 1 module that cannot be adapted') as error:
        Plan(LoRA(targets="proj")).resolve(model)
    assert "found  proj (BatchNorm2d): BatchNorm2d is not a linear layer" in str(error.value)
    assert "do     exclude these, or name the others in full" in str(error.value)
    Plan(LoRA(targets="a.proj")).resolve(model)


MATCH = {"targets": ["q"]}
LORA = {"kind": "lora"}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            {"rule": []},
            'plan: unknown key "rule"\n  expected  version, rules, passes\n  do        did you mean rules?',
        ),
        ({"version": 2, "rules": []}, "a plan of another version\n  expected  1\n  found     2"),
        ({"version": True, "rules": []}, "a plan of another version"),
        ({"version": 1}, "a plan without rules"),
        ({"rules": {"match": MATCH}}, "a plan's rules are not a list"),
        ([], "a plan without rules"),
        (3, "this is not a plan"),
        ([3], "rule 1 is not a rule"),
        ([LoRA(r=4)], "rule 1: LoRA without targets"),
        ([{"match": MATCH, "methd": LORA}], 'rule 1: rule: unknown key "methd"'),
        ([{"match": MATCH}], "rule 1: a rule has one of method and train\n  found  neither"),
        (
            [{"match": MATCH, "method": LORA, "train": "full"}],
            "a rule has one of method and train\n  found  both",
        ),
        ([{"match": MATCH, "train": "half"}], "a rule's train option is not known"),
        ([{"match": MATCH, "train": "full", "stack": True}], "train: full cannot be stacked"),
        ([{"match": MATCH, "method": LORA, "stack": "no"}], "a rule's stack option is not true or false"),
        ([{"method": LORA, "train": "full"}], "rule 1: a rule without match"),
        ([{"match": {"target": ["q"]}, "method": LORA}], 'match: unknown key "target"'),
        ([{"match": {"target": ["q"]}, "method": LORA}], "did you mean targets?"),
        ([{"match": {}, "method": LORA}], "a match without targets"),
        ([{"match": "q", "method": LORA}], "match is not a mapping"),
        ([{"match": MATCH, "method": {"kind": "lroa"}}], 'no adapter method "lroa"'),
        ([{"match": MATCH, "method": {"kind": "lroa"}}], "did you mean lora?"),
        ([{"match": MATCH, "method": {"r": 3}}], "a method without kind"),
        ([{"match": MATCH, "method": {**LORA, "alhpa": 3}}], 'method lora: unknown key "alhpa"'),
        ([{"match": MATCH, "method": {**LORA, "alhpa": 3}}], "did you mean alpha?"),
        (
            [{"match": MATCH, "method": {**LORA, "targets": ["q"]}}],
            "targets inside method\n  do  put them into match",
        ),
        (
            [{"match": MATCH, "method": {**LORA, "dropout": "x"}}],
            "rule 1: method lora: an option has a wrong type",
        ),
        ([{"match": MATCH, "method": {**LORA, "r": 0}}], "rule 1: LoRA: r is not legal"),
        ({"rules": [{"match": MATCH, "method": LORA}], "passes": {"skp": []}}, 'passes: unknown key "skp"'),
        (
            {"rules": [{"match": MATCH, "method": LORA}], "passes": {"limit": -1}},
            "passes.limit is not a count",
        ),
        (
            {"rules": [{"match": MATCH, "method": LORA}], "passes": {"skip": ["lift_no_grad"], "lift_no_grad": "q"}},
            "passes.lift_no_grad names modules, and the pass lift_no_grad does not run\n  found  it is in skip",
        ),
    ],
)
def test_a_malformed_plan(source: Any, message: str) -> None:
    with pytest.raises(PlanError) as error:
        Plan(source)
    assert message in str(error.value)


def test_a_method_in_a_rule_has_no_targets_of_its_own() -> None:
    with pytest.raises(PlanError, match="a rule's method has targets of its own"):
        Rule(Match("q"), LoRA(targets="v"))


@pytest.mark.parametrize("limit", [True, False, 1.5, {"a": -1}, {"a": None}])
def test_a_limit_is_a_count(limit: Any) -> None:
    with pytest.raises(PlanError, match=r"passes\.limit is not a count"):
        Passes(limit=limit)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("plan.txt", "", "is not a plan file\n  expected  .yaml, .yml, .json, .toml\n  found     .txt"),
        ("plan", "", "found     no suffix"),
        ("plan.json", "{", "not JSON"),
        ("plan.json", '{"rules": [], "rules": []}', 'key "rules" is given twice'),
        ("plan.json", "[]", "not a mapping"),
        ("plan.yaml", "a: [", "not YAML"),
        ("plan.yaml", "rules: []\nrules: []", 'key "rules" is given twice'),
        ("plan.yaml", "!!python/object/apply:os.system [ls]", "not YAML"),
        ("plan.yml", "", "not a mapping"),
        ("plan.toml", "a = ", "not TOML"),
        ("plan.toml", "a = 1\na = 2", "not TOML"),
        ("plan.toml", "rulse = []", "did you mean rules?"),
        ("plan.yaml", b"\xff\xfe\xff", "not UTF-8 text"),
    ],
)
def test_a_malformed_file_is_named(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    file = tmp_path / name
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(PlanError) as error:
        Plan.load(file)
    assert str(file) in str(error.value)
    assert message in str(error.value)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="no plan file"):
        Plan.coerce(tmp_path / "plan.yaml")
    with pytest.raises(PlanError, match='"lora" is not a plan file'):
        Plan.coerce("lora")
    with pytest.raises(CheckpointNotFoundError, match="no adapter_config"):
        Plan.coerce(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(ConfigError, match="is not JSON"):
        Plan.coerce(tmp_path)


def test_toml_has_no_null(tmp_path: Path) -> None:
    from adaptc.plan.files import toml_text

    with pytest.raises(PlanError, match="TOML cannot hold None"):
        toml_text({"version": 1, "rules": [{"method": {"x": None}}]})


def test_every_error_is_of_adaptc() -> None:
    assert issubclass(PlanError, AdaptcError) and issubclass(PlanError, ValueError)
