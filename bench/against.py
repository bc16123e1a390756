"""``python -m bench train --against``: the rows of the table ``train`` for two builds of adaptc, in turn."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench import report
from bench.builds import BUILDS_METHOD, Build, Worker, in_turn, opened
from bench.contenders import BUILDERS
from bench.errors import BenchError
from bench.harness import INTERVAL_METHOD, median_interval, ratio_interval
from bench.machine import ALLOCATOR_METHOD, machine_class, results_folder, versions
from bench.settings import Case, Settings

#: Contenders that a build of adaptc changes.
OURS = tuple(name for name in BUILDERS if name.startswith("adaptc"))


def run(
    source: Path, settings: Settings, cases: Sequence[Case], names: Sequence[str], out: Path | None, stem: str
) -> list[Path]:
    """Measure every case and contender of both builds; write ``<stem>-against-<device>.json`` and ``.md``.

    Raises:
        BenchError: ``source`` is no build, or a name no contender that adaptc takes part in.
    """
    others = [name for name in names if name not in OURS]
    if others or not names:
        raise BenchError(f"--against compares builds of adaptc: --contenders of {', '.join(OURS)}, not {others}")
    rows: list[dict[str, Any]] = []
    written: list[Path] = []
    with opened(None) as ours, opened(source) as other:
        results = head("train", settings, (ours, other))
        for case, name in itertools.product(cases, names):
            print(f"{case}: {name}, {ours.name} and {other.name}", file=sys.stderr, flush=True)
            arguments = {"settings": dataclasses.asdict(settings), "case": dataclasses.asdict(case)}
            row = measure((ours, other), settings.rounds, settings.seed, "train", contender=name, **arguments)
            rows.append({"dtype": case.dtype, "dropout": case.dropout, "contender": name, **row})
            # A row takes minutes: what was measured stands even if the rest is not.
            written = _write_rows(results, rows, settings, out, stem)
    return written


def _write_rows(
    results: dict[str, Any], rows: Sequence[dict[str, Any]], settings: Settings, out: Path | None, stem: str
) -> list[Path]:
    title = f"Training step of two builds, {report.method_name(results['flags'])} r = {settings.rank}"
    keys = [f"{row['dtype']}, p = {row['dropout']:g}: {report.LABELS[row['contender']]}" for row in rows]
    where = out or results_folder(torch.device(settings.device))
    table = dict(zip(keys, rows, strict=True))
    return write({**results, "rows": list(rows)}, table, title, where, f"{stem}-against-{settings.device}")


def head(table: str, settings: Settings, builds: Sequence[Build]) -> dict[str, Any]:
    """What a result says besides its rows."""
    return {
        "table": table,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "flags": dataclasses.asdict(settings),
        "builds": [build.name for build in builds],
        "versions": versions(),
        "machine": machine_class(torch.device(settings.device)),
        "method": {"builds": BUILDS_METHOD, "allocator": ALLOCATOR_METHOD, "interval": INTERVAL_METHOD},
    }


def measure(builds: Sequence[Build], rounds: int, seed: int, task: str, **arguments: Any) -> dict[str, Any]:
    """Times of one task in each build, and the ratio of the first to the second where there are two."""
    workers: list[Worker] = []
    try:
        for build in builds:
            workers.append(Worker(build, task, **arguments))
        times = in_turn(workers, rounds=rounds, seed=seed)
    finally:
        for worker in workers:
            worker.close()
    row: dict[str, Any] = {
        "seconds": times,
        "time": [dataclasses.asdict(median_interval(t)) for t in times],
        "facts": [worker.facts for worker in workers],
    }
    if len(times) == 2:
        row["ratio"] = dataclasses.asdict(ratio_interval(*times))
    return row


def write(results: dict[str, Any], rows: dict[str, dict[str, Any]], title: str, out: Path, stem: str) -> list[Path]:
    """The data as JSON and the table as text."""
    out.mkdir(parents=True, exist_ok=True)
    data = out / f"{stem}.json"
    data.write_text(json.dumps(results, indent=1) + "\n")
    table = data.with_suffix(".md")
    table.write_text(markdown(results, rows, title))
    return [data, table]


def markdown(results: dict[str, Any], rows: dict[str, dict[str, Any]], title: str) -> str:
    """A line a row: the time in each build, and their ratio."""
    flags, where = results["flags"], results["machine"]
    machine_text = where.get("gpu") or f"{where['cpu']}, {where['cores']} cores, {where['threads']} threads"
    labels = ["this build", "the other"][: len(results["builds"])]
    lines = [
        f"# {title}", "",
        f"Llama: {flags['layers']} layers, hidden {flags['hidden']}, {flags['batch']} x {flags['tokens']} tokens; "
        f"backend {flags['backend']}; {flags['rounds']} rounds; {results['date']}.",
        f"Machine: {machine_text}.",
        "Versions: " + ", ".join(f"{name} {version}" for name, version in results["versions"].items()) + ".",
        *(f"{label[0].upper()}{label[1:]}: {name}." for label, name in zip(labels, results["builds"], strict=True)),
        "",
    ]  # fmt: skip
    columns = [f"{label}, ms" for label in labels]
    cells = {key: [report.interval(time, 1e3, ".3f") for time in row["time"]] for key, row in rows.items()}
    if len(labels) == 2:
        columns.append("ratio")
        for key, row in rows.items():
            cells[key].append(report.interval(row["ratio"]))
    lines += report.table(["", *columns], [[key, *row] for key, row in cells.items()])
    lines += ["", *(f"- {topic}: {text}" for topic, text in results["method"].items())]
    lines += [f"- {note}" for note in results.get("notes", [])]
    return "\n".join(lines) + "\n"


def add_argument(parser: argparse.ArgumentParser) -> None:
    """The flag ``--against``."""
    parser.add_argument("--against", type=Path, help="another build of adaptc: a wheel, or a checkout's folder")
