"""Which modules a config means, and the plan it becomes: the oracle is PEFT 0.21.2 itself."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.tuners.tuners_utils import check_target_module_exists

from adaptc import LoRA, Match, Plan, Rule
from adaptc.errors import AdaptcWarning
from adaptc.methods import codec
from adaptc.plan.files import read_peft_config
from adaptc.runtime import peft_format, peft_matching
from tests.models import hosts

CLASSIFIER = Rule(Match("classifier"), train="full")
PARTS = st.sampled_from(["model", "layers", "h", "0", "1", "2", "q", "qq", "attn", "classifier", "x"])
PATHS = st.lists(PARTS, min_size=1, max_size=6).map(".".join)
NAMES = st.lists(st.one_of(PARTS, PATHS), min_size=1, max_size=3)
LAYERS = st.one_of(st.none(), st.integers(0, 2), st.lists(st.integers(0, 2), max_size=2))
EXPRESSIONS = st.sampled_from([r".*\.q", r"model\..*", r".*(q|x)", r"layers\.\d+\..*"])


@given(
    paths=st.lists(PATHS, min_size=1, max_size=8),
    targets=NAMES,
    expression=st.one_of(st.none(), EXPRESSIONS),
    exclude=st.one_of(st.none(), EXPRESSIONS, NAMES),
    saved=st.one_of(st.none(), NAMES),
    layers=LAYERS,
    pattern=st.one_of(st.none(), st.sampled_from(["layers", "h", "model.layers", ["h", "layers"]])),
)
def test_modules_are_matched_as_peft_matches_them(
    paths: list[str],
    targets: Any,
    expression: str | None,
    exclude: Any,
    saved: Any,
    layers: Any,
    pattern: Any,
) -> None:
    options: dict[str, Any] = {"target_modules": expression or targets, "exclude_modules": exclude}
    options["modules_to_save"] = saved
    if expression is None:
        options["layers_to_transform"] = layers
        options["layers_pattern"] = pattern if layers is not None else None
    config = peft.LoraConfig(**options)
    try:
        expected = [path for path in paths if check_target_module_exists(config, path)]
    except UnboundLocalError:  # PEFT's own fault on an empty list of patterns
        return
    assert peft_matching.target_paths(options, paths) == expected


@pytest.mark.parametrize("pattern", [None, "layers", "h", ["experts", "layers"]])
@pytest.mark.parametrize("layer", [0, 1])
def test_the_first_number_is_the_layer(layer: int, pattern: Any) -> None:
    paths = [f"model.layers.{i}.experts.{j}.q" for i in (0, 1) for j in (0, 1)] + ["h.1.q", "x.h.1.q.h.0.q"]
    options = {"target_modules": ["q"], "layers_to_transform": layer, "layers_pattern": pattern}
    config = peft.LoraConfig(**options)
    expected = [path for path in paths if check_target_module_exists(config, path)]
    assert expected or pattern == "h"
    assert peft_matching.target_paths(options, paths) == expected


@given(path=PATHS, patterns=st.dictionaries(st.one_of(PATHS, EXPRESSIONS), st.integers(1, 9), max_size=4))
def test_patterns_are_matched_as_peft_matches_them(path: str, patterns: dict[str, int]) -> None:
    from peft.utils.other import get_pattern_key

    expected = patterns.get(get_pattern_key(patterns.keys(), path), 0)
    assert codec.pattern_value(patterns, path, 0) == expected


def test_names_without_a_module_are_left_out_with_a_warning() -> None:
    model = hosts.build("llama")
    config = {
        "peft_type": "LORA",
        "target_modules": ["q_proj", "query"],
        "exclude_modules": ["layers.0.self_attn.q_proj", "z"],
        "modules_to_save": ["lm_head", "score", "head2"],
    }
    with pytest.warns(AdaptcWarning) as caught:
        plan = peft_format.config_to_plan(config, model=model)
    told = [str(w.message) for w in caught]
    assert [t.rpartition(": ")[2] for t in told] == ["query", "z", "head2"], "score is PEFT's own addition"
    assert plan == Plan(
        [
            Rule(Match("lm_head"), train="full"),
            LoRA(targets=["q_proj"], exclude=["layers.0.self_attn.q_proj"]),
        ]
    )


def test_the_plan_of_a_config_object_reads_well() -> None:
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["v_proj", "q_proj"], lora_dropout=0.1, layers_to_transform=[0, 1]
    )
    expected = Plan(LoRA(r=4, alpha=8, dropout=0.1, targets=["q_proj", "v_proj"], layers="0-1"))
    assert Plan.from_peft(config) == expected
    assert peft_format.config_to_plan(read_peft_config(config), model=hosts.build("llama")) == expected


def test_the_head_that_peft_adds_for_a_task_is_in_the_plan() -> None:
    config = peft.LoraConfig(target_modules=["query"], task_type="SEQ_CLS")
    plan = peft_format.config_to_plan(read_peft_config(config), model=hosts.build("roberta"))
    assert plan == Plan([CLASSIFIER, LoRA(targets=["query"])])
    assert [s.path for s in Plan.from_peft(config).resolve(hosts.build("roberta")).sites if s.train] == [
        "classifier"
    ]


def test_a_layer_number_at_the_root_is_written_as_paths() -> None:
    """PEFT wants two components before a layer's number; adaptc's selectors do not."""
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList(torch.nn.ModuleDict({"q": torch.nn.Linear(2, 2)}) for _ in range(2))
    model.deep = torch.nn.Module()
    model.deep.layers = torch.nn.ModuleList(
        torch.nn.ModuleDict({"q": torch.nn.Linear(2, 2)}) for _ in range(2)
    )
    config = {"peft_type": "LORA", "target_modules": ["q"], "layers_to_transform": [1]}
    plan = peft_format.config_to_plan(config, model=model)
    assert [site.path for site in plan.resolve(model).sites] == ["deep.layers.1.q"]
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q"], layers_to_transform=[1]))
    assert [n for n, m in wrapped.named_modules() if hasattr(m, "lora_A")] == [
        "base_model.model.deep.layers.1.q"
    ]
