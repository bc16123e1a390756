"""Prompt tuning of models with an encoder and a decoder: the prompt is the encoder's, the decoder attends to it."""

from __future__ import annotations

import copy
import json

import peft
import pytest
import torch
import transformers

import adaptc
from adaptc.errors import SiteError, TensorShapeError
from tests.models import hosts, zoo
from tests.reference import check_all_rewritten, relative_errors, step

ROWS = 3
HOSTS = ["t5", pytest.param("bart", marks=pytest.mark.slow)]


def build(host):
    return (hosts.build("t5") if host == "t5" else zoo.build("seq2seq", host)).eval()


def batch_of(base):
    batch = hosts.batch("t5")
    if base.config.model_type != "t5":  # the labels make the decoder's input there too
        batch["decoder_attention_mask"] = torch.ones_like(batch["labels"])
    return batch


def compiled(base, backend="eager", **options):
    method = adaptc.Prompt(num_virtual_tokens=ROWS, **options)
    return adaptc.compile(copy.deepcopy(base), method, backend=backend)


def peft_of(base, model=None, **options):
    config = peft.PromptTuningConfig(num_virtual_tokens=ROWS, task_type="SEQ_2_SEQ_LM", **options)
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    if model is not None:
        theirs.prompt_encoder["default"].embedding.weight.data.copy_(prompt_of(model))
    return theirs


def prompt_of(model):
    (site,) = model.adaptc.sites
    return site.adapters["default"].prompt


@pytest.mark.parametrize("host", HOSTS)
def test_it_is_the_formula_in_fp64(host):
    base = build(host)
    batch = batch_of(base)
    model = compiled(base, "aot_eager").train()
    assert prompt_of(model).shape == (2 * ROWS, 64 if host == "t5" else base.config.d_model)
    loss, got = step(model, batch)
    reference, prompt = copy.deepcopy(base).double().train(), prompt_of(model).detach().double().requires_grad_()
    rows = len(batch["labels"])
    embeds = reference.get_encoder().get_input_embeddings()(batch["input_ids"])
    lengthened = {
        "inputs_embeds": torch.cat([prompt[:ROWS].expand(rows, -1, -1), embeds], 1),
        "attention_mask": torch.cat([torch.ones(rows, ROWS).long(), batch["attention_mask"]], 1),
    }
    rest = {k: v for k, v in batch.items() if k not in ("input_ids", "attention_mask")}
    want = reference(**lengthened, **rest).loss
    (grad,) = torch.autograd.grad(want, prompt, retain_graph=True)
    assert abs(float(loss) / want.item() - 1) < 4e-6
    assert max(relative_errors(got, dict.fromkeys(got, grad)).values()) < 2e-5
    assert grad[:ROWS].any() and not grad[ROWS:].any()
    check_all_rewritten(model, 1)
    # What the decoder reads of the prompt matters: hidden from it, the gradient is another one.
    states = reference.get_encoder()(**lengthened).last_hidden_state
    hidden = lengthened["attention_mask"].clone()
    hidden[:, :ROWS] = 0
    (blind,) = torch.autograd.grad(reference(encoder_outputs=(states,), attention_mask=hidden, **rest).loss, prompt)
    assert float((blind - grad).norm() / grad.norm()) > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("host", ["t5", "bart"])
def test_loss_gradient_and_generation_are_pefts(host):
    base = build(host)
    batch = batch_of(base)
    model = compiled(base).train()
    theirs = peft_of(base, model).train()
    loss, got = step(model, batch)
    want = theirs(**batch).loss
    want.backward()
    torch.testing.assert_close(loss, want.detach().double(), rtol=2e-6, atol=0)
    (mine,) = got.values()
    grad = theirs.prompt_encoder["default"].embedding.weight.grad.double()
    torch.testing.assert_close(mine, grad, rtol=2e-4, atol=1e-6)
    model, theirs = model.eval(), theirs.eval()
    given = {k: batch[k] for k in ("input_ids", "attention_mask")}
    for options in ({}, {"num_beams": 2}):
        options |= {"max_new_tokens": 5, "do_sample": False}
        with torch.no_grad():
            assert torch.equal(model.generate(**given, **options), theirs.generate(**given, **options))
    with model.adaptc.disable_adapter(), torch.no_grad():
        got, want = model(**batch).logits, base(**batch).logits
    torch.testing.assert_close(got, want)


@pytest.mark.slow
def test_an_encoder_that_was_called_alone_takes_part():
    """As ``generate`` does: the encoder first, then the model with its output and the caller's mask."""
    base = build("t5")
    batch, model = batch_of(base), compiled(base)
    given = {k: batch[k] for k in ("input_ids", "attention_mask")}
    with torch.no_grad():
        states = model.get_encoder()(**given)
        assert states.last_hidden_state.shape[1] == given["input_ids"].shape[1] + ROWS
        got = model(encoder_outputs=states, attention_mask=given["attention_mask"], labels=batch["labels"]).loss
        torch.testing.assert_close(got, model(**batch).loss)
        plain = base.get_encoder()(**given)
        got = model(encoder_outputs=plain, attention_mask=given["attention_mask"], labels=batch["labels"]).loss
        torch.testing.assert_close(got, base(**batch).loss)


@pytest.mark.slow
def test_two_prompts_and_a_mask_that_is_too_short():
    base = build("t5")
    batch, model = batch_of(base), compiled(base).eval()
    model.adaptc.add("second", adaptc.Prompt(num_virtual_tokens=2))
    model.adaptc.switch(["default", "second"])
    (site,) = model.adaptc.sites
    first, second = (site.adapters[name].prompt.detach() for name in ("default", "second"))
    rows = len(batch["labels"])
    embeds = base.get_encoder().get_input_embeddings()(batch["input_ids"])
    front = torch.cat([first[:ROWS], second[:2]]).expand(rows, -1, -1)
    mask = torch.cat([torch.ones(rows, ROWS + 2).long(), batch["attention_mask"]], 1)
    with torch.no_grad():
        want = base(inputs_embeds=torch.cat([front, embeds], 1), attention_mask=mask, labels=batch["labels"]).loss
        torch.testing.assert_close(model(**batch).loss, want)
        states = model.get_encoder()(batch["input_ids"], attention_mask=batch["attention_mask"])
        with pytest.raises(Exception, match=r"size|shape"):  # the caller's mistake is not made up for
            model(encoder_outputs=states, attention_mask=batch["attention_mask"][:, 1:], labels=batch["labels"])


@pytest.mark.parametrize("count", [pytest.param(2, marks=pytest.mark.slow), 1])
def test_files_go_to_peft_and_come_back(count, tmp_path):
    base = build("t5")
    batch = batch_of(base)
    theirs = peft_of(base, num_transformer_submodules=count).eval()
    with torch.no_grad():
        want = theirs(**batch).loss
    theirs.save_pretrained(tmp_path / "theirs")
    model = adaptc.compile(copy.deepcopy(base), str(tmp_path / "theirs"), backend="eager").eval()
    assert prompt_of(model).shape[0] == count * ROWS
    torch.testing.assert_close(model(**batch).loss.detach(), want, rtol=2e-6, atol=0)
    model.adaptc.save(tmp_path / "ours")
    own = compiled(base, num_transformer_submodules=count)
    own.adaptc.save(tmp_path / "own")
    for name, mine in (("ours", model), ("own", own)):
        again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / name).eval()
        with torch.no_grad():
            torch.testing.assert_close(again(**batch).loss, mine.eval()(**batch).loss, rtol=2e-6, atol=0)
        assert again.peft_config["default"].task_type == "SEQ_2_SEQ_LM"
    taken = adaptc.compile(peft_of(base, num_transformer_submodules=count), backend="eager").eval()
    assert prompt_of(taken).shape[0] == count * ROWS


@pytest.mark.parametrize("host, count", [("t5", None), ("t5", 1), ("llama", None)])
def test_a_file_fits_a_plan_that_leaves_to_the_model_how_many_stacks_it_has(host, count, tmp_path):
    """The file says 1 or 2; rows that are not there are told of."""
    base = hosts.build(host).eval()
    task = "SEQ_2_SEQ_LM" if host == "t5" else "CAUSAL_LM"
    config = peft.PromptTuningConfig(num_virtual_tokens=ROWS, task_type=task, num_transformer_submodules=count)
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    theirs.save_pretrained(tmp_path)
    model = compiled(base)
    if count == 1:
        before = prompt_of(model).detach().clone()
        with pytest.raises(TensorShapeError):
            model.adaptc.load(tmp_path)
        assert torch.equal(prompt_of(model), before)
        return
    model.adaptc.load(tmp_path)
    assert torch.equal(prompt_of(model), theirs.prompt_encoder["default"].embedding.weight)
    model.adaptc.save(tmp_path / "ours")
    again = adaptc.compile(copy.deepcopy(base), adaptc.Plan.from_peft(tmp_path / "ours"), backend="eager")
    again.adaptc.load(tmp_path / "ours")
    assert torch.equal(prompt_of(again), prompt_of(model))


def test_a_file_of_a_fresh_prompt_says_how_many_rows_it_has(tmp_path):
    """PEFT takes none for one or two by the task, which a classifier's is not."""
    base = transformers.T5ForSequenceClassification(hosts.build("t5").config).eval()
    model = compiled(base)
    model.adaptc.save(tmp_path)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (stored["num_transformer_submodules"], stored["task_type"]) == (2, "SEQ_CLS")
    peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    again = adaptc.compile(copy.deepcopy(base), str(tmp_path), backend="eager")
    assert torch.equal(prompt_of(again), prompt_of(model))


@pytest.mark.slow
def test_a_mask_of_global_attention_is_lengthened():
    """Longformer's encoder: which tokens all others see."""
    base = zoo.build("seq2seq", "led").eval()
    batch = batch_of(base)
    globally = torch.zeros_like(batch["attention_mask"])
    globally[:, 0] = 1
    with torch.no_grad():
        got = compiled(base).eval()(**batch, global_attention_mask=globally).loss
    assert bool(got.isfinite())


def test_what_it_refuses():
    with pytest.raises(SiteError, match="models with an encoder and a decoder are not supported"):
        compiled(zoo.build("speech", "whisper"))
    pegasus = zoo.build("seq2seq", "pegasus")
    pegasus.get_encoder().embed_scale = 8.0
    with pytest.raises(SiteError, match="scales its tokens' embeddings after looking them up"):
        compiled(pegasus)
    with pytest.raises(SiteError, match="num_transformer_submodules is 2, which is for models with an encoder"):
        compiled(hosts.build("llama"), num_transformer_submodules=2)
