"""One adapted layer in the association order that adaptc chooses, over the split one, at several shapes."""

from __future__ import annotations

import argparse
import copy
import datetime
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench import harness, machine
from bench.errors import BenchError

#: rows, in, out, rank: fewer rows than the width, more of them, and ranks near the width.
SHAPES = ("512x1024x1024x16", "2048x1024x1024x16", "4096x1024x1024x16", "4096x768x3072x16", "8192x512x512x16",
          "2048x1024x1024x128", "2048x768x768x256", "2048x896x896x512", "4096x512x512x256")  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), help="rows x in x out x rank")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder of the result files; bench/results/<device> by default")


def run(arguments: argparse.Namespace) -> list[Path]:
    """Measure, and write ``orders-<device>.json`` and ``.md``.

    Raises:
        BenchError: a shape is no shape, or a chosen order computes something else than the split one.
    """
    machine.keep_freed_memory()
    device = torch.device(arguments.device)
    results: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": machine.machine_class(device),
        "versions": machine.versions(),
        "flags": {"rounds": arguments.rounds, "device": arguments.device, "seed": arguments.seed},
        "interval": harness.INTERVAL_METHOD,
        "shapes": {shape: measure(_parsed(shape), arguments) for shape in arguments.shapes},
    }
    out = arguments.out or machine.results_folder(device)
    out.mkdir(parents=True, exist_ok=True)
    data = out / f"orders-{device.type}.json"
    data.write_text(json.dumps(results, indent=1) + "\n")
    table = data.with_suffix(".md")
    table.write_text(markdown(results))
    return [data, table]


def _parsed(shape: str) -> tuple[int, int, int, int]:
    try:
        m, k, n, r = (int(size) for size in shape.split("x"))
    except ValueError:
        raise BenchError(f"--shapes {shape}: expected rows x in x out x rank, as in {SHAPES[0]}") from None
    return m, k, n, r


def measure(shape: tuple[int, int, int, int], arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a step of the layer (forward, and backward to the factors and the input) by either order."""
    import adaptc

    m, k, n, r = shape
    device = torch.device(arguments.device)
    torch.compiler.reset()  # or sizes that differ between shapes are symbolic
    torch.manual_seed(arguments.seed)
    base = nn.Sequential(nn.Linear(k, n)).to(device)
    x, g = torch.randn(m, k, device=device), torch.randn(m, n, device=device)
    steps: dict[str, Callable[[], object]] = {}
    models = {}
    for name, passes in (("split", {"skip": ["reassociate"]}), ("chosen", None)):
        torch.manual_seed(arguments.seed)
        method = adaptc.LoRA(r=r, alpha=2 * r, init="random", targets=("0",))
        models[name] = adaptc.compile(copy.deepcopy(base), adaptc.Plan([method], passes=passes))
        steps[name] = lambda model=models[name]: _step(model, x, g)  # type: ignore[misc]
    _check(*(steps[name]() for name in ("split", "chosen")))
    for _ in range(2):
        for step in steps.values():
            step()
    times = harness.time_interleaved(steps, rounds=arguments.rounds, device=device, seed=arguments.seed)
    ratio = harness.ratio_interval(times["chosen"], times["split"])
    choices = [c for graph in models["chosen"].adaptc.graphs for c in graph.choices if c.predicted]
    return {
        "chosen": choices[0].chosen if choices else "split",
        "choice": [str(choice) for choice in choices],
        "over_split": {"median": ratio.median, "low": ratio.low, "high": ratio.high},
        "seconds": times,
    }


def _step(model: nn.Module, x: torch.Tensor, g: torch.Tensor) -> list[torch.Tensor]:
    x = x.detach().requires_grad_()
    for parameter in model.parameters():
        parameter.grad = None
    y = model(x)
    y.backward(g)
    return [y.detach(), *(t.grad for t in (x, *model.parameters()) if t.grad is not None)]


def _check(split: Any, chosen: Any) -> None:
    for one, other in zip(split, chosen, strict=True):
        error = float((one - other).norm() / one.norm())
        if not error < 1e-4:
            raise BenchError(f"the chosen order computes something else: relative difference {error:.1e}")


def markdown(results: dict[str, Any]) -> str:
    flags, where = results["flags"], results["machine"]
    machine_text = where.get("gpu") or f"{where['cpu']}, {where['cores']} cores, {where['threads']} threads"
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    lines = [
        f"# Association order of one LoRA layer, fp32, {flags['device']}", "",
        f"{flags['rounds']} rounds; {results['date']}.", f"Machine: {machine_text}.", f"Versions: {versions}.", "",
        "A step under Inductor: forward, and backward to the factors and the input. The ratio is the chosen order's"
        " time over the split one's, its median and 95 % interval.", "",
        "| rows x in x out x rank | chosen | over split | as it was chosen |", "| --- | --- | ---: | --- |",
    ]  # fmt: skip
    for shape, row in results["shapes"].items():
        ratio = row["over_split"]
        text = f"{ratio['median']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]"
        lines.append(f"| {shape} | {row['chosen']} | {text} | {'; '.join(row['choice'])} |")
    return "\n".join(lines) + "\n"
