"""Fingerprints of the base: what is recognised, and what is tolerated."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from torch import nn

from adaptc.files.fingerprint import compare_fingerprint, fingerprint


class Host(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.a = nn.Linear(30, 20)
            self.b = nn.Linear(20, 10, bias=False)
            self.small = nn.Linear(3, 2)


SITES = ["a", "b", "small"]


def saved(model: nn.Module) -> dict[str, Any]:
    return json.loads(json.dumps(fingerprint(model, SITES)))


def test_the_same_base_has_no_differences() -> None:
    assert compare_fingerprint(saved(Host()), Host()) == []


def test_another_base_is_recognised() -> None:
    assert compare_fingerprint(saved(Host()), Host(1)) == [
        "the frozen weights have other values at 3 of 3 sites, first a"
    ]


def test_one_small_step_of_training_is_recognised() -> None:
    model = Host()
    print_before = saved(model)
    with torch.no_grad():
        model.b.weight.mul_(1 + 1e-6)
    assert compare_fingerprint(print_before, model) == [
        "the frozen weights have other values at 1 of 3 sites, first b"
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_copy_in_another_dtype_is_the_same_base(dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    assert compare_fingerprint(saved(Host()), Host().to(dtype)) == [
        f"the same weights in another dtype ({name}, it was float32) at 3 of 3 sites, first a"
    ]
    assert compare_fingerprint(saved(Host().to(dtype)), Host()) == [
        f"the same weights in another dtype (float32, it was {name}) at 3 of 3 sites, first a"
    ]
    found = compare_fingerprint(saved(Host()), Host(1).to(dtype))
    assert found == [
        f"the frozen weights have other values, in {name} (it was float32) at 3 of 3 sites, first a"
    ]


def test_class_shape_and_missing_sites_are_named() -> None:
    class Other(Host):
        pass

    model = Other()
    model.a = nn.Linear(30, 21)
    del model.small
    assert compare_fingerprint(saved(Host()), model) == [
        "saved on a Host, this is a Other",
        "the frozen weight has shape [21, 30], it had [20, 30] at 1 of 3 sites, first a",
        "no frozen weight is found at 1 of 3 sites, first small",
    ]


def test_weights_without_values_are_compared_by_shape() -> None:
    meta = copy.deepcopy(Host()).to("meta")
    assert compare_fingerprint(saved(meta), meta) == []
    assert compare_fingerprint(saved(Host()), meta) == []
    meta.a = nn.Linear(30, 21, device="meta")
    assert compare_fingerprint(saved(Host()), meta) == [
        "the frozen weight has shape [21, 30], it had [20, 30] at 1 of 3 sites, first a"
    ]
    half = compare_fingerprint(saved(Host()), Host().to("meta", torch.float16))
    assert half == [
        "the dtype is float16, it was float32, so the values cannot be compared at 3 of 3 sites, first a"
    ]
