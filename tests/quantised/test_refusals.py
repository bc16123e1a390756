"""What needs the values of a quantised weight is refused before anything changes; what does not, works."""

from __future__ import annotations

import copy

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

import adaptc
from adaptc.errors import SiteError, UnsupportedError
from tests.methods.in_fp64 import randomise
from tests.models import hosts
from tests.quantised import bases
from tests.quantised.bases import eagerly  # noqa: F401

FULL = {"match": {"targets": ["model.layers.1.mlp.up_proj"]}, "train": "full"}
BLOCK = {"match": {"targets": ["model.layers.1"]}, "train": "full"}
Q = "model.layers.1.self_attn.q_proj"
#: Name -> (plan, what the error calls it, the first site that it names)
NEEDY = {
    "dora": (adaptc.LoRA(r=2, dora=True, targets=[Q]), "dora", Q),
    "pissa": (adaptc.LoRA(r=2, init="pissa", targets=[Q]), 'init "pissa"', Q),
    "pissa_niter": (adaptc.LoRA(r=2, init="pissa_niter_4", targets=[Q]), 'init "pissa_niter_4"', Q),
    "olora": (adaptc.LoRA(r=2, init="olora", targets=[Q]), 'init "olora"', Q),
    "corda": (adaptc.LoRA(r=2, init="corda", targets=[Q]), 'init "corda"', Q),
    "full": (adaptc.Plan.from_dict({"version": 1, "rules": [FULL]}), "full", "model.layers.1.mlp.up_proj"),
    "full-block": (adaptc.Plan.from_dict({"version": 1, "rules": [BLOCK]}), "full", "model.layers.1"),
}


def snapshot(model: nn.Module) -> dict[str, object]:
    """Everything that a compile changes."""
    return {
        "modules": [path for path, _ in model.named_modules()],
        "attributes": {path: sorted(m.__dict__) for path, m in model.named_modules()},
        "hooks": {path: (len(m._forward_hooks), len(m._forward_pre_hooks)) for path, m in model.named_modules()},
        "trained": {name: p.requires_grad for name, p in model.named_parameters()},
    }


@pytest.mark.parametrize("case", NEEDY)
@pytest.mark.parametrize("kind", bases.KINDS)
def test_what_needs_the_values_is_refused(kind, case):
    plan, method, site = NEEDY[case]
    model = bases.build(kind)
    before, state = snapshot(model), copy.deepcopy(model.state_dict())
    with pytest.raises(SiteError) as caught:
        adaptc.compile(model, plan, backend="eager", calibration=[hosts.batch("llama")])
    text = str(caught.value)
    assert f"{site} (" in text and f"{method} needs the values of the weight" in text
    assert f"quantised ({bases.KINDS[kind]})" in text
    assert f"do     leave {method} out, or load the base without quantisation" in text
    assert snapshot(model) == before
    after = model.state_dict()
    assert state.keys() == after.keys()


@pytest.mark.parametrize("kind", ["nf4", "torchao"])
def test_a_pattern_does_not_pass_over_what_the_base_rules_out(kind):
    model = bases.build(kind)
    # One site could be adapted; the others would stay as they are, unnoticed.
    model.model.layers[0].self_attn.q_proj = nn.Linear(64, 64, bias=False)
    with pytest.raises(SiteError, match=r"names 13 modules that cannot be adapted"):
        adaptc.compile(model, adaptc.LoRA(r=2, dora=True, targets="all-linear"), backend="eager")
    plan = adaptc.LoRA(r=2, dora=True, targets=["model.layers.0.self_attn.q_proj"])
    assert len(adaptc.compile(model, plan, backend="eager").adaptc.sites) == 1


@pytest.mark.parametrize("kind", bases.KINDS)
def test_merging_is_refused(kind, tmp_path):
    model = adaptc.compile(bases.build(kind), adaptc.LoRA(r=2, init="random", targets="all-linear"), backend="eager")
    values = {name: p.detach().clone() for name, p in model.adaptc.named_parameters()}
    for merge in (lambda: model.save_pretrained(tmp_path / "merged", merge=True), model.merge_and_unload):
        with pytest.raises(UnsupportedError) as caught:
            merge()
        text = str(caught.value)
        assert "model.layers.0.self_attn.q_proj: the adapter (lora) cannot be merged" in text
        assert f"found  {bases.KINDS[kind]}: " in text and "do     save the adapter by itself" in text
    assert not (tmp_path / "merged").exists()
    assert len(model.adaptc.sites) == 14
    for name, parameter in model.adaptc.named_parameters():
        assert torch.equal(parameter, values[name])


def test_a_trained_bias_is_merged_beside_quantised_weights():
    base = bases.build("nf4", "bert")
    model = adaptc.compile(copy.deepcopy(base), adaptc.Bias(targets=["query"]), backend="eager")
    randomise(model)
    biases = {site.path: site.adapters["default"].bias.detach().clone() for site in model.adaptc.sites}
    assert model.merge_and_unload() is model
    for path, bias in biases.items():
        merged = model.get_submodule(path)
        assert torch.equal(merged.bias, bias) and not torch.equal(bias, base.get_submodule(path).bias)
        assert torch.equal(merged.weight, base.get_submodule(path).weight)


#: Methods that do not act on one linear layer: their targets, and what they need to be told.
ELSEWHERE = {
    "adaptformer": (["attention.output"], {"tap": "self.query"}),
    "prefix": (["."], {"num_virtual_tokens": 2}),
    "prompt": (["."], {"num_virtual_tokens": 2}),
    "trainable_tokens": (["query"], {"indices": [3]}),
}


@pytest.mark.parametrize("method", sorted(adaptc.methods()))
def test_capabilities_are_the_facts(method):
    """Every method trains on a quantised base, or is refused: as it says."""
    model = bases.build("nf4", "bert", train=True)
    targets, options = ELSEWHERE.get(method, (["query"], {}))
    rule = {"match": {"targets": targets}, "method": {"kind": method, **options}}
    if method == "full":
        rule = {"match": {"targets": ["query"]}, "train": "full"}
    plan = adaptc.Plan.from_dict({"version": 1, "rules": [rule]})
    if not adaptc.methods()[method].quantised:
        with pytest.raises(SiteError, match=f"{method} needs the values of the weight"):
            adaptc.compile(model, plan, backend="eager")
        return
    adaptc.compile(model, plan, backend="eager")
    randomise(model)
    model(**hosts.batch("bert")).loss.backward()
    gradients = [p.grad for p in model.adaptc.parameters()]
    assert gradients and all(g is not None and g.isfinite().all() and g.any() for g in gradients)


def test_a_step_without_gradients_through_the_base_is_refused():
    """As bitsandbytes leaves a layer that ran in eval mode on a CPU with AVX512-BF16."""
    model = adaptc.compile(bases.build("nf4", train=True), adaptc.LoRA(r=2, targets="all-linear"), backend="eager")
    model.get_submodule(Q).weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(UnsupportedError, match=f"{Q}: bitsandbytes has repacked its weight"):
        model(**hosts.batch("llama"))
    model.get_submodule(Q).weight.quant_state.packing_format_for_cpu = False
    model(**hosts.batch("llama")).loss.backward()


@pytest.mark.parametrize("make", [bnb.nn.LinearNF4, lambda *a: bnb.nn.Linear8bitLt(*a, has_fp16_weights=False)])
def test_a_layer_that_is_not_quantised_yet_is_refused(make):
    model = nn.Sequential(make(64, 64))
    with pytest.raises(SiteError) as caught:
        adaptc.compile(model, adaptc.LoRA(r=2, targets="all-linear"), backend="eager")
    assert "of bitsandbytes is not quantised yet" in str(caught.value) and "model.to(device)" in str(caught.value)
    adaptc.compile(model.to("cpu"), adaptc.LoRA(r=2, targets="all-linear"), backend="eager")
