"""The table ``overhead``: Python between the call of a model and its graphs, per call, whatever the model computes."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench import against
from bench.builds import opened
from bench.contenders import Base, build_base, fill_adapter
from bench.machine import results_folder
from bench.settings import Case, Settings
from bench.torch_internals import GRAPHS_THAT_COMPUTE_ONCE

#: Whether gradients are on, and what a graph holds.
MODES = {"training": True, "evaluation": False}
CAPTURES = {"whole": False, "by block": True}
#: Calls that are timed together: one alone is as short as the clock's own noise.
CALLS = 20
METHOD = (
    "each graph is computed by the first call and its outputs are given again by every later one, so that a call takes "
    f"the time of the Python around its graphs: hooks, guards, the model's own forward between blocks; a time is a "
    f"{CALLS}th of that of {CALLS} calls; the frozen base is captured by torch.compile, whole or each layer by itself"
)
STEP_METHOD = "the last line is a training step of the same model under Inductor, by block, computed in full"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``python -m bench overhead``."""
    parser.add_argument("--layers", type=int, default=16, help="decoder layers")
    parser.add_argument("--hidden", type=int, default=256, help="hidden size")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of the one sequence")
    parser.add_argument("--rounds", type=int, default=30, help="timed rounds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder of the result files; bench/results/<device> by default")
    against.add_argument(parser)


def run(arguments: argparse.Namespace) -> list[Path]:
    """Measure, and write ``overhead-cpu.json`` and ``.md``, with another build ``overhead-against-cpu``."""
    settings = Settings(
        layers=arguments.layers, hidden=arguments.hidden, tokens=arguments.tokens, rounds=arguments.rounds,
        seed=arguments.seed, head_dim=32,
    )  # fmt: skip
    rows: dict[str, dict[str, Any]] = {}
    with opened(None) as ours, opened(arguments.against) as other:
        builds = (ours, other) if arguments.against else (ours,)
        results = against.head("overhead", settings, builds)
        for name, task in _rows():
            print(name, file=sys.stderr, flush=True)
            rows[name] = against.measure(
                builds, settings.rounds, settings.seed, "overhead", settings=dataclasses.asdict(settings), **task
            )
    results["method"] |= {"calls": METHOD, "step": STEP_METHOD}
    results["rows"], results["notes"] = rows, _shares(rows)
    out = arguments.out or results_folder(torch.device("cpu"))
    title = f"Python per call of a model with LoRA r = {settings.rank} on all linear layers"
    return against.write(results, rows, title, out, "overhead-against-cpu" if arguments.against else "overhead-cpu")


def _rows() -> list[tuple[str, dict[str, Any]]]:
    calls = [
        (f"{contender}, {capture}, {mode}", {"contender": contender, "capture": capture, "mode": mode})
        for capture in CAPTURES for mode in MODES for contender in ("frozen base", "adaptc")
    ]  # fmt: skip
    return [*calls, ("a training step", {"contender": "adaptc", "capture": "by block", "mode": "step"})]


def _shares(rows: dict[str, dict[str, Any]]) -> list[str]:
    """What adaptc's Python takes of a step."""
    step = rows["a training step"]["time"][0]["median"]
    notes = []
    for capture in CAPTURES:
        ours, base = (rows[f"{name}, {capture}, training"]["time"][0]["median"] for name in ("adaptc", "frozen base"))
        notes.append(
            f"captured {capture}, a training call's Python takes {ours / step:.2%} of a step, the frozen base's "
            f"{base / step:.2%}"
        )
    return notes


def prepare(
    settings: dict[str, Any], contender: str, capture: str, mode: str
) -> tuple[Callable[[], object], torch.device, dict[str, Any]]:
    """What a process of one build times: (step, device, facts)."""
    read = Settings(**settings)
    base = build_base(read, Case("fp32", 0.0))
    inputs = {"inputs_embeds": base.fresh_embeds(), "use_cache": False}
    device = torch.device("cpu")
    if mode == "step":
        model = _adapted(base, read, "inductor", by_block=True)
        inputs["labels"] = base.labels

        def step() -> None:
            model.zero_grad()
            model(**inputs).loss.backward()

        for _ in range(3):
            step()
        return step, device, {}
    by_block = CAPTURES[capture]
    build = _frozen if contender == "frozen base" else _adapted
    model = build(base, read, GRAPHS_THAT_COMPUTE_ONCE, by_block=by_block).train(MODES[mode])
    call = _calls(model, inputs, MODES[mode])
    call()
    return call, device, {"calls": CALLS, "graphs": _graphs(model)}


def _calls(model: nn.Module, inputs: dict[str, Any], records: bool) -> Callable[[], object]:
    def call() -> None:
        with torch.set_grad_enabled(records):
            for _ in range(CALLS):
                model(**inputs)

    return call


def _adapted(base: Base, settings: Settings, backend: str, *, by_block: bool) -> nn.Module:
    import adaptc

    lora = adaptc.LoRA(r=settings.rank, alpha=settings.alpha, targets="all-linear")
    model: Any = adaptc.compile(base.fresh_model(), lora, backend=backend, regional=by_block)
    names = dict(model.named_parameters())
    trained = {n.replace(".adapters.default.", "."): p for n, p in names.items() if p.requires_grad}
    fill_adapter(trained, settings.seed)
    adapted: nn.Module = model
    return adapted


def _frozen(base: Base, settings: Settings, backend: str, *, by_block: bool) -> nn.Module:
    model: Any = base.fresh_model()
    for module in model.model.layers if by_block else [model]:
        module.compile(backend=backend)
    frozen: nn.Module = model
    return frozen


def _graphs(model: nn.Module) -> int | None:
    handle: Any = getattr(model, "adaptc", None)
    return None if handle is None else len(handle.graphs)
