"""Selectors and layer ranges, against PEFT's matching and against sets of numbers."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.tuners_utils import check_target_module_exists

from adaptc.errors import PlanError
from adaptc.plan import Match
from adaptc.plan.match import is_pattern, matcher, parse_layers

PATHS = [
    "lm_head",
    "layers.3.fc",
    "model.layers.0.self_attn.q_proj",
    "model.layers.0.mlp.gate_proj",
    "model.layers.10.self_attn.q_proj",
    "model.layers.10.mlp.experts.2.w1",
    "encoder.layers.1.self_attn.q_proj",
    "decoder.block.1.layer.0.q",
    "xq_proj",
]


@pytest.mark.parametrize(
    ("selector", "selected"),
    [
        ("q_proj", [2, 4, 6]),
        ("self_attn.q_proj", [2, 4, 6]),
        ("lm_head", [0]),
        ("model.layers.0.mlp.gate_proj", [3]),
        ("layers.3.fc", [1]),
        ("model.layers.0.*", [2, 3]),
        ("model.layers.*.q_proj", [2, 4]),
        ("layers.*.self_attn.q_proj", [2, 4, 6]),
        ("*_proj", [2, 3, 4, 6, 8]),
        ("*", range(len(PATHS))),
        ("model.layers.1*.w1", [5]),
        ("q?proj", []),
        ("model.layers.[0].*", []),
        (r"re:.*mlp\.(gate|up)_proj", [3]),
        ("re:q_proj", []),
        (r"re:model\.layers\.0", []),
        ("re:.*q_proj", [2, 4, 6, 8]),
        ("proj", []),
        ("layers.0", []),
    ],
)
def test_selector_selects(selector: str, selected: list[int]) -> None:
    assert [path for path in PATHS if matcher(selector)(path)] == [PATHS[i] for i in selected]


@pytest.mark.parametrize(("selector", "pattern"), [("q", False), ("a.*", True), ("re:a", True), ("all-linear", True)])
def test_names_and_patterns(selector: str, pattern: bool) -> None:
    assert is_pattern(selector) is pattern


class PeftConfig:
    """The fields that PEFT's matching reads."""

    def __init__(self, **fields: object) -> None:
        self.exclude_modules = fields.get("exclude")
        self.target_modules = fields["targets"]
        self.layers_to_transform = fields.get("layers")
        self.layers_pattern = fields.get("layers_pattern")
        self.target_parameters = None


names = st.lists(st.sampled_from(["q_proj", "w1", "mlp.gate_proj", PATHS[4], "q", "lm_head"]), min_size=1, unique=True)


@given(
    names,
    names,
    st.none() | st.lists(st.integers(0, 11), min_size=1),
    st.sampled_from([None, "layers", "block"]),
)
@settings(max_examples=200, deadline=None)
def test_names_select_what_peft_selects(
    targets: list[str], exclude: list[str], layers: list[int] | None, pattern: str | None
) -> None:
    pattern = pattern if layers else None
    peft = PeftConfig(targets=targets, exclude=exclude, layers=layers, layers_pattern=pattern)
    match = Match(tuple(targets), tuple(exclude), layers, (pattern,) if pattern else ())
    for path in PATHS:
        ours = any(matcher(t)(path) for t in targets) and match.in_layers(path) and not match.is_excluded(path)
        # PEFT lets a target that is a module's whole path pass whatever the layers say.
        in_layers = match.in_layers(path) or path not in targets
        if in_layers:
            assert ours == (check_target_module_exists(peft, path) is True), path


@given(st.lists(st.integers(0, 30), min_size=1), st.integers(0, 40))
@settings(max_examples=200, deadline=None)
def test_layer_list_means_its_numbers(layers: list[int], layer: int) -> None:
    match = Match("w", layers=layers)
    assert match.in_layers(f"model.layers.{layer}.w") == (layer in layers)
    assert Match("w", layers=match.layers) == match


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 5), st.booleans()), min_size=1), st.integers(0, 40))
@settings(max_examples=200, deadline=None)
def test_layer_text_means_its_ranges(spans: list[tuple[int, int, bool]], layer: int) -> None:
    text = ", ".join(f"{first}-" if is_open else f"{first}-{first + more}" for first, more, is_open in spans)
    expected = any(first <= layer and (is_open or layer <= first + more) for first, more, is_open in spans)
    assert Match("w", layers=text).in_layers(f"h.{layer}.w") == expected


@pytest.mark.parametrize(
    ("layers", "text"),
    [
        ("0-3,8,10-", "0-3,8,10-"),
        ([3, 1, 2], "1-3"),
        (7, "7"),
        ("4,5 , 6-9", "4-9"),
        ("2-,5", "2-"),
        ("0-9,2-3", "0-9"),
        ((0,), "0"),
    ],
)
def test_layers_have_one_form(layers: object, text: str) -> None:
    assert Match("w", layers=layers).layers == text


@pytest.mark.parametrize(
    ("layers", "why"),
    [
        ("-3", '"-3" is not "3", "0-3" or "3-"'),
        ("3-1", '"3-1" runs backwards'),
        ("", '"" is not "3"'),
        ("a", '"a" is not "3"'),
        ([-1], "-1 is not a layer number"),
        ([], "no layers at all"),
        (True, "True is not a layer number"),
        (1.5, "1.5 is not a layer number"),
    ],
)
def test_layers_that_are_none_raise(layers: object, why: str) -> None:
    with pytest.raises(PlanError, match="layers is not a set of layer numbers") as error:
        parse_layers(layers)
    assert why in str(error.value)


def test_layer_is_the_first_number() -> None:
    match = Match("w", layers="0")
    assert match.layer_of("model.layers.10.mlp.experts.2.w1") == 10
    assert match.layer_of("0.w") == 0
    assert match.layer_of("lm_head") is None
    assert not match.in_layers("lm_head")


def test_layers_pattern_says_which_list() -> None:
    match = Match("q", layers="1", layers_pattern=("decoder.block",))
    assert match.in_layers("decoder.block.1.layer.0.q")
    assert not match.in_layers("encoder.block.1.layer.0.q")
    assert Match("q", layers="0", layers_pattern="layer").in_layers("decoder.block.1.layer.0.q")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Match(()), "a match without targets"),
        (lambda: Match("  "), "an empty selector"),
        (lambda: Match("re:"), "an empty selector"),
        (lambda: Match("re:("), r'selector "re:\(" is not a regular expression'),
        (lambda: Match([1]), "targets has an entry that is not a string\n  found  1"),
        (lambda: Match(3), "targets is not a list of strings\n  found  3"),
        (lambda: Match("q", exclude="all-linear"), '"all-linear" in exclude'),
        (lambda: Match("q", layers_pattern="h"), "layers_pattern without layers"),
    ],
)
def test_a_match_that_means_nothing_raises(build: object, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        build()


def test_repeats_are_dropped_and_sets_are_sorted() -> None:
    assert Match(["b", "a", "b"]).targets == ("b", "a")
    assert Match({"b", "a"}).targets == ("a", "b")
