"""LoRA on embeddings: the formula in fp64, PEFT, and what a head that shares the weight does."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import adaptc
from adaptc.errors import SiteError, UnsupportedError
from adaptc.methods.lora import embedding
from tests.models import hosts
from tests.reference import check_all_rewritten, relative_errors, step
from tests.sites.life import check_life

LORA = adaptc.LoRA(r=3, alpha=6, init="random", targets=["embed_tokens", "q_proj"])


class Words(nn.Module):
    """Ids to scores, through one embedding of V rows of width D."""

    def __init__(self, V=11, D=6, **options):
        super().__init__()
        self.words = nn.Embedding(V, D, **options)
        self.head = nn.Linear(D, 4)

    def forward(self, ids):
        return self.head(torch.tanh(self.words(ids)))


def formula_step(model, base, ids):
    """Loss and gradients of the formula in fp64, at the adapter's values; ``base`` is untouched."""
    adapter = model.adaptc.sites[0].adapters["default"]
    A = adapter.lora_embedding_A.detach().double().requires_grad_()
    B = adapter.lora_embedding_B.detach().double().requires_grad_()
    host = copy.deepcopy(base).double()
    words = host.words
    rows = words.weight.detach()[ids]
    # Gradients by hand where the embedding's options change them: a column of A as often as its id occurs.
    columns = A.t()[ids]
    if words.padding_idx is not None:
        columns = torch.where((ids == words.padding_idx)[..., None], columns.detach(), columns)
    if words.scale_grad_by_freq:
        counts = torch.bincount(ids.flatten(), minlength=words.num_embeddings)[ids][..., None].double()
        columns = columns.detach() + (columns - columns.detach()) / counts
    y = rows + adapter.scaling * columns @ B.t()
    loss = weighted(F.linear(torch.tanh(y), host.head.weight, host.head.bias))
    loss.backward()
    prefix = "words.adapters.default.lora_embedding_"
    return loss.detach(), {f"{prefix}A": A.grad, f"{prefix}B": B.grad}


def weighted(out):
    return (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)).sum()


def model_step(model, ids):
    model.zero_grad()
    loss = weighted(model(ids))
    loss.backward()
    return loss.detach(), {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}


OPTIONS = [{}, {"padding_idx": 2}, {"scale_grad_by_freq": True}, {"sparse": True}, {"padding_idx": 0, "sparse": True}]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_computes_the_formula_with_the_options_of_the_embedding(options, backend):
    base = Words(**options)
    model = adaptc.compile(
        copy.deepcopy(base), adaptc.LoRA(r=3, alpha=6, init="random", targets=["words"]), backend=backend
    )
    for train in (True, False):
        model.train(train)
        for shape in ((2, 5), (3, 4)):
            ids = torch.randint(0, 11, shape)
            ids[0, :2] = options.get("padding_idx", 3)
            (loss, got), (want_loss, want) = model_step(model, ids), formula_step(model, base, ids)
            assert abs(float(loss / want_loss) - 1) < 1e-6
            assert max(relative_errors(got, want).values()) < 2e-6
    assert (model.adaptc.metrics()["eager_sites"], model.adaptc.idle_sites()) == (0, [])


# Of sparse embeddings PEFT cannot compute the gradient (torch does not transpose a sparse dimension).
@pytest.mark.parametrize("options", OPTIONS[:3])
def test_computes_what_peft_computes(options):
    base = Words(**options)
    model = adaptc.compile(
        copy.deepcopy(base), adaptc.LoRA(r=3, alpha=6, rslora=True, init="random", targets=["words"]),
        backend="aot_eager",
    )  # fmt: skip
    config = peft.LoraConfig(r=3, lora_alpha=6, use_rslora=True, lora_dropout=0.3, target_modules=["words"])
    twin = peft.get_peft_model(copy.deepcopy(base), config)
    layer, adapter = twin.base_model.model.words, model.adaptc.sites[0].adapters["default"]
    with torch.no_grad():
        layer.lora_embedding_A["default"].copy_(adapter.lora_embedding_A)
        layer.lora_embedding_B["default"].copy_(adapter.lora_embedding_B)
    ids = torch.randint(0, 11, (3, 6))
    loss, got = model_step(model, ids)
    want_loss = weighted(twin(ids))
    want_loss.backward()
    torch.testing.assert_close(loss, want_loss)
    for letter in "AB":
        want = getattr(layer, f"lora_embedding_{letter}")["default"].grad
        want = want.to_dense() if want.is_sparse else want
        torch.testing.assert_close(got[f"words.adapters.default.lora_embedding_{letter}"].float(), want)


def test_starts_as_the_identity_with_pefts_distributions():
    torch.manual_seed(0)
    base = Words(V=300, D=200)
    model = adaptc.compile(copy.deepcopy(base), adaptc.LoRA(r=64, targets=["words"]), backend="eager")
    adapter = model.adaptc.sites[0].adapters["default"]
    assert not adapter.lora_embedding_A.any()
    assert adapter.lora_embedding_B.shape == (200, 64) and adapter.lora_embedding_A.shape == (64, 300)
    assert abs(float(adapter.lora_embedding_B.detach().std()) - 1) < 0.03
    ids = torch.arange(300)[None]
    assert torch.equal(model(ids), base(ids))


def test_a_tied_head_stays_frozen_and_explain_says_so():
    base = hosts.build("llama", train=True, tie_word_embeddings=True)
    model = adaptc.compile(copy.deepcopy(base), LORA, backend="aot_eager")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "model.embed_tokens: shares lm_head.weight, which stays as it is" in str(model.adaptc.explain())
    batch = hosts.batch("llama")
    _, got = step(model, batch)
    check_all_rewritten(model, 3)
    reference = copy.deepcopy(base).double().requires_grad_(False)
    reference.lm_head.weight = nn.Parameter(reference.lm_head.weight.detach().clone(), requires_grad=False)
    want, factors = {}, {}
    for site in model.adaptc.sites:
        adapter = site.adapters["default"]
        letters = "lora_embedding_A", "lora_embedding_B"
        if site.path.endswith("q_proj"):
            letters = "lora_A", "lora_B"
        values = [getattr(adapter, name).detach().double().requires_grad_() for name in letters]
        factors.update({f"{site.path}.adapters.default.{n}": v for n, v in zip(letters, values, strict=True)})
        module = reference.get_submodule(site.path)
        delta = adapter.scaling * values[1] @ values[0]
        weight = module.weight.detach() + (delta.T if site.path.endswith("embed_tokens") else delta)
        del module.weight
        module.weight = weight
    reference(**batch).loss.backward()
    want = {name: value.grad for name, value in factors.items()}
    assert max(relative_errors(got, want).values()) < 5e-6
    with pytest.raises(UnsupportedError, match=r"its weight is also lm_head\.weight, which has no adapter"):
        model.adaptc.merge_and_unload()


def test_lives_as_other_sites_do():
    check_life(lambda: hosts.short("llama"), LORA, hosts.batch("llama"), sites=2)


def test_sixteen_bits_and_autocast_are_as_exact_as_pefts():
    ours, theirs = [], []
    for seed in range(8):
        torch.manual_seed(seed)
        base = Words(V=50, D=32).to(torch.bfloat16)
        model = adaptc.compile(
            copy.deepcopy(base), adaptc.LoRA(r=4, alpha=4, init="random", targets=["words"]), backend="aot_eager"
        )
        adapter = model.adaptc.sites[0].adapters["default"]
        adapter.lora_embedding_A.data.mul_(0.05)
        assert adapter.lora_embedding_A.dtype == torch.float32
        ids = torch.randint(0, 50, (4, 16))
        rows = model.words(ids)
        want = base.words.weight.double()[ids] + adapter.delta()[ids]
        twin = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=4, lora_alpha=4, target_modules=["words"]))
        layer = twin.base_model.model.words
        with torch.no_grad():
            layer.lora_embedding_A["default"].copy_(adapter.lora_embedding_A)
            layer.lora_embedding_B["default"].copy_(adapter.lora_embedding_B)
        ours.append((rows.double() - want).norm())
        theirs.append((layer(ids).double() - want).norm())
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(model.words(ids), rows)
    assert 0 < sum(ours) <= 1.1 * sum(theirs)


def test_refuses_what_it_would_get_wrong():
    def refused(module, **options):
        with pytest.raises(SiteError) as error:
            adaptc.compile(nn.Sequential(module), adaptc.LoRA(r=2, targets=["0"], **options), backend="eager")
        return str(error.value)

    class Positions(nn.Embedding):
        def forward(self, mask):
            return super().forward(mask.cumsum(-1))

    assert "max_norm rewrites rows of the weight" in refused(nn.Embedding(5, 4, max_norm=1.0))
    assert "Positions has a forward of its own" in refused(Positions(5, 4))
    assert "dora is for linear layers" in refused(nn.Embedding(5, 4), dora=True)
    assert 'init "pissa" is for linear layers' in refused(nn.Embedding(5, 4), init="pissa")


def test_rows_that_the_module_multiplies_are_corrected_by_the_same_factor():
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    host = nn.Sequential(Gemma3TextScaledWordEmbedding(7, 5, 0, embed_scale=3.0))
    base = copy.deepcopy(host)
    model = adaptc.compile(host, adaptc.LoRA(r=2, alpha=4, init="random", targets=["0"]), backend="aot_eager")
    ids = torch.randint(0, 7, (2, 3))
    want = 3.0 * (base[0].weight.double() + model.adaptc.sites[0].adapters["default"].delta())[ids]
    torch.testing.assert_close(model(ids).double(), want, rtol=1e-6, atol=1e-6)


@given(st.data())
def test_the_op_computes_its_formula(data):
    ids, y, A, B, scale, padding, by_frequency = embedding.sample(data.draw)
    got = embedding.EMBEDDING.overload(ids, y, A, B, scale, padding, by_frequency)
    want = y.double() + scale * (A.double().t()[ids] @ B.double().t())
    # One rounding each of h, B, the product and the sum.
    size = y.double().abs() + scale.abs() * (A.double().abs().t()[ids] @ B.double().abs().t())
    bound = 8 * torch.finfo(y.dtype).eps * size + 1e-30
    assert got.dtype == y.dtype and bool(((got.double() - want).abs() <= bound).all())
