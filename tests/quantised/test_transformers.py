"""The road of a user: ``from_pretrained`` quantises, adaptc compiles, transformers.Trainer trains and saves."""

from __future__ import annotations

import pytest
import torch
import transformers

import adaptc
from tests.models import hosts
from tests.quantised import bases
from tests.quantised.bases import eagerly  # noqa: F401

CONFIGS = {
    "nf4": transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    ),
    "int8": transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0),
}


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return {name: value[0] for name, value in hosts.batch("llama", rows=1, seed=index).items()}


def trainer(model, directory):
    args = transformers.TrainingArguments(
        str(directory), max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True, save_strategy="no",
        learning_rate=1e-2, dataloader_pin_memory=False, disable_tqdm=True,
    )  # fmt: skip
    return transformers.Trainer(model=model, args=args, train_dataset=Rows())


@pytest.fixture(params=CONFIGS)
def loaded(request, tmp_path):
    bases.plain(num_hidden_layers=1).save_pretrained(tmp_path / "base")
    config = CONFIGS[request.param]
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=config, dtype=torch.float32, device_map={"": "cpu"}
    )
    return request.param, model


def test_trainer_trains_and_saves_a_model_that_from_pretrained_quantised(loaded, tmp_path):
    kind, model = loaded
    assert model.is_quantized and len(list(bases.quantised(model))) == 7
    with pytest.raises(ValueError, match="purely quantized"):  # what the trainer says without adapters
        trainer(model, tmp_path / "bare")
    model = adaptc.compile(model, adaptc.LoRA(r=2, targets="all-linear"), backend="eager")
    before = {name: p.detach().clone() for name, p in model.adaptc.named_parameters()}
    one = trainer(model, tmp_path / "out")
    one.train()
    moved = [name for name, p in model.adaptc.named_parameters() if not torch.equal(p, before[name])]
    assert any(name.endswith("lora_B") for name in moved)
    one.save_model(str(tmp_path / "adapter"))
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    with pytest.raises(ValueError, match="purely quantized"):
        trainer(model.adaptc.detach(), tmp_path / "bare")


def test_a_model_without_adapters_is_written_as_ever(loaded, tmp_path):
    _, model = loaded
    keys = set(model.state_dict())
    model = adaptc.compile(model, adaptc.LoRA(r=2, targets="all-linear"), backend="eager")
    model.adaptc.remove("default")
    model.save_pretrained(tmp_path / "plain")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain", device_map={"": "cpu"})
    assert set(again.state_dict()) == keys
    torch.testing.assert_close(bases.logits(again), bases.logits(model), rtol=0, atol=0)
