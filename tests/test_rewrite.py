"""``adaptc.rewrite``: the passes on a plain graph module."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import fx, nn

import adaptc
from adaptc.errors import PlanError, SiteError, UnsupportedError
from adaptc.ir.show import graph_text
from tests.models import hosts

LORA = adaptc.LoRA(r=3, alpha=6, init="random", targets="all-linear")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 10), nn.Linear(10, 4, bias=False)

    def forward(self, x):
        return self.b(torch.relu(self.a(x)))


def by_formula(base, out, x, scale=2.0):
    """relu(x W^T + b + s x A^T B^T) ... in fp64; returns the value and the factors with their gradients."""
    factors = {n: p.detach().double().requires_grad_() for n, p in out.named_parameters() if ".adapters." in n}

    def layer(name, x):
        module = getattr(base, name)
        A, B = (factors[f"{name}.adapters.default.lora_{f}"] for f in "AB")
        bias = 0 if module.bias is None else module.bias.double()
        return x @ module.weight.double().T + bias + scale * (x @ A.T @ B.T)

    y = layer("b", torch.relu(layer("a", x.double())))
    y.sum().backward()
    return y, {n: p.grad for n, p in factors.items()}


def traced(kind, base, x):
    if kind == "modules":
        return fx.symbolic_trace(base), (x,)
    if kind == "functions":
        tracer = fx.Tracer()
        tracer.is_leaf_module = lambda *_: False
        return fx.GraphModule(base, tracer.trace(base)), (x,)
    if kind == "export":
        return torch.export.export(base, (x,)).module(), (x,)
    found = []

    def backend(gm, inputs):
        found.append((gm, inputs))
        return gm

    torch.compile(base, backend=backend)(x)
    return found[0]


@pytest.mark.parametrize("verify", [False, "raise"])
@pytest.mark.parametrize("kind", ["modules", "functions", "export", "dynamo"])
def test_values_and_gradients(kind, verify):
    base, x = Net(), torch.randn(5, 6)
    gm, inputs = traced(kind, base, x)
    before = gm.print_readable(print_output=False)
    out = adaptc.rewrite(gm, LORA, inputs, verify=verify)
    result = out(*inputs)
    y = result[0] if isinstance(result, tuple) else result
    expected, gradients = by_formula(base, out, x)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    base.zero_grad()
    y.sum().backward()
    for name, parameter in out.named_parameters():
        if ".adapters." in name:
            torch.testing.assert_close(parameter.grad.double(), gradients[name], rtol=1e-5, atol=1e-5)
    reports = {r.name: len(r.result.applied) for r in out.meta["adaptc_reports"]}
    applied = {"insert": 2, "lift_no_grad": 0, "canonicalise": 4, "seed_dropout": 0}
    assert reports == applied, "dropout and scale, of two sites"
    assert gm.print_readable(print_output=False) == before, "the graph that was given is not changed"
    assert list(base.state_dict()) == ["a.weight", "a.bias", "b.weight"] and not hasattr(base.a, "adapters")


def test_base_is_shared_frozen_and_keeps_its_flags():
    base = Net()
    out = adaptc.rewrite(fx.symbolic_trace(base), LORA, (torch.randn(5, 6),))
    assert out.a.weight.data_ptr() == base.a.weight.data_ptr()
    assert not out.a.weight.requires_grad and base.a.weight.requires_grad


def test_reads_well():
    out = adaptc.rewrite(fx.symbolic_trace(Net()), LORA, (torch.randn(5, 6),))
    assert '%y:a, _ = lora_linear(@x, %a, A:a, B:a, s:a, scale_at="r")' in graph_text(out)


def test_plans_passes_options_are_honoured():
    plan = adaptc.Plan([LORA], passes={"skip": ["canonicalise"]})
    out = adaptc.rewrite(fx.symbolic_trace(Net()), plan, (torch.randn(5, 6),))
    assert [r.name for r in out.meta["adaptc_reports"]] == ["insert", "lift_no_grad", "seed_dropout"]
    assert 'scale_at="n"' in graph_text(out)


def test_a_layer_called_twice_is_adapted_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 6)

        def forward(self, x):
            return self.fc(torch.relu(self.fc(x)))

    base, x = Twice(), torch.randn(5, 6)
    out = adaptc.rewrite(fx.symbolic_trace(base), LORA, (x,))
    A, B = out.fc.adapters.default.lora_A, out.fc.adapters.default.lora_B
    merged = copy.deepcopy(base)
    merged.fc.weight.data += 2.0 * (B @ A).detach()
    torch.testing.assert_close(out(x), merged(x), rtol=1e-5, atol=1e-5)


def test_full_training_of_a_head_and_stacked_rules():
    base, x = Net(), torch.randn(5, 6)
    rules = [
        {"match": {"targets": ["b"]}, "train": "full"},
        {"match": {"targets": ["a"]}, "method": {"kind": "lora", "r": 2, "init": "random"}},
        {"match": {"targets": ["a"]}, "method": {"kind": "lora", "r": 3, "init": "random"}, "stack": True},
    ]
    out = adaptc.rewrite(fx.symbolic_trace(base), adaptc.Plan(rules), (x,), verify="raise")
    out(x).sum().backward()
    trained = {n for n, p in out.named_parameters() if p.grad is not None}
    assert "b.adapters.default.copy.weight" in trained and len(trained) == 5
    gm, inputs = traced("functions", base, x)
    with pytest.raises(SiteError, match="b cannot be trained in full: the graph computes it without its module"):
        adaptc.rewrite(gm, adaptc.Plan(rules), inputs)


def test_errors():
    class Unused(Net):
        def forward(self, x):
            return self.a(x)

    gm = fx.symbolic_trace(Net())
    with pytest.raises(PlanError, match="matches nothing"):
        adaptc.rewrite(gm, adaptc.LoRA(targets=["c"]), (torch.randn(5, 6),))
    gm.graph.find_nodes(op="call_module", target="b")[0].replace_all_uses_with(
        gm.graph.find_nodes(op="call_module", target="a")[0]
    )
    gm.graph.eliminate_dead_code()
    with pytest.raises(SiteError, match="b is not called in this graph"):
        adaptc.rewrite(gm, LORA, (torch.randn(5, 6),))


def test_a_transformers_model_that_dynamo_captured():
    model, batch = hosts.build("llama"), hosts.batch("llama")
    found = []

    def backend(gm, inputs):
        found.append((gm, inputs))
        return gm

    torch.compile(model, backend=backend)(**batch)
    gm, inputs = found[0]
    plan = adaptc.LoRA(r=3, alpha=6, init="random", targets=["q_proj", "down_proj"])
    out = adaptc.rewrite(gm, plan, inputs, verify="raise")
    assert [len(r.result.applied) for r in out.meta["adaptc_reports"]] == [4, 0, 8, 0]
    (loss,) = (t for t in out(*inputs) if t.dim() == 0)
    for path in (f"model.layers.{i}.{m}" for i in (0, 1) for m in ("self_attn.q_proj", "mlp.down_proj")):
        adapter = out.get_submodule(path).adapters["default"]
        model.get_submodule(path).weight.data += 2.0 * (adapter.lora_B @ adapter.lora_A).detach()
    torch.testing.assert_close(loss, model(**batch).loss, rtol=1e-5, atol=1e-6)


def as_graph(module):
    tracer = fx.Tracer()
    tracer.is_leaf_module = lambda *_: False
    return fx.GraphModule(module, tracer.trace(module))


def test_an_adapter_on_the_input_acts():
    base, x = Net(), torch.randn(5, 6)
    plan = adaptc.IA3(targets=["a"], feedforward=True, init="random")
    for gm in (fx.symbolic_trace(base), as_graph(base)):
        out = adaptc.rewrite(gm, plan, (x,), verify="raise")
        scale = out.a.adapters.default.ia3_l
        expected = base(x * scale)
        torch.testing.assert_close(out(x), expected, rtol=1e-5, atol=1e-6)
        out(x).sum().backward()
        assert scale.grad.abs().max() > 0


def test_every_call_is_adapted_however_it_is_written():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Linear(6, 4)

        def forward(self, x):
            function = torch.nn.functional.linear
            W, b = self.w.weight, self.w.bias
            return self.w(input=x) + self.w(x) + function(x, weight=W, bias=b) + torch.addmm(b, x, torch.t(W))

    base, x = Mixed(), torch.randn(5, 6)
    for gm in (fx.symbolic_trace(base), as_graph(base)):
        out = adaptc.rewrite(gm, LORA, (x,))
        adapter = out.w.adapters.default
        expected = base(x) + 4 * 2.0 * x @ adapter.lora_A.T @ adapter.lora_B.T
        torch.testing.assert_close(out(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("use", [lambda x, W: x @ W.t(), lambda x, W: torch.mm(x, W), lambda x, W: x + W.sum()])
def test_a_reader_of_the_weight_that_is_not_understood_is_refused(use):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Linear(6, 6)

        def forward(self, x):
            return self.w(x) + use(x, self.w.weight)

    with pytest.raises(SiteError, match=r"w: %.* reads its weight in a way that cannot be adapted"):
        adaptc.rewrite(fx.symbolic_trace(Odd()), LORA, (torch.randn(5, 6),))


def test_methods_that_need_more_than_a_graph_say_so():
    gm, x = fx.symbolic_trace(Net()), torch.randn(5, 6)
    with pytest.raises(PlanError, match="a: lora is to start from the covariance of its inputs"):
        adaptc.rewrite(gm, adaptc.LoRA(r=2, init="corda", targets=["a"]), (x,))
    for method in (adaptc.VeRA(r=4, targets=["a"]), adaptc.Hydra(targets=["a"])):
        with pytest.raises(UnsupportedError, match=f"adaptc.rewrite cannot read what {method.kind} does at a site"):
            adaptc.rewrite(gm, method, (x,))


def test_a_layer_that_reads_an_adapted_one_gets_its_corrected_output():
    torch.manual_seed(0)
    base, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).double(), torch.randn(3, 4, dtype=torch.float64)
    out = adaptc.rewrite(fx.symbolic_trace(base), adaptc.LoRA(r=2, init="random", targets="all-linear"), (x,))
    h = x
    for i in "01":
        A, B = (out.get_parameter(f"{i}.adapters.default.lora_{f}") for f in "AB")
        layer = base.get_submodule(i)
        h = h @ layer.weight.T + layer.bias + out.get_submodule(f"{i}.adapters.default").scaling * (h @ A.T @ B.T)
    torch.testing.assert_close(out(x), h)
