"""TRL's trainers that compare with a reference: on a compiled model its adapter's start, as on a PEFT model."""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import math
import sys
import types

import accelerate.utils
import datasets
import peft
import pytest
import torch
import transformers
import trl
from trl.generation import vllm_generation

import adaptc
from adaptc.errors import AdaptcWarning, AdapterNameError, UnsupportedError
from adaptc.integrations import AdapterTrainerMixin
from tests.integrations.training import tokenizer
from tests.models import hosts

TARGETS = ["q_proj", "v_proj", "down_proj"]
PAIRS = [
    {"prompt": f"w{i} w{i + 1}", "chosen": f" w{i + 2} w4", "rejected": f" w{i + 3} w7"} for i in range(10, 18)
]
RATED = [{"prompt": f"w{i} w{i + 1}", "completion": f" w{i + 2} w4", "label": bool(i % 2)} for i in range(10, 18)]
PROMPTS = [{"prompt": f"w{i} w{i + 1}"} for i in range(10, 18)]
GENERATING = {
    "num_generations": 2, "max_completion_length": 3, "beta": 0.5, "top_k": 0, "temperature": 1.0,
    "steps_per_generation": 1, "disable_dropout": True,
}  # fmt: skip
KINDS = {
    "dpo": (trl.DPOTrainer, trl.DPOConfig, PAIRS, {}),
    "kto": (trl.KTOTrainer, trl.KTOConfig, RATED, {}),
    "grpo": (trl.GRPOTrainer, trl.GRPOConfig, PROMPTS, GENERATING),
    "rloo": (trl.RLOOTrainer, trl.RLOOConfig, PROMPTS, GENERATING),
}


def reward(completions, **_):
    """Any numbers that differ and are the same again for the same text."""
    return [float(sum(map(ord, text)) % 7) for text in completions]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """(folder of a base, folder of a PEFT adapter that does not start at zero and drops)."""
    base, adapter = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("start")
    hosts.build("llama", num_hidden_layers=1).save_pretrained(base)
    write_adapter(base, adapter)
    return base, adapter


@pytest.fixture(scope="module")
def with_head(start, tmp_path_factory):
    """As :func:`start`; the adapter trains the head in full."""
    adapter = tmp_path_factory.mktemp("with_head")
    write_adapter(start[0], adapter, modules_to_save=["lm_head"])
    return start[0], adapter


def write_adapter(base, directory, **options):
    with hosts.seeded(3):
        config = peft.LoraConfig(
            r=3, lora_alpha=6, lora_dropout=0.3, target_modules=TARGETS, task_type="CAUSAL_LM", init_lora_weights=False,
            **options,
        )  # fmt: skip
        peft.get_peft_model(load(base), config).save_pretrained(directory)


def load(base):
    return transformers.AutoModelForCausalLM.from_pretrained(base)


def compiled(start, plan=None, **options):
    base, adapter = start
    return adaptc.compile(load(base), adapter if plan is None else plan, **{"backend": "eager", **options})


def trainer_of(kind, model, directory, *, mixin=False, **changes):
    cls, config, rows, options = KINDS[kind]
    if mixin:
        cls = type(f"My{cls.__name__}", (AdapterTrainerMixin, cls), {})
    arguments = {
        "output_dir": str(directory), "max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 0.5,
        "optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 100.0, "logging_steps": 1, "report_to": [],
        "save_strategy": "no", "use_cpu": True, "bf16": False, "disable_tqdm": True, "dataloader_pin_memory": False,
        "gradient_checkpointing": False, "seed": 11,
    }  # fmt: skip
    rewards = {"reward_funcs": reward} if options else {}
    return cls(
        model=model, args=config(**{**arguments, **options, **changes}), processing_class=tokenizer(),
        train_dataset=datasets.Dataset.from_list(rows), **rewards,
    )  # fmt: skip


def losses(trainer, **options):
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train(**options)
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def values(model, name):
    return {key: p.detach().clone() for key, p in model.adaptc.named_parameters(name)}


# ------------------------------------------------------------------------------------------ as PEFT's


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("dpo", {}), ("kto", {}), ("grpo", {}), ("rloo", {}), ("dpo", {"precompute_ref_log_probs": True}),
        ("dpo", {"gradient_checkpointing": True, "mixin": True}), ("dpo", {"head": True}),
    ],
)  # fmt: skip
def test_losses_are_those_of_peft(kind, options, start, with_head, tmp_path):
    start = with_head if options.get("head") else start
    base, adapter = start
    theirs = peft.PeftModel.from_pretrained(load(base), adapter, is_trainable=True)
    own = {name: value for name, value in options.items() if name not in ("mixin", "head")}
    expected = losses(trainer_of(kind, theirs, tmp_path / "peft", **own))
    model = compiled(start)
    trainer = trainer_of(kind, model, tmp_path / "ours", mixin="mixin" in options, **own)
    assert trainer.ref_model is None  # no second base
    found = losses(trainer)
    assert found == pytest.approx(expected, abs=2e-6)
    if kind == "dpo":
        assert found[0] == pytest.approx(math.log(2), abs=1e-6)
        assert found[2] != pytest.approx(math.log(2), abs=1e-4)
    metrics = model.adaptc.metrics()
    assert (model.adaptc.live, metrics["eager_sites"], metrics["recompile_limits_hit"]) == (("default",), 0, 0)


@pytest.mark.slow
def test_what_the_reference_costs(start, tmp_path):
    """Its values stay, it has no gradients, and after the first steps nothing is compiled any more."""
    model = compiled(start)
    started = values(model, "default")
    trainer = trainer_of("dpo", model, tmp_path, max_steps=6)
    seen = []

    class Count(transformers.TrainerCallback):
        def on_step_end(self, *_, **__):
            seen.append(len(model.adaptc.graphs))

    trainer.add_callback(Count())
    losses(trainer)
    reference = values(model, "ref")
    assert all(torch.equal(reference[key.replace("default", "ref")], value) for key, value in started.items())
    assert all(not torch.equal(value, started[key]) for key, value in values(model, "default").items())
    assert all(p.grad is None and not p.requires_grad for p in model.adaptc.parameters("ref"))
    assert len(seen) == 6 and seen[-1] == seen[2]


@pytest.mark.slow
def test_files_hold_the_trained_adapter_and_a_checkpoint_resumes_with_its_reference(start, tmp_path):
    steps = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "mixin": True}
    model = compiled(start)
    trainer = trainer_of("dpo", model, tmp_path / "a", **steps)
    expected = losses(trainer)
    trainer.save_model(str(tmp_path / "out"))
    assert not any((tmp_path / "out").rglob("ref")) and (tmp_path / "out" / "adapter_model.safetensors").is_file()
    # A model that starts elsewhere: the checkpoint knows what it was compared with.
    with hosts.seeded(9):
        other = compiled(start, adaptc.LoRA(r=3, alpha=6, dropout=0.3, targets=TARGETS, init="random"))
    resumed = losses(
        trainer_of("dpo", other, tmp_path / "b", **steps), resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2")
    )
    assert resumed[-2:] == pytest.approx(expected[-2:], abs=1e-6)
    mine, theirs = values(other, "default"), values(model, "default")
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)


# -------------------------------------------------------------------------------- what TRL asks of a model


def ask(model, module="trl.trainer.dpo_trainer"):
    """What the module of TRL hears when it asks whether the model has adapters."""
    namespace = importlib.import_module(module).__dict__
    return eval("is_peft_model(model)", namespace, {"model": model})


@contextlib.contextmanager
def asked(model):
    """The model after TRL has asked."""
    assert ask(model)
    yield model


def tiny(plan=None, **options):
    plan = adaptc.LoRA(r=2, targets=["q_proj"], init="random") if plan is None else plan
    return adaptc.compile(hosts.build("llama", num_hidden_layers=1), plan, backend="eager", **options)


def test_only_compiled_models_are_answered_for():
    plain = hosts.build("llama", num_hidden_layers=1)
    model = tiny()
    assert ask(model) and not ask(plain) and not ask(torch.nn.Linear(2, 2))
    assert not ask(model, "trl.trainer.distillation_trainer") and not accelerate.utils.is_peft_model(model)
    wrapped = peft.get_peft_model(plain, peft.LoraConfig(target_modules=["q_proj"]))
    assert ask(wrapped) and accelerate.utils.is_peft_model(wrapped)
    attributes = {"peft_config", "add_adapter", "set_adapter", "get_base_model", "merge_adapter", "unmerge_adapter",
                  "prefix", "active_adapter"}  # fmt: skip
    assert attributes <= model.__dict__.keys()
    model.adaptc.detach()
    assert not attributes & model.__dict__.keys() and not ask(model)


def test_modules_that_imported_the_question_before_ask_the_new_one(monkeypatch):
    model = tiny()
    asks, module = accelerate.utils.is_peft_model, sys.modules["trl.trainer.kto_trainer"]
    monkeypatch.setattr(module, "is_peft_model", asks.__wrapped__)
    assert not ask(model, module.__name__)
    model = tiny()
    assert ask(model, module.__name__) and module.is_peft_model is asks is accelerate.utils.is_peft_model


def test_a_copy_answers_for_itself():
    with asked(tiny()) as model:
        model.add_adapter("ref", model.peft_config["default"])
        other = copy.deepcopy(model)
        other.set_adapter("ref")
        assert (other.active_adapter, model.active_adapter) == ("ref", "default")
        assert (other.adaptc.live, model.adaptc.live) == (("ref",), ("default",))
        assert other.get_base_model() is other


def test_the_reference_is_a_frozen_copy_of_the_live_adapter_whatever_its_kind():
    plan = adaptc.Plan.from_dict(
        {
            "rules": [
                {"match": {"targets": ["q_proj", "v_proj"]}, "method": {"kind": "vera", "r": 4}},
                {"match": {"targets": ["lm_head"]}, "train": "full"},
            ]
        }
    )
    model = tiny(plan, name="sft")
    batch = hosts.batch("llama")

    def run():  # without capture, which is not the point here
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            return model(**batch).logits

    with asked(model):
        before = run()
        model.add_adapter("ref", model.peft_config["default"])
        with torch.no_grad():
            for parameter in model.adaptc.parameters("sft"):
                parameter.add_(0.1)
        moved = run()
        with trl.trainer.utils.use_adapter(model, "ref"):
            assert torch.equal(run(), before)
        assert torch.equal(run(), moved) and not torch.equal(moved, before)
        # A second trainer starts from where the first one ended.
        model.add_adapter("ref", model.peft_config["default"])
        with trl.trainer.utils.use_adapter(model, "ref"):
            assert torch.equal(run(), moved)


def test_what_cannot_be_compared_with_is_refused():
    with asked(tiny()) as model:
        model.adaptc.add("ref", adaptc.LoRA(r=2, targets=["q_proj"]))
        with pytest.raises(AdapterNameError, match="'ref'"):
            model.add_adapter("ref", model.peft_config["default"])
        model.adaptc.switch(["default", "ref"])
        with pytest.raises(UnsupportedError, match="one live adapter"):
            model.add_adapter("other", model.peft_config["default"])
        model.adaptc.switch("ref")  # TRL would copy "default" over it
        with pytest.raises(UnsupportedError, match="'default'"):
            model.add_adapter("other", model.peft_config["default"])


def handed_over(model):
    """Name -> a copy of what TRL sends vLLM of the model's weights."""
    sender = vllm_generation.VLLMGeneration.__new__(vllm_generation.VLLMGeneration)
    sender.model = model
    sender._dist = types.SimpleNamespace(gather_params=lambda _: contextlib.nullcontext(), is_fsdp=False)
    with asks_of(vllm_generation):
        return {name: values.clone() for name, values in sender._iter_named_params()}


@contextlib.contextmanager
def asks_of(module):
    """A block in which a module of TRL asks as it does once adaptc has been told of TRL."""
    before, module.is_peft_model = module.is_peft_model, accelerate.utils.is_peft_model
    try:
        yield
    finally:
        module.is_peft_model = before


def test_vllm_is_handed_the_merged_weights_and_the_base_comes_back():
    plan = [adaptc.LoRA(r=2, targets=["q_proj"], init="random"), adaptc.Rule(adaptc.Match(["lm_head"]), train="full")]
    model = tiny(plan).train()
    with torch.no_grad():
        model.lm_head.adapters["default"].copy.weight.add_(0.5)
    base = {n: p.detach().clone() for n, p in model.named_parameters() if ".adapters." not in n}
    sent = handed_over(model)
    assert sent.keys() == base.keys()
    merged = copy.deepcopy(model).eval().adaptc.merge_and_unload()
    assert all(torch.equal(sent[n], p) for n, p in merged.named_parameters())
    assert not torch.equal(sent["lm_head.weight"], base["lm_head.weight"])
    assert all(torch.equal(p, base[n]) for n, p in model.named_parameters() if n in base)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.adapters["default"].lora_B.mul_(2)
    model.merge_adapter()  # and is interrupted
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.adapters["default"].lora_B.mul_(2)
    name = "model.layers.0.self_attn.q_proj.weight"
    update = sent[name] - base[name]
    torch.testing.assert_close(handed_over(model)[name] - base[name], 4 * update, rtol=1e-3, atol=1e-6)
    assert all(torch.equal(p, base[n]) for n, p in model.named_parameters() if n in base)


def test_what_weights_cannot_express_is_not_handed_to_vllm():
    with asked(tiny(adaptc.Bottleneck(targets=["down_proj"]))) as model:
        with pytest.raises(UnsupportedError, match="use_vllm=False") as error:
            model.merge_adapter()
        assert "bottleneck" in str(error.value)


@pytest.mark.parametrize(
    "plan", [adaptc.LoRA(r=2, targets=["q_proj", "lm_head"]), adaptc.Prompt(num_virtual_tokens=2)], ids=["head", "root"]
)
def test_an_adapter_that_the_fused_head_passes_by_is_refused(plan):
    with asked(tiny(plan)) as model:
        with pytest.raises(UnsupportedError, match="would be lost"):
            model.get_base_model()
        with pytest.raises(UnsupportedError, match="would be lost"):
            ask(model, "trl.trainer.distillation_trainer")


def test_a_base_that_is_trained_beside_the_adapter_is_told_of():
    with asked(tiny()) as model:
        model.model.norm.weight.requires_grad_(True)
        with pytest.warns(AdaptcWarning, match=r"model\.norm\.weight"):
            model.add_adapter("ref", model.peft_config["default"])


def test_dropout_is_turned_off_as_in_other_modules():
    model = tiny(adaptc.LoRA(r=2, targets=["q_proj"], init="random", dropout=0.5)).train()
    site, x = model.adaptc.sites[0], torch.randn(3, 64)
    adapter = site.adapters["default"]

    def update():
        return adapter.apply_to(site.module, x, torch.zeros(3, site.module.out_features)).detach()

    signature = adapter.signature()
    assert not torch.equal(update(), update())
    trl.trainer.utils.disable_dropout_in_model(model)
    exact = adapter.scaling * x @ adapter.lora_A.detach().mT @ adapter.lora_B.detach().mT
    assert torch.equal(update(), update())
    torch.testing.assert_close(update(), exact)
    assert adapter.signature() != signature  # graphs with the dropout do not serve it
    assert copy.deepcopy(model).adaptc.sites[0].adapters["default"].dropout.p == 0
