"""TRL's SFTTrainer, as it is and with the mixin, on a compiled model."""

from __future__ import annotations

import datasets
import peft
import pytest
import torch
import trl

from adaptc.errors import ResumeError
from adaptc.integrations import AdapterTrainerMixin
from tests.integrations.training import base, compiled, tokenizer, values
from tests.models import hosts

pytestmark = pytest.mark.slow
ROWS = {
    "input_ids": [[3 + (7 * row + 5 * column) % (hosts.VOCAB - 3) for column in range(8)] for row in range(12)],
}


class MySFTTrainer(AdapterTrainerMixin, trl.SFTTrainer):
    """The trainer with the mixin."""


def train(model, directory, kind=trl.SFTTrainer, *, resume=None, **changes):
    options = {
        "output_dir": str(directory),
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.05,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 2,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "gradient_checkpointing": False,
        "seed": 11,
    }
    rows = datasets.Dataset.from_dict(ROWS)
    trainer = kind(
        model=model, args=trl.SFTConfig(**{**options, **changes}), train_dataset=rows, processing_class=tokenizer()
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """(model, directory) of four steps with a checkpoint after the second, by the unmodified trainer."""
    model, directory = compiled(), tmp_path_factory.mktemp("straight")
    train(model, directory)
    return model, directory


def test_it_trains_every_adapter_in_one_graph(straight):
    model, _ = straight
    started, ended = values(compiled()), values(model)
    assert all(not torch.equal(started[name], ended[name]) for name in started)
    assert (model.adaptc.eager_sites(), model.adaptc.metrics()["recompile_limits_hit"]) == ([], 0)


def test_peft_reads_its_checkpoints(straight):
    model, directory = straight
    theirs = peft.PeftModel.from_pretrained(base(), directory / "checkpoint-4").eval()
    batch = hosts.batch("llama")
    with torch.no_grad():
        torch.testing.assert_close(theirs(**batch).logits, model.eval()(**batch).logits, rtol=0, atol=1e-6)


def test_its_resume_names_the_mixin(straight):
    _, directory = straight
    with pytest.raises(ResumeError, match="AdapterTrainerMixin"):
        train(compiled(), directory, resume=str(directory / "checkpoint-2"))


def test_the_mixin_resumes_bit_equal(straight, tmp_path):
    model, directory = straight
    resumed = compiled()
    train(resumed, tmp_path, MySFTTrainer, resume=str(directory / "checkpoint-2"))
    mine, theirs = values(resumed), values(model)
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
