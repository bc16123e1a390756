"""The table ``train``: one training step of LoRA over the frozen base, for PEFT and adaptc."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adaptc.codegen.cpp import build
from bench import against, report
from bench.agreement import Agreement
from bench.cold import COLD_METHOD, measure_cold
from bench.contenders import BUILDERS, USUAL, Contender, build_base
from bench.errors import BenchError
from bench.harness import INTERVAL_METHOD, median_interval, ratio_interval, time_interleaved
from bench.libraries import LIBRARIES_METHOD, libraries_row
from bench.machine import ALLOCATOR_METHOD, keep_freed_memory, machine_class, results_folder, versions
from bench.memory import MEMORY_METHOD, hooked_saved_bytes, step_memory
from bench.settings import DTYPES, Case, Settings
from bench.torch_internals import GraphCounts, graph_counts

#: Contenders that others are divided by, with the key of the ratio in the result.
DIVISORS = {"floor": "over_floor", "peft-compile": "over_peft_compile", "adaptc": "over_adaptc"}
STEP_METHOD = (
    "one step drops the gradients, computes the loss from inputs_embeds and labels, and runs backward to "
    "inputs_embeds and the adapter; no optimizer; LoRA (DoRA with --dora, magnitudes away from the row norms) on "
    "every linear layer but the head, lora_B non-zero, "
    "equal adapter values; all contenders interleaved in one process, in Williams-balanced order"
)


#: ``python -m bench compile`` is the same measurement, of a deep model and of those that compile it by block.
COMPILE_HELP = "cold compilation of a deep model: whole, and by block"
COMPILE_DEFAULTS = {
    "layers": 16, "rounds": 6, "cold": 2, "dtypes": ["fp32"], "dropouts": [0.0],
    "contenders": ["peft-compile", "peft-regional", "adaptc", "adaptc-regional"],
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``python -m bench train``."""
    for field in dataclasses.fields(Settings):
        flag = "--" + field.name.replace("_", "-")
        if isinstance(field.default, bool):
            parser.add_argument(flag, action="store_true", help=HELP[field.name])
        else:
            parser.add_argument(flag, type=type(field.default), default=field.default, help=HELP[field.name])
    parser.add_argument("--dtypes", type=_names, default=["fp32", "bf16"], help="of " + ",".join(DTYPES))
    parser.add_argument("--dropouts", type=_numbers, default=[0.0, 0.05], help="LoRA dropout probabilities")
    parser.add_argument(
        "--contenders", type=_names, default=list(USUAL), help="some of " + ",".join(BUILDERS)
        + "; with --against adaptc unless it is given"
    )
    against.add_argument(parser)
    parser.add_argument("--out", type=Path, help="folder of the result files; bench/results/<device> by default")


HELP = {
    "layers": "decoder layers",
    "hidden": "hidden size",
    "intermediate": "MLP size; 0: 2.75 times the hidden size",
    "head_dim": "size of an attention head",
    "vocab": "vocabulary; small, because the head is not adapted",
    "batch": "sequences in a batch",
    "tokens": "tokens of a sequence",
    "rank": "LoRA rank",
    "alpha": "LoRA alpha",
    "dora": "train DoRA instead of LoRA",
    "checkpointing": "checkpoint every decoder layer (not re-entrant)",
    "device": "cpu or cuda",
    "backend": "backend of torch.compile and adaptc",
    "threads": "CPU threads; 0: torch's choice",
    "rounds": "timed rounds; every contender runs once in each",
    "warmup": "steps before timing, after the compiling one",
    "cold": "rounds of cold compilation in fresh processes; 0: not measured",
    "seed": "seed of weights, adapters and order",
}


def _names(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


def _numbers(text: str) -> list[float]:
    return [float(part) for part in _names(text)]


def run(arguments: argparse.Namespace) -> list[Path]:
    """Measure every case, then write JSON, Markdown table and plot; returns their paths."""
    settings = Settings(**{f.name: getattr(arguments, f.name) for f in dataclasses.fields(Settings)})
    cases = [Case(dtype, p) for dtype in arguments.dtypes for p in arguments.dropouts]
    unknown = [name for name in arguments.contenders if name not in BUILDERS]
    if unknown or not arguments.contenders:
        raise BenchError(f"unknown contenders {unknown}; known: {', '.join(BUILDERS)}")
    marks = [name for name in ("dora", "checkpointing") if getattr(settings, name)]
    if arguments.against is not None:
        names = ["adaptc"] if arguments.contenders == list(USUAL) else arguments.contenders
        stem = "-".join([arguments.command, *marks])
        return against.run(arguments.against, settings, cases, names, arguments.out, stem)
    report.require_plotting()
    out = arguments.out or results_folder(torch.device(settings.device))
    stem = "-".join([arguments.command, *marks, torch.device(settings.device).type])
    # Written after every case, so that a run that is cut off leaves what it has.
    results = measure(
        settings, cases, arguments.contenders, after=lambda found: report.write(found, out, stem)
    )
    return report.write(results, out, stem)


def measure(
    settings: Settings,
    cases: Sequence[Case],
    names: Sequence[str],
    *,
    after: Callable[[dict[str, Any]], object] = lambda found: None,
) -> dict[str, Any]:
    """The whole result as plain data, the same that is written as JSON; ``after`` gets it after every case."""
    if settings.threads:
        torch.set_num_threads(settings.threads)
    keep_freed_memory()
    device = torch.device(settings.device)
    results: dict[str, Any] = {
        "table": "train",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "flags": {
            **dataclasses.asdict(settings),
            "dtypes": list(dict.fromkeys(case.dtype for case in cases)),
            "dropouts": list(dict.fromkeys(case.dropout for case in cases)),
            "contenders": list(names),
        },
        "versions": versions(),
        "machine": machine_class(device),
        "method": {
            "step": STEP_METHOD,
            "allocator": ALLOCATOR_METHOD,
            "interval": INTERVAL_METHOD,
            "memory": MEMORY_METHOD,
            **({"cold": COLD_METHOD} if settings.cold else {}),
        },
        "cases": [],
    }
    for case in cases:
        results["cases"].append(_measure_case(settings, case, names, device))
        if "libraries" in results["cases"][-1]:
            results["method"]["libraries"] = LIBRARIES_METHOD
        after(results)
    return results


def _measure_case(
    settings: Settings, case: Case, names: Sequence[str], device: torch.device
) -> dict[str, Any]:
    _say(f"{case}: building and compiling {', '.join(names)}")
    # What earlier cases compiled would count against the recompile limits of this one's frames.
    torch.compiler.reset()
    base = build_base(settings, case)
    agreement = Agreement(base, settings, case)
    contenders: dict[str, Contender] = {}
    first: dict[str, GraphCounts] = {}
    distances: dict[str, dict[str, float]] = {}
    for name in names:
        before = graph_counts()
        contenders[name] = BUILDERS[name](base, settings, case)
        distances[name] = agreement.check(contenders[name])
        first[name] = graph_counts() - before
    later = dict.fromkeys(names, GraphCounts())
    seen = graph_counts()

    def attribute(name: str) -> None:
        """Give what Dynamo captured since the last step to the contender that just ran."""
        nonlocal seen
        now = graph_counts()
        later[name] += now - seen
        seen = now

    for name, contender in contenders.items():
        for _ in range(settings.warmup):
            contender.step()
            attribute(name)
    _say(f"{case}: timing {settings.rounds} rounds")
    steps = {name: contender.step for name, contender in contenders.items()}
    with build.quiet():  # not beside what may still be compiled
        times = time_interleaved(
            steps, rounds=settings.rounds, device=device, seed=settings.seed, after=attribute
        )
    _say(f"{case}: memory")
    rows: dict[str, dict[str, Any]] = {}
    for name, contender in contenders.items():
        memory = _memory_row(contender, device)
        attribute(name)
        dtypes = {str(parameter.dtype).removeprefix("torch.") for parameter in contender.adapter.values()}
        rows[name] = {
            **_time_row(times, name),
            **memory,
            "graphs": first[name].graphs,
            "graph_breaks": first[name].breaks,
            "recompiles": later[name].graphs,
            "own_counts": _own_counts(contender),
            "adapter_dtypes": sorted(dtypes),
            "agreement": distances[name],
        }
    _add_memory_ratios(rows)
    result: dict[str, Any] = {"dtype": case.dtype, "dropout": case.dropout, "contenders": rows}
    if (libraries := libraries_row(settings, case, base.model, device)) is not None:
        result["libraries"] = libraries
    if settings.cold:
        result["cold"] = _cold_rows(settings, case, [n for n in names if contenders[n].compiled])
    return result


def _time_row(times: dict[str, list[float]], name: str) -> dict[str, Any]:
    mine = times[name]
    row: dict[str, Any] = {
        "time": dataclasses.asdict(median_interval(mine)),
        "quartiles": report.quartiles(mine),
        "seconds": mine,
    }
    for divisor, key in DIVISORS.items():
        if divisor in times:
            row[key] = dataclasses.asdict(ratio_interval(mine, times[divisor]))
    return row


def _memory_row(contender: Contender, device: torch.device) -> dict[str, Any]:
    peak, saved = step_memory(contender, device)
    row: dict[str, Any] = {"peak_bytes": peak, "saved_bytes": saved}
    if not contender.compiled:
        assert isinstance(contender.model, nn.Module)
        row["saved_bytes_by_hooks"] = hooked_saved_bytes(contender, contender.model)
    return row


def _add_memory_ratios(rows: dict[str, dict[str, Any]]) -> None:
    for divisor, key in DIVISORS.items():
        for row in rows.values():
            if divisor in rows:
                row[f"peak_{key}"] = row["peak_bytes"] / rows[divisor]["peak_bytes"]
                row[f"saved_{key}"] = row["saved_bytes"] / rows[divisor]["saved_bytes"]


def _own_counts(contender: Contender) -> dict[str, int]:
    if contender.own_counts is None:
        return {}
    counts = contender.own_counts()
    return {key: int(counts[key]) for key in ("graphs", "recompiles", "eager_sites") if key in counts}


def _cold_rows(settings: Settings, case: Case, names: Sequence[str]) -> dict[str, Any]:
    _say(f"{case}: cold compilation, {settings.cold} round(s) of {len(names)} processes")
    times = measure_cold(settings, case, names)
    return {name: _time_row(times, name) for name in names}


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
