"""Merged models: what they compute, in what order, what they report, and what is refused."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn

import adaptc
from adaptc import IA3, SSF, Bias, Bottleneck, Hydra, LoRA, Match, Plan, Prefix, Rule, TrainableTokens, VeRA
from adaptc.errors import AdapterNameError, UnsupportedError
from adaptc.runtime.weights import keep
from adaptc.runtime.weights.report import MergeReport
from tests.models import hosts
from tests.runtime.weights import cases
from tests.sites import moe as mixtures

pytestmark = pytest.mark.filterwarnings("ignore::adaptc.errors.NewSignatureWarning")
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL = "all-linear"
SMALL = LoRA(r=2, targets=["q_proj", "down_proj"], init="random")
LLAMA = {
    "lora": LoRA(r=3, targets=ALL, init="random"),
    "rslora": LoRA(r=3, targets=ALL, init="random", rslora=True),
    "dora": LoRA(r=3, targets=ALL, init="random", dora=True),
    "pissa": LoRA(r=3, targets=ALL, init="pissa"),
    "vera": VeRA(r=3, targets=ALL),
    "hydra": Hydra(r=2, targets=ALL, init="random", bias=False),
    "ia3": IA3(targets=["k_proj", "v_proj"], init="random"),
    "ia3 on the input": IA3(targets=["down_proj"], feedforward=True, init="random"),
    "embedding": LoRA(r=2, targets=["embed_tokens"], init="random"),
    "tokens": TrainableTokens(indices=(3, 5), targets=["embed_tokens"]),
    "full": Plan([Rule(Match(["lm_head"]), train="full")]),
}
MOE = {
    "experts": LoRA(r=2, targets=mixtures.NAMES, init="random"),
    "attention": LoRA(r=2, targets=ATTENTION, init="random"),
    "both": LoRA(r=2, targets=(*mixtures.NAMES, *ATTENTION), init="random"),
    "dora": LoRA(r=2, targets=ATTENTION, dora=True, init="random"),
}
VIT = {
    "lora": LoRA(r=2, targets=ALL, init="random"),
    "biases": LoRA(r=2, targets=ALL, init="random", bias="lora_only"),
    "bias": Bias(targets=ALL),
    "norms": Bias(targets=["layernorm_before"]),
    "ssf": SSF(targets=ALL),
    "convolution": LoRA(r=2, targets=["projection"], init="random"),
    "hydra": Hydra(r=2, targets=ALL, init="random"),
}
HOSTS = {"llama": (cases.llama, LLAMA, lambda: cases.IDS), "moe": (cases.moe, MOE, lambda: cases.IDS),
         "vit": (cases.vit, VIT, cases.images)}  # fmt: skip
EVERY = [(host, kind) for host, (_, kinds, _) in HOSTS.items() for kind in kinds]


def inputs_of_sites(model, batch):
    """Path of a site -> the input of its first call."""
    found, handles = {}, []
    for site in model.adaptc.sites:
        def keep_it(module, args, path=site.path):
            found.setdefault(path, args)
        handles.append(site.module.register_forward_pre_hook(keep_it))
    cases.logits(model, batch)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("host, kind", EVERY)
def test_what_merged_layers_compute_is_within_the_reported_error(host, kind):
    """Each layer on the inputs that it really gets, in fp64, so that only the rounding of the weights is seen."""
    build, kinds, batch = HOSTS[host]
    model = cases.compiled(build().to(torch.bfloat16), kinds[kind])
    exact = copy.deepcopy(model).double()
    batch = {n: t.double() if t.is_floating_point() else t for n, t in batch().items()}
    given = inputs_of_sites(exact, batch)
    want = {s.path: s.module(*given[s.path]) for s in exact.adaptc.sites}
    report = model.adaptc.merge()
    plain = model.adaptc.merge_and_unload().double()
    assert {row.path.rpartition(".")[0] for row in report.tensors} >= {p for p in given if "experts" not in p}
    for path, args in given.items():
        got = plain.get_submodule(path)(*args)
        rows = [row for row in report.tensors if row.path.startswith(f"{path}.")]
        if "experts" in path:  # two products, the second of which reads the first's error
            torch.testing.assert_close(got, want[path], rtol=2e-2, atol=2e-2)
            continue
        largest = float(args[0].abs().max()) if args[0].is_floating_point() else 1.0
        bound = sum(row.bound * (largest if row.path.endswith("weight") else 1.0) for row in rows)
        assert float((got - want[path]).abs().max()) <= bound * (1 + 1e-9) + 1e-12, path
        assert all(row.rms <= row.bound for row in rows)


@pytest.mark.parametrize("host, kind", EVERY)
def test_a_merged_model_computes_what_it_did(host, kind):
    build, kinds, batch = HOSTS[host]
    model = cases.compiled(build(), kinds[kind])
    want, base = cases.logits(model, batch()), cases.base_of(model)
    with torch.compiler.set_stance("force_eager"):
        report = model.adaptc.merge(example_inputs=batch())
    got = cases.logits(model, batch())
    scale = float(want.abs().max())
    assert report.output == pytest.approx(float((got.double() - want.double()).abs().max()))
    assert report.output < 1e-5 * max(scale, 1)
    model.adaptc.switch(None)
    assert cases.differing(model, base) == []
    assert float((cases.logits(model, batch()) - want).abs().max()) > 100 * report.output, "the adapter does something"


def test_the_reported_error_is_that_of_outputs_for_inputs_of_unit_variance():
    torch.manual_seed(0)
    model = cases.compiled(nn.Sequential(nn.Linear(48, 32)).bfloat16(), LoRA(r=4, targets=["0"], init="random")).eval()
    frozen, adapter = model[0].weight.detach().double().clone(), model[0].adapters["a"]
    exact = frozen + adapter.scaling * (adapter.lora_B.double() @ adapter.lora_A.double())
    report = model.adaptc.merge()
    row = next(row for row in report.tensors if row.path == "0.weight")
    x = torch.randn(20_000, 48, dtype=torch.float64)
    off = x @ (model[0].weight.double() - exact).mT
    assert float(off.square().mean().sqrt()) == pytest.approx(row.rms, rel=0.02)
    assert row.relative == pytest.approx(row.rms / float((x @ exact.mT).square().mean().sqrt()), rel=0.02)
    largest = (model[0].weight.double() - exact).sign()  # the input that makes the most of each row's error
    assert float((largest @ (model[0].weight.double() - exact).mT).abs().max()) == pytest.approx(row.bound)
    assert torch.equal(model[0].weight, exact.bfloat16()), "rounded once"
    assert report.worst is row and f"rms {row.rms:.2e}" in str(report)


@pytest.mark.parametrize("plan, module", [
    (LoRA(r=2, init="random"), nn.Conv1d(4, 6, 3)), (LoRA(r=2, init="random"), nn.Embedding(5, 4)),
])  # fmt: skip
def test_errors_of_other_layers_are_those_of_their_outputs(plan, module):
    model = cases.compiled(nn.Sequential(module.bfloat16()), Plan([Rule(Match(["0"]), plan)])).eval()
    before = copy.deepcopy(model).double()
    report = model.adaptc.merge()
    merged = model.adaptc.merge_and_unload().double()
    row = next(row for row in report.tensors if row.path == "0.weight")
    x = torch.arange(5) if isinstance(module, nn.Embedding) else torch.randn(300, 4, 40, dtype=torch.float64)
    off = (merged(x) - before(x)).detach()
    assert float(off.square().mean().sqrt()) == pytest.approx(row.rms, rel=0.05)


# ------------------------------------------------------------------------------------------ several


def three(live="a"):
    model = cases.compiled(cases.llama(), LoRA(r=2, targets=ALL, init="random"))
    model.adaptc.add("b", LoRA(r=3, targets=["q_proj", "up_proj"], init="random", dora=True))
    model.adaptc.add("c", IA3(targets=["q_proj", "v_proj"], init="random"))
    model.adaptc.add("d", LoRA(r=1, targets=["q_proj"], init="random"))
    cases.randomise(model)
    model.adaptc.switch(live)
    return model


def check_that_merging_changes_no_output(model):
    want, live = cases.logits(model), model.adaptc.live
    model.adaptc.merge()
    torch.testing.assert_close(cases.logits(model), want, rtol=1e-4, atol=1e-5)
    model.adaptc.unmerge()
    assert torch.equal(cases.logits(model), want) and model.adaptc.live == live


def test_the_order_of_names_and_of_calls_does_not_matter():
    model = three()
    base, seen = cases.base_of(model), {}
    for names in itertools.chain.from_iterable(itertools.permutations("abcd", n) for n in (1, 2, 3, 4)):
        model.adaptc.merge(names)  # from what the last ones were merged into
        assert model.adaptc.live == tuple(sorted(names))
        now = cases.base_of(model)
        known = seen.setdefault(frozenset(names), now)
        assert all(cases.same_bits(now[name], tensor) for name, tensor in known.items())
    assert len(seen) == 15
    model.adaptc.unmerge()
    assert cases.differing(model, base) == [] and model.adaptc.live == ("a",)


def test_several_compute_merged_what_they_do_live():
    check_that_merging_changes_no_output(three(["a", "b", "c"]))


def test_live_adapters_whose_order_matters_are_folded_in_that_order_or_not_at_all():
    model = three(["d", "a"])  # sums: the order is nothing
    check_that_merging_changes_no_output(model)
    model.adaptc.switch(["c", "a"])
    before = cases.base_of(model)
    with pytest.raises(UnsupportedError, match="the order in which these adapters act makes a difference") as error:
        model.adaptc.merge()
    assert error.value.facts["expected"] == "'a' then 'c'"
    assert error.value.facts["do"].startswith("model.adaptc.switch(['a', 'c']) first")
    assert cases.differing(model, before) == [] and model.adaptc.live == ("c", "a")


def test_the_same_names_again_do_nothing():
    model = three()
    report = model.adaptc.merge(["d", "a"])
    versions = [p._version for p in model.parameters()]
    assert model.adaptc.merge() is report and model.adaptc.merge(["a", "d"]) is report
    assert [p._version for p in model.parameters()] == versions
    assert isinstance(report, MergeReport) and report.names == ("a", "d")


def test_values_written_since_are_merged_anew():
    base = hosts.short("llama")
    model = adaptc.compile(copy.deepcopy(base), adaptc.LoRA(r=2, init="random", targets=["q_proj"]), backend="eager")
    model.adaptc.merge()
    layer = "model.layers.0.self_attn.q_proj"
    once = model.get_submodule(layer).weight.clone()
    with torch.no_grad():
        for parameter in model.adaptc.parameters():
            parameter.mul_(2)
    model.adaptc.merge()
    plain = base.get_submodule(layer).weight
    twice = model.get_submodule(layer).weight
    torch.testing.assert_close(twice - plain, 4 * (once - plain), rtol=1e-3, atol=1e-6)
    model.adaptc.unmerge()
    assert torch.equal(model.get_submodule(layer).weight, plain)


def test_what_was_live_is_live_again():
    model = three()
    model.adaptc.merge("b")
    model.adaptc.merge("d")
    assert model.adaptc.live == ("d",)
    model.adaptc.unmerge()
    assert model.adaptc.live == ("a",)
    model.adaptc.unmerge()  # nothing to undo
    model.adaptc.merge("b")
    with model.adaptc.disable_adapter():
        assert model.adaptc.live == ()
    assert model.adaptc.live == ("b",) and model.adaptc.metrics()["merged"] == 1
    model.adaptc.unmerge()
    assert model.adaptc.live == ("a",)


UNDOES = {
    "switch": lambda m, d: m.adaptc.switch("d"),
    "switch to the same": lambda m, d: m.adaptc.switch(["a", "b"]),
    "load": lambda m, d: m.adaptc.load(d, "a"),
    "remove another": lambda m, d: m.adaptc.remove("d"),
    "remove": lambda m, d: m.adaptc.remove("a"),
    "detach": lambda m, d: m.adaptc.detach(),
}


@pytest.mark.parametrize("what", UNDOES)
def test_what_changes_the_adapters_unmerges_first(what, tmp_path):
    model = three()
    base = cases.base_of(model)
    model.adaptc.save(tmp_path, "a")
    model.adaptc.merge(["a", "b"])
    handle = model.adaptc
    UNDOES[what](model, tmp_path)
    assert cases.differing(model, base) == [] and handle.metrics()["merged"] == 0
    assert not any(module._state_dict_hooks for module in model.modules())


def test_a_refused_change_leaves_what_is_merged():
    model = three()
    model.adaptc.merge("b")
    merged = cases.base_of(model)
    for act in (lambda: model.adaptc.switch("e"), lambda: model.adaptc.remove("e"), lambda: model.adaptc.merge("e"),
                lambda: model.adaptc.merge(["a", "a"]), lambda: model.adaptc.add("a", SMALL)):  # fmt: skip
        with pytest.raises(AdapterNameError):
            act()
    model.adaptc.add("e", Bottleneck(targets=["gate_proj"]))
    with pytest.raises(UnsupportedError, match="cannot be merged"):
        model.adaptc.merge(["a", "e"])
    assert cases.differing(model, merged) == [] and model.adaptc.live == ("b",)


# ------------------------------------------------------------------------------------------ for good


def test_merging_for_good_is_merging_and_forgetting():
    model = three(["a", "b", "c"])
    twin = copy.deepcopy(model)
    model.adaptc.merge()
    merged = cases.base_of(model)
    plain = twin.adaptc.merge_and_unload()
    assert cases.differing(plain, merged) == [] and not hasattr(plain, "adaptc")
    assert cases.differing(model.adaptc.merge_and_unload(), merged) == []
    assert not any(m._state_dict_hooks or m._forward_hooks for m in model.modules())
    assert all(cases.same_bits(t, merged[n]) for n, t in model.state_dict().items())


def test_saved_merged_weights_are_the_merged_ones(tmp_path):
    model = three(["a", "b"])
    model.save_pretrained(tmp_path / "live", merge=True)
    model.adaptc.merge()
    merged = cases.base_of(model)
    model.save_pretrained(tmp_path / "merged", merge=True)
    assert (tmp_path / "live/model.safetensors").read_bytes() == (tmp_path / "merged/model.safetensors").read_bytes()
    read = type(model).from_pretrained(tmp_path / "merged")
    assert cases.differing(read, merged) == []


def test_embeddings_that_came_with_an_adapter_are_merged_with_it(tmp_path):
    trained = cases.compiled(cases.llama(), LoRA(r=2, targets=["q_proj"], init="random"))
    with torch.no_grad():
        trained.model.embed_tokens.weight[[3, 7]] += 0.5
    trained.adaptc.save(tmp_path, save_embedding_layers=True)
    want = cases.logits(trained)
    base = cases.llama()
    before = cases.base_of(base)
    model = adaptc.compile(base, tmp_path, backend="eager").eval()
    torch.testing.assert_close(cases.logits(model), want)
    report = model.adaptc.merge()
    assert "model.embed_tokens.weight" in {row.path for row in report.tensors}
    torch.testing.assert_close(cases.logits(model), want)
    state = model.state_dict()
    assert all(cases.same_bits(state[n], before[n]) for n in state if not cases.is_ours(n))
    model.adaptc.unmerge()
    torch.testing.assert_close(cases.logits(model), want)
    model.adaptc.switch(None)
    assert cases.differing(model, before) == []
    model.adaptc.switch("default")
    torch.testing.assert_close(cases.logits(model.adaptc.merge_and_unload()), want)


# ------------------------------------------------------------------------------------------ calls


def test_merging_after_a_call_without_adapters_compiles_nothing():
    model = adaptc.compile(cases.llama(num_hidden_layers=1), SMALL, backend="aot_eager", name="a")
    def logits(model):
        with torch.no_grad():
            return model(**cases.IDS).logits

    model.adaptc.switch(None)
    logits(model)
    graphs = model.adaptc.metrics()["graphs"]
    model.adaptc.switch("a")
    want = logits(model)
    for _ in range(3):
        before = model.adaptc.metrics()["graphs"]
        model.adaptc.merge()
        torch.testing.assert_close(logits(model), want)
        model.adaptc.unmerge()
        assert torch.equal(logits(model), want)
        assert model.adaptc.metrics()["graphs"] == before
    assert model.adaptc.metrics()["graphs"] == 2 * graphs and model.adaptc.metrics()["eager_sites"] == 0


def test_the_kept_base_stands_in_the_metrics():
    model = three()
    model.adaptc.merge("d")
    kept = sum(layer.self_attn.q_proj.weight.nbytes for layer in model.model.layers)
    assert model.adaptc.metrics()["kept_bytes"] == kept
    assert "adapter 'd' (merged)" in str(model.adaptc.explain())
    model.adaptc.unmerge()
    assert model.adaptc.metrics()["kept_bytes"] == model.adaptc.metrics()["merged"] == 0


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_backward_that_is_still_to_come_is_waited_for(backend):
    model = adaptc.compile(cases.llama(num_hidden_layers=1), SMALL, backend=backend, name="a").eval()
    base = cases.base_of(model)
    loss = model(**cases.IDS).logits.sum()
    with pytest.raises(UnsupportedError, match="merge: a backward is still to come"):
        model.adaptc.merge()
    assert cases.differing(model, base) == [] and model.adaptc.live == ("a",)
    loss.backward()
    model.adaptc.merge()
    model.adaptc.unmerge()
    output = model(**cases.IDS)
    del output
    model.adaptc.merge()
    model.adaptc.unmerge()
    first, second = model(**cases.IDS).logits, model(**cases.IDS).logits
    first.sum().backward()
    with pytest.raises(UnsupportedError, match="a backward is still to come"):
        model.adaptc.merge()
    assert second is not None


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_graph_that_was_kept_raises_after_the_weights_have_changed(backend):
    model = adaptc.compile(cases.llama(num_hidden_layers=1), SMALL, backend=backend, name="a").eval()
    loss = model(**cases.IDS).logits.sum()
    loss.backward(retain_graph=True)
    model.adaptc.merge()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_training_mode_is_refused_where_gradients_are_on():
    model = three().train()
    with pytest.raises(UnsupportedError, match="merge: the model is in training mode with gradients on"):
        model.adaptc.merge()
    with torch.no_grad():
        model.adaptc.merge()
    with pytest.raises(UnsupportedError, match="a call in training mode: the adapters are merged"):
        model(**cases.IDS)
    model.eval()
    cases.logits(model)


def test_more_than_the_free_memory_is_refused_before_anything_changes(monkeypatch):
    model = three()
    base = cases.base_of(model)
    needed = sum(layer.self_attn.q_proj.weight.nbytes for layer in model.model.layers)
    for name, how in (("free_memory", "memory"), ("free_disk", "disk")):
        with monkeypatch.context() as patched:
            patched.setattr(keep, name, lambda *_: needed - 1)
            with pytest.raises(UnsupportedError, match="the base's weights that are to be kept do not fit") as error:
                model.adaptc.merge("d", keep=how)
            assert error.value.facts["found"] == f"{needed - 1:,} bytes"
            assert cases.differing(model, base) == [] and model.adaptc.live == ("a",)
            patched.setattr(keep, name, lambda *_: needed)
            model.adaptc.merge("d", keep=how)
            model.adaptc.unmerge()
    assert keep.free_memory(torch.device("cpu")) > 0 and keep.free_disk() > 0
    assert keep.free_memory(torch.device("meta")) is None


def test_what_keeps_the_base_is_one_of_three():
    with pytest.raises(ValueError, match='keep is "memory", "disk" or None'):
        three().adaptc.merge(keep="here")
    model = three()
    model.adaptc.switch(None)
    with pytest.raises(AdapterNameError, match="merge: no adapter is live"):
        model.adaptc.merge()


@pytest.mark.parametrize("plan", [
    Bottleneck(targets=["gate_proj"]), Prefix(num_virtual_tokens=2), LoRA(r=2, targets=["embed_tokens"]),
], ids=["bottleneck", "prefix", "tied"])  # fmt: skip
def test_what_weights_cannot_express_is_refused(plan):
    model = cases.compiled(cases.llama(tie_word_embeddings=True), plan)
    base = cases.base_of(model)
    with pytest.raises(UnsupportedError, match="cannot be merged"):
        model.adaptc.merge()
    assert cases.differing(model, base) == [] and model.adaptc.live == ("a",)
