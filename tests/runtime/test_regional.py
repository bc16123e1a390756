"""Blocks that repeat, captured once for all of their copies."""

from __future__ import annotations

import copy
import dataclasses
import io

import pytest
import torch
from torch import nn

import adaptc
from adaptc.errors import NewSignatureWarning
from adaptc.ir import dialect
from adaptc.runtime.regions import arm
from adaptc.runtime.restart import LARGEST
from tests.models import hosts
from tests.reference import (
    check_against_reference,
    check_steps_agree,
    factors_of,
    reference_model,
    reference_step,
    step,
)

LORA = adaptc.LoRA(r=3, alpha=6, init="random", targets="all-linear")


def regional(base, lora=LORA, **options):
    options = {"backend": "aot_eager", "regional": True, **options}
    return adaptc.compile(copy.deepcopy(base), lora, **options)


def llama(layers=2, **options):
    return hosts.build("llama", train=True, num_hidden_layers=layers, **{"use_cache": False, **options})


def check_nothing_is_left_out(model, *outside):
    assert model.adaptc.eager_sites() == sorted(outside) and model.adaptc.idle_sites() == []
    paths = model.adaptc.site_paths()
    ran = {paths[i] for graph in model.adaptc.graphs for i in graph.ran}
    assert ran | set(outside) == set(paths.values()) and not ran & set(outside)


@pytest.mark.inductor
@pytest.mark.slow
@pytest.mark.parametrize("checkpointed", [False, True])
def test_inductor_has_every_gradient_of_every_layer(checkpointed):
    base = llama(3, hidden_size=32, intermediate_size=48)
    model = regional(base, backend="inductor")
    if checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for seed in range(2):
        batch = hosts.batch("llama", seed=seed)
        got, want = step(model, batch), reference_step(model, base, batch)
        assert len(got[1]) == 3 * 7 * 2
        check_steps_agree(got, want)
    # The first block has a graph of its own: nothing asks for the gradient of what it reads.
    assert [(len(g.sites), len(g.ran)) for g in model.adaptc.graphs] == [(7, 7), (7, 14)]
    assert "7 sites (ran for 14)" in str(model.adaptc.explain())
    check_nothing_is_left_out(model)


#: graphs of one training step, two for each stack of blocks; and the sites around the blocks
GRAPHS = {
    "llama": (2, ()),
    "gpt2": (2, ()),
    "bert": (2, ("bert.pooler.dense",)),
    "t5": (4, ()),
}


@pytest.mark.parametrize("host", [pytest.param(h, marks=pytest.mark.slow) if h == "t5" else h for h in GRAPHS])
def test_blocks_of_many_classes(host):
    changes = {"use_cache": False} if host in ("llama", "gpt2", "t5") else {}
    base = hosts.build(host, train=True, **changes)
    model = regional(base)
    check_against_reference(model, base, hosts.batch(host))
    graphs, outside = GRAPHS[host]
    assert len(model.adaptc.graphs) == graphs
    check_nothing_is_left_out(model, *outside)


def test_layers_have_seeds_of_their_own_and_repeat_with_torchs(monkeypatch):
    def kernel(*args):
        seen.extend(map(int, args[-2]))

    for name in ("lora_shrink", "lora_factor_grads", "lora_input_grads"):
        monkeypatch.setattr(dialect.get(name), "kernel", kernel)
    seen: list[int] = []
    lora = adaptc.LoRA(r=3, alpha=6, init="random", dropout=0.4, targets="all-linear")
    # In fp64: C++ calls Python for that dtype.
    model, batch = regional(llama().double(), lora), hosts.batch("llama")
    step(model, batch)
    runs = []
    for seed in (0, 0, 1):
        seen.clear()
        torch.manual_seed(seed)
        loss, gradients = step(model, batch)
        runs.append((list(seen), loss, gradients))
    (first, loss, gradients), (again, same, equal), (other, *_) = runs
    assert len(set(first)) == 14
    # Forward, what the factors' gradients read, and the inputs' gradients where somebody asks for them.
    assert len(first) == 14 + 14 + 11
    assert first == again and torch.equal(loss, same) and all(torch.equal(gradients[n], equal[n]) for n in equal)
    assert not set(first) & set(other)


def test_checkpointed_blocks_drop_what_they_dropped():
    lora = adaptc.LoRA(r=3, alpha=6, init="random", dropout=0.4, targets="all-linear")
    plain = regional(llama(), lora)
    checkpointed = copy.deepcopy(plain)
    checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    found = []
    for model in (plain, checkpointed):
        torch.manual_seed(3)
        found.append(step(model, hosts.batch("llama")))
        check_nothing_is_left_out(model)
    check_steps_agree(found[1], found[0])


def test_a_switch_before_blocks_are_computed_again_changes_nothing():
    model = regional(llama())
    model.adaptc.add("second", LORA)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    want = step(model, hosts.batch("llama"))
    model.zero_grad()
    loss = model(**hosts.batch("llama")).loss
    model.adaptc.switch("second")
    loss.backward()
    got = {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}
    check_steps_agree((loss.detach().double(), got), want)


def test_automatic_where_there_are_many_and_nothing_is_lost():
    def regions(base, lora=LORA, **options):
        return set(arm(regional(base, lora, **{"regional": "auto", **options}).adaptc))

    many = llama(8, hidden_size=16, intermediate_size=16)
    model = regional(many, backend="eager", regional="auto")
    model(**hosts.batch("llama"))
    assert [len(g.ran) for g in model.adaptc.graphs] == [7, 49]
    paths = {f"model.layers.{i}" for i in range(8)}
    assert regions(many) == paths
    assert regions(llama(5)) == set()
    assert regions(many, regional=False) == set()
    assert regions(many, fullgraph=True) == set()
    embedding = adaptc.LoRA(r=3, init="random", targets=["embed_tokens", "q_proj"])
    assert regions(many, embedding) == set(), "a site outside would not be captured"
    assert regions(many, embedding, regional=True) == paths
    head = adaptc.Rule(adaptc.Match(targets=["lm_head"]), train="full")
    assert regions(many, adaptc.Plan([head, adaptc.Rule(adaptc.Match(targets=["q_proj"]), adaptc.LoRA(r=3))])) == paths
    hooked = copy.deepcopy(many)
    hooked.model.layers[3].register_forward_hook(lambda *args: None)
    assert regions(hooked) == set()


def test_what_runs_outside_the_blocks_is_reported():
    base = llama()
    lora = adaptc.LoRA(r=3, init="random", targets=["lm_head", "q_proj"])
    model = regional(base, lora)
    check_against_reference(model, base, hosts.batch("llama"))
    assert model.adaptc.eager_sites() == ["lm_head"]
    report = str(model.adaptc.explain())
    assert "ran outside a captured graph: lm_head" in report
    assert "captured by themselves, and together (LlamaDecoderLayer): model.layers." in report


@pytest.mark.slow
def test_a_call_with_a_cache_is_captured_whole():
    base = llama(use_cache=True).eval()
    model = regional(base)
    with torch.no_grad():
        for site in model.adaptc.sites:
            base.get_submodule(site.path).weight += site.adapters["default"].delta()
    prompt = {k: v[:, :5] for k, v in hosts.batch("llama").items() if k in ("input_ids", "attention_mask")}
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    got, want = model.generate(**prompt, **options), base.generate(**prompt, **options)
    assert torch.equal(got, want)
    assert len(model.adaptc.graphs) <= 3 and all(len(g.sites) == 14 for g in model.adaptc.graphs)
    model.train()
    step(model, {**hosts.batch("llama"), "use_cache": False})
    assert len(model.adaptc.graphs[-1].sites) == 7
    check_nothing_is_left_out(model)


def test_switching_recompiles_nothing():
    base = llama()
    model = regional(base)
    model.adaptc.add("second", LORA)
    for name in ("default", "second", "default"):
        model.adaptc.switch(name)
        check_against_reference(model, base, hosts.batch("llama"), name=name)
    assert [len(g.ran) for g in model.adaptc.graphs] == [2 * 7, 2 * 7], "both adapters ran through the same two"
    assert model.adaptc.metrics()["recompiles"] == 0, "the first block has a graph of its own from the start"
    model.adaptc.add("wide", adaptc.LoRA(r=5, alpha=6, init="random", targets="all-linear"))
    with pytest.warns(NewSignatureWarning, match="'wide'"):
        model.adaptc.switch("wide")
    check_against_reference(model, base, hosts.batch("llama"), name="wide")
    assert model.adaptc.metrics()["recompiles"] == 2


def test_layers_that_differ_have_graphs_of_their_own():
    base = llama(4)
    plan = adaptc.Plan([
        adaptc.Rule(adaptc.Match(targets=["q_proj"], layers="0-1"), adaptc.LoRA(r=3, init="random")),
        adaptc.Rule(adaptc.Match(targets=["q_proj", "up_proj"], layers="2-3"), adaptc.LoRA(r=5, init="random")),
    ])  # fmt: skip
    model = regional(base, plan)
    check_against_reference(model, base, hosts.batch("llama"))
    assert sorted((len(g.sites), len(g.ran)) for g in model.adaptc.graphs) == [(1, 1), (1, 1), (2, 4)]


@pytest.mark.parametrize("layers", [pytest.param("0-1", marks=pytest.mark.slow), "2-3"])
def test_layers_without_adapters_have_graphs_of_their_own(layers):
    """Of equal ranks and shapes: Dynamo does not guard on hooks that are not there."""
    base = llama(4)
    model = regional(base, adaptc.Plan([
        adaptc.Rule(adaptc.Match(targets=["q_proj"]), adaptc.LoRA(r=3, init="random")),
        adaptc.Rule(adaptc.Match(targets=["up_proj"], layers=layers), adaptc.LoRA(r=3, init="random")),
    ]))  # fmt: skip
    for seed in range(3):
        check_against_reference(model, base, hosts.batch("llama", seed=seed))
    model.eval()
    with torch.no_grad():
        check_against_reference(model, base, hosts.batch("llama"))
    check_nothing_is_left_out(model)
    alone = regional(base, adaptc.Plan([
        adaptc.Rule(adaptc.Match(targets=["q_proj"], layers=layers), adaptc.LoRA(r=3, init="random")),
    ])).eval()  # fmt: skip
    with torch.no_grad():
        check_against_reference(alone, base, hosts.batch("llama"))


def test_a_hook_inside_one_block_is_called():
    base = llama()
    model = regional(base)
    for place in ("mlp", "input_layernorm"):
        for each in (model, base):
            each.model.layers[1].get_submodule(place).register_forward_hook(lambda module, args, y: y * 1.5)
        check_against_reference(model, base, hosts.batch("llama"))


class Wrapped(nn.Module):
    """A language model inside of a module that has no config, in a region without gradients if asked."""

    def __init__(self, inner, freeze=False):
        super().__init__()
        self.inner, self.freeze = inner, freeze
        self.head = nn.Linear(64, 3)

    def forward(self, input_ids):
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze):
            hidden = self.inner(input_ids).last_hidden_state
        return self.head(hidden)


@pytest.mark.parametrize("freeze", [False, True], ids=["a cache of its own", "a region to be lifted"])
def test_what_is_not_of_one_block_has_the_call_captured_whole(freeze):
    base = Wrapped(llama(use_cache=not freeze).model, freeze=freeze).train()
    model, ids = regional(base, lift_no_grad=["inner"] if freeze else []), hosts.batch("llama")["input_ids"]
    base.freeze = False
    for _ in range(2):
        check_against_reference(model, base, ids)
    (graph,) = model.adaptc.graphs
    assert len(graph.sites) == 14 and model.adaptc.eager_sites() == []


class Cached(nn.Sequential):
    def forward(self, x, cache=None):
        return super().forward(x)


class Statistics(nn.Module):
    """Random numbers and running statistics in front of a block that is given a cache; in the last one too."""

    def __init__(self):
        super().__init__()
        self.norm, self.drop = nn.BatchNorm1d(6), nn.Dropout(0.5)
        self.register_buffer("weight", torch.ones(LARGEST + 1))
        self.layers = nn.ModuleList(Cached(nn.Linear(6, 6), nn.BatchNorm1d(6)) for _ in range(3))

    def forward(self, x):
        x = self.layers[0](self.drop(self.norm(x)))
        return self.layers[2](self.layers[1](x), cache=())


def test_a_call_that_begins_anew_leaves_behind_what_one_call_does():
    torch.manual_seed(0)
    base, x = Statistics(), torch.randn(8, 6) + 3
    by_block, whole = regional(base), regional(base, regional=False)
    for source, target in zip(whole.adaptc.parameters(), by_block.adaptc.parameters(), strict=True):
        target.data.copy_(source)
    for calls in (1, 2):
        found = []
        for model in (by_block, whole):
            torch.manual_seed(calls)
            found.append([model(x), torch.rand(3), *model.buffers()])
        torch.testing.assert_close(*found)
        assert by_block.norm.num_batches_tracked == by_block.layers[0][1].num_batches_tracked == calls
    assert by_block.adaptc.captures.regions and by_block.adaptc.captures.last_was_whole


@pytest.mark.slow
def test_copies_files_and_the_way_back():
    base, batch = llama(), hosts.batch("llama")
    model = regional(base)
    want = step(model, batch)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        check_steps_agree(step(other, batch), want)
        assert other.adaptc is not model.adaptc and len(other.adaptc.graphs) == 2
        check_nothing_is_left_out(other)
    assert len(model.adaptc.graphs) == 2, "copies capture their own"
    model.adaptc.detach()
    assert all("_compiled_call_impl" not in vars(m) and "_adaptc_prologue" not in vars(m) for m in model.modules())
    assert torch.equal(model(**batch).loss, base(**batch).loss)


@pytest.mark.slow
def test_hidden_states_are_recorded():
    base = llama().eval()
    model = regional(base)
    with torch.no_grad():
        for site in model.adaptc.sites:
            base.get_submodule(site.path).weight += site.adapters["default"].delta()
    with torch.no_grad():
        torch.testing.assert_close(model(**hosts.batch("llama")).logits, base(**hosts.batch("llama")).logits)
        for asked in ({"output_hidden_states": True}, {}):
            model.config.output_hidden_states = base.config.output_hidden_states = not asked
            got, want = (m(**hosts.batch("llama"), **asked) for m in (model, base))
            assert len(got.hidden_states) == 3
            torch.testing.assert_close(got.hidden_states, want.hidden_states, rtol=1e-5, atol=1e-5)


class Checkpointing(nn.Module):
    """A model that checkpoints its blocks itself, in one graph or not."""

    def __init__(self, breaks):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(3))
        self.breaks, self.checkpoints = breaks, True

    def forward(self, x, output_attentions=False):
        for layer in self.layers:
            if self.breaks:
                torch._dynamo.graph_break()
            x = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False) if self.checkpoints else layer(x)
        return x


@pytest.mark.parametrize("whole", [False, True], ids=["by block", "whole"])
@pytest.mark.parametrize("breaks", [False, True], ids=["one graph", "broken"])
def test_blocks_that_the_model_checkpoints_itself(breaks, whole):
    """Compiled inside of a checkpoint, and computed again as they ran in the forward."""
    base = Checkpointing(breaks).train()
    model = regional(base, adaptc.LoRA(r=2, init="random", targets="all-linear"))
    base.checkpoints = False
    for seed in range(2):
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(seed))
        model.zero_grad()
        model(x, output_attentions=whole).square().sum().backward()
        reference = reference_model(base, factors_of(model))
        reference(x.double()).square().sum().backward()
        for site in model.adaptc.sites:
            adapter, want = site.adapters["default"], reference.get_submodule(site.path)
            torch.testing.assert_close(adapter.lora_A.grad.double(), want.A.grad, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(adapter.lora_B.grad.double(), want.B.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "what", ["hooks", *(pytest.param(what, marks=pytest.mark.slow) for what in ("attributes", "modules", "methods"))]
)
def test_layers_that_differ_in_python(what):
    """What Dynamo guards on by itself; if it ever stops, layers compute what the first one does."""
    base = llama(3, hidden_size=16, intermediate_size=24)
    lora = adaptc.LoRA(r=2, init="random", targets=["q_proj"])
    rule = lambda i, method: adaptc.Rule(adaptc.Match(targets=["q_proj"], layers=str(i)), method)  # noqa: E731
    plan = adaptc.Plan([
        rule(0, adaptc.LoRA(r=2, init="random")), rule(1, adaptc.LoRA(r=2, init="random", lora_bias=True)),
        rule(2, adaptc.LoRA(r=2, init="random", dora=True)),
    ])  # fmt: skip
    model = regional(base, plan if what == "methods" else lora)
    for i, layer in enumerate(model.model.layers):
        if what == "hooks":
            layer.mlp.register_forward_hook(lambda module, args, y, i=i: y * (1 + i))
        elif what == "attributes":
            layer.self_attn.scaling *= 1 + i
        elif what == "modules":
            layer.mlp.act_fn = (nn.GELU, nn.SiLU, nn.Tanh)[i]()
    whole = copy.deepcopy(model)
    whole.adaptc.options = dataclasses.replace(whole.adaptc.options, regional=False)
    for seed in range(2):
        batch = hosts.batch("llama", seed=seed)
        check_steps_agree(step(model, batch), step(whole, batch))
    assert not whole.adaptc.captures.regions and model.adaptc.captures.regions


class Stages(nn.Module):
    """Blocks of one class and two widths, in a container of torch, as the root of nothing else."""

    def __init__(self):
        super().__init__()
        self.narrow = nn.Sequential(*(self.block(6) for _ in range(3)))
        self.wide = nn.Sequential(nn.Linear(6, 8), *(self.block(8) for _ in range(2)))

    @staticmethod
    def block(width):
        return nn.Sequential(nn.Linear(width, width), nn.Tanh())

    def forward(self, x):
        return self.wide(self.narrow(x))


def test_containers_of_torch():
    base = Stages().train()
    model = regional(base, adaptc.LoRA(r=2, init="random", targets="all-linear"))
    check_against_reference(model, base, torch.randn(3, 6))
    assert [g.sites for g in model.adaptc.graphs] == [["narrow.0.0"], ["narrow.1.0"], ["wide.1.0"]]
    assert model.adaptc.eager_sites() == ["wide.0"]


def test_another_word_than_the_three_is_refused():
    with pytest.raises(ValueError, match="regional is \"auto\", True or False, not 'always'"):
        adaptc.compile(llama(1), LORA, regional="always")
