"""What the tests of trainers share: a compiled tiny Llama with dropout, rows to train on, and arguments."""

from __future__ import annotations

from typing import Any

import tokenizers
import torch
import transformers
from torch.utils.data import Dataset

import adaptc
from tests.models import hosts

PLAN = adaptc.Plan(
    [adaptc.LoRA(r=3, alpha=6, dropout=0.3, init="random", targets=["q_proj", "v_proj", "down_proj"])]
)


class Rows(Dataset):
    """``count`` different rows with labels."""

    def __init__(self, count: int = 12, seed: int = 5) -> None:
        self.batch = hosts.batch("llama", rows=count, length=8, seed=seed)

    def __len__(self) -> int:
        return len(self.batch["input_ids"])

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {name: tensor[i] for name, tensor in self.batch.items()}


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Words ``w3``, ``w4``, ... with their numbers as ids."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, hosts.VOCAB)}}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def base() -> transformers.PreTrainedModel:
    """The Llama, of one layer, that :func:`compiled` adapts."""
    return hosts.build("llama", num_hidden_layers=1)


def compiled(plan: Any = PLAN, **options: Any) -> Any:
    """A compiled Llama; equal values at every call."""
    with hosts.seeded(3):
        return adaptc.compile(base(), plan, **{"backend": "aot_eager", **options})


def arguments(directory: Any, **changes: Any) -> transformers.TrainingArguments:
    """Six steps of two rows, on the CPU, nothing reported anywhere."""
    options = {
        "output_dir": str(directory),
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.05,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 11,
    }
    return transformers.TrainingArguments(**{**options, **changes})


def train(model: Any, directory: Any, kind: Any = transformers.Trainer, *, resume: Any = None, **changes: Any) -> Any:
    """A trainer of class ``kind`` after ``train()``; ``changes`` are its arguments, or its training arguments."""
    own = {name: changes.pop(name) for name in ("eval_dataset", "callbacks", "compute_metrics") if name in changes}
    trainer = kind(model=model, args=arguments(directory, **changes), train_dataset=Rows(), **own)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def values(model: Any) -> dict[str, torch.Tensor]:
    """A copy of every adapter parameter."""
    return {name: p.detach().clone() for name, p in model.adaptc.named_parameters()}
