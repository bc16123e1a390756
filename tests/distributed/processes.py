"""Two processes of this machine that run a function of a test, over gloo on the CPU."""

from __future__ import annotations

import copy
import datetime
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import adaptc
from tests.models import hosts
from tests.reference import factors_of, reference_loss, reference_model

ROOT = Path(__file__).parent.parent.parent
WORLD = 2
#: Rows and tokens are the same for both processes, so that the mean of their losses is the loss of all rows.
ROWS = 4


def run(function: Callable[..., None], *arguments: Any) -> None:
    """Call ``function(rank, *arguments)`` in two processes; what one raises is raised here."""
    with tempfile.TemporaryDirectory() as directory:
        torch.multiprocessing.spawn(_start, (f"{directory}/store", function, arguments), nprocs=WORLD)


def _start(rank: int, store: str, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    # What torchrun would set, for accelerate.
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD), MASTER_ADDR="127.0.0.1", MASTER_PORT="0"
    )
    seconds = datetime.timedelta(seconds=100)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD, timeout=seconds)
    # Not on failure: it would wait for the other process, which waits for this one.
    function(rank, *arguments)
    dist.barrier()
    dist.destroy_process_group()


def torchrun(*arguments: str) -> str:
    """What a script prints that torchrun starts in two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def batch(rows: slice = slice(None)) -> dict[str, torch.Tensor]:
    """Some of the rows of one batch, without padding."""
    with hosts.seeded(2):
        ids = torch.randint(3, hosts.VOCAB, (ROWS, 8))
    return {"input_ids": ids[rows], "labels": ids[rows]}


def own_rows(rank: int) -> dict[str, torch.Tensor]:
    return batch(slice(rank, None, WORLD))


def lora(**options: Any) -> adaptc.LoRA:
    return adaptc.LoRA(**{"r": 3, "alpha": 6, "init": "random", "targets": "all-linear", **options})


def llama(plan: Any = None, *, rank: int = 0, layers: int = 2, **options: Any) -> tuple[Any, Any]:
    """(base, compiled copy); initial adapter values differ between processes unless ``rank`` is 0 in all."""
    base = hosts.build("llama", num_hidden_layers=layers)
    with hosts.seeded(3 + rank):
        model = adaptc.compile(copy.deepcopy(base), plan or lora(), **{"backend": "aot_eager", **options})
    return base, model.train()


def formula_gradients(base: Any, factors: Any) -> dict[str, torch.Tensor]:
    """Parameter name -> gradient of the loss of the whole batch, by the formula in fp64, in one process."""
    reference = reference_model(base, factors).train()
    reference_loss(reference, batch()).backward()
    return {
        f"{path}.lora_{factor}": getattr(reference.get_submodule(path), factor).grad
        for path in factors
        for factor in "AB"
    }


def check_gradients(model: Any, want: dict[str, torch.Tensor], name: str = "default") -> None:
    """Every gradient of an adapter (gathered, where it is sharded) is ``want``; the base has none."""
    for site in model.adaptc.sites:
        for factor in "AB":
            got, wanted = getattr(site.adapters[name], f"lora_{factor}").grad, want[f"{site.path}.lora_{factor}"]
            assert got is not None and wanted.abs().max() > 0, site.path
            got = got.full_tensor() if hasattr(got, "full_tensor") else got
            error = float((got.double() - wanted).norm() / wanted.norm())
            assert error < 2e-5, (site.path, factor, error)
    assert all(p.grad is None for n, p in model.named_parameters() if ".adapters." not in n)


def check_every_site_is_rewritten(model: Any) -> None:
    """Graphs, however they are cut, hold every anchor once, rewritten; none ran outside of a graph."""
    handle = model.adaptc
    assert (handle.eager_sites(), handle.idle_sites()) == ([], [])
    inserted = [r.site for g in handle.graphs if g.sites for r in g.reports[0].result.applied]
    assert sorted(inserted) == sorted(site.path for site in handle.sites)
    assert all(not g.reports[0].result.refused for g in handle.graphs)


def whole_factors(model: Any, name: str = "default") -> dict[str, list[Any]]:
    """``factors_of``, gathered where they are sharded."""
    return {
        path: [(*(t.full_tensor() if hasattr(t, "full_tensor") else t for t in (A, B)), s) for A, B, s in found]
        for path, found in factors_of(model, name).items()
    }
