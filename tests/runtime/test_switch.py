"""Which adapter is live is data: changing it compiles nothing among adapters of one signature."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

import adaptc
from adaptc.errors import AdapterNameError, NewSignatureWarning, UnsupportedError
from tests.models import hosts
from tests.reference import check_against_reference, factors_of, loss_of, reference_model


def lora(r=3, **options):
    return adaptc.LoRA(r=r, alpha=6, init="random", targets="all-linear", **options)


@pytest.fixture
def pair():
    base = hosts.short("llama", train=True)
    model = adaptc.compile(copy.deepcopy(base), lora(), name="a", backend="aot_eager")
    model.adaptc.add("b", lora())
    return base, model, hosts.batch("llama")


def test_switching_among_equal_signatures_compiles_nothing(pair):
    base, model, batch = pair
    check_against_reference(model, base, batch, name="a")
    for step in range(30):
        name = "ab"[step % 2]
        model.adaptc.switch(name)
        if step < 4:
            check_against_reference(model, base, batch, name=name)
        else:
            model(**batch)
    assert (model.adaptc.metrics()["graphs"], model.adaptc.metrics()["signatures"]) == (1, 1)


def test_only_the_live_adapter_gets_gradients(pair):
    _, model, batch = pair
    model.adaptc.switch("b")
    model(**batch).loss.backward()
    assert all(p.grad is None for p in model.adaptc.parameters("a"))
    assert all(p.grad.abs().max() > 0 for p in model.adaptc.parameters("b"))


def test_a_new_signature_compiles_once_and_is_announced(pair):
    base, model, batch = pair
    model(**batch)
    model.adaptc.add("wide", lora(r=5))
    with pytest.warns(NewSignatureWarning, match="'wide': kinds, shapes or dtypes not seen before"):
        model.adaptc.switch("wide")
    check_against_reference(model, base, batch, name="wide")
    assert model.adaptc.metrics()["recompiles"] == 1
    for name in ("a", "wide", "b", "wide"):
        model.adaptc.switch(name)
        check_against_reference(model, base, batch, name=name)
    metrics = model.adaptc.metrics()
    assert (metrics["graphs"], metrics["recompiles"], metrics["signatures"]) == (2, 1, 2)


def test_recompiles_are_those_of_this_model():
    for _ in range(3):
        model = adaptc.compile(nn.Sequential(nn.Linear(4, 3)), lora(dropout=0.1), backend="eager")
        model(torch.randn(2, 4))
        metrics = model.adaptc.metrics()
        assert (metrics["graphs"], metrics["recompiles"]) == (1, 0)
    model.eval()(torch.randn(2, 4))
    metrics = model.adaptc.metrics()
    assert (metrics["graphs"], metrics["recompiles"]) == (2, 1)


def test_none_gives_the_base_and_its_own_graph(pair):
    base, model, batch = pair
    model(**batch)
    with pytest.warns(NewSignatureWarning, match="no adapter"):
        model.adaptc.switch(None)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, base(**batch).logits)
    assert model.adaptc.graphs[-1].sites == []
    assert model.adaptc.metrics()["recompiles"] == 1, "of the frame that adapters ran through"


def test_several_adapters_together_add_up(pair):
    base, model, batch = pair
    model.adaptc.switch(["a", "b"])
    model.eval()
    factors = {p: f + factors_of(model, "b")[p] for p, f in factors_of(model, "a").items()}
    expected = loss_of(reference_model(base.eval(), factors)(**batch))
    torch.testing.assert_close(model(**batch).loss.double(), expected.double(), rtol=1e-5, atol=1e-6)
    graph = model.adaptc.graphs[-1].graph_module("canonicalise")
    calls = [n for n in graph.graph.nodes if "lora_linear" in str(n.target)]
    assert len(calls) == 7, "two adapters of a site are one node"


def test_the_scale_is_data(pair):
    base, model, batch = pair
    model(**batch)
    for scale in (0.0, -1.5, 7.0):
        for site in model.adaptc.sites:
            site.adapters["a"].scaling = scale
        factors = {p: [(A, B, scale)] for p, [(A, B, _)] in factors_of(model, "a").items()}
        expected = loss_of(reference_model(base, factors)(**batch))
        torch.testing.assert_close(model(**batch).loss.double(), expected.double(), rtol=1e-5, atol=1e-6)
    assert model.adaptc.metrics()["graphs"] == 1


def test_a_scale_written_by_hand_is_seen_wherever_the_scale_is_read(pair):
    base, model, batch = pair
    for site in model.adaptc.sites:
        site.adapters["a"].scale.fill_(-1.5)
    model.double().float()
    factors = {p: [(A, B, -1.5)] for p, [(A, B, _)] in factors_of(model, "a").items()}
    expected = loss_of(reference_model(base, factors)(**batch))
    torch.testing.assert_close(model(**batch).loss.double(), expected.double(), rtol=1e-5, atol=1e-6)
    assert all(site.adapters["a"].scaling == -1.5 for site in model.adaptc.sites)
    merged = model.adaptc.merge_and_unload()
    torch.testing.assert_close(merged(**batch).loss.double(), expected.double(), rtol=1e-5, atol=1e-6)


def test_removing(pair):
    base, model, batch = pair
    model(**batch)
    model.adaptc.switch("b")
    model.adaptc.remove("a")
    check_against_reference(model, base, batch, name="b")
    assert model.adaptc.metrics()["graphs"] == 1, "the sites are the same: nothing is captured again"
    assert list(model.adaptc.records) == ["b"] and not any(".a." in n for n in model.state_dict())
    model.adaptc.remove("b")
    assert model.adaptc.sites == [] and list(model.state_dict()) == list(base.state_dict())
    assert torch.equal(model(**batch).logits, base(**batch).logits)


def test_names(pair):
    _, model, _ = pair
    with pytest.raises(AdapterNameError, match=r"no adapter named 'c'\n  found  adapters: a, b"):
        model.adaptc.switch("c")
    with pytest.raises(AdapterNameError, match="a name is given twice: a, a"):
        model.adaptc.switch(["a", "a"])
    with pytest.raises(AdapterNameError, match="an adapter named 'a' is there already"):
        model.adaptc.add("a", lora())
    with pytest.raises(AdapterNameError):
        model.adaptc.add("a.b", lora())
    assert model.adaptc.live == ("a",) and list(model.adaptc.records) == ["a", "b"]


def test_warmup_compiles_ahead_and_leaves_no_trace(pair):
    _, model, batch = pair
    model.adaptc.add("wide", lora(r=5, dropout=0.5))
    state = {k: v.clone() for k, v in model.state_dict().items()}
    random_state = torch.get_rng_state()
    model.adaptc.warmup(example_inputs=batch)
    assert model.adaptc.live == ("a",)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    graphs = model.adaptc.metrics()["graphs"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("wide", "b", "a"):
            model.adaptc.switch(name)
            model(**batch).loss.backward()
    assert model.adaptc.metrics()["graphs"] == graphs == 2


def test_warmup_needs_inputs():
    model = adaptc.compile(nn.Sequential(nn.Linear(4, 3)), lora(), backend="eager")
    with pytest.raises(ValueError, match="no example inputs: pass example_inputs="):
        model.adaptc.warmup()


def test_full_copies_switch_with_their_adapter():
    # transformers sets the problem type in the first call, and a changed config recompiles any model.
    base = hosts.short("bert", problem_type="single_label_classification")
    plan = [{"match": {"targets": ["classifier"]}, "train": "full"}, lora()]
    model = adaptc.compile(copy.deepcopy(base), plan, name="a", backend="aot_eager")
    model.adaptc.add("b", plan)
    batch = hosts.batch("bert")
    with torch.no_grad():
        for parameter in model.adaptc.parameters("b"):
            parameter.mul_(1.5)
    logits = {}
    for name in ("a", "b", "a", "b"):
        model.adaptc.switch(name)
        logits.setdefault(name, []).append(model(**batch).logits)
    assert torch.equal(*logits["a"]) and torch.equal(*logits["b"]) and not torch.equal(logits["a"][0], logits["b"][0])
    assert model.adaptc.metrics()["graphs"] == 1
    with pytest.raises(adaptc.errors.SiteError, match="classifier cannot be replaced by two adapters at once"):
        model.adaptc.switch(["a", "b"])
    assert model.adaptc.live == ("b",)


def test_learning_rate_groups_and_step_hooks(pair):
    _, model, batch = pair
    groups = model.adaptc.param_groups("a", lr=0.1, lr_ratio=16.0, weight_decay=0.01)
    by_name = dict(model.adaptc.named_parameters("a"))
    assert [g["lr"] for g in groups] == [0.1, 1.6]
    assert [id(p) for p in groups[1]["params"]] == [id(p) for n, p in by_name.items() if n.endswith("lora_B")]
    assert len(model.adaptc.param_groups("a", lr=0.1)) == 1
    with pytest.raises(ValueError, match="lr_ratio needs lr"):
        model.adaptc.param_groups(lr_ratio=2.0)
    optimizer = torch.optim.SGD(groups)
    seen = []
    for site in model.adaptc.sites:
        site.adapters["a"].after_step = lambda opt, path=site.path: seen.append((opt, path))
    handle = model.adaptc.on_step(optimizer)
    model(**batch).loss.backward()
    optimizer.step()
    assert seen == [(optimizer, site.path) for site in model.adaptc.sites]
    handle.remove()
    optimizer.step()
    assert len(seen) == len(model.adaptc.sites)


def test_what_is_not_there_yet_says_so(pair):
    _, model, _ = pair
    with pytest.raises(UnsupportedError, match=r"model.adaptc.compose is not in this version\n  missing  combining"):
        model.adaptc.compose()
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        model.adaptc.nonsense()
