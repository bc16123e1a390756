"""Prefix tuning of models with an encoder and a decoder: in the decoder's attention to itself, in PEFT's order."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import json

import peft
import pytest
import torch
import transformers

import adaptc
from adaptc.errors import AdaptcWarning, SiteError, TensorShapeError
from adaptc.transformers_names import cache_argument
from tests.models import hosts, zoo
from tests.reference import check_all_rewritten, relative_errors, step
from tests.sites.life import check_life

ROWS = 3
CLASSES = {
    "t5": "T5", "bart": "Bart", "mt5": "MT5", "umt5": "UMT5", "longt5": "LongT5", "mbart": "MBart",
    "pegasus": "Pegasus", "marian": "MarianMTModel", "blenderbot": "Blenderbot",
    "blenderbot-small": "BlenderbotSmall", "m2m_100": "M2M100", "nllb-moe": "NllbMoe",
    "led": "LED", "plbart": "PLBart", "bigbird_pegasus": "BigBirdPegasus", "pegasus_x": "PegasusX", "mvp": "Mvp",
    "switch_transformers": "SwitchTransformers", "prophetnet": "ProphetNet", "fsmt": "FSMT", "whisper": "Whisper",
    "speech_to_text": "Speech2Text",
}  # fmt: skip
#: Where PEFT and we compute; the others are refused.
HOSTS = [host for host in CLASSES if host not in ("prophetnet", "fsmt", "whisper", "speech_to_text")]
FIRST = ["t5", "bart"]
#: Those that generate here too: position tables, relative positions and encoders of their own.
GENERATE = [*FIRST, "umt5", "longt5", "m2m_100", "led"]
#: Classes that break their own graph: the prefix adds a piece to the base's, as PEFT's does.
BREAK = ["led", "bigbird_pegasus", "switch_transformers"]


def slow(hosts, *quick):
    return [host if host in quick else pytest.param(host, marks=pytest.mark.slow) for host in hosts]


def build(host, layers=(4, 3), **changes):
    """A tiny model with so many layers of the encoder and of the decoder."""
    name = CLASSES[host]
    cls = getattr(transformers, name if name.endswith("Model") else f"{name}ForConditionalGeneration")
    fields = {f.name for f in dataclasses.fields(cls.config_class)}
    names = (("num_layers", "encoder_layers", "num_encoder_layers"), ("num_decoder_layers", "decoder_layers"))
    sizes = {key: count for keys, count in zip(names, layers, strict=True) for key in keys if key in fields}
    if host == "switch_transformers":
        sizes |= {"num_sparse_encoder_layers": 0, "num_sparse_decoder_layers": 1}
    options = {**zoo.SPECIAL.get(host, {}), "decoder_start_token_id": 0, "forced_eos_token_id": None}
    with hosts.seeded(0):
        model = cls(zoo.tiny_config(cls.config_class, **options, **sizes, **changes))
    with hosts.seeded(1), torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def batch_of(masked=True):
    """Ids of other lengths for the encoder and for the decoder, the last of them padded."""
    with hosts.seeded(2):
        batch = {"input_ids": torch.randint(3, zoo.VOCAB, (2, 9)), "labels": torch.randint(3, zoo.VOCAB, (2, 6))}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][1, 7:] = 0
    if masked:
        batch["decoder_attention_mask"] = torch.ones_like(batch["labels"])
        batch["decoder_attention_mask"][1, 4:] = 0
    return batch


def compiled(base, backend="eager", **options):
    return adaptc.compile(copy.deepcopy(base), adaptc.Prefix(num_virtual_tokens=ROWS, **options), backend=backend)


def adapter_of(model):
    (site,) = model.adaptc.sites
    return site.adapters["default"]


def peft_of(base, model=None, **options):
    config = peft.PrefixTuningConfig(num_virtual_tokens=ROWS, task_type="SEQ_2_SEQ_LM", **options)
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    if model is not None:
        table_of(theirs).data.copy_(adapter_of(model).table().detach())
    return theirs


def table_of(theirs):
    return theirs.prompt_encoder["default"].embedding.weight


def by_hand(base, table, rows, order):
    """The cache of a decoder whose layer i starts with the keys and values of the entry ``order[i]``."""
    config = base.config
    width = getattr(config, "d_kv", None) or config.hidden_size // config.num_attention_heads
    entries = table.reshape(ROWS, -1, 2, config.num_attention_heads, width)
    cache = transformers.EncoderDecoderCache(transformers.DynamicCache(), transformers.DynamicCache())
    for layer, entry in enumerate(order):
        k, v = (entries[:, entry, i].transpose(0, 1).expand(rows, -1, -1, -1) for i in (0, 1))
        cache.self_attention_cache.update(k, v, layer)
    return cache


@pytest.mark.parametrize("host", slow(FIRST, "t5"))
def test_it_is_the_formula_in_fp64(host):
    """T5's heads are not d_model / heads wide here, which PEFT takes them for."""
    base, batch = build(host, **({"d_kv": 12} if host == "t5" else {})), batch_of()
    model = compiled(base, "aot_eager").train()
    loss, got = step(model, batch)
    reference, table = copy.deepcopy(base).double().train(), adapter_of(model).prefix.detach().double()
    table.requires_grad_()
    mask = torch.cat([torch.ones(2, ROWS).long(), batch["decoder_attention_mask"]], 1)

    def formula(order):
        cache = by_hand(base, table, 2, order)
        return reference(**{**batch, "decoder_attention_mask": mask}, past_key_values=cache).loss

    want = formula((0, 2, 0))  # (2 i) mod 4
    (grad,) = torch.autograd.grad(want, table)
    assert abs(float(loss) / want.item() - 1) < 4e-6
    assert max(relative_errors(got, dict.fromkeys(got, grad)).values()) < 2e-5
    assert [bool(g.any()) for g in grad.view(ROWS, 4, -1).unbind(1)] == [True, False, True, False]
    check_all_rewritten(model, 1)
    assert model.adaptc.metrics()["graphs"] == 1
    (other,) = torch.autograd.grad(formula((0, 1, 2)), table)
    assert float((other - grad).norm() / grad.norm()) > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("host", slow(HOSTS, "t5"))
def test_loss_gradient_and_generation_are_pefts(host):
    base = build(host, (3, 2))
    model = compiled(base).train()
    theirs = peft_of(base, model).train()
    for masked in (True, False) if host in FIRST else (True,):
        batch = batch_of(masked)
        model.zero_grad()
        loss, got = step(model, batch)
        table_of(theirs).grad = None
        want = theirs(**batch).loss
        want.backward()
        torch.testing.assert_close(loss, want.detach().double(), rtol=2e-6, atol=0)
        (mine,) = got.values()
        torch.testing.assert_close(mine, table_of(theirs).grad.double(), rtol=2e-4, atol=1e-7)
        assert mine.any()
    assert host in BREAK or model.adaptc.metrics()["graphs"] == (2 if host in FIRST else 1)
    # PEFT 0.21.2 loses its prefix in generation where the cache has its name of transformers 5.24.
    if host not in GENERATE or cache_argument(inspect.signature(type(base).forward).parameters) != "past_key_values":
        return
    model, theirs = model.eval(), theirs.eval()
    given = {k: batch[k] for k in ("input_ids", "attention_mask")}
    for options in ({}, {"num_beams": 2}) if host in FIRST else ({"num_beams": 2},):
        options |= {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
        with torch.no_grad():
            got, want = model.generate(**given, **options), theirs.generate(**given, **options)
        assert torch.equal(got, want) and got.shape == (2, 6)


@pytest.mark.slow
@pytest.mark.parametrize("host", slow(FIRST, "bart"))
def test_generation_reads_the_prefix_with_and_without_a_cache(host):
    base = build(host, (3, 2))
    model = compiled(base).eval()
    adapter_of(model).prefix.data.mul_(5)
    batch = batch_of()
    given = {k: batch[k] for k in ("input_ids", "attention_mask")}
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    rows = torch.zeros(2, 1).long()
    with torch.no_grad():
        for _ in range(3):  # the base, each time anew
            cache = by_hand(base, adapter_of(model).prefix, 2, (0, 2))
            logits = base(**given, decoder_input_ids=rows, past_key_values=cache).logits
            rows = torch.cat([rows, logits[:, -1:].argmax(-1)], 1)
        for use_cache in (True, False):
            assert torch.equal(model.generate(**given, **options, use_cache=use_cache), rows)
        masked = model.generate(**given, decoder_attention_mask=torch.ones(2, 1).long(), **options)
        assert torch.equal(masked, rows)
        plain = base.generate(**given, **options)
        assert not torch.equal(plain, rows)
        with model.adaptc.disable_adapter():
            assert torch.equal(model.generate(**given, **options), plain)


@pytest.mark.slow
def test_decoding_with_a_cache_is_computing_the_whole():
    base, batch = build("bart", (3, 2)), batch_of()
    model = compiled(base).eval()
    given = {k: batch[k] for k in ("input_ids", "attention_mask")}
    ids = batch["labels"]
    with torch.no_grad():
        whole = model(**given, decoder_input_ids=ids).logits
        first = model(**given, decoder_input_ids=ids[:, :3], use_cache=True)
        rest = model(
            encoder_outputs=(first.encoder_last_hidden_state,), attention_mask=given["attention_mask"],
            decoder_input_ids=ids[:, 3:], past_key_values=first.past_key_values,
            decoder_attention_mask=torch.ones_like(ids),
        )  # fmt: skip
        torch.testing.assert_close(torch.cat([first.logits, rest.logits], 1), whole, rtol=1e-5, atol=1e-5)
        plain = model(**given, decoder_input_ids=ids, use_cache=False, return_dict=False)
        assert all(isinstance(value, torch.Tensor) for value in plain)  # no cache among them
        torch.testing.assert_close(plain[0], whole)
        uncached = {**given, "decoder_input_ids": ids, "use_cache": False}
        assert list(model(**uncached)) == list(base(**uncached))  # outputs are read by their order too
        with pytest.raises(Exception, match="expected  an EncoderDecoderCache"):
            model(**given, decoder_input_ids=ids, past_key_values=transformers.DynamicCache())
        foreign = base(**given, decoder_input_ids=ids, use_cache=True).past_key_values
        with pytest.raises(Exception, match="this cache was filled without these virtual tokens"):
            model(**given, decoder_input_ids=ids[:, :1], past_key_values=foreign)
        fixed = transformers.StaticCache(config=base.config, max_cache_len=30)
        fixed = transformers.EncoderDecoderCache(fixed, transformers.DynamicCache())
        with pytest.raises(Exception, match="in a cache of a fixed size"):
            model(**given, decoder_input_ids=ids, past_key_values=fixed)


@pytest.mark.long
def test_two_prefixes_bf16_and_checkpointing():
    base, batch = build("t5", (3, 2)).bfloat16(), batch_of()
    model = compiled(base).train()
    model.adaptc.add("second", adaptc.Prefix(num_virtual_tokens=ROWS))
    model.adaptc.switch(["default", "second"])
    (site,) = model.adaptc.sites
    caches = [by_hand(base, site.adapters[n].prefix.detach().bfloat16(), 2, (0, 2)) for n in ("default", "second")]
    for layer, values in enumerate(caches[1].self_attention_cache.layers):
        caches[0].self_attention_cache.update(values.keys, values.values, layer)
    mask = torch.cat([torch.ones(2, 2 * ROWS).long(), batch["decoder_attention_mask"]], 1)
    want = base(**{**batch, "decoder_attention_mask": mask}, past_key_values=caches[0]).loss
    loss, got = step(model, batch)
    torch.testing.assert_close(loss.float(), want.detach().float(), rtol=1e-2, atol=0)
    assert len(got) == 2 and all(g.any() and g.isfinite().all() for g in got.values())
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with pytest.raises(Exception, match="does not compute with its cache"):
        model(**batch)


@pytest.mark.long
def test_it_bears_what_every_kind_of_site_must():
    plan = adaptc.Plan([adaptc.Prefix(num_virtual_tokens=ROWS)])
    check_life(lambda: build("t5", (3, 2)), plan, batch_of(), sites=1, unmergeable="cannot be folded")


@pytest.mark.long
def test_lora_beside_a_prefix():
    base, batch = build("bart", (3, 2)), batch_of()
    plan = [adaptc.Prefix(num_virtual_tokens=ROWS), adaptc.LoRA(r=2, targets=["v_proj"], init="random")]
    model = adaptc.compile(copy.deepcopy(base), adaptc.Plan(plan), backend="aot_eager").train()
    _, got = step(model, batch)
    assert len(got) == 1 + 2 * (3 + 2 * 2) and all(g.any() for g in got.values())
    assert model.adaptc.metrics()["graphs"] == 1


@pytest.mark.long
@pytest.mark.inductor
def test_inductor_computes_the_same():
    base, batch = build("t5", (3, 2)), batch_of()
    model, plain = compiled(base, "inductor").train(), compiled(base).train()
    adapter_of(plain).prefix.data.copy_(adapter_of(model).prefix.data)
    (loss, got), (want, grads) = step(model, batch), step(plain, batch)
    torch.testing.assert_close(loss, want, rtol=2e-6, atol=0)
    assert max(relative_errors(got, grads).values()) < 2e-5


@pytest.mark.slow
@pytest.mark.parametrize("kind", slow(["table", "projected"], "table"))
def test_files_go_to_peft_and_come_back(kind, tmp_path):
    base, batch = build("t5", (3, 2)), batch_of()
    options = {"prefix_projection": True, "encoder_hidden_size": 7} if kind == "projected" else {}
    theirs = peft_of(base, **options).eval()
    with torch.no_grad():
        want = theirs(**batch).loss
    theirs.save_pretrained(tmp_path / "theirs")
    model = adaptc.compile(copy.deepcopy(base), peft_plan(theirs), backend="eager").eval()
    with warning(kind):
        model.adaptc.load(tmp_path / "theirs")
    torch.testing.assert_close(model(**batch).loss.detach(), want, rtol=2e-6, atol=0)
    model.adaptc.save(tmp_path / "ours")
    own = compiled(base, **options).eval()
    own.adaptc.save(tmp_path / "own")
    for name, mine in (("ours", model), ("own", own)):
        stored = json.loads((tmp_path / name / "adapter_config.json").read_text())
        assert (stored["num_transformer_submodules"], stored["num_layers"], stored["token_dim"]) == (2, 3, 64)
        again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / name).eval()
        assert again.peft_config["default"].task_type == "SEQ_2_SEQ_LM"
        with torch.no_grad():
            torch.testing.assert_close(again(**batch).loss, mine(**batch).loss, rtol=2e-6, atol=0)


def peft_plan(theirs):
    return adaptc.Plan.from_peft(theirs.peft_config["default"])


def warning(kind):
    if kind == "projected":
        return pytest.warns(AdaptcWarning, match="the projection of a prefix is not in its files")
    return contextlib.nullcontext()


#: What PEFT must be told of a config, since it finds other sizes: the encoder's, or the width of hidden states.
TOLD = [
    ("t5", (3, 2), {"d_kv": 12}, {"token_dim": 48}),
    ("bart", (3, 2), {"decoder_attention_heads": 2}, {"num_attention_heads": 2}),
    ("t5", (2, 3), {}, {"num_layers": 3}),
]


@pytest.mark.slow
@pytest.mark.parametrize("host, layers, changes, told", TOLD)
def test_a_decoder_of_other_sizes_than_peft_finds(host, layers, changes, told, tmp_path):
    base, batch = build(host, layers, **changes), batch_of()
    with pytest.raises((RuntimeError, IndexError)):
        peft_of(base)(**batch)
    theirs = peft_of(base, **told).eval()
    with torch.no_grad():
        want = theirs(**batch).loss
    model = compiled(base).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    model.adaptc.load(tmp_path / "theirs")
    torch.testing.assert_close(model(**batch).loss.detach(), want, rtol=2e-6, atol=0)
    own = compiled(base)
    adapter_of(own).prefix.data.copy_(adapter_of(model).prefix.data)
    own.adaptc.save(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(**batch).loss, want, rtol=2e-6, atol=0)


def test_a_table_of_as_many_layers_as_the_decoder(tmp_path):
    """PEFT's user may say so, where the encoder has more."""
    base, batch = build("bart", (4, 3)), batch_of()
    theirs = peft_of(base, num_layers=3).eval()
    model = adaptc.compile(copy.deepcopy(base), peft_plan(theirs), backend="eager").eval()
    adapter_of(model).prefix.data.copy_(table_of(theirs).data)
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).loss, theirs(**batch).loss, rtol=2e-6, atol=0)
    theirs.save_pretrained(tmp_path)
    with pytest.raises(TensorShapeError, match="does not fit its site"):
        compiled(base).adaptc.load(tmp_path)


@pytest.mark.slow
def test_a_wrapped_model_of_peft_is_taken_over():
    base, batch = build("bart", (3, 2)), batch_of()
    theirs = peft_of(base).train()
    want = theirs(**batch).loss
    want.backward()
    grad = table_of(theirs).grad.double()
    model = adaptc.compile(theirs, backend="eager").train()
    loss, got = step(model, batch)
    torch.testing.assert_close(loss, want.detach().double(), rtol=2e-6, atol=0)
    (mine,) = got.values()
    torch.testing.assert_close(mine, grad, rtol=2e-4, atol=1e-7)
    assert adapter_of(model).method.num_transformer_submodules == 2


@pytest.mark.slow
def test_initial_values():
    base, batch = build("t5", (3, 2)), batch_of()
    for options in ({}, {"prefix_projection": True, "encoder_hidden_size": 7}):
        table = adapter_of(compiled(base, init="zero", **options)).table()
        assert table.shape == (ROWS, 2 * 3 * 64) and not table.any()
    model = compiled(base, prefix_projection=True, encoder_hidden_size=7).train()
    _, got = step(model, batch)
    assert {name.rpartition("default.")[2] for name in got} == {
        "embedding", "first.weight", "first.bias", "second.weight", "second.bias",
    }  # fmt: skip
    assert all(g.any() for g in got.values())


REFUSED = [
    ("whisper", {}, "encoder that does not read tokens"),
    ("speech_to_text", {}, "encoder that does not read tokens"),
    ("fsmt", {}, "makes its decoder's mask without the cache"),
    ("prophetnet", {}, "for one token at a time only"),
    ("bart", {"num_transformer_submodules": 1}, "is 1, and the model has 2: an encoder and a decoder"),
    ("bart", {"num_layers": 1}, "num_layers is 1, the model's is 2"),
    ("bart", {"token_dim": 32}, "token_dim is 32, the model's is 64"),
]


@pytest.mark.parametrize("host, options, reason", REFUSED)
def test_what_it_refuses(host, options, reason):
    with pytest.raises(SiteError, match=reason):
        compiled(build(host, (3, 2)), **options)


def test_other_heads_and_other_models_are_refused():
    config = build("bart", (3, 2)).config
    for cls in (transformers.BartForSequenceClassification, transformers.BartModel):
        with pytest.raises(SiteError, match=f"{cls.__name__} has an encoder and a decoder and no language model's"):
            compiled(cls(config))
    with pytest.raises(SiteError, match="is 2, which is for models with an encoder and a decoder"):
        compiled(hosts.build("llama"), num_transformer_submodules=2)
    theirs = peft.PrefixTuningConfig(num_virtual_tokens=ROWS, num_transformer_submodules=2, task_type="CAUSAL_LM")
    with pytest.raises(SiteError, match="is 2, which is for models with an encoder and a decoder"):
        adaptc.compile(hosts.build("llama"), adaptc.Plan.from_peft(theirs), backend="eager")
    mask = torch.ones(2, 1, 6, 6, dtype=torch.bool)
    with pytest.raises(Exception, match="attention mask that they can lengthen"):
        compiled(build("bart", (3, 2)))(**{**batch_of(), "decoder_attention_mask": mask})
