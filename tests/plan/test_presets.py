"""Published placements: which modules they choose on real classes."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

import adaptc
from adaptc.errors import PlanError
from adaptc.plan.presets import STYLES, bottleneck_plan
from tests.methods.in_fp64 import check_against_formula, randomise
from tests.methods.test_bottleneck import formulas
from tests.models import hosts
from tests.reference import check_all_rewritten


def tiny_opt():
    return transformers.OPTForCausalLM(
        transformers.OPTConfig(
            vocab_size=50, hidden_size=32, ffn_dim=48, num_hidden_layers=1, num_attention_heads=4,
            word_embed_proj_dim=32, max_position_embeddings=32,
        )
    )  # fmt: skip


def tiny_bloom():
    config = transformers.BloomConfig(vocab_size=50, hidden_size=32, n_layer=1, n_head=4)
    return transformers.BloomForCausalLM(config)


def tiny_gptj():
    config = transformers.GPTJConfig(
        vocab_size=50, n_embd=32, n_layer=1, n_head=4, n_positions=32, rotary_dim=4, n_inner=48
    )
    return transformers.GPTJForCausalLM(config)


def tiny(host):
    builders = {"opt": tiny_opt, "bloom": tiny_bloom, "gptj": tiny_gptj}
    if host in builders:
        return builders[host]()
    return hosts.build(host, **{"n_layer" if host == "gpt2" else "num_hidden_layers": 1})


#: (style, host) -> last components of the sites, with their placements
SITES = {
    ("series", "llama"): {"gate_proj": "series_in", "up_proj": "series_in", "down_proj": "series_out"},
    ("series", "opt"): {"fc1": "series_in", "fc2": "series_out"},
    ("series", "bloom"): {"dense_h_to_4h": "series_in", "dense_4h_to_h": "series_out"},
    ("series", "gptj"): {"fc_in": "series_in", "fc_out": "series_out"},
    ("series_last", "llama"): {"down_proj": "series_out"},
    ("parallel", "llama"): {"q_proj": "parallel", "k_proj": "parallel", "v_proj": "parallel"},
    ("parallel", "bloom"): {"query_key_value": "parallel"},
    ("parallel", "gptj"): {"q_proj": "parallel", "k_proj": "parallel", "v_proj": "parallel"},
    ("houlsby", "bert"): {"attention.output.dropout": "series_out", "0.output.dropout": "series_out"},
    ("houlsby", "roberta"): {"attention.output.dropout": "series_out", "0.output.dropout": "series_out"},
    ("houlsby", "llama"): {"o_proj": "series_out", "down_proj": "series_out"},
    ("houlsby", "gpt2"): {"attn.resid_dropout": "series_out", "mlp.dropout": "series_out"},
    ("pfeiffer", "bert"): {"0.output.dropout": "series_out"},
    ("pfeiffer", "opt"): {"fc2": "series_out"},
}


@pytest.mark.parametrize("style, host", SITES)
def test_styles_choose_their_modules(style, host):
    model = tiny(host)
    sites = bottleneck_plan(style, model, r=3).resolve(model).sites
    want = SITES[style, host]
    assert len(sites) == len(want)
    for site in sites:
        name = next(name for name in want if site.path.endswith(f".{name}"))
        assert site.method.placement == want[name]
        assert (site.method.r, site.method.activation) == (3, STYLES[style]["activation"])
        assert site.method.bias is STYLES[style].get("bias", True)


@pytest.mark.parametrize(
    "style, host, count", [pytest.param("houlsby", "gpt2", 2, marks=pytest.mark.slow), ("series", "llama", 3)]
)
def test_a_plan_computes_the_formula(style, host, count):
    base = tiny(host)
    plan = bottleneck_plan(style, base, r=3)
    model = adaptc.compile(copy.deepcopy(base), plan, backend="eager").train()
    randomise(model)
    act = STYLES[style]["activation"]
    check_against_formula(model, base, hosts.batch(host), **formulas("series_out", act, scale=1.0))
    check_all_rewritten(model, count)


def test_what_is_not_known_is_named():
    model = hosts.build("clip")
    with pytest.raises(PlanError, match="no such placement of bottlenecks"):
        bottleneck_plan("sideways", model)
    with pytest.raises(PlanError, match="in a model of type 'clip' are not known"):
        bottleneck_plan("houlsby", model)
    with pytest.raises(PlanError, match="in a model of type 'Linear' are not known"):
        bottleneck_plan("series", torch.nn.Linear(2, 3))
