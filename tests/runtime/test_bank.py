"""A bank: within its capacities adapters come, go, change and act without a compilation, and act as without a bank."""

from __future__ import annotations

import copy
import io
import random
import warnings

import peft
import pytest
import torch
from torch import nn

import adaptc
from adaptc.errors import BankError, NewSignatureWarning, PlanError, SiteError, UnsupportedError
from tests.methods.in_fp64 import randomise
from tests.models import hosts
from tests.runtime.rows import HOSTS, adapted, logits

pytestmark = pytest.mark.filterwarnings("ignore::adaptc.errors.NewSignatureWarning")

KINDS = ["lora", "ia3", "ssf", "vera", "hydra", "bottleneck", "bias"]
#: A regular expression on the linear layers of each host: one for some of them, one for others.
SOME = {"llama": ("q_proj", "down_proj"), "qwen3_moe": ("q_proj", "o_proj"), "vit": ("q_proj", "fc2")}


def plans(host):
    """Adapters of all kinds, ranks up and down, at layers that only some of them have."""
    first, last = SOME[host]
    found = {
        "small": adaptc.LoRA(r=2, targets=[first]),
        "wide": adaptc.LoRA(r=16, alpha=8, rslora=True, targets="all-linear"),
        "dora": adaptc.LoRA(r=3, dora=True, targets=[first, last]),
        "ia3": adaptc.IA3(targets=[first, last], feedforward=[last]),
        "ssf": adaptc.SSF(targets=[last]),
        "vera": adaptc.VeRA(r=5, targets=[first]),
        "hydra": adaptc.Hydra(r=2, targets=[last]),
        "bottleneck": adaptc.Bottleneck(r=4, targets=[last]),
    }
    return {**found, "biases": adaptc.Bias(targets=[first])} if host == "vit" else found


def banked(base, wanted, *, bank=None, **options):
    """A copy of ``base`` with a bank and these adapters, with other than their initial values."""
    options = {"backend": "aot_eager", **options}
    model = adaptc.compile(copy.deepcopy(base), bank=bank or adaptc.Bank(KINDS, 16, slots=len(wanted) + 1), **options)
    for name, plan in wanted.items():
        model.adaptc.add(name, plan)
    randomise(model)
    return model


def twin_of(model, base, wanted):
    """The same adapters with the same values without a bank, op by op."""
    twin = adapted(base, wanted, backend="eager")
    values = dict(model.adaptc.named_parameters())
    with torch.no_grad():
        for name, parameter in twin.adaptc.named_parameters():
            parameter.copy_(values[name])
    return twin


def op_by_op(model, inputs):
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        return logits(model(**inputs))


def check_trace(model, base, wanted, inputs, *, steps, seed=0, tolerance=1e-9):
    """Random switches, batches, removals, additions and writes: each call as in a model without a bank, no graph more.
    Without an adapter the outputs are, to the bit, what they were before there was one."""
    draw, twin, count = random.Random(seed), twin_of(model, base, wanted), len(next(iter(inputs.values())))
    with torch.no_grad():
        model.adaptc.switch(None)
        alone = logits(model(**inputs))
    want = dict.fromkeys(wanted)
    before = model.adaptc.metrics()

    def expected(name):
        if want[name] is None:
            twin.adaptc.switch(name)
            want[name] = op_by_op(twin, inputs)
        return want[name]

    for _ in range(steps):
        names = list(wanted)
        action = draw.choice(["one", "one", "none", "several", "batch", "write", "again"])
        name = draw.choice(names)
        with torch.no_grad():
            if action == "one":
                model.adaptc.switch(name)
                torch.testing.assert_close(logits(model(**inputs)), expected(name), rtol=tolerance, atol=tolerance)
            elif action == "none":
                model.adaptc.switch(None)
                assert torch.equal(logits(model(**inputs)), alone)
            elif action == "several":
                chosen = draw.sample(names, 2)
                model.adaptc.switch(chosen)
                twin.adaptc.switch(chosen)
                found = logits(model(**inputs))
                torch.testing.assert_close(found, op_by_op(twin, inputs), rtol=tolerance, atol=tolerance)
            elif action == "batch":
                chosen = draw.choices([None, *names], k=count)
                with model.adaptc.batch(chosen):
                    found = logits(model(**inputs))
                for row, name in enumerate(chosen):
                    if name is None:
                        assert torch.equal(found[row], alone[row])
                    else:
                        torch.testing.assert_close(found[row], expected(name)[row], rtol=tolerance, atol=tolerance)
            elif action == "write":
                for one in (model, twin):
                    next(iter(one.adaptc.parameters(name))).data.mul_(1.5)
                want[name] = None
            else:
                model.adaptc.remove(name)
                model.adaptc.add(name, wanted[name])
                randomise(model, seed=draw.randrange(99))
                twin = twin_of(model, base, wanted)
                want = dict.fromkeys(want)
    after = model.adaptc.metrics()
    assert [after[key] - before[key] for key in ("graphs", "recompiles", "epochs", "past_graphs")] == [0, 0, 0, 0]
    assert after["graphs"] == 1 and model.adaptc.eager_sites() == []
    assert all(parameter.requires_grad for parameter in model.adaptc.parameters())


@pytest.mark.parametrize("host", hosts.slowly(["llama", "qwen3_moe", "vit"], also=["qwen3_moe", "vit"]))
def test_nothing_is_compiled_and_outputs_are_right(host):
    base, wanted = HOSTS[host][0]().double().eval(), plans(host)
    inputs = {n: t.double() if t.is_floating_point() else t for n, t in HOSTS[host][1](4).items()}
    model = banked(base, wanted)
    check_trace(model, base, wanted, inputs, steps=60 if host == "llama" else 200)


@pytest.mark.inductor
@pytest.mark.slow
@pytest.mark.parametrize("layers", [1, 6])
def test_by_inductor_whole_and_by_block(layers):
    base = hosts.build("llama", num_hidden_layers=layers).double().eval()
    base.config.use_cache = False
    wanted = {name: plan for name, plan in plans("llama").items() if name in ("small", "wide", "dora", "ia3")}
    model = banked(base, wanted, backend="inductor", regional=layers > 1)
    # Llama computes its norms in fp32 whatever the dtype is, and Inductor sums them in another order.
    check_trace(model, base, wanted, HOSTS["llama"][1](4), steps=60, tolerance=1e-5)


@pytest.fixture(scope="module")
def llama():
    base = hosts.short("llama").double().eval()
    wanted = {name: plan for name, plan in plans("llama").items() if name in ("small", "wide", "ia3")}
    model = banked(base, wanted, backend="eager")
    return base, wanted, model, twin_of(model, base, wanted), HOSTS["llama"][1](3)


def close(found, want):
    torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-9)


def test_calls_with_gradients_go_by_the_parameters(llama):
    _, _, model, twin, inputs = llama
    with torch.no_grad():
        model(**inputs)
    known = model.adaptc.metrics()["graphs"]
    for name in ("small", "wide"):
        for one in (model, twin):
            one.zero_grad()
            one.adaptc.switch(name)
        with pytest.warns(NewSignatureWarning, match="without gradients"):
            logits(model(**inputs)).square().sum().backward()
        with torch.compiler.set_stance("force_eager"):
            logits(twin(**inputs)).square().sum().backward()
        want = dict(twin.adaptc.named_parameters(name))
        for key, parameter in model.adaptc.named_parameters(name):
            close(parameter.grad, want[key].grad)
    trained = model.adaptc.metrics()["graphs"]
    assert trained == known + 2
    with torch.no_grad():
        close(logits(model(**inputs)), op_by_op(twin, inputs))
    assert model.adaptc.metrics()["graphs"] == trained


@pytest.mark.slow
def test_generate_and_merging_compile_nothing_more(llama):
    base, _, model, twin, _ = llama
    with hosts.seeded(8):
        ids = torch.randint(3, hosts.VOCAB, (3, 5))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "max_new_tokens": 3}
    model.adaptc.switch(None)
    model.generate(**inputs, **options)
    model.generate(**inputs, **options)
    with torch.no_grad():
        model(**inputs)
    known = model.adaptc.metrics()["graphs"]
    for name in ("wide", "ia3", "small"):
        model.adaptc.switch(name)
        twin.adaptc.switch(name)
        with torch.compiler.set_stance("force_eager"):
            want = twin.generate(**inputs, **options)
        assert torch.equal(model.generate(**inputs, **options), want)
    model.adaptc.merge(["wide"])
    with torch.no_grad():
        merged = logits(model(**inputs))
        model.adaptc.unmerge()
        model.adaptc.switch("wide")
        close(merged, logits(model(**inputs)))
        model.adaptc.switch(None)
    assert model.adaptc.metrics()["graphs"] == known
    assert all(torch.equal(p, q) for p, q in zip(base.parameters(), _base_parameters(model), strict=True))


def _base_parameters(model):
    return [p for name, p in model.named_parameters() if ".adapters." not in name]


@pytest.mark.slow
def test_copies_have_banks_of_their_own(llama):
    _, wanted, model, twin, inputs = llama
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        twin.adaptc.switch("small")
        model.adaptc.switch("wide")
        other.adaptc.switch("small")
        with torch.no_grad():
            close(logits(other(**inputs)), op_by_op(twin, inputs))
            other.adaptc.switch("wide")
            close(logits(other(**inputs)), logits(model(**inputs)))
        assert other.adaptc.metrics()["graphs"] == 1
        other.adaptc.remove("ia3")
        assert "ia3" in model.adaptc.records


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast(dtype):
    base, wanted = hosts.short("llama").eval(), {"small": adaptc.LoRA(r=2, targets=["q_proj", "down_proj"])}
    model, inputs = banked(base, wanted, backend="eager"), HOSTS["llama"][1](2)
    twin = twin_of(model, base, wanted)
    with torch.autocast("cpu", dtype):
        for name in (None, "small"):
            model.adaptc.switch(name)
            twin.adaptc.switch(name)
            with torch.no_grad():
                found = logits(model(**inputs))
            want = op_by_op(twin, inputs)
            assert found.dtype == dtype
            assert (found - want).abs().max() <= 4 * torch.finfo(dtype).eps * want.abs().max()
    assert model.adaptc.metrics()["graphs"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("inference", [torch.no_grad, torch.inference_mode])
def test_in_training_mode_without_gradients_dropout_drops(inference):
    base = hosts.short("llama").double()
    model = banked(base, {"a": adaptc.LoRA(r=2, dropout=0.5, targets=["q_proj"])}, backend="eager")
    inputs = HOSTS["llama"][1](2)
    model.adaptc.switch("a")
    with inference():
        one, other = logits(model.train()(**inputs)), logits(model(**inputs))
        assert not torch.equal(one, other)
        assert torch.equal(logits(model.eval()(**inputs)), logits(model(**inputs)))


def test_warming_up_compiles_what_serving_needs():
    base, inputs = hosts.short("llama").eval(), HOSTS["llama"][1](2)
    bank = adaptc.Bank("lora", 4, 2)
    model = adaptc.compile(base, bank=bank, backend="eager", example_inputs=inputs)
    model.adaptc.warmup()
    model.adaptc.add("a", adaptc.LoRA(r=2, targets=["q_proj"]))
    model.adaptc.switch("a")
    with torch.no_grad():
        model(**inputs)
    assert model.adaptc.metrics()["graphs"] == 1


# -- capacities ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plan", "capacity"),
    [
        (adaptc.LoRA(r=5, targets=["q_proj"]), "at most 4 (max_rank)"),
        (adaptc.LoRA(r=2, rank_pattern={"q_proj": 9}, targets=["q_proj"]), "at most 4 (max_rank)"),
        (adaptc.VeRA(r=2, targets=["q_proj"]), "kinds: lora"),
        (adaptc.LoRA(r=2, targets=["lm_head"]), "sites"),
        (adaptc.LoRA(r=2, targets=["embed_tokens"]), "sites"),
        ([adaptc.LoRA(r=2, targets=["q_proj"]), {"match": {"targets": ["norm"]}, "train": "full"}], "kinds: lora"),
        (adaptc.LoRA(r=4, targets="all-linear"), "bytes"),
    ],
)
def test_what_does_not_fit_is_refused_by_its_capacity(plan, capacity):
    bank = adaptc.Bank(["lora"], max_rank=4, slots=2, bytes=4096)
    model = adaptc.compile(hosts.short("llama"), bank=bank, backend="eager")
    before = {name: id(p) for name, p in model.named_parameters()}
    with pytest.raises(BankError) as raised:
        model.adaptc.add("x", plan)
    assert capacity in str(raised.value) and "'x'" in str(raised.value)
    assert {name: id(p) for name, p in model.named_parameters()} == before and not model.adaptc.records
    assert model.adaptc.metrics()["bank_bytes"] == 0


def test_slots_are_counted_and_given_back():
    bank = adaptc.Bank(["lora"], max_rank=4, slots=2, bytes="2 KiB")
    model = adaptc.compile(hosts.short("llama"), adaptc.LoRA(r=1, targets=["q_proj"]), bank=bank, backend="eager")
    model.adaptc.add("b", adaptc.LoRA(r=1, targets=["q_proj"]))
    with pytest.raises(BankError, match="'c' is one adapter too many") as raised:
        model.adaptc.add("c", adaptc.LoRA(r=1, targets=["q_proj"]))
    assert "at most 2 (slots)" in str(raised.value) and "default, b" in str(raised.value)
    told = model.adaptc.explain().to_dict()["bank"]
    assert told[0] == "2 of 2 slots taken" and "kinds lora; rank at most 4" in told
    counts = model.adaptc.metrics()
    size = sum(p.numel() * p.element_size() for p in model.adaptc.parameters())
    assert (counts["bank_slots"], counts["bank_used"]) == (2, 2) and size <= counts["bank_bytes"] <= 2048
    model.adaptc.remove("b")
    model.adaptc.add("c", adaptc.LoRA(r=1, targets=["k_proj"]))
    assert model.adaptc.metrics()["bank_used"] == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kinds": ["prompt"]}, "'prompt' cannot be in a bank"),
        ({"kinds": ["full"]}, "'full' cannot be in a bank"),
        ({"kinds": ["lorra"]}, "no such kind"),
        ({"kinds": []}, "no kinds"),
        ({"slots": 0}, "slots is not legal"),
        ({"max_rank": -1}, "max_rank is not legal"),
        ({"max_rank": True}, "max_rank is not legal"),
        ({"bytes": "two"}, "bytes are not legal"),
        ({"bytes": -5}, "bytes are not legal"),
    ],
)
def test_a_bank_says_what_is_not_legal(options, message):
    with pytest.raises(BankError) as raised:
        adaptc.Bank(**{"kinds": ["lora"], "max_rank": 4, "slots": 2, **options})
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("text", "count"), [("2GiB", 2 << 30), ("1.5 kB", 1500), ("1 kilobyte", None), ("3 MB", 3_000_000), (17, 17)]
)
def test_bytes(text, count):
    if count is None:
        with pytest.raises(BankError):
            adaptc.Bank("lora", 4, 2, text)
    else:
        assert adaptc.Bank("lora", 4, 2, text).bytes == count


def test_sites_are_targets():
    bank = adaptc.Bank("lora", 4, 2, sites=["q_proj", "lm_head"])
    model = adaptc.compile(hosts.short("llama"), bank=bank, backend="eager")
    assert {site.path.rpartition(".")[2] for site in model.adaptc.sites} == {"q_proj", "lm_head"}
    model.adaptc.add("a", adaptc.LoRA(r=2, targets=["lm_head"]))
    with pytest.raises(BankError, match="no site of the bank"):
        model.adaptc.add("b", adaptc.LoRA(r=2, targets=["k_proj"]))
    with pytest.raises(BankError, match="embed_tokens cannot be a site"):
        adaptc.compile(hosts.short("llama"), bank=adaptc.Bank("lora", 4, 2, sites=["embed_tokens"]))
    with pytest.raises(PlanError, match="q_prok"):
        adaptc.compile(hosts.short("llama"), bank=adaptc.Bank("lora", 4, 2, sites=["q_prok"]))


def test_a_model_is_left_as_it_was():
    base = hosts.short("llama")
    before = [(name, type(m), len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in base.named_modules()]
    for bank, plan in [
        (adaptc.Bank("lora", 1, 2), adaptc.LoRA(r=2, targets=["q_proj"])),
        (adaptc.Bank("lora", 1, 2, sites=["q_proj", "embed_tokens"]), None),
    ]:
        with pytest.raises(BankError):
            adaptc.compile(base, plan, bank=bank)
        assert [
            (name, type(m), len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in base.named_modules()
        ] == before
        assert all(p.requires_grad for p in base.parameters()) and not hasattr(base, "adaptc")
    model = adaptc.compile(base, adaptc.IA3(targets=["k_proj"]), bank=adaptc.Bank(KINDS, 1, 2), backend="eager")
    model.adaptc.detach()
    assert [
        (name, type(m), len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in base.named_modules()
    ] == before


def test_the_bank_of_folders(tmp_path, llama):
    base, wanted, model, _, inputs = llama
    for name in wanted:
        model.adaptc.save(tmp_path / name, name)
    bank = adaptc.Bank.from_adapters([tmp_path / name for name in wanted])
    assert (bank.kinds, bank.max_rank, bank.slots) == (("ia3", "lora"), 16, 3)
    other = adaptc.compile(copy.deepcopy(base), bank=bank, backend="eager")
    for name in wanted:
        other.adaptc.add(name, tmp_path / name)
        for one in (model, other):
            one.adaptc.switch(name)
        with torch.no_grad():
            close(logits(other(**inputs)), logits(model(**inputs)))
    with pytest.raises(BankError, match="one adapter too many"):
        other.adaptc.add("fourth", tmp_path / "small")
    assert adaptc.Bank.from_adapters([tmp_path / "small"], slots=5).slots == 5
    with pytest.raises(BankError, match="no folder"):
        adaptc.Bank.from_adapters([])


def test_other_arguments():
    model = hosts.short("llama")
    bank = adaptc.Bank("lora", 4, 2)
    with pytest.raises(BankError, match="bank is a dict"):
        adaptc.compile(model, bank={"kinds": ["lora"]})
    with pytest.raises(UnsupportedError, match="CUDA graphs"):
        adaptc.compile(model, bank=bank, mode="reduce-overhead")
    with pytest.raises(UnsupportedError, match="CUDA graphs"):
        adaptc.compile(model, bank=bank, backend="cudagraphs")
    with pytest.raises(UnsupportedError, match="needs a plan"):
        adaptc.compile(model)
    model = adaptc.compile(model, bank=bank, backend="eager")
    assert adaptc.compile(model, adaptc.LoRA(r=2, targets=["q_proj"]), name="a", bank=bank) is model
    with pytest.raises(UnsupportedError, match="another bank"):
        adaptc.compile(model, adaptc.LoRA(r=2, targets=["q_proj"]), name="a", bank=adaptc.Bank("lora", 8, 2))


def test_a_peft_model_in_a_bank():
    def wrapped(r=4):
        config = peft.LoraConfig(r=r, target_modules=["q_proj"], init_lora_weights=False)
        model = peft.get_peft_model(hosts.short("llama").eval(), config, adapter_name="one")
        model.add_adapter("two", peft.LoraConfig(r=2, target_modules=["down_proj"], init_lora_weights=False))
        return model

    model, inputs = wrapped(), HOSTS["llama"][1](2)
    with torch.no_grad():
        want = logits(model(**inputs))
    with pytest.raises(BankError, match="rank 9"):
        adaptc.compile(refused := wrapped(9), bank=adaptc.Bank("lora", 8, 3))
    with torch.no_grad():
        refused(**inputs)
    assert refused.peft_config.keys() == {"one", "two"} and not hasattr(refused.get_base_model(), "adaptc")
    model = adaptc.compile(model, bank=adaptc.Bank("lora", 8, 3), backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(logits(model(**inputs)), want)
    assert model.adaptc.metrics()["bank_used"] == 2


@pytest.mark.slow
def test_user_hooks_see_what_they_would_see_without_a_bank(llama):
    _, _, model, twin, inputs = llama
    seen = []
    for one in (model, twin):
        one.adaptc.switch("wide")
        layer = one.get_submodule("model.layers.0.self_attn.q_proj")
        handle = layer.register_forward_hook(lambda m, args, output: seen.append(output.detach().clone()))
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            one(**inputs)
        handle.remove()
    close(seen[0], seen[-1])


class Forces(nn.Module):
    """A forward that differentiates itself, whatever the caller's mode is."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 1)

    def forward(self, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            (force,) = torch.autograd.grad(self.last(torch.tanh(self.first(x))).sum(), x)
        return force, self.last(x)


def test_regions_that_record_gradients_have_them():
    base, wanted = Forces().double(), {"a": adaptc.LoRA(r=2, targets=["first", "last"])}
    model = banked(base, wanted, backend="eager")
    twin = twin_of(model, base, wanted)
    model.adaptc.switch("a")
    twin.adaptc.switch("a")
    x = torch.randn(3, 4, dtype=torch.float64)
    with torch.no_grad():
        with torch.compiler.set_stance("force_eager"):
            want = twin(x)
        for found, right in zip(model(x), want, strict=True):
            close(found, right)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        y = self.first(x)
        return self.last(self.first(x)) + y * self.first(x)


def test_a_layer_that_is_called_several_times():
    base, wanted = Net().double(), {"a": adaptc.LoRA(r=2, targets=["first"]), "b": adaptc.IA3(targets=["last"])}
    model = banked(base, wanted)
    twin = twin_of(model, base, wanted)
    inputs = {"x": torch.randn(3, 4, dtype=torch.float64)}
    for names in ("a", "b", ["a", "b"], None):
        model.adaptc.switch(names)
        twin.adaptc.switch(names)
        with torch.no_grad():
            close(model(**inputs), op_by_op(twin, inputs))
    assert model.adaptc.metrics()["graphs"] == 1


# -- what others do to the model -----------------------------------------------------------------------


class Around(nn.Module):
    """Calls a model, or a layer of one, that is no part of it."""

    def __init__(self, other):
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)
        self.__dict__["other"] = other

    def forward(self, x):
        return self.last(self.other(self.first(x)))


@pytest.mark.parametrize("whole", [True, False])
def test_a_model_that_another_calls_has_its_own_adapters(whole):
    plan = {"a": adaptc.LoRA(r=2, targets=["first", "last"])}
    inner, base = Net().double(), Net().double()
    model = banked(base, plan, backend="eager")
    others = [banked(inner, plan, backend="eager"), copy.deepcopy(model)]
    x = torch.randn(3, 4, dtype=torch.float64)
    for other in others:
        other.adaptc.switch("a")
        with torch.no_grad():
            other(x)
        called = other if whole else other.first
        outer = banked(Around(called).double(), plan, backend="eager")
        outer.adaptc.switch("a")
        with torch.no_grad():
            y = x @ outer.first.weight.T + outer.first.bias + _update(outer.first, x)
            with torch.compiler.set_stance("force_eager"):
                y = other.adaptc.model(y) if whole else _adapted_linear(other.first, y)
            want = _adapted_linear(outer.last, y)
            close(outer(x), want)


def _update(layer, x):
    lora = layer.adapters["a"]
    return lora.scale * (x @ lora.lora_A.T @ lora.lora_B.T)


def _adapted_linear(layer, x):
    return x @ layer.weight.T + layer.bias + _update(layer, x)


def test_a_layer_that_was_replaced_by_its_copy():
    model = banked(Net().double(), {"a": adaptc.LoRA(r=2, targets=["first", "last"])}, backend="eager")
    x = torch.randn(3, 4, dtype=torch.float64)
    model.adaptc.switch("a")
    with torch.no_grad():
        model(x)
        model.first = copy.deepcopy(model.first)
        model.first.adapters["a"].lora_A.mul_(3)
        y = _adapted_linear(model.first, x)
        close(model(x), _adapted_linear(model.last, y) + y * y)
        model.adaptc.switch(None)
        y = x @ model.first.weight.T + model.first.bias
        close(model(x), y @ model.last.weight.T + model.last.bias + y * y)


def test_what_a_layer_returns_and_somebody_keeps_is_not_written():
    model = banked(Net().double(), {"a": adaptc.LoRA(r=2, targets=["first"])}, backend="eager")
    x, stored = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    model.adaptc.switch("a")
    kept, given = stored.clone(), x.clone()

    def by_hook(value):
        return model.first.register_forward_hook(lambda m, args, y: value, prepend=True)

    for value in (stored, x, stored[:1].expand(3, 4)):
        handle = by_hook(value)
        for _ in range(3):
            with torch.no_grad():
                y = value + _update(model.first, x)
                close(model(x), y @ model.last.weight.T + model.last.bias + y * y)
            assert torch.equal(stored, kept) and torch.equal(x, given)
        handle.remove()
    model.first.forward = lambda z: stored
    with torch.no_grad():
        model(x)
    assert torch.equal(stored, kept)


def test_a_layer_of_another_compiled_model_is_refused():
    shared = nn.Linear(4, 4)
    one = adaptc.compile(nn.Sequential(shared), adaptc.LoRA(r=2, targets=["0"]), backend="eager")
    before = [id(p) for p in one.adaptc.parameters()]
    with pytest.raises(SiteError, match="not this model's"):
        adaptc.compile(nn.Sequential(shared, nn.Linear(4, 4)), bank=adaptc.Bank("lora", 4, 2))
    assert [id(p) for p in one.adaptc.parameters()] == before and len(shared._forward_hooks) == 1


def test_bytes_are_those_of_now():
    model = adaptc.compile(hosts.short("llama"), bank=adaptc.Bank("lora", 4, 4, bytes="3 kB"), backend="eager")
    model.adaptc.add("a", adaptc.LoRA(r=1, targets=["q_proj"]))
    model.double()
    used = model.adaptc.metrics()["bank_bytes"]
    assert 1000 < used < 2000
    model.adaptc.add("b", adaptc.LoRA(r=1, targets=["q_proj"]))
    model.double()
    with pytest.raises(BankError, match="takes") as raised:
        model.adaptc.add("c", adaptc.LoRA(r=1, targets=["q_proj"]))
    assert f"{model.adaptc.metrics()['bank_bytes']:,} are taken" in str(raised.value)
