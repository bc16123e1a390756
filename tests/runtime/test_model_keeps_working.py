"""What a user does with a model works on the compiled one as before."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import adaptc
from adaptc.errors import AdapterNameError, NewSignatureWarning
from adaptc.passes.manager import op_counts
from tests.models import hosts
from tests.reference import check_against_reference, loss_of, relative_errors, step

LORA = adaptc.LoRA(r=3, alpha=6, init="random", targets="all-linear")


def compiled(host="llama", *, train=True, plan=LORA, backend="aot_eager", **changes):
    base = hosts.short(host, train=train, **changes)
    return base, adaptc.compile(copy.deepcopy(base), plan, backend=backend)


def test_same_object_and_class():
    base = hosts.short("llama")
    keys = list(base.state_dict())
    model = adaptc.compile(base, LORA, backend="aot_eager")
    assert model is base and type(model).__name__ == "LlamaForCausalLM"
    assert [k for k in model.state_dict() if ".adapters." not in k] == keys
    adapter_keys = [k for k in model.state_dict() if ".adapters." in k]
    assert adapter_keys[0] == "model.layers.0.self_attn.q_proj.adapters.default.lora_A"
    assert len(adapter_keys) == 2 * len(model.adaptc.sites)


def test_train_and_eval_with_dropout():
    plan = adaptc.LoRA(r=3, alpha=6, dropout=0.5, init="random", targets="all-linear")
    base, model = compiled(plan=plan)
    batch = hosts.batch("llama")
    torch.manual_seed(1)
    first, again = model(**batch).loss, model(**batch).loss
    assert first != again, "two training forwards draw different masks"
    check_against_reference(model.eval(), base.eval(), batch)
    dropouts = [op_counts(g.graph_module("seed_dropout")).get("seeded_dropout", 0) for g in model.adaptc.graphs]
    assert (dropouts[0], dropouts[-1]) == (7, 0)


def test_modes_share_a_graph_where_nothing_drops():
    model = adaptc.compile(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), LORA, backend="aot_eager").train()
    x = torch.randn(3, 4)
    torch.testing.assert_close(model(x), model.eval()(x))
    assert len(model.adaptc.graphs) == 1


def test_gradient_accumulation_and_clipping():
    base, model = compiled()
    batches = [hosts.batch("llama", seed=s) for s in (1, 2)]
    for batch in batches:
        model(**batch).loss.backward()
    summed = [p.grad.clone() for p in model.adaptc.parameters()]
    parts = []
    for batch in batches:
        model.zero_grad()
        model(**batch).loss.backward()
        parts.append([p.grad.clone() for p in model.adaptc.parameters()])
    for total, one, two in zip(summed, *parts, strict=True):
        torch.testing.assert_close(total, one + two)
    norm = nn.utils.clip_grad_norm_(model.adaptc.parameters(), 1e-3)
    assert norm > 1e-3
    clipped = torch.sqrt(sum(p.grad.pow(2).sum() for p in model.adaptc.parameters()))
    torch.testing.assert_close(clipped, torch.tensor(1e-3), rtol=1e-3, atol=0)


def test_grad_scaler_under_fp16_autocast():
    _, model = compiled()
    optimizer = torch.optim.SGD(model.adaptc.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    before = [p.detach().clone() for p in model.adaptc.parameters()]
    with torch.autocast("cpu", torch.float16):
        loss = model(**hosts.batch("llama")).loss
    scaler.scale(loss).backward()
    grads = [p.grad / 2.0**8 for p in model.adaptc.parameters()]
    scaler.step(optimizer)
    scaler.update()
    for old, new, grad in zip(before, model.adaptc.parameters(), grads, strict=True):
        torch.testing.assert_close(new.detach(), old - 0.1 * grad)


@pytest.mark.parametrize("host, when", [("llama", "after"), pytest.param("bert", "before", marks=pytest.mark.slow)])
def test_transformers_checkpointing_is_one_graph(host, when):
    # transformers warns, and so breaks the graph of any model, when a cache is asked for as well.
    base = hosts.build(host, train=True, use_cache=False)
    model = copy.deepcopy(base)
    if when == "before":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model = adaptc.compile(model, LORA, backend="aot_eager")
    if when == "after":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    check_against_reference(model, base, hosts.batch(host))
    assert model.adaptc.metrics()["graphs"] == 1
    assert model.adaptc.idle_sites() == []
    plain = adaptc.compile(copy.deepcopy(base), LORA, backend="aot_eager")
    plain.load_state_dict(model.state_dict())
    plain(**hosts.batch(host)).loss.backward()
    for p, q in zip(model.adaptc.parameters(), plain.adaptc.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), "recomputation changes nothing"


def test_checkpointing_with_dropout_draws_the_same_mask_in_recomputation():
    plan = adaptc.LoRA(r=3, alpha=6, dropout=0.3, init="random", targets="all-linear")
    base, model = compiled(plan=plan)
    batch = hosts.batch("llama")
    grads = []
    for _ in range(2):
        torch.manual_seed(5)
        model.zero_grad()
        model(**batch).loss.backward()
        grads.append([p.grad.clone() for p in model.adaptc.parameters()])
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for plain, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=1e-6, atol=1e-8)


#: Under Inductor with the other two torch draws again what it drew for its own dropouts, checkpointed or not.
HALF = {"activation_memory_budget": 0.5}
SAVING = {
    "aot_eager": [HALF, {"aggressive_recomputation": True}, {"activation_memory_budget": 0.0}], "inductor": [HALF]
}  # fmt: skip


@pytest.mark.parametrize("checkpointed", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize(
    "backend", ["aot_eager", pytest.param("inductor", marks=[pytest.mark.inductor, pytest.mark.slow])]
)
def test_masks_are_those_of_the_forward_however_little_is_saved(backend, checkpointed):
    base, batch, found = hosts.build("llama", train=True, use_cache=False), hosts.batch("llama"), []
    for options in ({}, *SAVING[backend]):
        torch.compiler.reset()
        torch.manual_seed(1)
        plan = adaptc.LoRA(r=3, dropout=0.3, init="random", targets="all-linear")
        model = adaptc.compile(copy.deepcopy(base), plan, backend=backend)
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        with torch._functorch.config.patch(options):
            found.append(step(model, batch))
    for loss, gradients in found[1:]:
        assert loss == found[0][0]
        assert max(relative_errors(gradients, found[0][1]).values()) < 1e-5


def test_a_checkpoint_saves_a_seed_and_not_the_state_that_it_was_drawn_with():
    plan = adaptc.LoRA(r=3, dropout=0.3, init="random", targets=["layers.0.self_attn.q_proj"])
    _, model = compiled(plan=plan)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    saved = []

    def note(tensor):
        saved.append((tensor.dtype, tensor.numel()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(**hosts.batch("llama")).loss.backward()
    states = [numel for dtype, numel in saved if dtype is torch.uint8]
    # That of the attention, which torch takes for random before 2.14.
    attention = torch.__version__ < "2.14"
    assert (torch.int64, 1) in saved and len(states) == attention


def test_generate_with_a_cache_needs_at_most_three_graphs():
    base, model = compiled(train=False)
    ids = hosts.batch("llama")["input_ids"][:1]
    options = {"max_new_tokens": 64, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    tokens = model.generate(ids, **options)
    assert tokens.shape[1] == ids.shape[1] + 64
    assert model.adaptc.metrics()["graphs"] <= 3
    assert model.adaptc.eager_sites() == []
    for site in model.adaptc.sites:
        adapter = site.adapters["default"]
        weight = base.get_submodule(site.path).weight
        weight.data += (adapter.scaling * adapter.lora_B.double() @ adapter.lora_A.double()).float()
    assert torch.equal(tokens, base.generate(ids, **options))


@pytest.mark.slow
def test_the_encoder_that_generate_calls_by_itself_is_captured():
    base, model = compiled("t5", train=False)
    batch = hosts.batch("t5")
    model.generate(batch["input_ids"], max_new_tokens=4, do_sample=False)
    assert model.adaptc.eager_sites() == []
    assert model.adaptc.idle_sites() == []
    encoder_sites = {s.path for s in model.adaptc.sites if s.path.startswith("encoder.")}
    assert set(model.adaptc.graphs[0].sites) == encoder_sites
    got = model.get_encoder()(batch["input_ids"])[0]
    for site in model.adaptc.sites:
        base.get_submodule(site.path).weight.data += site.adapters["default"].delta().float()
    torch.testing.assert_close(got, base.get_encoder()(batch["input_ids"])[0], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_towers_of_clip_are_captured():
    base, model = compiled("clip", train=False)
    batch = hosts.batch("clip")
    text = model.get_text_features(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    image = model.get_image_features(pixel_values=batch["pixel_values"])
    assert model.adaptc.eager_sites() == []
    assert model.adaptc.metrics()["graphs"] == 2
    for site in model.adaptc.sites:
        base.get_submodule(site.path).weight.data += site.adapters["default"].delta().float()
    want = base.get_text_features(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    for got, expected in ((text, want), (image, base.get_image_features(pixel_values=batch["pixel_values"]))):
        got, expected = (v if isinstance(v, torch.Tensor) else v.pooler_output for v in (got, expected))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_moving_to_another_dtype():
    base, model = compiled(plan=adaptc.LoRA(r=3, alpha=7, rslora=True, init="random", targets="all-linear"))
    model(**hosts.batch("llama"))
    model.to(torch.float64)
    check_against_reference(model, base, hosts.batch("llama"))
    assert model.adaptc.idle_sites() == []
    adapter = model.adaptc.sites[0].adapters["default"]
    model.to(torch.bfloat16)
    assert adapter.lora_A.dtype == torch.bfloat16
    assert float(adapter.scale) == 7 / 3**0.5, "the scale is a number, not a weight: it is not rounded"
    loss = model(**hosts.batch("llama")).loss
    loss.backward()
    assert all(p.grad.dtype == torch.bfloat16 for p in model.adaptc.parameters())


def test_sixteen_bit_base_keeps_full_precision_adapters():
    base = hosts.short("llama", train=True).to(torch.bfloat16)
    model = adaptc.compile(copy.deepcopy(base), LORA, backend="aot_eager")
    assert {p.dtype for p in model.adaptc.parameters()} == {torch.float32}
    model(**hosts.batch("llama")).loss.backward()
    assert {p.grad.dtype for p in model.adaptc.parameters()} == {torch.float32}
    joint = model.adaptc.graphs[0].graph_module("joint")
    assert op_counts(joint)["lora_linear"] == len(model.adaptc.sites)
    other = adaptc.compile(copy.deepcopy(base), LORA, backend="aot_eager", adapter_dtype=torch.bfloat16)
    assert {p.dtype for p in other.adaptc.parameters()} == {torch.bfloat16}


def clones(model, how):
    if how == "deepcopy":
        return copy.deepcopy(model)
    if how == "pickle":
        return pickle.loads(pickle.dumps(model))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("host, how", [
    ("llama", "deepcopy"), ("llama", "torch.save"),
    *(pytest.param(*row, marks=pytest.mark.slow)
      for row in (("llama", "pickle"), ("t5", "deepcopy"), ("clip", "pickle"))),
])  # fmt: skip
def test_copies_are_independent_and_compiled(host, how):
    base, model = compiled(host)
    batch = hosts.batch(host)
    loss_of(model(**batch))
    clone = clones(model, how)
    assert clone is not model and clone.adaptc is not model.adaptc and clone.adaptc.model is clone
    check_against_reference(clone, base, batch)
    assert clone.adaptc.metrics()["graphs"] == 1 and clone.adaptc.idle_sites() == []
    with torch.no_grad():
        for parameter in clone.adaptc.parameters():
            parameter.zero_()
    check_against_reference(model, base, batch)
    with pytest.warns(NewSignatureWarning):
        clone.adaptc.switch(None)
    assert all(len(s.module.adapters.live) == 1 for s in model.adaptc.sites)
    clone.adaptc.detach()
    assert model.adaptc.model is model and "_compiled_call_impl" not in clone.__dict__


def test_a_copied_part_of_the_model_runs_eagerly():
    base, model = compiled("t5")
    encoder = copy.deepcopy(model.get_encoder())
    ids = hosts.batch("t5")["input_ids"]
    torch.testing.assert_close(encoder(ids)[0], model.get_encoder()(ids)[0], rtol=1e-5, atol=1e-6)
    assert "_compiled_call_impl" not in encoder.__dict__


def test_running_a_notebook_cell_again():
    base, model = compiled()
    parameters = list(model.adaptc.parameters())
    again = adaptc.compile(model, LORA, backend="aot_eager")
    assert again is model
    assert all(p is q for p, q in zip(parameters, model.adaptc.parameters(), strict=True))
    with pytest.raises(AdapterNameError) as caught:
        adaptc.compile(model, adaptc.LoRA(r=5, targets="all-linear"), backend="aot_eager")
    assert "another plan is there already" in str(caught.value)
    assert 'model.adaptc.remove(\'default\') first' in str(caught.value)
    check_against_reference(model, base, hosts.batch("llama"))


def test_detach_gives_the_untouched_model_back():
    base = hosts.short("roberta", train=True)
    base.roberta.embeddings.word_embeddings.weight.requires_grad_(False)
    handle = base.classifier.out_proj.register_forward_hook(lambda m, a, o: None)
    flags = {n: p.requires_grad for n, p in base.named_parameters()}
    state = {k: v.clone() for k, v in base.state_dict().items()}
    attributes = {n: set(m.__dict__) for n, m in base.named_modules()}
    hooks = {n: len(m._forward_hooks) for n, m in base.named_modules()}
    modules = [n for n, _ in base.named_modules()]
    model = adaptc.compile(base, [{"match": {"targets": ["classifier"]}, "train": "full"}, LORA], backend="aot_eager")
    model(**hosts.batch("roberta")).loss.backward()
    assert model.adaptc.detach() is base
    assert not hasattr(base, "adaptc")
    assert [n for n, _ in base.named_modules()] == modules
    assert {n: p.requires_grad for n, p in base.named_parameters()} == flags
    assert {n: set(m.__dict__) for n, m in base.named_modules()} == attributes
    assert {n: len(m._forward_hooks) for n, m in base.named_modules()} == hooks
    assert list(base.state_dict()) == list(state)
    assert all(torch.equal(v, state[k]) for k, v in base.state_dict().items())
    assert all(p.grad is None for p in base.parameters())
    handle.remove()


def test_sites_added_after_the_first_forward():
    base, model = compiled(plan=adaptc.LoRA(r=3, alpha=6, init="random", targets=["q_proj"]))
    batch = hosts.batch("llama")
    check_against_reference(model, base, batch)
    model.adaptc.add("more", LORA)
    model.adaptc.switch("more")
    check_against_reference(model, base, batch, name="more")
    assert model.adaptc.metrics()["graphs"] == 1, "a fresh capture, one graph"
    assert len(model.adaptc.graphs[0].sites) == len(model.adaptc.sites) == 7


def test_an_adapter_that_the_model_never_calls_is_named():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x):
            return self.used(x)

    model = adaptc.compile(Unused(), LORA, backend="aot_eager")
    model(torch.randn(2, 4))
    assert model.adaptc.idle_sites() == ["unused"]
