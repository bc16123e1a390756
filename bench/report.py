"""Result files: JSON (the data), Markdown (the table) and PNG (the plot), all from the same plain data."""

from __future__ import annotations

import importlib.util
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.errors import BenchError

LIBRARIES = {"mkl": "MKL", "onednn": "oneDNN"}
LABELS = {
    "floor": "frozen base, compiled (floor)",
    "peft-eager": "PEFT, eager",
    "peft-compile": "PEFT + torch.compile",
    "peft-regional": "PEFT + accelerate's regional compilation",
    "adaptc": "adaptc",
    "adaptc-regional": "adaptc, by block",
    "adaptc-backend": "PEFT + torch.compile(backend=\"adaptc\")",
}
#: Okabe and Ito's colours, told apart by colour-blind readers too.
COLOURS = {"floor": "#999999", "peft-eager": "#E69F00", "peft-compile": "#0072B2", "adaptc": "#009E73"}
MIB = 2**20


def quartiles(values: Sequence[float]) -> list[float]:
    """First and third quartile; the value itself twice when there is only one."""
    if len(values) == 1:
        return [values[0], values[0]]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return [low, high]


def require_plotting() -> None:
    """Fail before the measurement, not after it.

    Raises:
        BenchError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise BenchError("the plot needs matplotlib; install the extra with: pip install 'adaptc[bench]'")


def write(results: dict[str, Any], folder: Path, stem: str) -> list[Path]:
    """Write ``<stem>.json``, ``.md`` and ``.png`` into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / f"{stem}.json"
    data.write_text(json.dumps(results, indent=1) + "\n")
    return [data, *render(data)]


def render(data: Path) -> list[Path]:
    """Write table and plot beside a result file, from what it holds.

    Raises:
        BenchError: there is no such file.
    """
    if not data.is_file():
        raise BenchError(f"no result file {data}")
    results = json.loads(data.read_text())
    table, picture = data.with_suffix(".md"), data.with_suffix(".png")
    table.write_text(markdown(results))
    plot(results, picture)
    return [table, picture]


def method_name(flags: dict[str, Any]) -> str:
    return ("checkpointed " if flags.get("checkpointing") else "") + ("DoRA" if flags.get("dora") else "LoRA")


def markdown(results: dict[str, Any]) -> str:
    """The table as text: one block per case, then how it was measured."""
    flags, machine = results["flags"], results["machine"]
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads"
    lines = [
        f"# Training step, {method_name(flags)} r = {flags['rank']} on all linear layers, {flags['device']}",
        "",
        f"Llama: {flags['layers']} layers, hidden {flags['hidden']}, MLP {flags['intermediate']}, "
        f"{flags['batch']} x {flags['tokens']} tokens; backend {flags['backend']}; {flags['rounds']} rounds; "
        f"{results['date']}.",
        f"Machine: {where}, {machine['memory_gib']} GiB, {machine['cpu_capability']}.",
        "Versions: " + ", ".join(f"{name} {version}" for name, version in results["versions"].items()) + ".",
    ]
    for case in results["cases"]:
        lines += ["", f"## {_title(case)}", "", *_case_table(case)]
        if "libraries" in case:
            lines += ["", _libraries_line(case["libraries"])]
        if "cold" in case:
            lines += ["", *_cold_table(case["cold"])]
    lines += ["", "## How it was measured", ""]
    lines += [f"- {topic}: {text}" for topic, text in results["method"].items()]
    lines.append(
        "- brackets: 95 % interval (of fewer than six rounds: their range); /floor and /PEFT: median of the per-round "
        "ratios to the floor and to PEFT + torch.compile (/adaptc: to adaptc), for bytes the plain ratio to PEFT + "
        "torch.compile"
    )
    return "\n".join(lines) + "\n"


def _title(case: dict[str, Any]) -> str:
    return f"{case['dtype']} base, dropout {case['dropout']:g}"


def _case_table(case: dict[str, Any]) -> list[str]:
    head = ["contender", "adapter", "step ms", "/floor", "/PEFT", "peak MiB", "/PEFT", "saved MiB", "/PEFT",
            "graphs", "breaks", "recompiles"]  # fmt: skip
    rows = []
    for name, row in case["contenders"].items():
        rows.append([
            LABELS.get(name, name),
            ", ".join(row["adapter_dtypes"]) or "none",
            interval(row["time"], 1e3, ".1f"),
            interval(row.get("over_floor")),
            interval(row.get("over_peft_compile")),
            f"{row['peak_bytes'] / MIB:.1f}",
            _number(row.get("peak_over_peft_compile")),
            f"{row['saved_bytes'] / MIB:.1f}",
            _number(row.get("saved_over_peft_compile")),
            str(row["graphs"]),
            str(row["graph_breaks"]),
            str(row["recompiles"]),
        ])  # fmt: skip
    # How another way to adaptc compares with the plan's.
    if any(name.startswith("adaptc-") and "over_adaptc" in row for name, row in case["contenders"].items()):
        head.insert(5, "/adaptc")
        for cells, row in zip(rows, case["contenders"].values(), strict=True):
            cells.insert(5, interval(row.get("over_adaptc")))
    return table(head, rows)


def _libraries_line(found: dict[str, Any]) -> str:
    seconds = " and ".join(f"{interval(found[k], 1e3, '.1f')} ms in {n}" for k, n in LIBRARIES.items())
    return (
        f"The base's linear layers alone, forward and backward: {seconds}; oneDNN over MKL "
        f"{interval(found['onednn_over_mkl'])}. The floor and PEFT call MKL, adaptc what is faster for a shape."
    )


def _cold_table(cold: dict[str, Any]) -> list[str]:
    rows = [
        [
            LABELS.get(name, name),
            interval(row["time"], 1, ".1f"),
            interval(row.get("over_floor")),
            interval(row.get("over_peft_compile")),
            interval(row.get("over_adaptc")),
        ]
        for name, row in cold.items()
    ]
    return table(["cold compile", "seconds", "/floor", "/PEFT", "/adaptc"], rows)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return ["| " + " | ".join(cells) + " |" for cells in [head, rule, *rows]]


def interval(found: dict[str, float] | None, scale: float = 1.0, form: str = ".3f") -> str:
    if found is None:
        return "-"
    middle, low, high = (format(found[key] * scale, form) for key in ("median", "low", "high"))
    return middle if low == high else f"{middle} [{low}, {high}]"


def _number(found: float | None) -> str:
    return "-" if found is None else f"{found:.3f}"


def plot(results: dict[str, Any], path: Path) -> None:
    """Step time over the floor with its interval, saved bytes and peak bytes; one group per case."""
    require_plotting()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cases = results["cases"]
    rows = [(case, name) for case in cases for name in case["contenders"]]
    figure = Figure(figsize=(12, 1.6 + 0.33 * (len(rows) + len(cases))), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 3, sharey=True)
    places = _places(cases)
    relative = all("over_floor" in case["contenders"][name] for case, name in rows)
    for (case, name), y in zip(rows, places, strict=True):
        row, colour = case["contenders"][name], COLOURS.get(name, "#CC79A7")
        shown = row["over_floor"] if relative else row["time"]
        reach = [[shown["median"] - shown["low"]], [shown["high"] - shown["median"]]]
        panels[0].errorbar(shown["median"], y, xerr=reach, fmt="o", color=colour, capsize=3)
        text = f"{shown['median']:.3f}"
        panels[0].annotate(text, (shown["high"], y), (6, 0), textcoords="offset points", va="center", size=8)
        for panel, key in ((panels[1], "saved_bytes"), (panels[2], "peak_bytes")):
            panel.barh(y, row[key] / MIB, color=colour)
            panel.annotate(f" {row[key] / MIB:.3g}", (row[key] / MIB, y), va="center", size=8)
    if relative:
        panels[0].axvline(1, color="#999999", linewidth=1, zorder=0)
    panels[0].set_xlabel("step time / floor (median, 95 % interval)" if relative else "step seconds")
    panels[1].set_xlabel("saved for backward, MiB")
    panels[2].set_xlabel("peak of a step, MiB")
    panels[0].margins(x=0.15)
    panels[0].set_yticks(places, [f"{_title(case)}: {LABELS.get(name, name)}" for case, name in rows], size=8)
    panels[0].invert_yaxis()
    for panel in panels:
        panel.grid(axis="x", alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
        panel.set_axisbelow(True)
    for panel in panels[1:]:
        panel.margins(x=0.15)
    flags = results["flags"]
    figure.suptitle(
        f"One {method_name(flags)} training step: {flags['layers']} layers, hidden {flags['hidden']}, "
        f"{flags['batch']} x {flags['tokens']} tokens, r = {flags['rank']}, {flags['device']}", size=11
    )  # fmt: skip
    figure.savefig(path, dpi=120)


def _places(cases: Sequence[dict[str, Any]]) -> list[float]:
    """Vertical places of the rows, with a gap between two cases."""
    places: list[float] = []
    for case in cases:
        start = places[-1] + 1.8 if places else 0.0
        places += [start + i for i in range(len(case["contenders"]))]
    return places
