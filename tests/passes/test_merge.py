"""The merge pass: what it folds and into what, against fp64, and every reason to leave a site."""

from __future__ import annotations

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import adaptc
from adaptc import IA3, SSF, Bias, LoRA
from adaptc.errors import PipelineError
from adaptc.ir.show import graph_text
from adaptc.passes import manager
from tests.files.peft_cases import randomise

MERGE = {"passes": {"order": ["merge"]}}
METHODS = {
    "lora": LoRA(r=2, init="random"),
    "biases": LoRA(r=2, init="random", bias="lora_only"),
    "dora": LoRA(r=2, init="random", dora=True),
    "ia3": IA3(init="random"),
    "ia3 on the input": IA3(init="random", feedforward=True),
    "ssf": SSF(),
    "bias": Bias(),
}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 10), nn.Linear(10, 4)

    def forward(self, x):
        return self.b(torch.relu(self.a(x))) * 2.0 + 1.0


def functions(base):
    """A graph that has the weights of linear layers, and calls no modules."""
    tracer = fx.Tracer()
    tracer.is_leaf_module = lambda *_: False
    return fx.GraphModule(base, tracer.trace(base))


TRACES = {"modules": fx.symbolic_trace, "functions": functions}


def adapted(method, trace=fx.symbolic_trace, base=None, dtype=torch.float64, **options):
    torch.manual_seed(0)
    gm = trace((Net() if base is None else base).eval().to(dtype))
    x = torch.randn(3, 6, dtype=dtype)
    plan = adaptc.Plan([adaptc.Rule(adaptc.Match(["a", "b"]), method)], **options)
    out = adaptc.rewrite(gm, plan, (x,)).eval()
    randomise(out)
    return out, x


def targets(gm):
    return [n.target for n in gm.graph.nodes if n.op not in ("placeholder", "get_attr", "output")]


@pytest.mark.parametrize("trace", TRACES.values(), ids=TRACES)
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_adapters_of_a_graph_are_folded_into_its_weights(method, trace):
    out, x = adapted(method, trace, passes={"order": ["insert"]})
    want, before = out(x), {name: p.clone() for name, p in out.named_parameters()}
    merged = adaptc.rewrite(out, MERGE, (x,), verify="raise")
    torch.testing.assert_close(merged(x), want, rtol=1e-12, atol=1e-12)
    assert [t for t in targets(merged) if t is F.linear] == [F.linear] * 2
    assert len(targets(merged)) == 2 + 3, "relu, and what the model multiplies and adds itself"
    assert not any("adapters" in name for name, _ in merged.named_parameters())
    report = merged.meta["adaptc_reports"][0]
    assert report.name == "merge" and len(report.result.applied) == 2 and report.result.refused == []
    assert all(torch.equal(p, before[name]) for name, p in out.named_parameters()), "the graph that was given stays"


def test_the_weight_is_the_exact_one_rounded_once():
    out, x = adapted(LoRA(r=2, init="random"), dtype=torch.bfloat16)
    merged = adaptc.rewrite(out, MERGE, (x,))
    for name in "ab":
        layer, adapter = out.get_submodule(name), out.get_submodule(f"{name}.adapters.default")
        A, B = adapter.lora_A.double(), adapter.lora_B.double()
        exact = layer.weight.double() + adapter.scaling * (B @ A)
        assert torch.equal(merged.get_parameter(f"{name}.merged_weight"), exact.bfloat16())
        assert torch.equal(merged.get_parameter(f"{name}.merged_bias"), layer.bias)


def test_a_plans_own_adapters_are_folded_at_once_and_read_by_stage():
    torch.manual_seed(0)
    gm, x = fx.symbolic_trace(Net().double().eval()), torch.randn(3, 6, dtype=torch.float64)
    plan = adaptc.Plan([LoRA(r=2, init="random", targets=["a"])], passes={"order": ["insert", "merge"]})
    stages = {}
    run = manager.Pipeline.run

    def reading(self, gm, level, context, **options):
        def on_stage(name, stage):
            stages[name] = graph_text(stage)

        return run(self, gm, level, context, **options, on_stage=on_stage)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(manager.Pipeline, "run", reading)
        torch.manual_seed(1)
        merged = adaptc.rewrite(gm, plan, (x,))
    torch.manual_seed(1)
    adapted = adaptc.rewrite(gm, adaptc.Plan(plan.rules), (x,))
    torch.testing.assert_close(merged(x), adapted(x), rtol=1e-12, atol=1e-12)
    assert "lora_linear" in stages["insert"] and "lora_linear" not in stages["merge"]
    assert "merged_weight:a" in stages["merge"] or "merged_weight" in stages["merge"]


def test_several_adapters_of_a_layer_are_folded_together():
    torch.manual_seed(0)
    gm, x = fx.symbolic_trace(Net().double().eval()), torch.randn(3, 6, dtype=torch.float64)
    rules = [adaptc.Rule(adaptc.Match(["a"]), LoRA(r=2, init="random")),
             adaptc.Rule(adaptc.Match(["a"]), IA3(init="random"), stack=True)]  # fmt: skip
    out = adaptc.rewrite(gm, adaptc.Plan(rules, passes={"order": ["insert"]}), (x,))
    merged = adaptc.rewrite(out, MERGE, (x,))
    torch.testing.assert_close(merged(x), out(x), rtol=1e-12, atol=1e-12)
    assert len(merged.meta["adaptc_reports"][0].result.applied) == 1


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return self.b(self.a(self.a(x)))


def test_a_layer_that_is_called_twice_is_folded_at_both_calls():
    out, x = adapted(LoRA(r=2, init="random"), base=Twice())
    merged = adaptc.rewrite(out, MERGE, (x,))
    torch.testing.assert_close(merged(x), out(x), rtol=1e-12, atol=1e-12)
    assert targets(merged) == [F.linear] * 3


def test_dropout_that_is_at_work_is_left():
    torch.manual_seed(0)
    gm, x = fx.symbolic_trace(Net().double()), torch.randn(3, 6, dtype=torch.float64)
    out = adaptc.rewrite(gm, adaptc.Plan([LoRA(r=2, dropout=0.5, targets=["a"])], passes={"order": ["insert"]}), (x,))
    merged = adaptc.rewrite(out, MERGE, (x,))
    reasons = dict(merged.meta["adaptc_reports"][0].result.refused)
    assert reasons == {"a": "its dropout is at work: the graph is one of training"}


def test_what_is_not_affine_is_left():
    out, x = adapted(LoRA(r=2, init="random"), passes={"order": ["insert"]})
    corrected = next(n for n in out.graph.nodes if n.target is operator.getitem)
    with out.graph.inserting_after(corrected):
        bent = out.graph.call_function(torch.tanh, (corrected,))
    bent.meta["custom"] = dict(corrected.meta["custom"])
    corrected.replace_all_uses_with(bent, delete_user_cb=lambda user: user is not bent)
    out.recompile()
    merged = adaptc.rewrite(out, MERGE, (x,))
    result = merged.meta["adaptc_reports"][0].result
    assert [site for site, _ in result.refused] == ["a"] and "tanh is not affine" in result.refused[0][1]
    torch.testing.assert_close(merged(x), out(x))


def test_an_output_that_is_read_before_it_is_corrected_is_left():
    out, x = adapted(LoRA(r=2, init="random"), passes={"order": ["insert"]})
    product = next(n for n in out.graph.nodes if n.op == "call_module" and n.target == "a")
    relu = next(n for n in out.graph.nodes if n.target is torch.relu)
    with out.graph.inserting_after(relu):
        total = out.graph.call_function(torch.add, (relu, product))
    relu.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)
    out.recompile()
    merged = adaptc.rewrite(out, MERGE, (x,))
    result = merged.meta["adaptc_reports"][0].result
    assert dict(result.refused) == {"a": "the layer's output is read before it is corrected"}
    assert len(result.applied) == 1
    torch.testing.assert_close(merged(x), out(x))


def test_merging_is_in_no_default_order():
    assert "merge" not in manager.default_order()
    out, x = adapted(LoRA(r=2, init="random"))
    assert any("adapters" in name for name, _ in out.named_parameters())
    with pytest.raises(PipelineError):
        adaptc.rewrite(out, {"passes": {"order": ["reassociate", "merge"]}}, (x,))
