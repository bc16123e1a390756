"""Blocks that repeat, captured once for all of their copies."""

from __future__ import annotations

import copy
import dataclasses
import io
import types

import pytest
import torch
from torch import nn

import adaptc
from adaptc.codegen.ops import registry
from adaptc.codegen.ops.row import Kernel, on_cpu
from adaptc.errors import NewSignatureWarning
from adaptc.ir import dialect
from adaptc.runtime.calls import captures
from adaptc.runtime.calls.regions import arm
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
    paths = model.adaptc.captures.site_paths()
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
    def takes(*args):
        seen.extend(map(int, args[-2]))
        return True

    for name in ("lora_shrink", "lora_factor_grads", "lora_input_grads"):
        row = dataclasses.replace(registry.row(name), kernels=(Kernel(dialect.get(name).body, takes, on_cpu),))
        monkeypatch.setitem(registry.ROWS, name, row)
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


@pytest.mark.slow
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
        return set(arm(regional(base, lora, **{"regional": "auto", **options}).adaptc.captures))

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


@pytest.mark.slow
@pytest.mark.parametrize("layers", ["0-1", "2-3"])
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


class Cache:
    """What blocks keep of a call, as transformers' classes have it."""

    def __init__(self):
        self.seen = []

    def get_seq_length(self):
        return len(self.seen)


class Kept(nn.Module):
    """A block that keeps what it made in the cache that it is given."""

    def __init__(self, i):
        super().__init__()
        self.i, self.fc, self.norm = i, nn.Linear(6, 6), nn.BatchNorm1d(6)

    def forward(self, x, cache=None):
        x = x + torch.tanh(self.norm(self.fc(x)))
        if cache is not None:
            cache.seen.insert(self.i, x)
        return x


class Once(nn.Module):
    """Counts its calls, writes into its input, draws random numbers and keeps statistics, before, in and after blocks
    of which one makes a cache for those after it: none of that may happen twice."""

    def __init__(self):
        super().__init__()
        self.norm, self.drop, self.calls = nn.BatchNorm1d(6), nn.Dropout(0.5), 0
        self.layers = nn.ModuleList(Kept(i) for i in range(4))

    def forward(self, x):
        self.calls += 1
        x.mul_(0.5)
        cache = None
        h = self.drop(self.norm(x))
        for i, layer in enumerate(self.layers):
            h = layer(h, cache)
            cache = Cache() if i == 1 else cache
        return self.drop(h)


def test_a_call_that_must_be_captured_whole_runs_once():
    """To the first call's end with its blocks op by op; whole from the next on."""
    with hosts.seeded(0):
        base = Once().train()
    model = regional(base)
    merged, seen = copy.deepcopy(base).double(), []
    model.norm.register_forward_hook(lambda *args: seen.append(len(seen)))
    for site in model.adaptc.sites:
        merged.get_submodule(site.path).weight.data += site.adapters["default"].delta().double()
    for calls in (1, 2, 3):
        found = []
        for one in (model, merged):
            torch.manual_seed(calls)
            x = torch.randn(8, 6).to(one.layers[0].fc.weight.dtype)
            loss = one(x).square().sum()
            gradient = torch.autograd.grad(loss, one.layers[3].fc.bias if one is merged else [*one.adaptc.parameters()])
            found.append([loss, x, torch.rand(3), *one.norm.buffers(), *one.layers[3].norm.buffers()])
        torch.testing.assert_close(*found, check_dtype=False)
        assert model.calls == calls == len(seen) == model.layers[0].norm.num_batches_tracked
        assert all(g.abs().sum() > 0 for g in gradient)
        assert model.adaptc.eager_sites() == [] and model.adaptc.idle_sites() == []
    first = [len(g.ran) for g in model.adaptc.graphs][:3]
    assert first == [1, 1, 4], "two blocks before the cache was there, then all four"


def test_what_was_warmed_up_is_not_compiled_at_a_call():
    model, x = regional(Once().train()), torch.randn(8, 6)
    calls = next(model.parameters()).new_zeros(())
    del model.calls
    model.register_buffer("calls", calls)  # a number of Python would be compiled for each call
    model.adaptc.warmup(example_inputs=x)
    graphs = len(model.adaptc.graphs)
    assert graphs == 3 and model.calls == 0
    model(x.clone()).sum().backward()
    assert len(model.adaptc.graphs) == graphs and model.calls == 1
    assert [len(g.sites) for g in model.adaptc.preview()] == []


@pytest.mark.parametrize("changes", [{}, {"gradient_checkpointing": True}], ids=["cache", "checkpointed"])
def test_a_cache_that_transformers_makes_is_known_before(changes):
    """By its default config; a checkpointed layer gets none in training."""
    base, seen = llama(use_cache=True), []
    if changes:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model = regional(Wrapped(base.model).train(), backend="eager")
    model.inner.embed_tokens.register_forward_hook(lambda *args: seen.append(1))
    model(hosts.batch("llama")["input_ids"]).sum().backward()
    assert [len(g.sites) for g in model.adaptc.graphs] == [7 if changes else 14] and len(seen) == 1


class Reentrant(nn.Module):
    """Checkpoints its blocks re-entrantly, counts calls and writes into its input."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.3), nn.Tanh()) for _ in range(6))
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        x.mul_(0.5)
        h = x.clone().requires_grad_()
        for layer in self.layers:
            h = torch.utils.checkpoint.checkpoint(layer, h, use_reentrant=True)
        return h


@pytest.mark.parametrize(
    "backend", ["eager", *(pytest.param(backend, marks=pytest.mark.slow) for backend in ("aot_eager", "inductor"))]
)
def test_reentrant_checkpoints_compute_again_what_they_computed(backend):
    """With the masks of the forward, in the first call too: then the gradient of the last block's B, in which the
    output before the last tanh is linear, gives back what B added to it."""
    with hosts.seeded(0):
        base = Reentrant().train()
    lora = adaptc.LoRA(r=2, alpha=2, dropout=0.4, init="random", targets="all-linear")
    base.layers[5][2] = nn.Identity()
    model = regional(base, lora, backend=backend, regional="auto")
    factor = model.layers[5][0].adapters["default"].lora_B
    for calls in (1, 2, 3):
        x, found = torch.randn(4, 6), []
        for scale in (1.0, 0.0):
            torch.manual_seed(calls)
            model.zero_grad()
            with torch.no_grad():
                kept = factor.clone()
                factor.mul_(scale)
            given = x.clone()
            loss = model(given).sum()
            loss.backward()
            with torch.no_grad():
                factor.copy_(kept)
            torch.testing.assert_close(given, x / 2)
            other = model.layers[2][0].adapters["default"].lora_A.grad
            found.append((loss.detach(), (factor.grad * kept).sum(), other))
        (loss, share, other), (without, *_) = found
        torch.testing.assert_close(share, loss - without, rtol=1e-4, atol=1e-5)
        assert other.abs().sum() > 0 and model.calls == 2 * calls
        assert model.adaptc.eager_sites() == []


class Numbered(nn.Module):
    """A block with a Python number of its own."""

    def __init__(self, i):
        super().__init__()
        self.up, self.down, self.i = nn.Linear(6, 6), nn.Linear(6, 6), i

    def forward(self, x):
        return x + self.scaled(self.down(torch.tanh(self.up(x))))

    def scaled(self, y):
        return y / self.divisor

    @property
    def divisor(self):
        return self.i + 1


class Unread(Numbered):
    def scaled(self, y):
        return y / 2


class ReadElsewhere(Numbered):
    def scaled(self, y):
        return divided(self, y)


def divided(block, y):
    return y / (block.i + 1)


class WithConfig(Numbered):
    def __init__(self, i):
        super().__init__(0)
        self.config = types.SimpleNamespace(divisor=1 + i)

    def scaled(self, y):
        return y / self.config.divisor


class WithDropRate(Numbered):
    def __init__(self, i):
        super().__init__(0)
        self.drop = nn.Dropout(1e-9 * i)

    def scaled(self, y):
        return self.drop(y)


#: class -> the sites of the graphs of one and of two training steps
NUMBERED = {
    Numbered: ([12], [12]), WithConfig: ([12], [12]), WithDropRate: ([12], [12]),
    Unread: ([2, 2], [2, 2]),
    ReadElsewhere: ([2, 2, 2], [2, 2, 2, 12]),  # not to be told before: found at the third block
}  # fmt: skip


@pytest.mark.parametrize("kind", NUMBERED)
def test_blocks_that_differ_by_a_number(kind):
    """One graph for all, or one for the whole model."""
    with hosts.seeded(0):
        base = nn.Sequential(*(kind(i) for i in range(6))).train()
    lora = adaptc.LoRA(r=2, init="random", targets=["up", "down"])
    model = regional(base, lora, regional="auto", backend="eager")
    for graphs in NUMBERED[kind]:
        check_against_reference(model, base, torch.randn(3, 6))
        assert [len(g.sites) for g in model.adaptc.graphs] == graphs
        assert model.adaptc.eager_sites() == [] == model.adaptc.idle_sites()
    for _ in range(2):
        model.eval()
        with torch.no_grad():
            model(torch.randn(3, 6))
    assert len(model.adaptc.graphs) <= len(graphs) + 1 and model.adaptc.metrics()["recompile_limits_hit"] == 0


def test_copies_that_differ_do_not_use_up_the_limit(monkeypatch):
    monkeypatch.setattr(captures, "RECOMPILE_LIMIT", 2)
    base = nn.Sequential(*(Numbered(i) for i in range(6))).train()
    model = regional(base, adaptc.LoRA(r=2, dropout=0.1, init="random", targets=["up"]), backend="eager")
    model(torch.randn(3, 6)).sum().backward()
    model.eval()(torch.randn(3, 6))
    assert len(model.adaptc.graphs) == 12 and model.adaptc.metrics()["recompile_limits_hit"] == 0
    assert model.adaptc.eager_sites() == []


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
    whole.adaptc.captures.options = dataclasses.replace(whole.adaptc.options, regional=False)
    for seed in range(2):
        batch = hosts.batch("llama", seed=seed)
        check_steps_agree(step(model, batch), step(whole, batch))
    assert not whole.adaptc.captures.epoch.regions and model.adaptc.captures.epoch.regions


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
