"""What "all-linear" selects on real classes, against PEFT, and what it leaves out with which reason."""

from __future__ import annotations

from collections.abc import Mapping

import peft
import pytest
import torch
from torch import nn

from adaptc import Bias, LoRA, Match, Plan, Rule
from adaptc.errors import PlanError
from adaptc.plan import Resolution
from tests.models import hosts

HEAD = "output head: the model's output embeddings"
FUSED = 'fused expert weights, not linear layers: name them, "experts.{}"'
#: Host -> the layers that PEFT adapts and adaptc leaves out.
PEFT_ALSO = {"roberta": {"classifier.dense", "classifier.out_proj"}}
LEFT_OUT = {
    "llama": {"lm_head": HEAD},
    "gpt2": {"lm_head": HEAD},
    "bert": {"classifier": 'output head: it is named "classifier"'},
    "roberta": {
        "classifier.dense": 'output head: it is named "classifier"',
        "classifier.out_proj": 'output head: it is named "classifier"',
    },
    "t5": {"lm_head": HEAD},
    "mixtral": {
        "model.layers.0.mlp.gate": "MoE router",
        "model.layers.0.mlp.experts.gate_up_proj": FUSED.format("gate_up_proj"),
        "model.layers.0.mlp.experts.down_proj": FUSED.format("down_proj"),
        "model.layers.1.mlp.gate": "MoE router",
        "model.layers.1.mlp.experts.gate_up_proj": FUSED.format("gate_up_proj"),
        "model.layers.1.mlp.experts.down_proj": FUSED.format("down_proj"),
        "lm_head": HEAD,
    },
    "albert": {"classifier": 'output head: it is named "classifier"'},
    "clip": {},
}


def resolve(model: nn.Module, method: object = None) -> Resolution:
    return Plan(method or LoRA(targets="all-linear")).resolve(model)


def chosen(resolution: Resolution) -> set[str]:
    return {site.path for site in resolution.sites}


@pytest.mark.parametrize("name", hosts.HOSTS)
def test_selects_what_peft_selects_but_heads(name: str) -> None:
    resolution = resolve(hosts.build(name))
    config = peft.LoraConfig(target_modules="all-linear", task_type="SEQ_CLS" if name in ("bert", "albert") else None)
    config.modules_to_save = []
    wrapped = peft.LoraModel(hosts.build(name), {"default": config}, "default")
    assert chosen(resolution) == set(wrapped.targeted_module_names) - PEFT_ALSO.get(name, set())
    assert dict(resolution.left_out) == LEFT_OUT[name]


class Block(nn.Module):
    """The older form of an MoE block: a linear gate beside a list of experts."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 2)
        self.gate_proj = nn.Linear(8, 8)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))


class TopTwoRouter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Linear(8, 2)


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.blocks = nn.ModuleList([Block()])
        self.route = TopTwoRouter()
        self.side = nn.ModuleDict({"router": nn.Linear(8, 2), "gate": nn.Linear(8, 8), "head": nn.Linear(8, 8)})
        self.out = nn.Linear(8, 11, bias=False)
        self.out.weight = self.embed.weight
        self.head = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3))


def test_routers_tied_weights_and_heads_of_any_model() -> None:
    resolution = resolve(Mixed())
    assert chosen(resolution) == {
        "blocks.0.gate_proj",
        "blocks.0.experts.0",
        "blocks.0.experts.1",
        "side.gate",
        "side.head",
    }
    assert dict(resolution.left_out) == {
        "blocks.0.gate": "MoE router",
        "route.classifier": "MoE router",
        "side.router": "MoE router",
        "out": "output head: its weight is tied to embed.weight",
        "head.0": 'output head: it is named "head"',
        "head.1": 'output head: it is named "head"',
    }


class Wrapper(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.project = nn.Linear(8, 8)


@pytest.mark.parametrize("name", ["llama", "roberta"])
def test_a_head_inside_a_wrapper_is_a_head(name: str) -> None:
    resolution = resolve(Wrapper(hosts.build(name)))
    assert dict(resolution.left_out) == {f"inner.{p}": w for p, w in LEFT_OUT[name].items()}
    assert "project" in chosen(resolution)


def test_the_head_of_an_inner_tower_is_no_output_head() -> None:
    class Model(nn.ModuleDict):
        def get_output_embeddings(self) -> None:
            return None

    def tower() -> Model:
        return Model({"head": nn.Linear(4, 4), "lm_head": nn.Linear(4, 4)})

    resolution = resolve(Model({"tower": tower(), "head": nn.Linear(4, 4)}))
    assert chosen(resolution) == {"tower.head"}
    assert [path for path, _ in resolution.left_out] == ["tower.lm_head", "head"]
    assert chosen(resolve(nn.ModuleDict({"first": tower(), "fc": nn.Linear(4, 4)}))) == {"fc"}


def test_a_head_named_as_well_is_adapted() -> None:
    resolution = resolve(hosts.build("llama"), LoRA(targets=["all-linear", "lm_head"]))
    assert "lm_head" in chosen(resolution)
    assert resolution.left_out == []


def test_a_model_that_has_no_output_embeddings_may_say_so() -> None:
    class Backbone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def get_output_embeddings(self) -> nn.Module:
            raise NotImplementedError

    assert chosen(resolve(Backbone())) == {"fc"}


def test_what_the_method_cannot_adapt_is_left_out_with_its_reason() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)
    resolution = resolve(model)
    assert chosen(resolution) == {"layers.0.linear1", "layers.0.linear2"}
    reason = "nn.MultiheadAttention reads its out_proj weight without calling the module"
    assert resolution.left_out == [("layers.0.self_attn.out_proj", reason)]
    half = resolve(nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4, bias=False)}), Bias(targets="all-linear"))
    assert chosen(half) == {"a"}
    assert half.left_out == [("b", "this Linear has no bias")]


def test_conv1d_is_linear_and_nn_conv1d_is_not() -> None:
    resolution = resolve(nn.ModuleDict({"body": nn.Conv1d(4, 4, 3), "fc": nn.Linear(4, 4)}))
    assert chosen(resolution) == {"fc"}
    assert len(chosen(resolve(hosts.build("gpt2")))) == 8  # 4 Conv1D in each of 2 blocks


def test_all_linear_on_a_model_that_is_only_a_head_names_it() -> None:
    with pytest.raises(PlanError, match="rule 1 matches nothing") as error:
        resolve(nn.ModuleDict({"lm_head": nn.Linear(4, 4)}))
    assert 'found  lm_head: output head: it is named "lm_head"' in str(error.value)


def test_adapters_are_never_candidates() -> None:
    model = hosts.build("llama")
    before = resolve(model)
    site = model.model.layers[0].self_attn.q_proj
    adapter = LoRA(r=2).build("q", site, dtype=None, site_id=0)
    adapter.inner = nn.Linear(2, 2)
    site.adapters = nn.ModuleDict({"default": adapter})
    assert [s.path for s in resolve(model).sites] == [s.path for s in before.sites]
    pattern = Plan([Rule(Match("layers.0.self_attn.q_proj*"), train="full")]).resolve(model)
    assert [s.path for s in pattern.sites] == ["model.layers.0.self_attn.q_proj"]
    with pytest.raises(PlanError, match="matches nothing"):
        Plan([Rule(Match("q_proj.*"), train="full")]).resolve(model)


def test_modules_named_adapters_by_the_model_are_candidates() -> None:
    model = nn.ModuleDict({"adapters": nn.ModuleList([nn.Linear(4, 4)])})
    assert chosen(resolve(model)) == {"adapters.0"}


def test_resolving_changes_nothing() -> None:
    model = hosts.build("mixtral")
    before: Mapping[str, torch.Tensor] = {k: v.clone() for k, v in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    resolve(model)
    after = model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert flags == [p.requires_grad for p in model.parameters()]
