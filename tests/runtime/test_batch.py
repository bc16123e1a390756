"""Batches whose rows, or tokens of them, use different adapters: captured, in training, in generate, and refused."""

from __future__ import annotations

import itertools
import threading

import pytest
import torch
from torch import nn

import adaptc
from adaptc.errors import AdapterNameError, BatchError, NewSignatureWarning
from tests.models import hosts
from tests.runtime import rows
from tests.runtime.rows import HOSTS, adapted, check

pytestmark = pytest.mark.filterwarnings("ignore::adaptc.errors.NewSignatureWarning")


def lora(**options):
    return adaptc.LoRA(**{"r": 3, "alpha": 6, "targets": ["q_proj", "down_proj"], **options})


MIXED = {
    "a": lora(),
    "b": lora(),
    "wide": lora(r=5, targets="all-linear"),
    "dora": lora(dora=True),
    "ia3": adaptc.IA3(targets=["k_proj", "down_proj"]),
    "bottleneck": adaptc.Bottleneck(r=4, targets=["o_proj"]),
}


def llama(plans=MIXED, dtype=torch.float64, **options):
    options = {"backend": "eager", **options}
    return adapted(hosts.short("llama").to(dtype), plans, **options), HOSTS["llama"][1](5)


SLOW = [pytest.mark.inductor, pytest.mark.slow]


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=SLOW)])
def test_other_assignments_compile_nothing(backend):
    model, inputs = llama(backend=backend)
    kinds = [None, "a", "b", "ia3", "dora"]
    check(model, inputs, kinds)
    before = model.adaptc.metrics()["graphs"]
    for names in list(itertools.permutations(kinds))[1:120:17]:
        with model.adaptc.batch(names):
            model(**inputs)
            with torch.no_grad():
                model(**inputs)
    with model.adaptc.batch(["a", "a", "b", "ia3", "dora"]):
        model(**inputs)  # that the base has no row is no other graph
    assert model.adaptc.metrics()["graphs"] == before
    assert model.adaptc.eager_sites() == []


def test_new_signatures_are_announced():
    model, inputs = llama({"a": lora(), "b": lora(), "wide": lora(r=5)})
    model(**inputs)
    with pytest.warns(NewSignatureWarning, match="a batch of 'a', 'b': kinds, shapes or dtypes not seen before"):
        model.adaptc.batch(["a", "b"]).__enter__()


def test_batches_that_come_again_are_made_once():
    model, _ = llama({"a": lora(), "b": lora()})
    made = model.adaptc.captures.batch
    one, other = made(["a", None], None), made(["b", "a"], None)
    assert made(["a", None], None) is one and made(["b", "a"], None) is other
    model.adaptc.remove("a")
    model.adaptc.add("a", lora())
    assert made(["b", "a"], None) is not other
    for count in range(1, 20):
        made(["a"] * count, None)
    assert made(["a"] * 19, None) is made(["a"] * 19, None)
    assert len(model.adaptc.captures._batches) == 16


def test_threads_that_look_at_once_leave_torch_compiling():
    models = [llama({"a": lora(), "b": lora()}) for _ in range(4)]
    errors = []

    def serve(model, inputs):
        try:
            with torch.no_grad(), model.adaptc.batch(["a"] * 5):
                model.adaptc.captures.layouts.check(
                    model.adaptc.captures.batching.current, "", model._call_impl, inputs["input_ids"], (), inputs
                )
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=serve, args=pair) for pair in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    graphs = []
    torch.compile(lambda x: x + 1, backend=lambda gm, _: graphs.append(gm) or gm.forward)(torch.ones(2))
    assert not errors and len(graphs) == 1


def test_adapters_of_equal_signatures_share_graphs():
    model, inputs = llama({name: lora() for name in "abcd"}, backend="aot_eager")
    graphs = set()
    for names in (["a", "b", None, "a", "b"], ["c", "a", "c", None, "c"], ["d", "d", "b", None, "d"]):
        with model.adaptc.batch(names):
            model(**inputs)
        graphs.add(model.adaptc.metrics()["graphs"])
    assert graphs == {1}


@pytest.mark.parametrize("regional", [True, False])
def test_blocks_and_checkpoints(regional):
    base = hosts.build("llama", num_hidden_layers=2).double()
    model = adapted(base, {"a": lora(), "b": lora()}, backend="aot_eager", regional=regional)
    model.config.use_cache = False
    model.train().gradient_checkpointing_enable()
    inputs = HOSTS["llama"][1](3)
    names, found = ["a", None, "b"], {}
    for i, name in enumerate(names):
        if name is not None:
            model.adaptc.switch(name)
            model(**rows.row(inputs, i)).logits.square().sum().backward()
            found.update(rows.gradients(model))
            model.zero_grad()
    with model.adaptc.batch(names):
        output = model(**inputs).logits.square().sum()
    output.backward()  # after the block: what is computed again has the rows of the forward
    got = rows.gradients(model)
    assert got.keys() == found.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(got[name], gradient, msg=name)


def test_dropout_drops_each_row_by_itself():
    model, inputs = llama({"a": lora(dropout=0.5), "b": lora(dropout=0.5)})
    model.train()
    with torch.compiler.set_stance("force_eager"), model.adaptc.batch(["a", None, "a", "b", "b"]):
        one, other = model(**inputs).logits, model(**inputs).logits
    same = [torch.equal(x, y) for x, y in zip(one, other, strict=True)]
    assert same == [False, True, False, False, False]


def test_what_is_not_finite_in_one_row_stays_there():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x):
            return self.last(self.first(x))

    plans = {
        "a": adaptc.LoRA(r=2, targets=["first", "last"]), "b": adaptc.LoRA(r=2, targets=["first", "last"]),
        "c": adaptc.VeRA(r=2, targets=["first", "last"]), "d": adaptc.Bottleneck(r=2, targets=["first", "last"]),
    }  # fmt: skip
    model = adapted(Net().double(), plans, backend="eager")
    x = torch.randn(5, 4, dtype=torch.float64)
    x[3] = float("inf")
    names = ["a", "c", "d", "b", None]
    with torch.compiler.set_stance("force_eager"), model.adaptc.batch(names):
        model(x)[[0, 1, 2, 4]].square().sum().backward()
    for name in "acd":
        assert all(p.grad.isfinite().all() for p in model.adaptc.parameters(name)), name
    with torch.compiler.set_stance("force_eager"), model.adaptc.batch(names):
        assert model(x)[[0, 1, 2, 4]].isfinite().all() and not model(x)[3].isfinite().any()


# -- generate ------------------------------------------------------------------------------------------


GREEDY = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def prompts():
    with hosts.seeded(8):
        ids = torch.randint(3, hosts.VOCAB, (3, 5))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
@pytest.mark.parametrize("kind", ["lora", "prefix", "prompt"])
def test_generate_with_an_adapter_for_each_sequence(options, kind):
    tokens = {"num_virtual_tokens": 3}
    plans = {
        "lora": {"a": lora(targets="all-linear"), "b": lora(targets="all-linear", dora=True)},
        "prefix": {"a": adaptc.Prefix(**tokens), "b": adaptc.Prefix(**tokens)},
        "prompt": {"a": adaptc.Prompt(**tokens), "b": adaptc.Prompt(**tokens)},
    }  # fmt: skip
    model = adapted(hosts.short("llama").double(), plans[kind], backend="eager")
    names = ["b", None if kind == "lora" else "a", "a"]
    inputs, more = prompts(), {**GREEDY, "max_new_tokens": 5, **options}
    count = options.get("num_return_sequences", 1)
    with torch.compiler.set_stance("force_eager"):
        want = []
        for i, name in enumerate(names):
            model.adaptc.switch(name)
            want.append(model.generate(**rows.row(inputs, i), **more))
        with model.adaptc.batch(names):
            found = model.generate(**inputs, **more)
        assert torch.equal(found, torch.cat(want)) and len(found) == 3 * count
        model.adaptc.switch("a")
        assert not torch.equal(model.generate(**inputs, **more), found)


def test_generate_draws_for_each_row():
    model = adapted(hosts.short("llama").double(), {"a": lora(), "b": lora()}, backend="eager")
    options = {**GREEDY, "max_new_tokens": 4, "do_sample": True, "num_return_sequences": 2}
    with torch.compiler.set_stance("force_eager"), model.adaptc.batch(["a", None, "b"]):
        torch.manual_seed(0)
        one = model.generate(**prompts(), **options)
        torch.manual_seed(0)
        assert torch.equal(one, model.generate(**prompts(), **options)) and one.shape == (6, 9)


# -- spans ---------------------------------------------------------------------------------------------


def test_tokens_of_a_row_use_different_adapters():
    """On a model without attention every token is a row."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.first, self.last = nn.Embedding(9, 4), nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, ids):
            h = torch.relu(self.first(self.embed(ids)))
            return self.last(h.view(-1, 6)).view(*ids.shape, 3)

    plans = {
        "a": adaptc.LoRA(r=2, targets=["first", "last", "embed"]), "b": adaptc.IA3(targets=["first"]),
        "c": adaptc.LoRA(r=2, dora=True, targets=["last"]),
    }  # fmt: skip
    model = adapted(Net().double(), plans, backend="eager")
    ids, names = torch.randint(0, 9, (3, 4)), ["c", None, "a", "b"]
    spans = torch.tensor([[0, 1, 2, 3], [3, 2, 2, 1], [1, 1, 1, 1]])
    with torch.compiler.set_stance("force_eager"):
        with model.adaptc.batch(names, spans=spans):
            found = model(ids)
        found.square().sum().backward()
        got = rows.gradients(model)
        model.zero_grad()
        with torch.no_grad(), model.adaptc.batch([None], spans=torch.zeros_like(spans)):
            base = model(ids)
        for number, name in enumerate(names):
            model.adaptc.switch(name)
            alone = model(ids)
            own = spans == number
            torch.testing.assert_close(found[own], alone[own])
            if name is None:
                assert torch.equal(found[own], base[own])
            else:
                alone[own].square().sum().backward()
        want = rows.gradients(model)
    assert got.keys() == want.keys()
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient, msg=name)


def test_spans_on_a_real_class():
    model, inputs = llama()
    spans = torch.tensor([[0] * 7, [1] * 7, [2] * 7, [0] * 7, [1] * 7])
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        with model.adaptc.batch(["a", None, "ia3"], spans=spans):
            found = model(**inputs).logits
        with model.adaptc.batch(["a", None, "ia3", "a", None]):
            torch.testing.assert_close(found, model(**inputs).logits)
        spans[0, 4:] = 2  # a later token changes nothing before it
        with model.adaptc.batch(["a", None, "ia3"], spans=spans):
            again = model(**inputs).logits
    assert torch.equal(again[1:], found[1:]) and torch.equal(again[0, :4], found[0, :4])
    assert not torch.equal(again[0, 4], found[0, 4])


# -- refusals ------------------------------------------------------------------------------------------


def test_what_names_no_rows_is_refused_before_anything_runs():
    model, inputs = llama()
    state = {n: p.clone() for n, p in model.named_parameters()}
    batch = model.adaptc.batch
    cases = [
        (AdapterNameError, "no adapter named 'x'", lambda: batch(["a", "x"])),
        (BatchError, "which adapters", lambda: batch([])),
        (BatchError, "which adapters", lambda: batch("ab")),
        (BatchError, "which adapters", lambda: batch([0, 1])),
        (BatchError, "ids of no name", lambda: batch(["a"], spans=torch.tensor([[0, -1]]))),
        (BatchError, "ids of no name", lambda: batch(["a"], spans=torch.tensor([[0, 1]]))),
        (BatchError, "not legal", lambda: batch(["a"], spans=torch.zeros(2, 3))),
        (BatchError, "not legal", lambda: batch(["a"], spans=torch.zeros(3, dtype=torch.int64))),
    ]
    for error, text, make in cases:
        with pytest.raises(error, match=text), make():
            pass
    calls = model.adaptc.metrics()["calls"]
    with batch(["a", None]), pytest.raises(BatchError, match="2 rows have adapters, and the call has 5"):
        model(**inputs)
    with batch(["a", None] * 5), pytest.raises(BatchError, match="10 rows have adapters, and the call has 5"):
        model(**inputs)
    with batch(["a"]), pytest.raises(BatchError, match="1 rows have adapters, and the call has 5"):
        model(**inputs)  # only in generate does a row stand for several
    spans = torch.zeros(5, 6, dtype=torch.int64)
    with batch(["a"], spans=spans), pytest.raises(BatchError, match="spans of other sizes"):
        model(**inputs)
    assert model.adaptc.metrics()["calls"] == calls and model.adaptc.live == ("a",)
    assert all(torch.equal(p, state[n]) for n, p in model.named_parameters())


def test_actions_in_a_batch_are_refused_and_it_ends_with_its_block():
    model, inputs = llama()
    handle = model.adaptc
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        before = model(**inputs).logits
        with pytest.raises(KeyError), handle.batch([None] * 5):
            actions = [
                lambda: handle.switch("b"), lambda: handle.add("n", lora()), lambda: handle.remove("b"),
                lambda: handle.load("nowhere"), handle.detach, handle.merge_and_unload,
                lambda: handle.batch(["a"] * 5).__enter__(),
            ]  # fmt: skip
            for action in actions:
                with pytest.raises(BatchError, match="inside of model"):
                    action()
            base = model(**inputs).logits
            raise KeyError
        assert torch.equal(model(**inputs).logits, before) and not torch.equal(base, before)
    handle.switch("b")


def test_a_batch_is_of_its_thread():
    model, inputs = llama()
    found = []

    def call():
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            found.append(model(**inputs).logits)

    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        want = model(**inputs).logits
        with model.adaptc.batch([None] * 5):
            thread = threading.Thread(target=call)
            thread.start()
            thread.join()
            assert not torch.equal(model(**inputs).logits, want)
    assert torch.equal(found[0], want)


def test_rows_with_different_numbers_of_virtual_tokens_are_refused():
    plans = {"a": adaptc.Prefix(num_virtual_tokens=3), "b": adaptc.Prefix(num_virtual_tokens=4), "l": lora()}
    model, _ = llama(plans)
    for names in (["a", "b"], ["a", None], ["a", "l"]):
        with pytest.raises(BatchError, match="rows with different numbers or kinds of virtual tokens"):
            model.adaptc.batch(names).__enter__()


class Transposed(nn.Module):
    """Steps in front, as recurrent models have them."""

    def __init__(self, order):
        super().__init__()
        self.first, self.last, self.order = nn.Linear(4, 6), nn.Linear(6, 3), order

    def forward(self, x):
        h = self.first(x)
        if self.order == "steps":
            return self.last(h.transpose(0, 1)).transpose(0, 1)
        if self.order == "steps in one":
            return self.last(h.transpose(0, 1).reshape(-1, 6)).view(x.shape[1], x.shape[0], 3).transpose(0, 1)
        windows = h.view(x.shape[0], -1, 2, 6)  # pairs of steps, those of row 0 first
        return self.last(windows.transpose(2, 3).contiguous().transpose(2, 3).reshape(-1, 2, 6)).view(*x.shape[:2], 3)


@pytest.mark.parametrize("order", ["steps", "steps in one"])
def test_rows_that_are_not_in_front_are_refused_also_where_sizes_are_equal(order):
    plans = {"a": adaptc.LoRA(r=2, targets=["last"]), "f": adaptc.LoRA(r=2, targets=["first"])}
    model = adapted(Transposed(order), plans, backend="eager")
    x = torch.randn(4, 4, 4)
    with torch.compiler.set_stance("force_eager"):
        with model.adaptc.batch(["a", None, "a", None]), pytest.raises(BatchError, match="last: a tensor of it is"):
            model(x)
        with model.adaptc.batch(["f", None, "f", None]):
            model(x)


def test_windows_of_rows_are_those_of_their_row():
    plans = {"a": adaptc.LoRA(r=2, targets=["last"]), "b": adaptc.IA3(targets=["last"])}
    model = adapted(Transposed("windows").double(), plans, backend="eager")
    x = torch.randn(4, 4, 4, dtype=torch.float64)
    names = ["a", None, "b", "a"]
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        with model.adaptc.batch(names):
            found = model(x)
        for i, name in enumerate(names):
            model.adaptc.switch(name)
            torch.testing.assert_close(found[i : i + 1], model(x[i : i + 1]))
