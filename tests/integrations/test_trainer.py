"""The trainer of transformers, as it is and with the mixin, on a compiled model."""

from __future__ import annotations

import shutil

import peft
import pytest
import safetensors.torch
import torch
import transformers
from torch import nn

import adaptc
from adaptc.errors import AdapterNameError, ResumeError
from adaptc.integrations import AdapterTrainerMixin
from adaptc.methods.lora import LoRAAdapter
from tests.integrations.training import PLAN, Rows, arguments, base, compiled, train, values
from tests.models import hosts


class MyTrainer(AdapterTrainerMixin, transformers.Trainer):
    """The trainer with the mixin."""


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def logits(model):
    with torch.no_grad():
        return model.eval()(**hosts.batch("llama")).logits


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(model, directory) of six steps with a checkpoint after the third, by the unmodified trainer."""
    model, directory = compiled(), tmp_path_factory.mktemp("straight")
    trainer = train(model, directory, save_strategy="steps", save_steps=3)
    assert trainer.model_accepts_loss_kwargs, "the signature that the trainer inspects is the model's own"
    counts = model.adaptc.metrics()
    assert (counts["graphs"], counts["calls"], counts["eager_sites"]) == (1, 6, 0)
    return model, directory


@pytest.fixture
def straight(trained, tmp_path):
    """:func:`trained`, with a copy of the directory."""
    model, directory = trained
    shutil.copytree(directory, tmp_path / "straight")
    return model, tmp_path / "straight"


# ------------------------------------------------------------------------------- the unmodified trainer


def test_it_trains_the_adapters_and_nothing_else(straight):
    model, _ = straight
    fresh = compiled()
    started, ended = values(fresh), values(model)
    assert all(not torch.equal(started[name], ended[name]) for name in started)
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in base().state_dict().items())


def test_peft_reads_its_checkpoints(straight):
    model, directory = straight
    theirs = peft.PeftModel.from_pretrained(base(), directory / "checkpoint-6")
    torch.testing.assert_close(logits(theirs), logits(model), rtol=0, atol=1e-6)
    early = peft.PeftModel.from_pretrained(base(), directory / "checkpoint-3")
    assert (logits(early) - logits(model)).abs().max() > 1e-3


def test_its_checkpoints_hold_no_base_weight(straight):
    _, directory = straight
    tensors = safetensors.torch.load_file(directory / "checkpoint-6" / "adapter_model.safetensors")
    assert len(tensors) == 6 and all(".lora_" in key for key in tensors)
    guard = safetensors.torch.load_file(directory / "checkpoint-6" / "model.safetensors")
    assert sum(tensor.numel() for tensor in guard.values()) == 0


def test_its_resume_names_the_mixin(straight):
    _, directory = straight
    model = compiled()
    before = values(model)
    with pytest.raises(ResumeError, match="does not read by itself") as error:
        train(model, directory, resume=True)
    assert "adaptc.integrations.AdapterTrainerMixin" in str(error.value)
    assert same(values(model), before)


def test_no_trainer_reads_a_bare_base_from_its_checkpoints(straight):
    _, directory = straight
    with pytest.raises(RuntimeError, match="size mismatch"):
        train(base(), directory, resume=True)


@pytest.mark.slow
def test_its_best_model_names_the_mixin(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    with pytest.raises(ResumeError, match="does not read by itself"):
        train(
            compiled(backend="eager"), tmp_path, max_steps=2, load_best_model_at_end=True, eval_dataset=Rows(4, 9),
            **options,
        )  # fmt: skip


class Recorded(transformers.TrainerCallback):
    """Remembers the gradients of the first step as they reach the optimizer."""

    def __init__(self):
        self.gradients = None

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if self.gradients is None:
            self.gradients = {n: p.grad.clone() for n, p in model.adaptc.named_parameters()}


def first_gradients(tmp_path, plan, **options):
    """The first step's gradients, and its rows in the order in which the trainer draws them."""
    recorded = Recorded()
    model = compiled(plan)
    trainer = train(model, tmp_path, max_steps=1, callbacks=[recorded], **options)
    transformers.set_seed(11)
    rows = [row for row, _ in zip(trainer.get_train_dataloader(), range(2), strict=False)]
    return model, recorded.gradients, rows


def plain_gradients(rows, plan, **autocast):
    """Loss per token over all ``rows``, differentiated in a loop of our own."""
    model = compiled(plan).train()
    count = sum(int((row["labels"][:, 1:] != -100).sum()) for row in rows)
    for row in rows:
        with torch.autocast("cpu", torch.bfloat16, enabled=bool(autocast)):
            model(**row, num_items_in_batch=count).loss.backward()
    return {n: p.grad for n, p in model.adaptc.named_parameters()}


STILL = adaptc.Plan([adaptc.LoRA(r=3, alpha=6, init="random", targets=["q_proj", "down_proj"])])


@pytest.mark.parametrize(
    "options, steps, autocast",
    [
        ({"gradient_accumulation_steps": 2, "max_grad_norm": 0.0}, 2, {}),
        pytest.param({"gradient_checkpointing": True, "max_grad_norm": 0.0}, 1, {}, marks=pytest.mark.slow),
        pytest.param({"bf16": True, "max_grad_norm": 0.0}, 1, {"dtype": "bf16"}, marks=pytest.mark.slow),
    ],
    ids=["accumulation", "checkpointing", "bf16"],
)
def test_its_options_give_the_gradients_of_a_plain_loop(tmp_path, options, steps, autocast):
    model, got, rows = first_gradients(tmp_path, STILL, **options)
    assert model.adaptc.metrics()["eager_sites"] == 0
    want = plain_gradients(rows[:steps], STILL, **autocast)
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, want[name], rtol=1e-5, atol=1e-7)


def test_it_clips_gradients(tmp_path):
    _, got, _ = first_gradients(tmp_path, STILL, max_grad_norm=1e-3)
    norm = torch.sqrt(sum(g.pow(2).sum() for g in got.values()))
    torch.testing.assert_close(norm, torch.tensor(1e-3), rtol=1e-3, atol=0)


def test_save_model(tmp_path):
    model = compiled(backend="eager")
    trainer = train(model, tmp_path, max_steps=1)
    trainer.save_model(tmp_path / "out")
    theirs = peft.PeftModel.from_pretrained(base(), tmp_path / "out")
    torch.testing.assert_close(logits(theirs), logits(model), rtol=0, atol=1e-6)
    assert not (tmp_path / "out" / "model.safetensors").exists(), "a guard belongs into checkpoints only"


# ------------------------------------------------------------------------------------------- the mixin


def test_resume_ends_where_an_uninterrupted_run_ends(straight, tmp_path):
    model, _ = straight
    run = {"save_strategy": "steps", "save_steps": 3}
    first = train(compiled(), tmp_path / "mixin", MyTrainer, **run)
    assert same(values(first.model), values(model)), "the mixin does not change how a run goes"
    shutil.rmtree(tmp_path / "mixin" / "checkpoint-6")
    again = train(compiled(), tmp_path / "mixin", MyTrainer, resume=True, **run)
    assert (again.state.global_step, len(again.state.log_history)) == (6, 7)
    assert same(values(again.model), values(model)) and not same(values(compiled()), values(model))


def test_resume_takes_up_what_the_unmodified_trainer_saved(straight):
    model, directory = straight
    shutil.rmtree(directory / "checkpoint-6")
    assert same(values(train(compiled(), directory, MyTrainer, resume=True).model), values(model))


class Keep(transformers.TrainerCallback):
    """Remembers the adapters at every evaluation, and makes the second evaluation the best."""

    def __init__(self):
        self.seen = []

    def on_evaluate(self, args, state, control, model=None, metrics=None, **kwargs):
        self.seen.append(values(model))


def best_second():
    scores = iter([0.1, 0.9, 0.2, 0.3])
    return lambda _: {"score": next(scores)}


def test_best_model_and_save_total_limit(tmp_path):
    keep = Keep()
    trainer = train(
        compiled(backend="eager"), tmp_path, MyTrainer, max_steps=4, eval_strategy="steps", eval_steps=1,
        save_strategy="steps", save_steps=1, save_total_limit=2, load_best_model_at_end=True,
        metric_for_best_model="score", greater_is_better=True, eval_dataset=Rows(2, 9), callbacks=[keep],
        compute_metrics=best_second(),
    )  # fmt: skip
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    assert same(values(trainer.model), keep.seen[1]) and not same(keep.seen[1], keep.seen[3])
    trainer.save_model(tmp_path / "best")
    theirs = peft.PeftModel.from_pretrained(base(), tmp_path / "best")
    torch.testing.assert_close(logits(theirs), logits(trainer.model), rtol=0, atol=1e-6)


def two_adapters(live=("default",)):
    model = compiled(backend="eager")
    with hosts.seeded(8):
        model.adaptc.add("second", adaptc.LoRA(r=2, init="random", targets=["k_proj"]))
    model.adaptc.switch(live)
    return model


@pytest.mark.parametrize("live", [("default",), ("second",), ("default", "second")], ids="+".join)
def test_every_adapter_is_in_a_checkpoint(tmp_path, live):
    model = train(two_adapters(live), tmp_path, MyTrainer, max_steps=1, save_strategy="steps", save_steps=1).model
    again = two_adapters(live)
    assert not same(values(again), values(model))
    with torch.no_grad():
        for parameter in again.adaptc.parameters():
            parameter.zero_()
    trainer = MyTrainer(model=again, args=arguments(tmp_path), train_dataset=Rows())
    trainer._load_from_checkpoint(str(tmp_path / "checkpoint-1"))
    assert same(values(again), values(model))


def test_resume_with_other_adapters_is_refused(tmp_path):
    train(two_adapters(), tmp_path, MyTrainer, max_steps=1, save_strategy="steps", save_steps=1)
    for model in (compiled(backend="eager"), two_adapters(("second",))):
        before = values(model)
        with pytest.raises(ResumeError, match="does not say that it holds this model's adapters"):
            train(model, tmp_path, MyTrainer, resume=True)
        assert same(values(model), before)


class Host(nn.Module):
    """A model of one's own: no ``save_pretrained``."""

    def __init__(self):
        super().__init__()
        self.inner = base()

    def forward(self, input_ids, attention_mask=None, labels=None):
        return self.inner(input_ids=input_ids, attention_mask=attention_mask, labels=labels)


def own_model():
    with hosts.seeded(3):
        return adaptc.compile(Host(), PLAN, backend="eager")


@pytest.mark.slow
def test_a_model_of_ones_own(tmp_path):
    run = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    model = train(own_model(), tmp_path, MyTrainer, **run).model
    shutil.rmtree(tmp_path / "checkpoint-4")
    guard = safetensors.torch.load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert sum(tensor.numel() for tensor in guard.values()) == 0
    assert same(values(train(own_model(), tmp_path, MyTrainer, resume=True, **run).model), values(model))


def test_a_model_that_is_not_compiled_is_left_to_the_trainer(tmp_path):
    model = base()
    run = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    trained = {n: p.clone() for n, p in train(model, tmp_path, MyTrainer, **run).model.named_parameters()}
    shutil.rmtree(tmp_path / "checkpoint-2")
    again = train(base(), tmp_path, MyTrainer, resume=True, **run).model
    assert same(dict(again.named_parameters()), trained)


def test_methods_that_act_between_steps_do_so_once_a_step(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(LoRAAdapter, "after_step", lambda self, optimizer: calls.append(self))
    model = compiled(adaptc.LoRA(r=2, targets=["q_proj"]), backend="eager")
    trainer = train(model, tmp_path, MyTrainer, max_steps=3)
    trainer.train()
    assert len(calls) == 3 + 3, "one site, three steps, trained twice"


def test_nothing_live_cannot_be_merged(tmp_path):
    model = compiled(backend="eager")
    model.adaptc.switch(None)
    with pytest.raises(AdapterNameError, match="no adapter is live"):
        model.save_pretrained(tmp_path, merge=True)
