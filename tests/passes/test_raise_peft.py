"""torch.compile(peft_model, backend="adaptc"): PEFT's LoRA layers, recognised and rewritten."""

from __future__ import annotations

import copy
import logging
import warnings

import peft
import pytest
import torch
from torch import nn

import adaptc
from adaptc.capture import peft_backend
from adaptc.capture.backend import AdapterBackend, BackendOptions
from adaptc.errors import AdaptcWarning
from adaptc.ir import dialect
from adaptc.passes.manager import Pipeline, op_counts
from adaptc.passes.raise_peft import site_path
from tests.models import hosts

SITES = 7


def peft_model(host="llama", *, dtype=None, targets="all-linear", changes=None, **options):
    one_layer = {"num_hidden_layers": 1} if host == "llama" else {}
    base = hosts.build(host, train=True, **one_layer, **(changes or {}))
    options = {"r": 3, "lora_alpha": 6, "init_lora_weights": False, "target_modules": targets, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(base.to(dtype) if dtype else base, peft.LoraConfig(**options)).train()


class Recorded:
    """The backend's passes with aot_eager below, and the graphs that it saw."""

    def __init__(self, verify=False):
        self.graphs, self.verify = [], verify

    def __call__(self, gm, inputs):
        options = BackendOptions("aot_eager", verify=self.verify)
        backend = AdapterBackend(Pipeline.from_options(order=peft_backend.PASSES), options, peft_backend._no_tensors)
        compiled = backend(gm, inputs)
        self.graphs += backend.graphs
        return compiled

    def applied(self):
        return [r.site for report in self._raised() for r in report.result.applied]

    def refused(self):
        return dict(pair for report in self._raised() for pair in report.result.refused)

    def _raised(self):
        return [report for graph in self.graphs for report in graph.reports if report.name == "raise_peft"]


def step(model, call, batch):
    model.zero_grad()
    loss = call(**batch).loss
    loss.backward()
    return loss.detach().double(), {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}


def check_as_in_double(model, batch, backend, *, factor=1.1, rtol=2e-5):
    """Loss and gradients of the compiled model are those of PEFT's own code run in fp64, to PEFT's own error."""
    double = copy.deepcopy(model).double()
    exact = step(double, double, batch)
    eager, got = (step(model, call, batch) for call in (model, torch.compile(model, backend=backend)))
    assert got[1].keys() == eager[1].keys() == exact[1].keys()
    for name, want in {"loss": exact[0], **exact[1]}.items():
        norm = float(want.norm())
        error, own = (float(((r[0] if name == "loss" else r[1][name]) - want).norm()) for r in (got, eager))
        assert norm > 0 and error <= factor * own + rtol * norm, (name, error / norm, own / norm)


@pytest.mark.parametrize("options", [
    {}, {"use_rslora": True}, {"target_modules": ["q_proj", "down_proj"]},
    {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {"up_proj": 1}},
], ids=["lora", "rslora", "some", "patterns"])  # fmt: skip
def test_every_layer_is_recognised(options):
    targets = options.pop("target_modules", "all-linear") if "target_modules" in options else "all-linear"
    model, backend = peft_model(targets=targets, **options), Recorded()
    check_as_in_double(model, hosts.batch("llama"), backend)
    (graph,) = backend.graphs
    sites = backend.applied()
    assert len(sites) == (2 if targets != "all-linear" else SITES) and backend.refused() == {}
    assert "base_model.model.model.layers.0.mlp.down_proj" in sites
    assert op_counts(graph.graph_module("canonicalise"))["lora_linear"] == len(sites)
    assert "mul" not in {n.name for n in graph.graph_module("lower").graph.nodes if n.meta.get("custom")}


@pytest.mark.slow
@pytest.mark.parametrize("host", ["bert", "gpt2"])
def test_other_hosts(host):
    model, backend = peft_model(host), Recorded(verify="raise")
    check_as_in_double(model, hosts.batch(host), backend)
    layers = sum(isinstance(m, peft.tuners.lora.Linear) for m in model.modules())
    assert len(backend.applied()) == layers and backend.refused() == {}


def test_a_16_bit_base_with_fp32_adapters():
    model, backend = peft_model(dtype=torch.bfloat16), Recorded()
    assert next(p for p in model.parameters() if p.requires_grad).dtype == torch.float32
    # PEFT computes in fp32 beside a base in bf16; here everything rounds as the base does.
    check_as_in_double(model, hosts.batch("llama"), backend, factor=2.5, rtol=0.02)
    assert len(backend.applied()) == SITES
    (graph,) = backend.graphs
    casts = [
        n for n in graph.graph_module("canonicalise").graph.nodes
        if n.target == "to" and "adaptc" in n.meta.get("custom", {}) and n.meta["example_value"].numel() > 64 * 3
    ]  # fmt: skip
    assert casts == [], "no activation is cast for an adapter"


def test_autocast_rounds_as_peft_does():
    """What a run loses to bf16 is a matter of luck in every single one: the median of seven counts."""
    model, backend, ratios = peft_model(), Recorded(), []
    compiled, double = torch.compile(model, backend=backend), copy.deepcopy(model).double()
    for seed in range(7):
        batch = hosts.batch("llama", seed=seed)
        exact = step(double, double, batch)[1]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            runs = [step(model, call, batch)[1] for call in (model, compiled)]
        own, error = (sum(float((run[n] - want).norm() / want.norm()) for n, want in exact.items()) for run in runs)
        ratios.append(error / own)
    assert sorted(ratios)[3] < 1.3 and max(ratios) < 10, ratios
    assert len(backend.applied()) == SITES and backend.refused() == {}


def test_several_adapters_at_once_become_one():
    model = peft_model()
    model.add_adapter("second", peft.LoraConfig(
        r=2, lora_alpha=1, init_lora_weights=False, target_modules=["q_proj", "up_proj"]))  # fmt: skip
    model.base_model.set_adapter(["default", "second"])
    model, backend = model.train(), Recorded(verify="raise")
    check_as_in_double(model, hosts.batch("llama"), backend)
    assert len(backend.applied()) == SITES + 2 and backend.refused() == {}
    assert op_counts(backend.graphs[0].graph_module("canonicalise"))["lora_linear"] == SITES


def test_dropout_is_seeded_and_eval_has_none():
    model, backend = peft_model(lora_dropout=0.4), Recorded()
    compiled = torch.compile(model, backend=backend)
    batch, losses = hosts.batch("llama"), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        losses.append(step(model, compiled, batch)[0])
    assert losses[0] == losses[1] != losses[2]
    found = op_counts(backend.graphs[0].graph_module("seed_dropout"))
    assert found["seeded_dropout"] == SITES and "dropout" not in found
    seeded = dialect.get("seeded_dropout").overload
    graph = backend.graphs[0].graph_module("seed_dropout").graph
    assert {node.args[2] for node in graph.find_nodes(op="call_function", target=seeded)} == {0.4}
    model.eval()
    torch.testing.assert_close(compiled(**batch).loss, model(**batch).loss)
    assert "dropout" not in op_counts(backend.graphs[-1].graph_module("canonicalise"))


def test_the_dropped_values_have_peft_s_expectation():
    model, backend = peft_model(lora_dropout=0.5, targets=["q_proj"]), Recorded()
    layer = next(m for m in model.modules() if isinstance(m, peft.tuners.lora.Linear))
    compiled = torch.compile(layer, backend=backend)
    x = torch.randn(3, 64)
    with torch.no_grad():
        mean = torch.stack([compiled(x) for _ in range(3000)]).mean(0)
        want = layer.eval()(x)
    assert backend.applied(), "the layer's own frame"
    assert float((mean - want).norm() / (want - layer.base_layer(x)).norm()) < 0.15


@pytest.mark.slow
def test_what_set_adapter_and_disable_adapter_change():
    model, backend = peft_model(), Recorded()
    model.add_adapter("second", peft.LoraConfig(r=3, lora_alpha=1, init_lora_weights=False, target_modules=["q_proj"]))
    compiled, batch = torch.compile(model, backend=backend), hosts.batch("llama")
    for name, sites in (("second", 1), ("default", SITES)):
        model.set_adapter(name)
        del backend.graphs[:]
        torch.testing.assert_close(compiled(**batch).loss, model(**batch).loss)
        assert len(backend.applied()) == sites
    with model.disable_adapter():
        del backend.graphs[:]
        torch.testing.assert_close(compiled(**batch).loss, model(**batch).loss)
        assert backend.applied() == []


def test_after_from_pretrained(tmp_path):
    first, batch = peft_model(), hosts.batch("llama")
    first.save_pretrained(tmp_path)
    base = hosts.build("llama", num_hidden_layers=1)
    model = peft.PeftModel.from_pretrained(base, tmp_path, is_trainable=True).train()
    backend = Recorded()
    torch.testing.assert_close(torch.compile(model, backend=backend)(**batch).loss, first(**batch).loss)
    assert len(backend.applied()) == SITES


def test_checkpointed_blocks():
    model, backend = peft_model(changes={"use_cache": False}), Recorded()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.get_base_model().disable_input_require_grads()
    check_as_in_double(model, hosts.batch("llama"), backend)
    assert len(backend.applied()) == SITES and backend.refused() == {}


def test_what_is_not_recognised_stays_and_says_why():
    model, backend = peft_model(lora_bias=True, targets=["q_proj"]), Recorded()
    check_as_in_double(model, hosts.batch("llama"), backend)
    assert backend.applied() == []
    assert set(backend.refused().values()) == {"its bottleneck is not the input of one linear layer without a bias"}
    model, backend = peft_model(targets=["embed_tokens", "q_proj"]), Recorded()
    check_as_in_double(model, hosts.batch("llama"), backend)
    assert len(backend.applied()) == 1
    (left,) = backend.refused().items()
    assert left == ("base_model.model.model.embed_tokens", "its first factor is not the weight of a linear layer")


@pytest.fixture
def without_kernels(monkeypatch):
    """The backend by its name with aot_eager below."""
    monkeypatch.setattr(peft_backend, "_told", set())
    monkeypatch.setattr(peft_backend, "AdapterBackend", lambda pipeline, options, tensors: AdapterBackend(
        pipeline, BackendOptions("aot_eager"), tensors))  # fmt: skip


def test_the_log_says_what_was_left_and_why(caplog, without_kernels):
    model = peft_model(targets=["embed_tokens", "q_proj"])
    with caplog.at_level(logging.INFO, logger="adaptc"):
        torch.compile(model, backend="adaptc")(**hosts.batch("llama"))
    assert [record.getMessage() for record in caplog.records if record.name == "adaptc"] == [
        "1 of PEFT's LoRA layers are rewritten",
        "left as it was: base_model.model.model.embed_tokens: its first factor is not the weight of a linear layer",
    ]


class Written(nn.Module):
    """LoRA's names with another form around them."""

    def __init__(self, change):
        super().__init__()
        self.base_layer, self.change = nn.Linear(6, 5), change
        self.lora_A, self.lora_B = nn.Linear(6, 2, bias=False), nn.Linear(2, 5, bias=False)

    def forward(self, x):
        if self.change == "none, after a cast of the model's own":
            x = x.double().to(torch.float32)
        y, h = self.base_layer(x), self.lora_A(x)
        if self.change == "a bottleneck that is read twice":
            return y + self.lora_B(h) * 2.0 + h.sum()
        if self.change == "a nonlinearity":
            return y + self.lora_B(h.relu()) * 2.0
        if self.change == "a tensor as scale":
            return y + self.lora_B(h) * y.mean()
        if self.change == "a write between":
            u = self.lora_B(h)
            x.mul_(2)
            return y + u * 2.0
        if self.change == "a write before the cast":
            total = y + self.lora_B(h) * 2.0
            x.mul_(2)
            return total.to(y.dtype)
        if self.change == "a bias instead of a layer":
            return self.base_layer.bias + self.lora_B(h) * 2.0
        if self.change == "subtracted":
            return y - self.lora_B(h) * 2.0
        return y + self.lora_B(h) * 2.0


CHANGES = [
    "a bottleneck that is read twice", "a nonlinearity", "a tensor as scale", "a write between", "subtracted",
    "a write before the cast", "a bias instead of a layer",
]  # fmt: skip


@pytest.mark.parametrize("change", [*CHANGES, "none", "none, after a cast of the model's own"])
def test_other_forms_compute_what_they_did(change):
    module, backend = Written(change), Recorded()
    x = torch.randn(4, 6)
    with torch.no_grad():
        got = torch.compile(module, backend=backend)(x.clone())
        torch.testing.assert_close(got, module(x.clone()))
    left = 0 if change.startswith("none") else 1
    assert (len(backend.applied()), len(backend.refused())) == (1 - left, left)


@pytest.mark.parametrize("root", ["L['self']", "L['args'][0]"])
def test_site_paths(root):
    modules = f"{root}.__dict__['_modules']['base_model'].__dict__['_modules']['model']._modules['layers']"
    tail = "._modules['0']._modules['q_proj']._modules['lora_A']._modules['default']._parameters['weight']"
    assert site_path(modules + tail) == "base_model.model.layers.0.q_proj"


@pytest.mark.inductor
@pytest.mark.slow
def test_by_its_name_under_inductor(caplog, monkeypatch):
    monkeypatch.setattr(peft_backend, "_told", set())
    peft_backend.GRAPHS.clear()
    model = peft_model(changes={"use_cache": False, "hidden_size": 32})
    with caplog.at_level(logging.INFO, logger="adaptc"):
        check_as_in_double(model, hosts.batch("llama"), "adaptc")
    assert "7 of PEFT's LoRA layers are rewritten" in caplog.text
    (graph,) = peft_backend.GRAPHS
    assert "lora_linear" in graph.stage("raise_peft")


@pytest.mark.slow
def test_a_break_is_told_once_with_the_cure(without_kernels):
    model = peft_model(use_dora=True, targets=["q_proj", "v_proj"])
    compiled = torch.compile(model, backend="adaptc")
    peft_backend.GRAPHS.clear()
    with pytest.warns(AdaptcWarning, match=r"adaptc\.compile\(peft_model\) takes the model over") as told:
        got = compiled(**hosts.batch("llama")).loss
    assert sum(graph.break_reason is not None for graph in peft_backend.GRAPHS) > 1
    assert len([w for w in told if issubclass(w.category, AdaptcWarning)]) == 1
    torch.testing.assert_close(got, model(**hosts.batch("llama")).loss)
    taken = adaptc.compile(copy.deepcopy(model), backend="aot_eager")
    torch.testing.assert_close(taken(**hosts.batch("llama")).loss, got)
    assert len(taken.adaptc.graphs) == 1
