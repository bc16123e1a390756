"""Guards that a call does without, and what is still seen to change."""

from __future__ import annotations

import copy

import torch
from torch import nn

import adaptc
from adaptc.runtime.calls.guards import unneeded

SITE = "L['self']._modules['q']"
READ = [("EQUALS_MATCH", f"{SITE}._modules['adapters'].epoch")]


def left_out(*guards, hooked=False):
    return unneeded([*READ, *guards], hooked=hooked)[len(READ) :]


def test_what_only_adaptc_changes_is_left_out():
    assert unneeded(READ, hooked=False) == [True]
    assert left_out(("TYPE_MATCH", f"{SITE}._modules['adapters']")) == [True]
    assert left_out(("NOT_PRESENT_IN_GENERIC_DICT", f"{SITE}._modules['adapters'].live[0]")) == [True]


def test_what_acts_is_kept():
    kept = [
        ("SEQUENCE_LENGTH", f"{SITE}._modules['adapters'].live"),
        ("TYPE_MATCH", f"{SITE}._modules['adapters'].live[0]"),
        ("EQUALS_MATCH", f"{SITE}._modules['adapters'].live[0]._dropout"),
        ("TYPE_MATCH", SITE),
        ("EQUALS_MATCH", f"{SITE}.training"),
        # A module of this name that is not an adapted one's.
        ("TYPE_MATCH", "L['self']._modules['other']._modules['adapters']"),
    ]
    assert not any(left_out(*kept))


def test_hooks_of_adapted_modules_are_left_out_while_they_are_adaptcs():
    ours = ("DICT_KEYS_MATCH", f"{SITE}._forward_hooks")
    others = ("DICT_KEYS_MATCH", "L['self']._modules['other']._forward_hooks")
    assert left_out(ours, others) == [True, False]
    assert left_out(ours, others, hooked=True) == [False, False]


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.other = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return self.other(self.q(x).tanh())


def test_a_hook_in_the_place_of_adaptcs_is_seen():
    """As many hooks as before, at an adapted module whose hooks no guard asks for."""
    torch.manual_seed(0)
    base = Model().eval()
    model = adaptc.compile(copy.deepcopy(base), adaptc.LoRA(r=2, targets="q"), backend="eager")
    for parameter in model.adaptc.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(3, 6)
    adapted = model(x)
    hooks = model.q._forward_hooks
    ((key, ours),) = hooks.items()
    hooks[key] = lambda module, args, kwargs, output: output * 2
    torch.testing.assert_close(model(x), base.other((base.q(x) * 2).tanh()))
    hooks[key] = ours
    torch.testing.assert_close(model(x), adapted)
