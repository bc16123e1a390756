"""Prompt and prefix tuning on real classes: the formula in fp64, PEFT, generation, files, and what is refused."""

from __future__ import annotations

import copy
import inspect
import json
import warnings

import peft
import pytest
import safetensors.torch
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

import adaptc
from adaptc.errors import (
    AdaptcWarning,
    NewSignatureWarning,
    PlanError,
    SiteError,
    UnsupportedError,
    UnsupportedKindError,
)  # fmt: skip
from adaptc.methods import prefix
from adaptc.methods.prefix import PREFIX
from adaptc.methods.prompt import PROMPT
from adaptc.transformers_names import cache_argument
from tests.models import hosts
from tests.reference import check_all_rewritten, loss_of, relative_errors, step
from tests.sites.life import check_life

ROWS = 3
METHODS = {
    "prompt": lambda **o: adaptc.Prompt(num_virtual_tokens=ROWS, **o),
    "prefix": lambda **o: adaptc.Prefix(num_virtual_tokens=ROWS, **o),
    "projected": lambda **o: adaptc.Prefix(
        num_virtual_tokens=ROWS, prefix_projection=True, encoder_hidden_size=7, **o
    ),
}  # fmt: skip
CAUSAL = ("llama", "gpt2")
PLACES = [(host, kind) for host in ("llama", "gpt2", "bert") for kind in METHODS]
SLOW = [pytest.param(*place, marks=pytest.mark.slow) for place in PLACES if place != ("llama", "prompt")]
#: The same, those that take longest in the slow set.
SOME = [
    (host, kind) if (host, kind) in (("llama", "prompt"), ("bert", "prefix"))
    else pytest.param(host, kind, marks=pytest.mark.slow) for host, kind in PLACES
]  # fmt: skip


def build(host, **options):
    if host == "llama-score":
        config = hosts.build("llama").config
        config.num_labels = hosts.CLASSES
        with hosts.seeded(0):
            return transformers.LlamaForSequenceClassification(config).eval()
    return hosts.build(host, **options)


def batch_of(host, **options):
    if host == "llama-score":
        batch = hosts.batch("llama", **options)
        return {**batch, "labels": torch.arange(len(batch["labels"])) % hosts.CLASSES}
    return hosts.batch(host, **options)


def compiled(base, kind, backend="eager"):
    return adaptc.compile(copy.deepcopy(base), METHODS[kind](), backend=backend).train()


def table_of(t):
    """T, from the tensors of a site."""
    if "prefix" in t:
        return t["prefix"]
    hidden = torch.tanh(t["embedding"] @ t["first.weight"].T + t["first.bias"])
    return hidden @ t["second.weight"].T + t["second.bias"]


def filled_cache(config, table, rows):
    """A cache that begins with T's keys and values, put together here by hand."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    states = table.reshape(ROWS, config.num_hidden_layers, 2, heads, -1)
    cache = transformers.DynamicCache()
    for layer in range(config.num_hidden_layers):
        k, v = (states[:, layer, i].transpose(0, 1).expand(rows, -1, -1, -1) for i in (0, 1))
        cache.update(k, v, layer)
    return cache


def greedy(model, base, ids, count):
    """``count`` tokens more by the formula: the base computes the whole anew for each. Logits of each, and tokens."""
    tensors, every = dict(model.adaptc.sites[0].adapters["default"].named_parameters()), []
    for _ in range(count):
        rows = len(ids)
        if "prompt" in tensors:
            embeds = [tensors["prompt"].expand(rows, -1, -1), base.get_input_embeddings()(ids)]
            logits = base(inputs_embeds=torch.cat(embeds, 1), use_cache=False).logits
        else:
            logits = base(ids, past_key_values=filled_cache(base.config, table_of(tensors), rows)).logits
        every.append(logits[:, -1])
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
    return torch.stack(every), ids


def formula_step(model, base, batch):
    """The base in fp64 on lengthened inputs, put together here by hand."""
    reference = copy.deepcopy(base).double().requires_grad_(False).train(model.training)
    ((name, adapter),) = model.adaptc.sites[0].adapters.items()
    t = {n: p.detach().double().clone().requires_grad_() for n, p in adapter.named_parameters()}
    path = f"{model.adaptc.sites[0].path}.adapters.{name}.".lstrip(".")
    mask, labels = batch["attention_mask"], batch["labels"]
    rows = mask.shape[0]
    mask = torch.cat([torch.ones(rows, ROWS, dtype=mask.dtype), mask], 1)
    if "prompt" in t:
        embeds = reference.get_input_embeddings()(batch["input_ids"])
        embeds = torch.cat([t["prompt"].expand(rows, -1, -1), embeds], 1)
        if model.can_generate():
            labels = torch.cat([torch.full((rows, ROWS), -100), labels], 1)
        loss = reference(inputs_embeds=embeds, attention_mask=mask, labels=labels).loss
    else:
        cache = filled_cache(base.config, table_of(t), rows)
        if hasattr(reference, "bert"):
            pooled = reference.bert(batch["input_ids"], attention_mask=mask, past_key_values=cache).pooler_output
            loss = torch.nn.functional.cross_entropy(reference.classifier(pooled), labels)
        else:
            loss = reference(batch["input_ids"], attention_mask=mask, past_key_values=cache, labels=labels).loss
    loss.backward()
    return loss.detach(), {path + n: p.grad for n, p in t.items()}


@pytest.mark.parametrize("host, kind", SOME)
def test_every_class_computes_the_formula(host, kind):
    base, batch = build(host), batch_of(host)
    model = compiled(base, kind, "aot_eager" if host == "llama" else "eager")
    (loss, got), (want_loss, want) = step(model, batch), formula_step(model, base, batch)
    assert abs(loss / want_loss - 1) < 4e-6
    errors = relative_errors(got, want)
    assert len(errors) == len(list(model.adaptc.parameters())) > 0
    assert max(errors.values()) < 2e-5, max(errors, key=errors.get)
    check_all_rewritten(model, 1)
    # The class itself breaks GPT-2's graph: it warns of its loss type.
    assert model.adaptc.metrics()["graphs"] == 1 or host == "gpt2"


TASKS = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "bert": "SEQ_CLS", "llama-score": "SEQ_CLS"}


def peft_of(base, host, kind):
    options = {"num_virtual_tokens": ROWS, "task_type": TASKS[host]}
    if kind == "prompt":
        config = peft.PromptTuningConfig(**options)
    else:
        projected = {"prefix_projection": True, "encoder_hidden_size": 7} if kind == "projected" else {}
        config = peft.PrefixTuningConfig(**options, **projected)
    model = peft.get_peft_model(named_for_peft(copy.deepcopy(base)), config)
    for name, p in model.named_parameters():
        p.requires_grad_("prompt_encoder" in name)
    return model.train()


def named_for_peft(base):
    """``base``, whose backbone says in its signature that it takes past_key_values: PEFT 0.21.2 looks for this name,
    which transformers 5.24 has given up there and still takes."""
    backbone = base.base_model
    kind = type(backbone)
    signature = inspect.signature(kind.forward)
    own = cache_argument(signature.parameters)

    def forward(self, *args, **kwargs):
        return kind.forward(self, *args, **kwargs)

    renamed = [p.replace(name="past_key_values") if p.name == own else p for p in signature.parameters.values()]
    forward.__signature__ = signature.replace(parameters=renamed)
    if own != "past_key_values":
        backbone.__class__ = type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})
    return base


def copy_values(theirs, model):
    """PEFT's values, and the names of its parameters by ours."""
    encoder, adapter = theirs.prompt_encoder["default"], model.adaptc.sites[0].adapters["default"]
    pairs = {"prompt": "embedding.weight", "prefix": "embedding.weight", "embedding": "embedding.weight"}
    pairs |= {f"{a}.{n}": f"transform.{i}.{n}" for a, i in (("first", 0), ("second", 2)) for n in ("weight", "bias")}
    own, names = dict(encoder.named_parameters()), {}
    for name, parameter in adapter.named_parameters():
        parameter.data.copy_(own[pairs[name]].data)
        names[name] = own[pairs[name]]
    return names


@pytest.mark.parametrize("host, kind", SOME)
def test_loss_and_gradients_are_pefts(host, kind):
    base, batch = build(host), batch_of(host)
    model, theirs = compiled(base, kind), peft_of(base, host, kind)
    pairs = copy_values(theirs, model)
    loss, _ = step(model, batch)
    want = theirs(**batch).loss
    want.backward()
    torch.testing.assert_close(loss, want.detach().double(), rtol=2e-6, atol=0)
    for name, parameter in model.adaptc.sites[0].adapters["default"].named_parameters():
        torch.testing.assert_close(parameter.grad, pairs[name].grad, rtol=2e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_a_classifier_on_a_decoder_finds_the_last_token_under_padding(kind):
    """PEFT gives embeddings instead of ids to it, so that it cannot see the padding: row by row it can."""
    base, batch = build("llama-score"), batch_of("llama-score")
    model = compiled(base, kind).eval()
    together = model(**batch).logits
    for row in range(len(together)):
        length = int(batch["attention_mask"][row].sum())
        alone = model(input_ids=batch["input_ids"][row : row + 1, :length]).logits
        torch.testing.assert_close(together[row], alone[0], rtol=1e-5, atol=1e-6)
    assert [s.path for s in model.adaptc.sites] == ["model"]


@pytest.mark.parametrize("host, kind", [("llama", "prompt"), *(p for p in SLOW if "bert" not in p.values)])
def test_generation_is_the_formula_without_a_cache_and_counts_the_callers_tokens(host, kind):
    """PEFT 0.21.2 is no reference: beside transformers 5.24 its prompt goes in again at every step."""
    base = build(host, num_hidden_layers=1)
    model = compiled(base, kind).eval()
    ids = hosts.batch(host, rows=2, length=5)["input_ids"].clamp(min=3)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    options |= {"pad_token_id": 0, "return_dict_in_generate": True, "output_logits": True}
    with torch.no_grad():
        want, tokens = greedy(model, base, ids, 3)
        got = model.generate(input_ids=ids, **options)
        torch.testing.assert_close(torch.stack(got.logits), want, rtol=1e-4, atol=1e-5)
        assert torch.equal(got.sequences, tokens)
        plain = base.generate(input_ids=ids, **options)
        assert not torch.allclose(torch.stack(plain.logits), want, rtol=1e-2, atol=1e-3)
        if (host, kind) == ("llama", "prompt"):
            return
        assert torch.equal(model.generate(input_ids=ids, use_cache=False, **options).sequences, tokens)
        with model.adaptc.disable_adapter():
            assert torch.equal(model.generate(input_ids=ids, **options).sequences, plain.sequences)


@pytest.mark.slow
@pytest.mark.parametrize("host, kind", [("llama", "prompt"), ("llama", "prefix"), ("gpt2", "prompt")])
def test_generation_under_left_padding_is_that_of_the_row_alone(host, kind):
    model = compiled(build(host), kind).eval()
    ids = hosts.batch(host, rows=2, length=6)["input_ids"].clamp(min=3)
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    ids[1, :2] = 0
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with torch.no_grad():
        both = model.generate(input_ids=ids, attention_mask=mask, **options)
        alone = model.generate(input_ids=ids[1:, 2:], attention_mask=mask[1:, 2:], **options)
        searched = model.generate(input_ids=ids, attention_mask=mask, num_beams=2, **options)
    assert torch.equal(both[1, 6:], alone[0, 4:]) and searched.shape == (2, 11)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_decoding_with_a_cache_is_computing_the_whole(kind):
    model = compiled(build("llama"), kind).eval()
    ids = hosts.batch("llama", length=8)["input_ids"].clamp(min=3)
    with torch.no_grad():
        whole = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        first = model(input_ids=ids[:, :5], use_cache=True)
        # As generation does: positions of the caller's own tokens, with which the virtual ones are not counted.
        places = torch.arange(5, 8)[None]
        more = {"attention_mask": torch.ones_like(ids), "position_ids": places}
        own = cache_argument(inspect.signature(type(model).forward).parameters)
        for name in {own, "past_key_values"}:  # the old name is taken by the release that has a new one, too
            cache = copy.deepcopy(first[own])
            rest = model(input_ids=ids[:, 5:], **{name: cache}, **more)
            torch.testing.assert_close(torch.cat([first.logits, rest.logits], 1), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("host", CAUSAL)
def test_a_prompt_is_the_prefix_of_its_own_keys_and_values(host):
    """Under a causal mask the prompt's rows never see the input."""
    base, batch = build(host), batch_of(host)
    prompt, prefix = compiled(base, "prompt").eval(), compiled(base, "prefix").eval()
    rows = prompt.adaptc.sites[0].adapters["default"].prompt
    with torch.no_grad():
        cache = base(inputs_embeds=rows[None], use_cache=True).past_key_values
        states = [x[0].transpose(0, 1) for layer in cache.layers for x in (layer.keys, layer.values)]
        prefix.adaptc.sites[0].adapters["default"].prefix.copy_(torch.cat([s.flatten(1) for s in states], 1))
        mine = {k: v for k, v in batch.items() if k != "labels"}
        torch.testing.assert_close(prefix(**mine).logits, prompt(**mine).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_outputs_have_the_callers_rows():
    model, batch = compiled(build("llama"), "prompt").eval(), batch_of("llama")
    out = model(**batch, output_hidden_states=True)
    assert out.logits.shape[:2] == batch["input_ids"].shape
    assert {h.shape[:2] for h in out.hidden_states} == {batch["input_ids"].shape}
    ids = {"input_ids": batch["input_ids"]}
    full = model(**ids).logits
    for keep in (1, 4, 99):
        torch.testing.assert_close(model(**ids, logits_to_keep=keep).logits, full[:, -keep:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        model(**ids, logits_to_keep=torch.tensor([2, 5])).logits, full[:, [2, 5]], rtol=1e-5, atol=1e-5
    )
    loss, logits = model(**batch, return_dict=False)[:2]
    assert loss.dim() == 0 and logits.shape[:2] == batch["input_ids"].shape
    by_position = model(batch["input_ids"], batch["attention_mask"])
    torch.testing.assert_close(by_position.logits, out.logits)


def test_the_call_keeps_its_signature():
    """Generation and trainers ask which arguments a model takes."""
    base = build("llama")
    want = list(inspect.signature(base.forward).parameters)
    model = compiled(base, "prompt")
    assert list(inspect.signature(model.forward).parameters) == want
    assert list(inspect.signature(copy.deepcopy(model).forward).parameters) == want


LIVES = [("llama", "prompt"), ("bert", "prefix"), ("bert", "prompt"), ("llama", "projected")]


@pytest.mark.slow
@pytest.mark.parametrize("host, kind", LIVES)
def test_it_bears_what_every_kind_of_site_must(host, kind):
    plan = adaptc.Plan([METHODS[kind]()])
    check_life(lambda: build(host), plan, batch_of(host), sites=1, unmergeable="cannot be folded")


@pytest.mark.slow
def test_a_head_and_lora_beside_a_prompt():
    plan = adaptc.Plan([
        METHODS["prompt"](), adaptc.LoRA(r=2, targets=["query"], init="random"),
        adaptc.Rule(adaptc.Match(("classifier",)), train="full"),
    ])  # fmt: skip
    model = adaptc.compile(build("bert"), plan, backend="aot_eager").train()
    _, got = step(model, batch_of("bert"))
    assert set(got) == {n for n, _ in model.adaptc.named_parameters()} and all(g.any() for g in got.values())
    assert model.adaptc.metrics()["graphs"] == 1


@pytest.mark.slow
def test_checkpointing_works_for_prompts_and_is_refused_for_prefixes():
    batch = batch_of("llama")
    model = compiled(build("llama"), "prompt")
    plain = step(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    again = step(model, batch)
    assert max(relative_errors(again[1], plain[1]).values()) < 1e-6
    model = compiled(build("llama"), "prefix")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with pytest.raises(Exception, match="does not compute with its cache"):
        model(**batch)


@pytest.mark.parametrize("host, kind", SOME)
def test_files_go_to_peft_and_come_back(host, kind, tmp_path):
    base, batch = build(host), batch_of(host)
    model = compiled(base, kind).eval()
    want = loss_of(model(**batch)).detach()
    model.adaptc.save(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    assert theirs.peft_config["default"].task_type == ("FEATURE_EXTRACTION" if host == "bert" else "CAUSAL_LM")
    with torch.no_grad():
        torch.testing.assert_close(loss_of(theirs(**batch)), want, rtol=2e-6, atol=0)
    assert list(safetensors.torch.load_file(tmp_path / "ours" / "adapter_model.safetensors")) == ["prompt_embeddings"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AdaptcWarning)  # a projection is not in the file
        again = adaptc.compile(copy.deepcopy(base), str(tmp_path / "ours"), backend="eager").eval()
    torch.testing.assert_close(loss_of(again(**batch)).detach(), want, rtol=2e-6, atol=0)
    for n, p in again.adaptc.named_parameters():
        assert p.requires_grad and n.endswith(("prompt", "prefix"))


@pytest.mark.parametrize("host, kind", SOME)
def test_files_of_peft_are_read(host, kind, tmp_path):
    base, batch = build(host), batch_of(host)
    theirs = peft_of(base, host, kind).eval()
    with torch.no_grad():
        want = theirs(**batch).loss
    theirs.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AdaptcWarning)
        model = adaptc.compile(copy.deepcopy(base), str(tmp_path), backend="eager").eval()
    torch.testing.assert_close(loss_of(model(**batch)).detach(), want, rtol=2e-6, atol=0)


@pytest.mark.parametrize("host, kind", [("llama", "prompt"), ("bert", "prefix")])
def test_a_wrapped_model_of_peft_is_taken_over(host, kind):
    base, batch = build(host), batch_of(host)
    theirs = peft_of(base, host, kind)
    theirs.base_model.get_input_embeddings().requires_grad_(True)
    loss, want = step(theirs, batch)
    model = adaptc.compile(theirs, backend="eager").train()
    got_loss, got = step(model, batch)
    torch.testing.assert_close(got_loss, loss, rtol=2e-6, atol=0)
    assert set(got) == {n for n, p in model.named_parameters() if p.requires_grad}
    (table,) = (g for n, g in want.items() if "prompt_encoder" in n)
    (mine,) = (g for n, g in got.items() if ".adapters." in f".{n}")
    torch.testing.assert_close(mine, table, rtol=2e-4, atol=1e-6)
    assert any("embed" in n for n in got)


def test_a_prompt_and_its_head_in_one_file_of_peft(tmp_path):
    base, batch = build("bert"), batch_of("bert")
    config = peft.PromptTuningConfig(num_virtual_tokens=ROWS, task_type="SEQ_CLS")
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.add_(0.1)
        want = theirs(**batch).loss
    theirs.save_pretrained(tmp_path / "theirs")
    model = adaptc.compile(copy.deepcopy(base), str(tmp_path / "theirs"), backend="eager").eval()
    torch.testing.assert_close(loss_of(model(**batch)).detach(), want, rtol=2e-6, atol=0)
    model.adaptc.save(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    torch.testing.assert_close(again(**batch).loss.detach(), want, rtol=2e-6, atol=0)
    old, new = (json.loads((tmp_path / d / "adapter_config.json").read_text()) for d in ("theirs", "ours"))
    assert new == old


def test_initial_values():
    base = build("llama")
    table = base.get_input_embeddings().weight

    def prompt(**options):
        method = adaptc.Prompt(num_virtual_tokens=5, **options)
        return adaptc.compile(copy.deepcopy(base), method, backend="eager").adaptc.sites[0].adapters["default"].prompt

    assert 0.9 < float(prompt().detach().std()) < 1.1
    drawn = prompt(init="vocabulary").detach()
    assert all((row == table).all(1).any() for row in drawn)
    assert torch.equal(prompt(init="tokens", init_ids=[4, 7]).detach(), table[[4, 7, 4, 7, 4]])

    def tokenizer(text):
        return {"input_ids": [len(word) for word in text.split()]}

    method = adaptc.Prompt.from_text("a prompt of words", tokenizer)
    assert (method.num_virtual_tokens, method.init_ids) == (4, (1, 6, 2, 5))
    plan = adaptc.Plan([method])
    assert adaptc.Plan.from_dict(json.loads(plan.canonical_json())) == plan
    zero = adaptc.compile(copy.deepcopy(base), METHODS["projected"](init="zero"), backend="eager")
    assert not zero.adaptc.sites[0].adapters["default"].table().any()


def test_what_it_refuses(tmp_path):
    with pytest.raises(SiteError, match="is not a transformer of transformers"):
        adaptc.compile(torch.nn.Linear(2, 2), METHODS["prefix"](), backend="eager")
    with pytest.raises(SiteError, match="num_layers is 5, the model's is 2"):
        adaptc.compile(build("llama"), METHODS["prefix"](num_layers=5), backend="eager")
    with pytest.raises(SiteError, match="init_ids has 99, the model's vocabulary 99 tokens"):
        adaptc.compile(build("llama"), METHODS["prompt"](init="tokens", init_ids=(99,)), backend="eager")
    with pytest.raises(PlanError, match="prompt acts on the model as a whole"):
        adaptc.compile(build("llama"), METHODS["prompt"](targets=["q_proj"]), backend="eager")
    with pytest.raises(PlanError, match="lora acts on modules, not on the model as a whole"):
        adaptc.compile(build("llama"), adaptc.LoRA(r=2, targets=["."]), backend="eager")
    config = peft.PromptTuningConfig(
        num_virtual_tokens=ROWS, prompt_tuning_init="TEXT", prompt_tuning_init_text="x", tokenizer_name_or_path="y"
    )
    with pytest.raises(UnsupportedKindError, match="prompt_tuning_init"):
        adaptc.Plan.from_peft(config)
    base = hosts.short("llama")
    model = compiled(base, "prompt").eval()
    ids = hosts.batch("llama")["input_ids"]
    with pytest.raises(Exception, match="attention mask that they can lengthen"):
        model(input_ids=ids, attention_mask=torch.ones(2, 1, 10, 10, dtype=torch.bool))
    cache = base(input_ids=ids, use_cache=True).past_key_values
    for mask in (torch.ones(2, 11, dtype=torch.long), None):
        with pytest.raises(Exception, match="this cache was filled without these virtual tokens"):
            model(input_ids=ids[:, :1], past_key_values=cache, attention_mask=mask)
    with pytest.warns(NewSignatureWarning):
        model.adaptc.switch(None)
    cache = model(input_ids=ids, use_cache=True).past_key_values
    model.adaptc.switch("default")
    with pytest.raises(Exception, match="this cache was filled without these virtual tokens"):
        model(input_ids=ids[:, :1], past_key_values=cache)
    fixed = transformers.StaticCache(config=model.config, max_cache_len=30)
    with pytest.raises(Exception, match="in a cache of a fixed size"):
        model(input_ids=ids, past_key_values=fixed)


ILLEGAL = [
    (adaptc.Prompt, "num_virtual_tokens", 0), (adaptc.Prompt, "init", "text"), (adaptc.Prompt, "init_ids", (1,)),
    (adaptc.Prompt, "num_transformer_submodules", 3),
    (adaptc.Prefix, "token_dim", 0), (adaptc.Prefix, "init", "one"), (adaptc.Prefix, "prefix_projection", 1),
    (adaptc.Prefix, "encoder_hidden_size", -1),
]  # fmt: skip


@pytest.mark.parametrize("cls, option, value", ILLEGAL)
def test_illegal_options_are_named(cls, option, value):
    with pytest.raises(PlanError, match=f"{cls.__name__}: {option} is not legal"):
        cls(**{option: value})


@given(st.data())
def test_prompt_op_and_gradients_are_the_formula(data):
    embeds, prompt = (t.requires_grad_() for t in PROMPT.sample(data.draw))
    got = torch.ops.adaptc.prompt_rows(embeds, prompt)
    n, of_rows = prompt.shape[-2], prompt.expand(len(embeds), *prompt.shape[-2:])
    assert torch.equal(got[:, n:], embeds)
    assert torch.equal(got[:, :n], of_rows.to(embeds.dtype))
    grad = torch.arange(got.numel(), dtype=torch.float64).view(got.shape).remainder(7).sub(3)  # exact in any order
    found = torch.autograd.grad(got, (embeds, prompt), grad.to(got.dtype))
    wanted = grad[:, :n] if prompt.dim() == 3 else grad[:, :n].sum(0)
    assert torch.equal(found[0].double(), grad[:, n:]) and torch.equal(found[1].double(), wanted)


@given(st.data())
def test_prefix_op_and_gradient_are_the_formula(data):
    table, like, layers, heads = PREFIX.sample(data.draw)
    table.requires_grad_()
    got = torch.ops.adaptc.prefix_states(table, like, layers, heads)
    n, d = table.shape[-2], table.shape[-1] // (2 * layers * heads)
    assert (got.shape, got.dtype) == ((2 * layers, len(like), heads, n, d), like.dtype)
    for i in range(2 * layers):
        for b in range(len(like)):
            own = table[b] if table.dim() == 3 else table
            rows = own[:, i * heads * d : (i + 1) * heads * d].to(like.dtype)
            assert torch.equal(got[i, b], rows.view(n, heads, d).transpose(0, 1))
    (found,) = torch.autograd.grad(got, table, torch.ones_like(got))
    assert torch.equal(found, torch.full_like(table, 1 if table.dim() == 3 else len(like)))


def test_ops_pass_gradcheck():
    embeds, prompt = torch.randn(2, 3, 4).double().requires_grad_(), torch.randn(2, 4).double().requires_grad_()
    assert torch.autograd.gradcheck(torch.ops.adaptc.prompt_rows, (embeds, prompt))
    torch.library.opcheck(torch.ops.adaptc.prompt_rows.default, (embeds, prompt))
    args = (torch.randn(2, 24).double().requires_grad_(), torch.zeros(3).double(), 2, 3)
    assert torch.autograd.gradcheck(torch.ops.adaptc.prefix_states, args)
    torch.library.opcheck(torch.ops.adaptc.prefix_states.default, args)


def test_a_table_does_not_take_the_place_of_a_sharded_projection(monkeypatch):
    model = adaptc.compile(build("llama"), METHODS["projected"](), backend="eager")
    (site,) = model.adaptc.sites
    adapter = site.adapters["default"]
    monkeypatch.setattr(prefix.distributed, "is_distributed", lambda tensor: tensor is adapter.embedding)
    before = {name: value.clone() for name, value in model.adaptc.named_parameters()}
    with pytest.raises(UnsupportedError, match="the projection's parameters are sharded"):
        adapter.set_peft_tensors({"prompt_embeddings": torch.zeros_like(adapter.table())})
    assert all(torch.equal(value, before[name]) for name, value in model.adaptc.named_parameters())
