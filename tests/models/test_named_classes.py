"""LoRA on all linear layers of classes of different build: PEFT's loss and gradients, exact counts, no extra graphs."""

from __future__ import annotations

import contextlib

import pytest
import torch

import adaptc
from adaptc.errors import AdaptcWarning, NoGradientWarning
from tests.models import zoo
from tests.models.test_against_peft import CountingBackend, lora, peft_step, peft_twin
from tests.reference import relative_errors, step

#: Model type -> task, sites of "all-linear" in two layers, and sites that the forward never calls.
CLASSES = {
    "qwen2": ("causal", 14, 0),
    "qwen3": ("causal", 14, 0),
    "gemma2": ("causal", 14, 0),
    "gemma3_text": ("causal", 14, 0),
    "phi3": ("causal", 8, 0),  # qkv and gate_up are one weight each
    "mistral": ("causal", 14, 0),
    "gpt_neox": ("causal", 8, 0),
    "opt": ("causal", 12, 0),
    "falcon": ("causal", 8, 0),
    "bloom": ("causal", 8, 0),
    "qwen3_moe": ("causal", 8, 0),  # the experts are fused weights
    "mamba": ("causal", 6, 2),  # its scan reads the weight of dt_proj past the module, kernels that of out_proj
    "vit": ("image", 12, 0),
    "dinov2": ("image", 12, 0),
    "whisper": ("speech", 32, 0),
    "audio-spectrogram-transformer": ("audio", 12, 0),
    "musicgen": ("causal", 20, 8),  # cross-attention has nothing to attend to
}
QUICK = ("qwen3",)
EVERY = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CLASSES]


@pytest.mark.parametrize("kind", EVERY)
def test_a_class_trains_as_under_peft_in_as_many_graphs_as_its_base(kind):
    task, sites, idle = CLASSES[kind]
    plain = zoo.build(task, kind).train().requires_grad_(False)
    batch = zoo.batch(task, plain)
    counting = CountingBackend()
    torch.compile(plain, backend=counting)(**batch)
    torch.compiler.reset()

    never = pytest.warns(AdaptcWarning, match="never calls it") if kind == "mamba" else contextlib.nullcontext()
    with never:
        model = adaptc.compile(zoo.build(task, kind).train(), lora(), backend="aot_eager")
    want_loss, want = peft_step(peft_twin(zoo.build(task, kind), model).train(), batch)
    with pytest.warns(NoGradientWarning, match="not called in any forward") if idle else contextlib.nullcontext():
        loss, got = step(model, batch)
    assert abs(loss / want_loss - 1) < 2e-6
    # Fp32 through two layers; PEFT gives None and the formula zero to what is not reached.
    assert max(relative_errors(got, {name: g for name, g in want.items() if g is not None and g.any()}).values()) < 1e-4
    assert len(got) == 2 * (sites - idle), "every factor that acts has a gradient"
    handle = model.adaptc
    assert (len(handle.sites), len(handle.idle_sites()), handle.eager_sites()) == (sites, idle, [])
    assert len(handle.graphs) == counting.graphs
    rewritten = {site for graph in handle.graphs for site in graph.sites}
    assert len(rewritten) == sites - idle
