"""An optimizer step beside PEFT's own; gradients under checkpointing, in blocks captured once, and around writes."""

from __future__ import annotations

import copy
import functools
import json
import re

import peft
import pytest
import safetensors.torch
import torch
from torch import nn

import adaptc
from tests.files.peft_cases import peft_save, randomise
from tests.integrations.test_peft_model import ours_to_theirs
from tests.models import hosts
from tests.reference import (
    check_against_reference,
    check_steps_agree,
    factors_of,
    reference_loss,
    reference_model,
    reference_step,
    step,
)

BACKENDS = ["aot_eager", pytest.param("inductor", marks=[pytest.mark.inductor, pytest.mark.slow])]


def lora(**options):
    return peft.LoraConfig(**{"r": 3, "lora_alpha": 5, "init_lora_weights": False, **options})


# -- one step, and the file of it -------------------------------------------------------------------------

CASES = {
    "lora": ("llama", lora(target_modules=["q_proj", "down_proj"])),
    "rslora": ("llama", lora(use_rslora=True, rank_pattern={"k_proj": 5}, target_modules=["k_proj", "v_proj"])),
    "dora": ("llama", lora(use_dora=True, target_modules=["q_proj", "up_proj"])),
    "lora bias": ("bert", lora(lora_bias=True, target_modules=["query", "value"])),
    "biases": ("bert", lora(bias="lora_only", target_modules=["query", "value"])),
    "head": ("bert", lora(task_type="SEQ_CLS", target_modules=["query"])),
    "module to save": ("llama", lora(modules_to_save=["lm_head"], target_modules=["v_proj"])),
    "conv1d": ("gpt2", lora(fan_in_fan_out=True, target_modules=["c_attn", "c_fc"])),
}
# Updates larger than the weights, so that the weights' rounding does not hide them; and Adam's division is kept from
# making gradients that are zero but for rounding as large as the others.
OPTIMIZERS = {
    "sgd": functools.partial(torch.optim.SGD, lr=100.0),
    "adamw": functools.partial(torch.optim.AdamW, lr=1.0, eps=1e-2, weight_decay=0.1),
}


def read(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    # PEFT adds the names of heads once more whenever it loads an adapter.
    lists = {key: sorted(set(value)) for key, value in config.items() if isinstance(value, list)}
    return {**config, **lists}, safetensors.torch.load_file(folder / "adapter_model.safetensors")


def form(tensors):
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


def logits(model, host):
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # files are the subject here, not graphs
        return model.eval()(**hosts.batch(host)).logits


def saved_steps(host, config, optimizer, folder, dtype=torch.float32):
    """What PEFT and adaptc saved after a step from one folder of PEFT: before, PEFT's, adaptc's; and both models."""

    def base():
        return hosts.short(host).to(dtype)

    made = peft.get_peft_model(base(), copy.deepcopy(config))
    randomise(made)
    start = peft_save(made, folder / "start")
    theirs = peft.PeftModel.from_pretrained(base(), start, is_trainable=True)
    ours = adaptc.compile(base(), start, backend="aot_eager")
    for model in (theirs, ours):
        stepping = OPTIMIZERS[optimizer]([p for p in model.parameters() if p.requires_grad])
        model.train()(**hosts.batch(host)).loss.backward()
        stepping.step()
    peft_save(theirs, folder / "theirs")
    ours.adaptc.save(folder / "ours")
    return [read(folder / name) for name in ("start", "theirs", "ours")], theirs, ours


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("case", CASES)
def test_a_step_is_pefts_and_so_is_its_file(case, optimizer, tmp_path):
    host, config = CASES[case]
    ((_, old), (want_config, want), (got_config, got)), theirs, ours = saved_steps(host, config, optimizer, tmp_path)
    assert got_config == want_config and (want_config["r"], want_config["lora_alpha"]) == (3, 5)
    assert form(got) == form(want) == form(old)
    for name, before in old.items():
        update, expected = got[name].double() - before.double(), want[name].double() - before.double()
        size, rounding = expected.abs().max(), 2**-23 * want[name].abs().max()
        assert size > 1e3 * rounding, f"{name} is trained"
        torch.testing.assert_close(update, expected, rtol=0, atol=float(1e-5 * size + rounding), msg=name)
    again = peft.PeftModel.from_pretrained(hosts.short(host), tmp_path / "ours")
    read_again, stepped = logits(again, host), logits(theirs, host)
    tight = {"rtol": 0, "atol": float(1e-5 * stepped.abs().max())}
    torch.testing.assert_close(read_again, logits(ours, host), **tight)
    torch.testing.assert_close(read_again, stepped, **tight)


def test_a_step_on_a_16_bit_base_is_saved_in_the_dtypes_of_peft(tmp_path):
    host, config = CASES["lora"]
    (_, old), (want_config, want), (got_config, got) = saved_steps(host, config, "sgd", tmp_path, torch.bfloat16)[0]
    assert got_config == want_config and form(got) == form(want)
    assert {tensor.dtype for tensor in got.values()} == {torch.float32}
    for name, before in old.items():
        assert (got[name] - want[name]).norm() < 0.05 * (want[name] - before).norm(), name


# -- a PEFT model that checkpoints its layers -------------------------------------------------------------


def adopted(dora, p, **options):
    """A PEFT model that checkpoints its layers; and what adaptc makes of it, with checkpoints and without."""
    targets = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
    config = lora(use_dora=dora, lora_dropout=p, target_modules=targets)
    plain = peft.get_peft_model(hosts.build("llama", train=True, use_cache=False), config).train()
    randomise(plain)
    wrapped = copy.deepcopy(plain)
    wrapped.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    models = [adaptc.compile(model, backend="aot_eager", **options) for model in (copy.deepcopy(wrapped), plain)]
    return wrapped, *models


def seeded_step(model):
    """A step after a fixed seed, and how many bytes autograd kept for its backward."""
    kept = []

    def note(tensor):
        kept.append(tensor.numel() * tensor.element_size())
        return tensor

    torch.manual_seed(5)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        return *step(model, hosts.batch("llama")), sum(kept)


@pytest.mark.parametrize("p, fullgraph", [
    pytest.param(0.0, False, id="exact"),
    pytest.param(0.1, True, id="dropout in one graph", marks=pytest.mark.slow),
    pytest.param(0.1, False, id="dropout", marks=pytest.mark.slow),
])  # fmt: skip
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_a_checkpointed_peft_model_has_the_same_gradients(dora, p, fullgraph):
    theirs, model, plain = adopted(dora, p, fullgraph=fullgraph)
    assert model.is_activation_checkpointing and not plain.is_activation_checkpointing
    (loss, got, kept), (want_loss, want, all_kept) = seeded_step(model), seeded_step(plain)
    assert kept < all_kept, "blocks are computed again"
    trained = {name for name, parameter in theirs.named_parameters() if parameter.requires_grad}
    assert {ours_to_theirs(name) for name in got} == trained and got.keys() == want.keys()
    assert sum("magnitude" in name for name in got) == (10 if dora else 0)
    assert torch.equal(loss, want_loss) and all(torch.equal(got[name], want[name]) for name in want)
    assert all(gradient.any() for gradient in got.values())
    assert len(model.adaptc.graphs) == 1 and model.adaptc.eager_sites() == model.adaptc.idle_sites() == []
    if p == 0:
        their_loss, their_gradients = step(theirs, hosts.batch("llama"))
        renamed = {ours_to_theirs(name): gradient for name, gradient in got.items()}
        shaped = {name: renamed[name].reshape(gradient.shape) for name, gradient in their_gradients.items()}
        check_steps_agree((loss, shaped), (their_loss, their_gradients))


# -- masks, read from the gradients -----------------------------------------------------------------------


def kept_elements(gradients):
    """Path -> which elements of its input a site's adapter kept, of a step on a single row: where the mask is zero, so
    is the column of the first factor's gradient."""
    factor = re.compile(r"(.+)\.adapters\.default\.lora_A")
    found = {factor.fullmatch(name): gradient for name, gradient in gradients.items()}
    return {match[1]: gradient.any(dim=0) for match, gradient in found.items() if match}


def masked(layer, mask, x):
    return layer.base(x) + layer.scale * (((x * mask) @ layer.A.T) @ layer.B.T)


def formula_step(model, base, batch, change):
    """A step of the formula in fp64; ``change(path, layer)`` is the forward of an adapted layer there."""
    factors = factors_of(model)
    reference = reference_model(base, factors).train()
    layers = {path: reference.get_submodule(path) for path in factors}
    for path, layer in layers.items():
        layer.forward = change(path, layer)
    loss = reference_loss(reference, batch)
    loss.backward()
    gradients = {f"{path}.adapters.default.lora_{f}": getattr(layers[path], f).grad for path in layers for f in "AB"}
    return loss.detach(), gradients


def check_against_masked_formula(got, model, base, batch, p):
    """A step on a single row, against the formula with the masks that the step had."""
    masks = {path: kept / (1 - p) for path, kept in kept_elements(got[1]).items()}
    want = formula_step(model, base, batch, lambda path, layer: functools.partial(masked, layer, masks[path]))
    check_steps_agree(got, want, loss=1e-5)


@pytest.mark.parametrize("backend", [
    "aot_eager", pytest.param("inductor", marks=[pytest.mark.inductor, pytest.mark.slow]),
])  # fmt: skip
def test_blocks_captured_once_have_masks_of_their_own(backend):
    base = hosts.build("llama", train=True, num_hidden_layers=3, use_cache=False)
    # Attention among one token has no gradient for queries and keys.
    targets = ["v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    plan = adaptc.LoRA(r=3, alpha=6, dropout=0.1, init="random", targets=targets)
    model = adaptc.compile(copy.deepcopy(base), plan, backend=backend, regional=True)
    token = {"input_ids": torch.tensor([[17]])}
    runs = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        runs.append(step(model, token))
        check_against_masked_formula(runs[-1], model, base, token, 0.1)
    assert [len(graph.ran) for graph in model.adaptc.graphs] == [5, 10] and model.adaptc.eager_sites() == []
    (loss, gradients), (same, again), (_, others) = runs
    assert torch.equal(loss, same) and all(torch.equal(gradients[name], again[name]) for name in gradients)
    masks = [tuple(mask.tolist()) for run in (gradients, others) for mask in kept_elements(run).values()]
    assert len(masks) == 30 and len({mask[:64] for mask in masks}) == 30
    kept = torch.tensor([element for mask in masks for element in mask], dtype=torch.float64)
    assert abs(kept.mean() - 0.9) < 4 * (0.9 * 0.1 / len(kept)) ** 0.5


def test_every_gradient_of_three_blocks_captured_once():
    base = hosts.build("llama", train=True, num_hidden_layers=3, use_cache=False)
    plan = adaptc.LoRA(r=3, alpha=5, init="random", targets="all-linear")
    model = adaptc.compile(copy.deepcopy(base), plan, backend="aot_eager", regional=True)
    check_against_reference(model, base, hosts.batch("llama"))
    assert [len(graph.ran) for graph in model.adaptc.graphs] == [7, 14]


# -- a write between two readers --------------------------------------------------------------------------


class Written(nn.Module):
    """Two layers read ``h``, which is written to in between."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.front, self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 5), nn.Linear(64, 4)

    def forward(self, x):
        h = self.front(x) + x
        first = self.a(h)
        h.mul_(2)
        return torch.cat([first.square(), torch.tanh(self.b(h))], dim=-1)


def written(backend, targets, p=0.0):
    base = Written().train()
    plan = adaptc.LoRA(r=3, alpha=5, dropout=p, init="random", targets=targets)
    return base, adaptc.compile(copy.deepcopy(base), plan, backend=backend)


ROW = {"x": torch.linspace(-1, 2, 64)[None]}


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_write_between_two_adapters_that_drop_something(backend):
    base, model = written(backend, "all-linear", p=0.1)
    for seed in range(3):
        torch.manual_seed(seed)
        check_against_masked_formula(step(model, ROW), model, base, ROW, 0.1)
    assert len(model.adaptc.graphs) == 1 and model.adaptc.eager_sites() == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_write_between_a_frozen_layer_and_an_adapted_one(backend):
    base, model = written(backend, ["front", "b"])
    check_steps_agree(step(model, ROW), reference_step(model, base, ROW))


def test_a_write_between_two_adapters_under_autocast():
    """Which reads a copy of what is written to."""
    base, model = written("aot_eager", "all-linear")
    with torch.autocast("cpu", torch.bfloat16):
        got = step(model, ROW)
    want = formula_step(model, base, ROW, lambda path, layer: lambda x: type(layer).forward(layer, x.clone()))
    check_steps_agree(got, want, loss=0.02, gradient=0.02)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_write_to_what_a_backward_needs_is_refused_as_in_torch(backend):
    base, model = written(backend, "all-linear")
    for compute in (lambda: reference_step(model, base, ROW), lambda: step(model, ROW)):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            compute()
