"""One plan, many spellings: Python objects, dict, YAML, JSON and TOML are the same thing."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import adaptc
from adaptc import LoRA, Match, Plan, Rule
from adaptc.plan import Passes

EXAMPLE = """\
version: 1
rules:                       # first match wins
  - match: {targets: ["q_proj", "k_proj", "v_proj", "o_proj"], layers: "0-15"}
    method: {kind: lora, r: 16, alpha: 32, dropout: 0.05}
  - match: {targets: ["re:.*mlp\\\\.(gate|up|down)_proj"], exclude: ["model.layers.0.*"]}
    method: {kind: lora, r: 8, alpha: 16}
  - match: {targets: ["score"]}
    train: full
passes:                      # optional; default is the full pipeline
  skip: [reassociate]
"""
EXAMPLE_TOML = """\
version = 1
[[rules]]
match = { targets = ["q_proj", "k_proj", "v_proj", "o_proj"], layers = "0-15" }
method = { kind = "lora", r = 16, alpha = 32.0, dropout = 0.05 }
[[rules]]
[rules.match]
targets = 're:.*mlp\\.(gate|up|down)_proj'
exclude = ["model.layers.0.*"]
[rules.method]
kind = "lora"
alpha = 16
[[rules]]
train = "full"
match.targets = ["score"]
[passes]
skip = ["reassociate"]
"""


def example_objects() -> Plan:
    return Plan(
        [
            LoRA(
                r=16,
                alpha=32,
                dropout=0.05,
                targets=["q_proj", "k_proj", "v_proj", "o_proj"],
                layers=range(16),
            ),
            Rule(
                Match([r"re:.*mlp\.(gate|up|down)_proj"], exclude=["model.layers.0.*"]),
                LoRA(r=8, alpha=16),
            ),
            {"match": {"targets": "score"}, "train": "full"},
        ],
        passes=Passes(skip=("reassociate",)),
    )


def test_the_documented_file_is_the_same_plan_in_every_form(tmp_path: Path) -> None:
    objects = example_objects()
    (tmp_path / "plan.yaml").write_text(EXAMPLE)
    (tmp_path / "plan.toml").write_text(EXAMPLE_TOML)
    (tmp_path / "plan.json").write_text(json.dumps(objects.to_dict()))
    for name in ("plan.yaml", "plan.toml", "plan.json"):
        loaded = Plan.load(tmp_path / name)
        assert loaded == objects
        assert hash(loaded) == hash(objects)
        assert loaded.canonical_json() == objects.canonical_json()
        assert Plan(str(tmp_path / name)) == objects
    assert Plan.from_dict(objects.to_dict()) == objects
    assert Plan(objects) == objects
    assert Plan.coerce(objects) is objects


def test_dict_form() -> None:
    assert example_objects().to_dict() == {
        "version": 1,
        "rules": [
            {
                "match": {"targets": ["q_proj", "k_proj", "v_proj", "o_proj"], "layers": "0-15"},
                "method": {"kind": "lora", "r": 16, "alpha": 32, "dropout": 0.05},
            },
            {
                "match": {"targets": [r"re:.*mlp\.(gate|up|down)_proj"], "exclude": ["model.layers.0.*"]},
                "method": {"kind": "lora", "alpha": 16},
            },
            {"match": {"targets": ["score"]}, "train": "full"},
        ],
        "passes": {"skip": ["reassociate"]},
    }


def test_canonical_json_is_minimal_and_sorted() -> None:
    plan = Plan(LoRA(r=4, alpha=8.0, targets=["v", "q"]))
    expected = '{"rules":[{"match":{"targets":["q","v"]},"method":{"kind":"lora","r":4}}],"version":1}'
    assert plan.canonical_json() == expected


text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8).filter(
    lambda s: s.strip() and s != "re:" and not s.startswith("re:") and s != "all-linear"
)
selectors = st.lists(text | st.just(r"re:.*\.q_(a|b)") | st.just("1e5") | st.just("on"), min_size=1, max_size=3)
layer_lists = st.lists(st.integers(0, 40), min_size=1, max_size=4)
methods = st.builds(
    LoRA,
    r=st.integers(1, 64),
    alpha=st.floats(allow_nan=False, allow_infinity=False) | st.integers(0, 99),
    dropout=st.floats(0, 0.9),
    rslora=st.booleans(),
    init=st.sampled_from(["default", "gaussian", "random"]),
    rank_pattern=st.dictionaries(text, st.integers(1, 9), max_size=2),
    compute_dtype=st.sampled_from([None, "float32"]),
)


@st.composite
def rules(draw: Any) -> Rule:
    layers = draw(st.none() | layer_lists)
    pattern = tuple(draw(selectors)) if layers and draw(st.booleans()) else ()
    exclude = tuple(draw(st.just([]) | selectors))
    match = Match(("all-linear", *draw(selectors)), exclude, layers, pattern)
    if draw(st.booleans()):
        return Rule(match, train="full")
    return Rule(match, draw(methods), stack=draw(st.booleans()))


limits = st.none() | st.integers(0, 9) | st.dictionaries(text, st.integers(0, 9), min_size=1, max_size=2)
passes = st.none() | st.builds(
    Passes,
    skip=st.lists(text, max_size=2).map(tuple),
    order=st.none() | st.lists(text, max_size=2).map(tuple),
    limit=limits,
)
lifting = st.builds(Passes, limit=limits, lift_no_grad=st.lists(text.filter(str.strip), max_size=2).map(tuple))
plans = st.builds(Plan, st.lists(rules(), min_size=1, max_size=3), passes | lifting)


@given(plans)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_form_round_trips(tmp_path: Path, plan: Plan) -> None:
    forms = [Plan.from_dict(plan.to_dict()), pickle.loads(pickle.dumps(plan)), copy.deepcopy(plan)]
    for suffix in ("yaml", "yml", "json", "toml"):
        file = tmp_path / f"plan.{suffix}"
        plan.save(file)
        forms.append(Plan.load(file))
    for form in forms:
        assert form.to_dict() == plan.to_dict()
        assert form == plan
        assert form.canonical_json() == plan.canonical_json()
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".")] == []


@given(plans)
@settings(max_examples=100, deadline=None)
def test_repr_is_python(plan: Plan) -> None:
    names = {"Plan": Plan, "Rule": Rule, "Match": Match, "LoRA": LoRA}
    assert eval(repr(plan), names) == plan


@given(plans, st.randoms())
@settings(max_examples=100, deadline=None)
def test_order_of_targets_and_skips_has_no_meaning(plan: Plan, random: Any) -> None:
    data = copy.deepcopy(plan.to_dict())
    for rule in data["rules"]:
        for key in {"targets", "exclude"} & rule["match"].keys():
            random.shuffle(rule["match"][key])
    for key in ("skip", "lift_no_grad"):
        random.shuffle(data.get("passes", {}).get(key, []))
    assert Plan.from_dict(data) == plan


def test_what_has_an_order_keeps_it() -> None:
    first, second = LoRA(r=4, targets="q"), LoRA(r=8, targets="*")
    assert Plan([first, second]) != Plan([second, first])
    ranks = {"a": 1, ".*": 2}
    assert Plan(LoRA(targets="q", rank_pattern=ranks)) != Plan(
        LoRA(targets="q", rank_pattern=dict(reversed(ranks.items())))
    )
    assert Plan(first, passes={"order": ["a", "b"]}) != Plan(first, passes={"order": ["b", "a"]})
    assert Plan(first) != "a plan"


def test_numbers_of_one_value_are_one_plan() -> None:
    assert Plan(LoRA(alpha=16, targets="q")) == Plan(LoRA(alpha=16.0, targets="q"))
    assert Plan(LoRA(alpha=16.5, targets="q")) != Plan(LoRA(alpha=16, targets="q"))


def test_passes_that_ask_for_nothing_are_none() -> None:
    assert Plan(LoRA(targets="q"), passes=Passes()).passes is None
    assert Plan(LoRA(targets="q"), passes={"limit": 0}).passes == Passes(limit=0)


def test_passes_argument_replaces_those_of_the_source() -> None:
    plan = Plan(LoRA(targets="q"), passes={"skip": ["a"]})
    assert Plan(plan).passes == Passes(skip=("a",))
    assert Plan(plan, passes={"limit": 2}).passes == Passes(limit=2)


def test_shorthand_moves_into_the_match() -> None:
    (rule,) = Plan(LoRA(r=4, targets=["a", "b"], exclude="c", layers=[0, 1])).rules
    assert rule == Rule(Match(("a", "b"), ("c",), "0-1"), LoRA(r=4))


def test_full_as_a_method_is_train_full() -> None:
    data = {"rules": [{"match": {"targets": ["score"]}, "method": {"kind": "full"}}]}
    assert Plan(data) == Plan([Rule(Match("score"), train="full")])


def test_yaml_reads_exponents_as_numbers_and_empty_keys_as_unset(tmp_path: Path) -> None:
    file = tmp_path / "p.yaml"
    file.write_text("rules:\n- match:\n    targets: q\n    exclude:\n  method: {kind: lora, dropout: 1e-2}\n")
    assert Plan.load(file) == Plan(LoRA(dropout=0.01, targets="q"))


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "plan.json"
    Plan(LoRA(targets="q")).save(file)
    before = file.read_bytes()

    def full_disk(fd: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="no space left"):
        Plan(LoRA(targets="v")).save(file)
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


def test_peft_config_object_dict_file_and_folder_are_one_plan(tmp_path: Path) -> None:
    import peft

    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    config.save_pretrained(tmp_path)
    expected = Plan(LoRA(r=4, alpha=8, targets=["q_proj", "v_proj"]))
    for source in (config, tmp_path, tmp_path / "adapter_config.json", str(tmp_path)):
        assert Plan(source) == expected
    assert Plan.from_peft(json.loads((tmp_path / "adapter_config.json").read_text())) == expected


def test_plan_is_importable_without_the_file_formats() -> None:
    import subprocess
    import sys

    code = (
        "import sys, adaptc; adaptc.Plan(adaptc.LoRA(targets='q')).canonical_json(); "
        "print([m for m in ('yaml', 'transformers', 'peft', 'tomli_w') if m in sys.modules])"
    )
    root = Path(adaptc.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert done.stdout.strip() == "[]"
