"""A loop of one's own with accelerate."""

from __future__ import annotations

import accelerate
import peft
import pytest
import torch
from accelerate.state import AcceleratorState

import adaptc
from tests.integrations.training import Rows, base, compiled, values
from tests.models import hosts

#: Without dropout: a loader draws a number when it is iterated, so that a resumed loop has other masks.
STILL = adaptc.Plan([adaptc.LoRA(r=3, alpha=6, init="random", targets=["q_proj", "down_proj"])])


@pytest.fixture(autouse=True)
def _no_accelerator_before():
    """Accelerate keeps one state a process and refuses another precision than the first one's."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def run(steps, directory=None, load=False):
    """The model and the accelerator after ``steps``; state is loaded before them, or else saved after them."""
    torch.manual_seed(4)
    accelerator = accelerate.Accelerator(cpu=True)
    model = compiled(STILL, backend="eager").train()
    optimizer = torch.optim.AdamW(model.adaptc.parameters(), lr=0.05)
    loader = torch.utils.data.DataLoader(Rows(), batch_size=4)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    if load:
        accelerator.load_state(str(directory))
        loader = accelerator.skip_first_batches(loader, 3 - steps)
    for _, batch in zip(range(steps), loader, strict=False):
        accelerator.backward(model(**batch).loss)
        optimizer.step()
        optimizer.zero_grad()
    if directory is not None and not load:
        accelerator.save_state(str(directory))
    return model, accelerator


def test_prepare_trains_what_a_plain_loop_trains():
    prepared, accelerator = run(3)
    torch.manual_seed(4)
    plain = compiled(STILL, backend="eager").train()
    optimizer = torch.optim.AdamW(plain.adaptc.parameters(), lr=0.05)
    for batch in torch.utils.data.DataLoader(Rows(), batch_size=4):
        plain(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    ours, want = values(accelerator.unwrap_model(prepared)), values(plain)
    assert all(torch.equal(ours[name], want[name]) for name in want)
    assert not torch.equal(next(iter(want.values())), next(iter(values(compiled(STILL)).values())))


def test_state_goes_through_a_file(tmp_path):
    straight, _ = run(3)
    run(2, tmp_path)
    again, _ = run(1, tmp_path, load=True)
    want = values(straight)
    assert all(torch.equal(tensor, want[name]) for name, tensor in values(again).items())


def test_the_idiom_for_saving(tmp_path):
    model, accelerator = run(1)
    accelerator.unwrap_model(model).save_pretrained(
        tmp_path, is_main_process=accelerator.is_main_process, save_function=accelerator.save,
        state_dict=accelerator.get_state_dict(model),
    )  # fmt: skip
    theirs = peft.PeftModel.from_pretrained(base(), tmp_path).eval()
    row = {name: tensor[None] for name, tensor in Rows()[0].items()}
    with torch.no_grad():
        torch.testing.assert_close(theirs(**row).logits, model.eval()(**row).logits, rtol=0, atol=1e-6)


def test_detached_under_the_forward_that_mixed_precision_wraps():
    """Accelerate keeps the forward that it found, which a prompt had put there."""
    model = compiled(adaptc.Plan([adaptc.Prompt(num_virtual_tokens=2)]), backend="eager")
    prepared = accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare_model(model)
    batch = hosts.batch("llama")
    prompted = prepared(**batch).logits
    model.adaptc.detach()
    plain = prepared(**batch).logits
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(plain, base()(**batch).logits.float())
    assert prompted.shape != plain.shape or not torch.equal(prompted, plain)
