"""The two byte counts of the bench, against sizes worked out by hand and against autograd's own hooks."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from torch import nn

from bench import memory
from bench.contenders import Contender, build_base, build_peft_eager
from bench.settings import Case, Settings

CPU = torch.device("cpu")
SMALL = Settings(layers=2, hidden=64, head_dim=16, vocab=64, tokens=24, rank=4)


@pytest.mark.parametrize(
    ("events", "peak", "live"),
    [
        ([(1, 100), (2, 50), (1, -100), (3, 20)], 150, 70),
        ([(9, -500), (1, 10)], 10, 10),  # the free of something older
        ([(1, 100), (1, -100), (1, 30), (1, -30)], 100, 0),  # an address used twice
        ([(1, 100), (1, 30)], 100, 30),  # given out again after a free that was not reported
        ([], 0, 0),
    ],
)
def test_replay_of_allocator_events(events: list[tuple[int, int]], peak: int, live: int) -> None:
    assert memory.replay(events) == memory.Usage(peak, live)


def test_peak_and_rest_of_a_call() -> None:
    older = [torch.empty(1000)]

    def call() -> torch.Tensor:
        older.clear()
        first = torch.empty(256)
        second = torch.empty(64)
        view = second[3:].view(-1, 1)
        del first, second
        return view

    # 256 + 64 floats at the highest point; the view keeps all 64 of its storage.
    assert memory.usage_of(call, CPU) == memory.Usage(4 * 320, 4 * 64)


class Net(nn.Module):
    """gelu(x W1) W2 with W1 and W2 frozen: the backward to x needs gelu's input, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(32, 128, bias=False).requires_grad_(False)
        self.two = nn.Linear(128, 8, bias=False).requires_grad_(False)

    def forward(self, inputs_embeds: torch.Tensor, labels: torch.Tensor) -> Any:
        out = self.two(nn.functional.gelu(self.one(inputs_embeds)))
        return types.SimpleNamespace(loss=out.sum(), logits=out)


def contender(model: Any) -> Contender:
    embeds = torch.randn(16, 32).requires_grad_(True)
    return Contender("net", model, embeds, torch.zeros(16), {}, compiled=False)


def test_saved_bytes_of_a_net_worked_out_by_hand() -> None:
    net = Net()
    peak, saved = memory.step_memory(contender(net), CPU)
    loss = 4
    assert saved == 4 * 16 * 128 + loss
    # The last step of the backward: gelu's input and the gradient of it, or more.
    assert peak >= 2 * 4 * 16 * 128
    assert memory.hooked_saved_bytes(contender(net), net) == 4 * 16 * 128


def test_saved_bytes_under_a_compiler() -> None:
    compiled = torch.compile(Net(), backend="aot_eager")
    one = contender(compiled)
    one.step()
    _, saved = memory.step_memory(one, CPU)
    assert saved == 4 * 16 * 128 + 4


@pytest.mark.parametrize("dropout", [0.0, 0.05])
def test_both_instruments_agree_on_peft(dropout: float) -> None:
    case = Case("fp32", dropout)
    one = build_peft_eager(build_base(SMALL, case), SMALL, case)
    one.step()
    _, saved = memory.step_memory(one, CPU)
    assert isinstance(one.model, nn.Module)
    hooked = memory.hooked_saved_bytes(one, one.model)
    # The allocator also sees the loss and the scalars that autograd nodes carry.
    assert hooked <= saved <= hooked + 256


def test_what_dropout_adds_is_two_tensors_per_site() -> None:
    saved = []
    for p in (0.0, 0.05):
        one = build_peft_eager(build_base(SMALL, Case("fp32", p)), SMALL, Case("fp32", p))
        one.step()
        saved.append(memory.step_memory(one, CPU)[1])
    # Per site the mask and the dropped input, both fp32. Without dropout the inputs themselves are saved:
    # those of q/k/v, of gate/up and of down, which nothing else needs (attention saves o's in both cases).
    features = SMALL.intermediate + 6 * SMALL.hidden
    replaced = SMALL.intermediate + 2 * SMALL.hidden
    added = 4 * SMALL.layers * SMALL.tokens * (2 * features - replaced)
    assert saved[1] - saved[0] == added


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_counts_from_the_allocator() -> None:
    device = torch.device("cuda")
    torch.empty(1, device=device)
    used = memory.usage_of(lambda: torch.empty(2**20, dtype=torch.uint8, device=device), device)
    assert used == memory.Usage(2**20, 2**20)
