"""``python -m tests.models.survey``: every class of several tasks through adaptc and through PEFT, a line each.

For each class: LoRA on all its linear layers by ``"all-linear"``, one training step, loss and every gradient against
PEFT on the same values (against the formula in fp64 where PEFT refuses the class), relative to the gradient's size or
to a ten-thousandth of the largest one's, and once more in fp64 where fp32 does not tell. ``equal``: it agrees, every
site was rewritten, and there are no more graphs than the base has under ``torch.compile``, trained whole or in the
layers that were adapted: graphs are captured for inputs with and without gradients apart, so that a base that breaks
graphs has fewer where all of it is trained.
A class whose base does not run under PEFT, or not under ``torch.compile``, does not count.
"""

from __future__ import annotations

import argparse
import collections
import json
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch

import adaptc
from adaptc.errors import PlanError
from tests.models import zoo
from tests.models.test_against_peft import CountingBackend, lora, peft_step, peft_twin
from tests.reference import reference_step, relative_errors, step

BASE = ("not built", "base fails", "PEFT fails", "no sites")


def survey_one(task: str, model_type: str, *, backend: str) -> tuple[str, str]:
    """The verdict on one class, and a detail."""
    try:
        plain = zoo.build(task, model_type).train()
        batch = zoo.batch(task, plain)
    except zoo.NotBuiltError as error:
        return "not built", str(error)
    try:
        graphs = _base_graphs(plain, batch)  # trained, as the adapted one will be
    except Exception as error:
        return "base fails", f"{type(error).__name__}: {str(error)[:200]}"
    try:
        model = adaptc.compile(zoo.build(task, model_type).train(), lora(), backend=backend)
    except PlanError as error:
        reason = " ".join(str(error).split())
        return ("no sites" if "matches nothing" in reason else "refused"), reason[:300]
    try:
        want = peft_step(peft_twin(zoo.build(task, model_type), model).train(), batch)
    except Exception as peft_error:
        try:  # the formula in fp64, where PEFT does not take the class
            base = zoo.build(task, model_type)
            base.config._experts_implementation = "eager"  # torch has no grouped product in fp64
            want = reference_step(model, base, batch)
        except Exception:
            return "PEFT fails", f"{type(peft_error).__name__}: {str(peft_error)[:200]}"
    verdict, detail = _compare(model, batch, want, graphs)
    if verdict == "more graphs":
        frozen = zoo.build(task, model_type).train().requires_grad_(False)
        for site in model.adaptc.sites:
            frozen.get_submodule(site.path).weight.requires_grad_(True)
        graphs = _base_graphs(frozen, batch)
        detail = f"{detail}, base trained at the sites alone {graphs}"
        verdict = "equal" if len(model.adaptc.graphs) <= graphs else verdict
    if verdict == "unequal":
        exact = _compare_in_fp64(task, model_type, graphs, backend=backend)
        verdict, detail = exact[0], f"{detail}; in fp64: {exact[1]}"
    return verdict, detail


def _compare_in_fp64(task: str, model_type: str, base_graphs: int, *, backend: str) -> tuple[str, str]:
    """The verdict where the base itself does not round much: convolutions in fp32 may lose ten bits (Winograd's)."""
    torch.compiler.reset()
    model = adaptc.compile(zoo.build(task, model_type).train().double(), lora(), backend=backend).double()
    batch = {
        name: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in zoo.batch(task, model).items()
    }
    twin = peft_twin(zoo.build(task, model_type).double(), model).train().double()
    return _compare(model, batch, peft_step(twin, batch), base_graphs, exact=True)


def _base_graphs(base: Any, batch: dict[str, Any]) -> int:
    """How many graphs the bare class has."""
    torch.compiler.reset()
    counting = CountingBackend()
    torch.compile(base, backend=counting)(**batch)
    torch.compiler.reset()
    return counting.graphs


def verdict_on(task: str, model_type: str, *, backend: str, show: bool = False) -> tuple[str, str]:
    """:func:`survey_one`, with what it raises. Where ``aot_eager`` does not train the bare class, as where a kernel
    lays out its result unlike its fake tensor, Inductor may."""
    torch.compiler.reset()
    try:
        return survey_one(task, model_type, backend=backend)
    except Exception as error:
        detail = f"{type(error).__name__}: {str(error)[:400]}"
        if _base_trains(task, model_type, backend=backend):
            if show:
                traceback.print_exc()
            return "fails", detail
    if backend == "inductor":
        return "base fails", detail
    verdict, detail = verdict_on(task, model_type, backend="inductor", show=show)
    return verdict, f"{detail}, under Inductor"


def _base_trains(task: str, model_type: str, *, backend: str) -> bool:
    """Whether a training step of the bare class goes through the backend."""
    torch.compiler.reset()
    plain = zoo.build(task, model_type).train()
    try:
        torch.compile(plain, backend=backend)(**zoo.batch(task, plain)).loss.backward()
    except Exception:
        return False
    return True


def _compare(
    model: Any, batch: dict[str, Any], want: Any, base_graphs: int, *, exact: bool = False
) -> tuple[str, str]:
    got = step(model, batch)
    handle = model.adaptc
    counts = f"{len(handle.sites)} sites, {len(handle.graphs)} graphs (base {base_graphs})"
    # Gradients that are zero for PEFT (a branch that is not taken, an expert that no token reached) are zero here.
    reached = {name: g for name, g in want[1].items() if g is not None and g.any()}
    stray = [n for n, g in got[1].items() if n not in reached and g.any()]
    missing = [n for n in reached if n not in got[1]]
    if stray or missing:
        return "unequal", f"{counts}; gradients missing {missing[:2]}, stray {stray[:2]}"
    errors = relative_errors({n: got[1][n] for n in reached}, reached)
    # A softmax over one key has no gradient: what is there is rounding of the others (BLT).
    largest = max((float(g.norm()) for g in reached.values()), default=0.0)
    errors = {n: e * min(1.0, float(reached[n].norm()) / (1e-4 * largest)) for n, e in errors.items()}
    worst = max(errors, key=errors.__getitem__, default="")
    loss = float(abs(got[0] / want[0] - 1))
    error = errors.get(worst, 0.0)
    counts = f"{counts}, {len(reached)} of {len(want[1])} gradients, loss {loss:.1e}, gradient {error:.1e}"
    if loss > (1e-10 if exact else 1e-5) or error > (1e-8 if exact else 1e-3):
        return "unequal", f"{counts} at {worst}"
    if not reached:
        return "unequal", f"{counts}: nothing was compared"
    if handle.eager_sites():
        return "eager sites", f"{counts}: {handle.eager_sites()[:3]}"
    if len(handle.graphs) > base_graphs:
        return "more graphs", counts
    return "equal", counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="model types; none: all")
    parser.add_argument("--tasks", default=",".join(zoo.TASKS))
    parser.add_argument("--backend", default="aot_eager")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--part", default="1/1", help="k/n: every n-th class, from the k-th")
    parser.add_argument("--traceback", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    which, parts = (int(n) for n in options.part.split("/"))
    rows = [(task, kind) for task in options.tasks.split(",") for kind in zoo.classes(task)]
    rows = [(task, kind) for task, kind in rows if not options.names or kind in options.names][which - 1 :: parts]
    verdicts: dict[str, Any] = {}
    for task, kind in rows:
        start = time.perf_counter()
        verdict, detail = verdict_on(task, kind, backend=options.backend, show=options.traceback)
        name = zoo.classes(task)[kind]
        verdicts[f"{task} {name}"] = (verdict, detail)
        print(f"{verdict:12} {task:8} {name:40} {time.perf_counter() - start:5.1f} s  {detail}", flush=True)
        if options.json:
            options.json.write_text(json.dumps(verdicts, indent=1))
    tally = collections.Counter(verdict for verdict, _ in verdicts.values())
    counted = sum(n for verdict, n in tally.items() if verdict not in BASE)
    print(dict(tally), f"equal: {tally['equal']} of {counted} whose base and PEFT run")


if __name__ == "__main__":
    main()
