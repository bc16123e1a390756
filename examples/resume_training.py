"""Train a tiny model with adapters, stop, and take training up again: the end is the same, bit for bit.

Runs offline in about a minute: ``python examples/resume_training.py``.
"""

import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import adaptc
from adaptc.integrations import AdapterTrainerMixin


class AdapterTrainer(AdapterTrainerMixin, Trainer):
    """The trainer, reading adapters from its checkpoints."""


def make_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))
    return adaptc.compile(model, adaptc.LoRA(r=4, dropout=0.1, targets=["q_proj", "v_proj"]), backend="aot_eager")


def make_rows() -> list[dict[str, torch.Tensor]]:
    torch.manual_seed(1)
    return [{"input_ids": row, "labels": row} for row in torch.randint(3, 64, (16, 12))]


def train(directory: str, *, resume: bool = False) -> LlamaForCausalLM:
    arguments = TrainingArguments(
        directory, max_steps=6, per_device_train_batch_size=2, save_steps=3, report_to=[], use_cpu=True
    )
    trainer = AdapterTrainer(model=make_model(), args=arguments, train_dataset=make_rows())
    trainer.train(resume_from_checkpoint=f"{directory}/checkpoint-3" if resume else None)
    return trainer.model


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        straight = train(directory)
        resumed = train(directory, resume=True)
    pairs = zip(straight.adaptc.parameters(), resumed.adaptc.parameters(), strict=True)
    print("equal:", all(torch.equal(one, other) for one, other in pairs))
