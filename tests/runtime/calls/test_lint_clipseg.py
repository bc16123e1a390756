"""CLIPSeg runs its CLIP towers under torch.no_grad: adapters inside them get the gradients of a model without it."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
import transformers

import adaptc
from adaptc.errors import LiftedRegionWarning
from tests.models import hosts
from tests.reference import as_double, factors_of, loss_of, reference_loss, reference_model, relative_errors


def clipseg():
    tower = {"num_hidden_layers": 2, "num_attention_heads": 4, "attention_dropout": 0.0}
    text = {**tower, "vocab_size": hosts.VOCAB, "hidden_size": 32, "intermediate_size": 48, "eos_token_id": 2}
    vision = {**tower, "hidden_size": 48, "intermediate_size": 80, "image_size": 32, "patch_size": 16}
    config = transformers.CLIPSegConfig(
        text_config={**text, "max_position_embeddings": 20, "pad_token_id": 0, "bos_token_id": 1},
        vision_config=vision, projection_dim=24, reduce_dim=16, extract_layers=[0, 1], decoder_num_attention_heads=4,
        decoder_intermediate_size=20, decoder_attention_dropout=0.0, conditional_layer=0,
    )  # fmt: skip
    with hosts.seeded(0):
        return transformers.CLIPSegForImageSegmentation(config)


def batch():
    with hosts.seeded(1):
        ids = torch.randint(3, hosts.VOCAB, (2, 7))
        ids[:, -1] = 2
        pixels = torch.randn(2, 3, 32, 32)
        return {"input_ids": ids, "pixel_values": pixels, "labels": torch.rand(2, 32, 32)}


def compiled(base, targets, **options):
    with hosts.seeded(2):
        plan = adaptc.LoRA(r=3, alpha=6, init="random", targets=targets)
        return adaptc.compile(copy.deepcopy(base), plan, **{"backend": "aot_eager", **options}).train()


def formula(monkeypatch, model, base):
    """Gradients of the formula in fp64, with no_grad taken out of torch while it runs."""
    factors = factors_of(model)
    reference = reference_model(base, factors).train()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "no_grad", contextlib.nullcontext)
        loss = reference_loss(reference, batch())
        loss.backward()
    modules = {path: reference.get_submodule(path) for path in factors}
    return loss.detach(), {f"{p}.lora_{f}": getattr(m, f).grad for p, m in modules.items() for f in "AB"}


def gradients(model):
    return {
        f"{site.path}.lora_{f}": getattr(site.adapters["default"], f"lora_{f}").grad.double()
        for site in model.adaptc.sites
        for f in "AB"
    }


EVERYWHERE = ["q_proj", "v_proj", "fc1", "film_mul", "reduces.*"]


@pytest.mark.parametrize("targets", [
    pytest.param(EVERYWHERE, marks=pytest.mark.slow, id="everywhere"),
    pytest.param(["clip.*.q_proj"], id="in the towers alone"),
])  # fmt: skip
def test_adapters_in_the_towers_get_the_gradients_of_a_model_without_the_region(monkeypatch, targets):
    base = clipseg().double()  # some gradients are small differences
    model = compiled(base, targets)
    with pytest.warns(LiftedRegionWarning, match="a torch.no_grad region records gradients"):
        loss = loss_of(model(**as_double(batch())))
    loss.backward()
    want_loss, want = formula(monkeypatch, model, base)
    assert abs(loss.detach().double() / want_loss - 1) < 1e-6
    # The last layer of a tower whose hidden states alone are read has no influence: it is named, not given a zero.
    reached = {name: gradient for name, gradient in want.items() if gradient is not None and gradient.any()}
    got = {name: gradient for name, gradient in gradients(model).items() if name in reached}
    assert len(reached) >= 8
    errors = relative_errors(got, reached)
    assert max(errors.values()) < 1e-6, max(errors, key=errors.get)
    assert all(p.grad is None for n, p in model.named_parameters() if ".adapters." not in n)
    assert model.adaptc.eager_sites() == []
    assert "records gradients for it: clip." in str(model.adaptc.explain())


@pytest.mark.slow
def test_without_adapters_in_the_towers_the_regions_stay():
    model = compiled(clipseg(), ["decoder.*.q_proj", "film_mul"])
    loss_of(model(**batch())).backward()
    for graph in model.adaptc.graphs:
        assert graph.stage("insert") == graph.stage("lift_no_grad")
    assert all(g.any() for g in gradients(model).values())
