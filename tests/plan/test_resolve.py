"""Precedence, train: full, shared and tied modules."""

from __future__ import annotations

import peft
import pytest
from torch import nn

from adaptc import LoRA, Match, Plan, Rule
from adaptc.errors import PlanError, SiteError
from adaptc.plan import Resolution
from tests.models import hosts

HEAD = Rule(Match("classifier"), train="full")


def by_rule(resolution: Resolution) -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    for site in resolution.sites:
        found.setdefault(site.rule, []).append(site.path)
    return found


def test_first_match_wins_and_the_rest_is_shadowed() -> None:
    plan = Plan([LoRA(r=4, targets="q_proj", layers=0), LoRA(r=8, targets=["q_proj", "v_proj"])])
    resolution = plan.resolve(hosts.build("llama"))
    q, v = "model.layers.{}.self_attn.q_proj", "model.layers.{}.self_attn.v_proj"
    assert by_rule(resolution) == {0: [q.format(0)], 1: [v.format(0), q.format(1), v.format(1)]}
    assert resolution.shadowed == [(1, q.format(0), 0)]
    assert {site.path: site.method.r for site in resolution.sites}[q.format(0)] == 4


def test_a_rule_that_is_shadowed_whole_is_reported_not_an_error() -> None:
    resolution = Plan([LoRA(targets="all-linear"), LoRA(r=2, targets="q_proj")]).resolve(hosts.build("llama"))
    assert [(rule, winner) for rule, _, winner in resolution.shadowed] == [(1, 0), (1, 0)]
    assert 1 not in by_rule(resolution)


def test_sites_carry_the_module_and_the_method_as_it_applies_there() -> None:
    model = hosts.build("llama")
    plan = Plan(LoRA(r=4, alpha=8, targets="q_proj", rank_pattern={"layers.1.self_attn.q_proj": 2}))
    sites = plan.resolve(model).sites
    assert [site.method.r for site in sites] == [4, 2]
    assert sites[1].module is model.model.layers[1].self_attn.q_proj
    assert sites[1].paths == ("model.layers.1.self_attn.q_proj",)
    assert not any(site.stacked or site.tied_to or site.train for site in sites)


def test_sites_come_in_model_order() -> None:
    model = hosts.build("llama")
    sites = Plan([LoRA(targets="v_proj"), LoRA(targets="q_proj"), LoRA(targets="mlp.*")]).resolve(model).sites
    order = [path for path, _ in model.named_modules()]
    assert [order.index(site.path) for site in sites] == sorted(order.index(site.path) for site in sites)


def test_stacked_rules_add_to_the_winner() -> None:
    stack = Rule(Match("q_proj", layers="1"), LoRA(r=2), stack=True)
    resolution = Plan([LoRA(r=4, targets="q_proj"), stack, LoRA(r=8, targets="q_proj")]).resolve(hosts.build("llama"))
    assert [(s.path.split(".")[2], s.rule, s.method.r, s.stacked) for s in resolution.sites] == [
        ("0", 0, 4, False),
        ("1", 0, 4, False),
        ("1", 1, 2, True),
    ]
    assert {rule for rule, _, _ in resolution.shadowed} == {2}


def test_selects_what_peft_selects() -> None:
    targets, exclude = ["q_proj", "down_proj", "up_proj"], ["layers.2.mlp.down_proj"]
    ours = Plan(LoRA(targets=targets, layers=[1, 2], exclude=exclude)).resolve(
        hosts.build("llama", num_hidden_layers=4)
    )
    config = peft.LoraConfig(target_modules=targets, layers_to_transform=[1, 2], exclude_modules=exclude)
    theirs = peft.LoraModel(hosts.build("llama", num_hidden_layers=4), {"default": config}, "default")
    assert [site.path for site in ours.sites] == theirs.targeted_module_names
    assert len(ours.sites) == 5


def test_a_stacked_rule_in_front_shadows_nothing() -> None:
    stack = Rule(Match("q_proj", layers="0"), LoRA(r=2), stack=True)
    resolution = Plan([stack, LoRA(r=4, targets="q_proj", layers="0")]).resolve(hosts.build("llama"))
    assert [(site.rule, site.stacked) for site in resolution.sites] == [(0, False), (1, True)]
    assert resolution.shadowed == []


def test_an_exclude_that_also_names_a_container_is_fine() -> None:
    plan = Plan(LoRA(targets="dense", exclude="*classifier*"))
    assert len(plan.resolve(hosts.build("roberta")).sites) == 6


def test_an_entry_may_be_excluded_whole() -> None:
    resolution = Plan(LoRA(targets=["q_proj", "v_proj"], exclude="v_proj")).resolve(hosts.build("llama"))
    assert {site.path.rpartition(".")[2] for site in resolution.sites} == {"q_proj"}


# -- patterns and names ------------------------------------------------------------------------------------


def test_a_pattern_takes_what_can_be_adapted_and_says_what_it_left() -> None:
    resolution = Plan(LoRA(targets="model.layers.0.*")).resolve(hosts.build("llama"))
    assert len(resolution.sites) == 7
    reason = "LlamaRMSNorm is not a linear layer (nn.Linear or transformers' Conv1D)"
    assert resolution.left_out == [
        ("model.layers.0.input_layernorm", reason),
        ("model.layers.0.post_attention_layernorm", reason),
    ]


def test_what_another_rule_takes_is_not_left_out() -> None:
    plan = Plan([Rule(Match("input_layernorm"), train="full"), LoRA(targets="model.layers.0.*")])
    left = [path for path, _ in plan.resolve(hosts.build("llama")).left_out]
    assert left == ["model.layers.0.post_attention_layernorm"]


# -- train: full -------------------------------------------------------------------------------------------


def test_a_fully_trained_container_takes_what_is_inside() -> None:
    resolution = Plan([HEAD, LoRA(targets="dense")]).resolve(hosts.build("roberta"))
    last = resolution.sites[-1]
    assert (last.path, last.train, last.method.kind) == ("classifier", "full", "full")
    assert resolution.shadowed == [(1, "classifier.dense", 0)]
    assert len(resolution.sites) == 7


def test_peft_trains_the_same_modules() -> None:
    config = peft.LoraConfig(target_modules=["dense"], modules_to_save=["classifier"])
    wrapped = peft.get_peft_model(hosts.build("roberta"), config)
    theirs = set(wrapped.base_model.targeted_module_names)
    resolution = Plan([HEAD, LoRA(targets="dense")]).resolve(hosts.build("roberta"))
    assert {site.path for site in resolution.sites if not site.train} == theirs


def test_all_linear_before_a_trained_head_is_no_conflict() -> None:
    resolution = Plan([LoRA(targets="all-linear"), HEAD]).resolve(hosts.build("roberta"))
    assert by_rule(resolution)[1] == ["classifier"]
    assert resolution.left_out == []


def test_a_container_after_what_is_inside_raises() -> None:
    with pytest.raises(PlanError) as error:
        Plan([LoRA(targets="dense"), HEAD]).resolve(hosts.build("roberta"))
    assert str(error.value) == (
        "rule 2 takes classifier as a whole, but rule 1 already takes classifier.dense inside it\n"
        '  rule  1: LoRA(targets=["dense"])\n'
        '        2: Rule(Match(targets=["classifier"]), train="full")\n'
        '  do    put rule 2 before rule 1, or exclude "classifier.*" in rule 1'
    )
    Plan([LoRA(targets="dense", exclude="classifier.*"), HEAD]).resolve(hosts.build("roberta"))


def test_full_inside_full_is_one_site() -> None:
    pattern = Plan([Rule(Match("classifier*"), train="full")]).resolve(hosts.build("roberta"))
    assert ([s.path for s in pattern.sites], pattern.shadowed) == (["classifier"], [])
    inner_first = Plan([Rule(Match("classifier.dense"), train="full"), HEAD]).resolve(hosts.build("roberta"))
    assert ([s.path for s in inner_first.sites], inner_first.shadowed) == (
        ["classifier"],
        [(0, "classifier.dense", 1)],
    )


def test_full_takes_modules_of_any_kind_with_parameters() -> None:
    model = hosts.build("llama")
    plan = Plan([Rule(Match(["embed_tokens", "norm", "model.layers.0"]), train="full")])
    assert [site.path for site in plan.resolve(model).sites] == [
        "model.embed_tokens",
        "model.layers.0",
        "model.norm",
    ]


def test_full_on_a_module_without_parameters_raises() -> None:
    with pytest.raises(SiteError, match='rule 1: "rotary_emb" names 1 module that cannot be adapted') as error:
        Plan([Rule(Match("rotary_emb"), train="full")]).resolve(hosts.build("llama"))
    assert "model.rotary_emb (LlamaRotaryEmbedding): this LlamaRotaryEmbedding has no parameters" in str(error.value)


@pytest.mark.parametrize("path", ["lm_head", "transformer.wte"])
def test_full_on_a_tied_weight_raises(path: str) -> None:
    other = {"lm_head": "transformer.wte.weight", "transformer.wte": "lm_head.weight"}[path]
    with pytest.raises(SiteError, match=f"{path} cannot be trained in full: it shares a parameter") as error:
        Plan([Rule(Match(path), train="full")]).resolve(hosts.build("gpt2"))
    assert f"tied to {other}" in str(error.value)
    untied = hosts.build("gpt2", tie_word_embeddings=False)
    assert [site.path for site in Plan([Rule(Match(path), train="full")]).resolve(untied).sites] == [path]


def test_a_tie_inside_the_trained_module_is_no_obstacle() -> None:
    inner = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    inner["b"].weight = inner["a"].weight
    model = nn.ModuleDict({"both": inner, "rest": nn.Linear(4, 4)})
    assert [s.path for s in Plan([Rule(Match("both"), train="full")]).resolve(model).sites] == ["both"]


def test_an_adapter_on_a_tied_weight_names_the_tie() -> None:
    (site,) = Plan(LoRA(targets="lm_head")).resolve(hosts.build("gpt2")).sites
    assert site.tied_to == ("transformer.wte.weight",)


def test_stacking_on_a_fully_trained_module_raises() -> None:
    plan = Plan([HEAD, Rule(Match("classifier"), LoRA(), stack=True)])
    with pytest.raises(PlanError, match="classifier is trained in full and has a stacked method too"):
        plan.resolve(hosts.build("bert"))


# -- shared modules ----------------------------------------------------------------------------------------


def shared_layers() -> nn.Module:
    layer = nn.ModuleDict({"q": nn.Linear(4, 4), "v": nn.Linear(4, 4)})
    return nn.ModuleDict({"layers": nn.ModuleList([layer, layer]), "alias": layer["q"]})


def test_a_shared_module_is_one_site_with_all_its_paths() -> None:
    model = shared_layers()
    sites = Plan(LoRA(targets=["q", "v"])).resolve(model).sites
    assert [(site.path, site.paths) for site in sites] == [
        ("layers.0.q", ("layers.0.q", "layers.1.q", "alias")),
        ("layers.0.v", ("layers.0.v", "layers.1.v")),
    ]


def test_albert_has_one_site_for_the_layer_that_runs_twice() -> None:
    sites = Plan(LoRA(targets="query")).resolve(hosts.build("albert", num_hidden_layers=4)).sites
    assert [site.path for site in sites] == ["albert.encoder.albert_layer_groups.0.albert_layers.0.attention.query"]


@pytest.mark.parametrize(
    ("rules", "found"),
    [
        ([LoRA(targets="q", layers="0")], "rule 1 takes layers.0.q, and by its layers leaves out layers.1.q"),
        ([LoRA(targets="q", exclude="layers.1.q")], "rule 1 takes layers.0.q, and excludes layers.1.q"),
        (
            [LoRA(r=2, targets="layers.0.q"), LoRA(r=4, targets="layers.1.q")],
            "layers.0.q falls to rule 1, layers.1.q to rule 2",
        ),
    ],
)
def test_rules_that_split_a_shared_module_raise(rules: list[LoRA], found: str) -> None:
    with pytest.raises(PlanError, match=r"layers\.0\.q and layers\.1\.q are one shared Linear") as error:
        Plan(rules).resolve(shared_layers())
    assert f"found     {found}" in str(error.value)


def test_patterns_that_split_a_shared_module_raise() -> None:
    plan = Plan(LoRA(r=4, targets="q", rank_pattern={"layers.1.q": 2}))
    with pytest.raises(PlanError, match="rule 1 gives LoRA"):
        plan.resolve(shared_layers())


def test_keys_of_patterns_that_say_the_same_or_overlap_in_part_are_kept() -> None:
    ranks = {"layers.0.*": 3, "q_proj": 2, "self_attn.q_proj": 2}
    sites = Plan(LoRA(r=4, targets=["q_proj", "v_proj"], rank_pattern=ranks)).resolve(hosts.build("llama")).sites
    assert [site.method.r for site in sites] == [3, 3, 2, 4]


def test_rules_of_one_method_share_the_keys_of_its_patterns() -> None:
    """A PEFT config becomes one rule for its modules and one for its parameters."""
    method = LoRA(r=4, rank_pattern={"q_proj": 2, "down_proj": 3})
    plan = Plan([Rule(Match("q_proj"), method), Rule(Match("experts.down_proj"), method)])
    assert [site.method.r for site in plan.resolve(hosts.build("mixtral")).sites] == [2, 3, 2, 3]
    with pytest.raises(PlanError, match='rule 2: rank_pattern "q_proj" matches nothing'):
        Plan([Rule(Match("k_proj"), LoRA()), Rule(Match("v_proj"), LoRA(rank_pattern={"q_proj": 2}))]).resolve(
            hosts.build("llama")
        )
