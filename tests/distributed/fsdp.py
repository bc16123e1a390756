"""What the processes of ``test_fsdp`` do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import fully_shard

import adaptc
from adaptc.errors import CheckpointError, UnsupportedError
from tests.distributed.processes import (
    batch,
    check_every_site_is_rewritten,
    check_gradients,
    formula_gradients,
    llama,
    lora,
    own_rows,
    whole_factors,
)  # fmt: skip
from tests.reference import factors_of


def shard(model: Any) -> Any:
    """Each layer, and what is left, as the documentation of FSDP2 has it."""
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def one_step(rank: int) -> None:
    base, model = llama()
    shard(model)
    want = formula_gradients(base, whole_factors(model))
    for _ in range(2):
        model.zero_grad()
        model(**own_rows(rank)).loss.backward()
        check_gradients(model, want)
    check_every_site_is_rewritten(model)


def by_block(rank: int) -> None:
    base, model = llama(layers=3, regional=True)
    shard(model)
    want = formula_gradients(base, whole_factors(model))
    for _ in range(2):
        model.zero_grad()
        model(**own_rows(rank), use_cache=False).loss.backward()
        check_gradients(model, want)
    assert model.adaptc.eager_sites() == model.adaptc.idle_sites() == []


def train(rank: int) -> None:
    """Some steps end at the values that one process reaches on the whole batch."""
    _, alone = llama()
    _, model = llama()
    shard(model)
    optimizers = [torch.optim.SGD(m.adaptc.parameters(), lr=0.5) for m in (alone, model)]
    for _ in range(3):
        for one, optimizer, rows in zip((alone, model), optimizers, (batch(), own_rows(rank)), strict=True):
            optimizer.zero_grad()
            one(**rows).loss.backward()
            optimizer.step()
    for path, found in whole_factors(model).items():
        for got, want in zip(found[0][:2], whole_factors(alone)[path][0][:2], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def switch(rank: int) -> None:
    base, model = llama(name="first")
    model.adaptc.add("second", lora())
    model.adaptc.add("wider", lora(r=5))
    shard(model)
    for name in ("first", "second", "wider", "first", None, "second"):
        with pytest.warns(adaptc.errors.NewSignatureWarning) if name in ("wider", None) else _nothing():
            model.adaptc.switch(name)
        model.zero_grad()
        if name is None:
            with torch.no_grad():
                torch.testing.assert_close(model(**batch()).logits, base(**batch()).logits, rtol=0, atol=1e-6)
            continue
        model(**own_rows(rank)).loss.backward()
        check_gradients(model, formula_gradients(base, whole_factors(model, name)), name)


def _nothing() -> Any:
    import contextlib

    return contextlib.nullcontext()


def refuse_what_is_sharded(rank: int) -> None:
    base, model = llama()
    shard(base)
    with pytest.raises(UnsupportedError, match="the model is wrapped by fully_shard already") as caught:
        adaptc.compile(base, lora())
    assert "adaptc.compile(model, plan) first, then fully_shard(model)" in str(caught.value)
    assert not hasattr(base, "adaptc")
    shard(model)
    with pytest.raises(UnsupportedError, match="wrapped by fully_shard already"):
        model.adaptc.add("late", lora())
    assert list(model.adaptc.records) == ["default"]


def save_and_load(rank: int, directory: str) -> None:
    """Values go through files; nothing is called, so nothing is compiled."""
    _, model = llama()
    want = {path: [t.detach().clone() for t in found[0][:2]] for path, found in factors_of(model).items()}

    def check(other: Any) -> None:
        for path, found in whole_factors(other).items():
            for got, wanted in zip(found[0][:2], want[path], strict=True):
                torch.testing.assert_close(got, wanted, rtol=0, atol=0)

    shard(model)
    model.unshard()
    path = Path(directory, "adapter")
    model.adaptc.save(path)
    assert (path / "adapter_model.safetensors").exists()  # in every process, without a barrier of the caller
    model.save_pretrained(Path(directory, "pretrained"))
    full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    for load in (
        lambda m: m.adaptc.load(path),
        lambda m: m.adaptc.load(Path(directory, "pretrained")),
        lambda m: m.load_state_dict(full),
    ):
        _, other = llama(rank=7)
        with pytest.raises(AssertionError):
            check(other)
        load(other)
        check(other)
    for load in (
        lambda m: (m.unshard(), m.adaptc.load(path)),  # the root may be whole, as it is after a forward
        lambda m: set_model_state_dict(m, full, options=StateDictOptions(full_state_dict=True)),
    ):
        _, other = llama(rank=7)
        shard(other)
        load(other)
        other.reshard()
        check(other)
        # What a forward gathers are these values, too.
        other.unshard()
        check(other)


def fail_to_write(rank: int, directory: str) -> None:
    """What the first process cannot write is an error in all of them, and none waits for ever."""
    _, model = llama()
    shard(model)
    blocked = Path(directory, "file")
    blocked.write_text("no directory")
    dist.barrier()
    with pytest.raises(CheckpointError, match="cannot save" if rank == 0 else "the first process could not write"):
        model.adaptc.save(blocked)
    with pytest.raises(UnsupportedError, match="gathers its adapters itself"):
        model.save_pretrained(directory, state_dict={})
