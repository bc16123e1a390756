"""What the processes of ``test_ddp`` do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.nn.parallel import DistributedDataParallel

import adaptc
from adaptc.errors import UnsupportedError
from tests.distributed.processes import (
    batch,
    check_every_site_is_rewritten,
    check_gradients,
    formula_gradients,
    llama,
    lora,
    own_rows,
)  # fmt: skip
from tests.reference import factors_of


def one_step(rank: int) -> None:
    base, model = llama(layers=1, rank=rank)
    ddp = DistributedDataParallel(model)
    ddp(**own_rows(rank)).loss.backward()
    # DDP has given every process the values of the first one.
    check_gradients(model, formula_gradients(base, factors_of(model)))
    check_every_site_is_rewritten(model)
    assert len(model.adaptc.graphs) == 1


def by_block(rank: int) -> None:
    base, model = llama(layers=3, regional=True)
    ddp = DistributedDataParallel(model)
    for _ in range(2):
        model.zero_grad()
        ddp(**own_rows(rank), use_cache=False).loss.backward()
        check_gradients(model, formula_gradients(base, factors_of(model)))
    assert model.adaptc.eager_sites() == model.adaptc.idle_sites() == []
    paths = model.adaptc.captures.site_paths()
    assert {paths[i] for graph in model.adaptc.graphs for i in graph.ran} == set(paths.values())


def cut_at_buckets(rank: int) -> None:
    """Adapters of more than a bucket: Dynamo cuts the graph, and the parts are rewritten."""
    base, model = llama(lora(r=160))
    ddp = DistributedDataParallel(model, bucket_cap_mb=1)
    for _ in range(2):
        model.zero_grad()
        ddp(**own_rows(rank)).loss.backward()
        check_gradients(model, formula_gradients(base, factors_of(model)))
    check_every_site_is_rewritten(model)
    graphs = model.adaptc.graphs
    assert len(graphs) > 1 and model.adaptc.metrics()["recompiles"] == 0
    assert "DDPOptimizer" in str(model.adaptc.explain())


def two_forwards_before_a_backward(rank: int) -> None:
    base, model = llama()
    ddp = DistributedDataParallel(model)
    losses = [ddp(**own_rows(rank)).loss for _ in range(2)]
    sum(losses).backward()
    want = formula_gradients(base, factors_of(model))
    check_gradients(model, {name: 2 * gradient for name, gradient in want.items()})


def accumulate_without_sync(rank: int) -> None:
    base, model = llama()
    ddp = DistributedDataParallel(model)
    with ddp.no_sync():
        ddp(**own_rows(rank)).loss.backward()
    ddp(**own_rows(rank)).loss.backward()
    want = formula_gradients(base, factors_of(model))
    check_gradients(model, {name: 2 * gradient for name, gradient in want.items()})


def switch(rank: int) -> None:
    base, model = llama(name="first")
    model.adaptc.add("second", lora())
    ddp = DistributedDataParallel(model, find_unused_parameters=True)
    for name in ("first", "second", "first"):
        model.adaptc.switch(name)
        model.zero_grad()
        ddp(**own_rows(rank)).loss.backward()
        check_gradients(model, formula_gradients(base, factors_of(model, name)), name)
        others = [p for other in ("first", "second") if other != name for p in model.adaptc.parameters(other)]
        # DDP gives parameters that nobody used a gradient of zero, or none.
        assert all(p.grad is None or not p.grad.any() for p in others)
    assert model.adaptc.metrics()["recompiles"] == 0


def refuse_what_is_not_averaged(rank: int) -> None:
    _, model = llama()
    ddp = DistributedDataParallel(model)
    with pytest.raises(UnsupportedError, match=r"the model is wrapped by DistributedDataParallel already") as caught:
        adaptc.compile(ddp, lora())
    assert "adaptc.compile(model, plan) first, then DistributedDataParallel(model)" in str(caught.value)
    ddp(**own_rows(rank)).loss.backward()
    model.adaptc.add("late", lora(targets=["q_proj"]))
    with pytest.warns(adaptc.errors.NewSignatureWarning):
        model.adaptc.switch("late")
    with pytest.raises(UnsupportedError, match=r"q_proj\.adapters\.late\.lora_A is trained, and DistributedDataP"):
        ddp(**own_rows(rank))
    with torch.no_grad():
        ddp(**own_rows(rank))
    # One that was frozen when the model was wrapped is not averaged either.
    _, model = llama(name="first")
    model.adaptc.add("second", lora())
    frozen = list(model.adaptc.parameters("second"))
    for parameter in frozen:
        parameter.requires_grad_(False)
    ddp = DistributedDataParallel(model)
    ddp(**own_rows(rank)).loss.backward()
    for parameter in frozen:
        parameter.requires_grad_(True)
    model.adaptc.switch("second")
    with pytest.raises(UnsupportedError, match="whose requires_grad was set, afterwards"):
        ddp(**own_rows(rank))


def save_and_load(rank: int, directory: str) -> None:
    _, model = llama(rank=rank)
    ddp = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.adaptc.parameters(), lr=0.5)
    ddp(**own_rows(rank)).loss.backward()
    optimizer.step()
    model.eval()
    if rank == 0:
        model.adaptc.save(f"{directory}/first")
    model.adaptc.save(f"{directory}/all")  # each process, at the same time, to one place
    full = get_model_state_dict(ddp, options=StateDictOptions(full_state_dict=True))
    dist.barrier()
    want = model(**batch()).logits
    for name in ("first", "all"):
        _, other = llama(rank=7)
        other.eval().adaptc.load(f"{directory}/{name}")
        torch.testing.assert_close(other(**batch()).logits, want, rtol=0, atol=0)
        assert sorted(p.name for p in Path(directory, name).iterdir()) == [
            "adaptc_plan.json", "adapter_config.json", "adapter_model.safetensors",
        ]  # fmt: skip
    _, other = llama(rank=7)
    other.eval().load_state_dict(full)
    torch.testing.assert_close(other(**batch()).logits, want, rtol=0, atol=0)


def accelerate_prepare(rank: int) -> None:
    import accelerate

    base, model = llama(rank=rank)
    accelerator = accelerate.Accelerator(cpu=True)
    optimizer = torch.optim.SGD(model.adaptc.parameters(), lr=0.1)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    assert isinstance(prepared, DistributedDataParallel)
    accelerator.backward(prepared(**own_rows(rank)).loss)
    check_gradients(model, formula_gradients(base, factors_of(model)))
    check_every_site_is_rewritten(model)
