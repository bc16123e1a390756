"""Switching between adapters of one model, and merging them: what is compiled anew, and the time over a forward."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import random
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import harness, machine
from bench.contenders import Base, build_base
from bench.settings import Case, Settings
from bench.torch_internals import graph_counts

#: LoRA adapters that PEFT has as well: name -> rank, whether it is DoRA.
LORA = {"a": (8, False), "b": (8, False), "c": (16, False), "d": (64, False), "e": (8, True)}
COUNTED = (
    "graphs are counted while a small model is switched and called at random; a call that follows each switch is one "
    "of evaluation, without gradients; Dynamo's own count of the graphs that it captured in the process stands beside "
    "adaptc's; the frozen base alone is one of what is switched to; with a bank half of the steps also take an adapter "
    "off and put another one of another rank or kind in its place"
)
TIMED = (
    "times are those of a Llama with LoRA r = 16 on all linear layers of its blocks, compiled by Inductor, over one "
    "forward of it with a live adapter; a switch is to another adapter of equal shapes, which compiles nothing; PEFT's "
    "unmerge subtracts what its merge added, adaptc's writes the base's own bytes back"
)


@dataclasses.dataclass
class Contender:
    """A model with adapters by their names.

    ``switch``: makes one of them live, or none; ``counted``: the graphs that it counts itself; ``warm``: compiles for
    each of the adapters before; ``signatures``: how many the adapters and the base have; ``replace``: takes an adapter
    off and puts another one in its place.
    """

    call: Callable[[], object]
    switch: Callable[[str | None], object]
    names: Sequence[str | None]
    counted: Callable[[], int] | None = None
    warm: Callable[[], object] | None = None
    signatures: Callable[[], int] | None = None
    replace: Callable[[random.Random], object] | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``python -m bench switch``."""
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS), help="what is measured")
    parser.add_argument("--switches", type=int, default=200, help="random switches while graphs are counted")
    parser.add_argument("--rounds", type=int, default=20, help="timed rounds")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend", default="inductor", help="of what is timed; graphs are counted without kernels")
    parser.add_argument("--out", type=Path, help="folder of the result files; bench/results/<device> by default")


def run(arguments: argparse.Namespace) -> list[Path]:
    """Measure, and write ``switch-cpu.json`` and ``.md``."""
    machine.keep_freed_memory()
    device = torch.device("cpu")
    about = {"machine": machine.machine_class(device), "versions": machine.versions()}
    out = arguments.out or machine.results_folder(device)
    out.mkdir(parents=True, exist_ok=True)
    data = out / "switch-cpu.json"
    found = _rows_of(data, about)
    flags = {name: value for name, value in vars(arguments).items() if isinstance(value, int | str | list)}
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    method = {"counts": COUNTED, "times": TIMED}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for part in arguments.parts:
            for name, measured in PARTS[part](arguments).items():
                print(name, file=sys.stderr, flush=True)
                found[part][name] = {**measured(), "date": date, "flags": flags}
                results = {**about, "method": method, "interval": harness.INTERVAL_METHOD, **found}
                data.write_text(json.dumps(results, indent=1) + "\n")
                data.with_suffix(".md").write_text(markdown(results))
    return [data, data.with_suffix(".md")]


def _rows_of(data: Path, about: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What a result file holds that is about the same."""
    known = json.loads(data.read_text()) if data.is_file() else {}
    same = all(known.get(name) == value for name, value in about.items())
    return {part: dict(known.get(part, {})) if known and same else {} for part in PARTS}


# ------------------------------------------------------------------------------------------ contenders


def _plans(ranks: Mapping[str, tuple[int, bool]]) -> dict[str, Any]:
    import adaptc

    return {
        name: adaptc.LoRA(r=rank, alpha=2 * rank, dora=dora, targets="all-linear", init="random")
        for name, (rank, dora) in ranks.items()
    }


def _kinds() -> dict[str, Any]:
    """Adapters of several kinds on several layers."""
    import adaptc

    return {
        **_plans(LORA),
        "f": adaptc.IA3(targets=["k_proj", "v_proj"]),
        "g": adaptc.VeRA(r=16, targets=["q_proj", "v_proj"]),
        "h": adaptc.Bottleneck(r=8, targets=["o_proj"]),
    }


def ours(base: Base, backend: str, plans: Mapping[str, Any], **options: Any) -> Contender:
    """adaptc."""
    import adaptc

    names = list(plans)
    model: Any = adaptc.compile(
        base.fresh_model().eval(), plans[names[0]], name=names[0], backend=backend, **options
    )
    for name in names[1:]:
        model.adaptc.add(name, plans[name])
    inputs = {"inputs_embeds": base.embeds}
    handle = model.adaptc

    def warm() -> None:
        with torch.no_grad():  # as the calls are
            handle.warmup(example_inputs=inputs)
        handle.switch(None)
        _call(model, inputs)()

    return Contender(
        call=_call(model, inputs),
        switch=handle.switch,
        names=[None, *names],
        counted=lambda: int(handle.metrics()["graphs"] + handle.metrics()["past_graphs"]),
        warm=warm,
        signatures=lambda: int(handle.metrics()["signatures"]),
    )


def banked(base: Base, backend: str, plans: Mapping[str, Any], **options: Any) -> Contender:
    """adaptc with a bank that holds these adapters, and any other of their kinds up to rank 64."""
    import adaptc

    bank = adaptc.Bank(sorted({plan.kind for plan in plans.values()}), max_rank=64, slots=len(plans))
    model: Any = adaptc.compile(base.fresh_model().eval(), bank=bank, backend=backend, **options)
    for name, plan in plans.items():
        model.adaptc.add(name, plan)
    handle, call = model.adaptc, _call(model, {"inputs_embeds": base.embeds})

    def replace(rng: random.Random) -> None:
        name = rng.choice(list(plans))
        handle.remove(name)
        rank = rng.randint(1, 64)
        handle.add(name, rng.choice([*plans.values(), adaptc.LoRA(r=rank, targets="all-linear", init="random")]))

    return Contender(
        call=call, switch=handle.switch, names=[None, *plans], warm=call, replace=replace,
        counted=lambda: int(handle.metrics()["graphs"] + handle.metrics()["past_graphs"]),
    )  # fmt: skip


def theirs(base: Base, backend: str, ranks: Mapping[str, tuple[int, bool]]) -> tuple[Contender, Any]:
    """(PEFT under ``torch.compile``, its model)."""
    import peft

    model: Any = None
    for name, (rank, dora) in ranks.items():
        config = peft.LoraConfig(
            r=rank, lora_alpha=2 * rank, use_dora=dora, target_modules="all-linear", task_type="CAUSAL_LM",
            init_lora_weights=False,
        )  # fmt: skip
        if model is None:
            inner: Any = base.fresh_model()
            model = peft.get_peft_model(inner, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    model.eval()
    compiled = torch.compile(model, backend=backend)
    tuner = model.base_model

    def switch(name: str | None) -> None:
        if name is None:
            tuner.disable_adapter_layers()
        else:
            tuner.enable_adapter_layers()
            model.set_adapter(name)

    return Contender(_call(compiled, {"inputs_embeds": base.embeds}), switch, [None, *ranks]), model


def _call(model: Callable[..., Any], inputs: Mapping[str, Any]) -> Callable[[], object]:
    def call() -> object:
        with torch.no_grad():
            return model(**inputs).logits

    return call


# ------------------------------------------------------------------------------------------ counts


def _count(contender: Contender, switches: int, seed: int, *, warm: bool) -> dict[str, int | None]:
    """Graphs that were compiled in random switches, each followed by a call."""
    rng = random.Random(seed)
    if warm and contender.warm is not None:
        contender.warm()
    elif warm:
        for name in contender.names:
            contender.switch(name)
            contender.call()
    before, own = graph_counts(), contender.counted() if contender.counted else 0
    for _ in range(switches):
        if contender.replace is not None and rng.random() < 0.5:
            contender.replace(rng)
        contender.switch(rng.choice(contender.names))
        contender.call()
    return {
        "switches": switches,
        "signatures": contender.signatures() if contender.signatures else None,
        "graphs": (graph_counts() - before).graphs,
        "own count": contender.counted() - own if contender.counted else None,
    }


def _small(arguments: argparse.Namespace) -> Settings:
    return Settings(layers=1, hidden=64, head_dim=16, tokens=16, vocab=128, seed=arguments.seed, backend="eager")


def _counts(arguments: argparse.Namespace) -> dict[str, Callable[[], dict[str, Any]]]:
    settings, n, seed = _small(arguments), arguments.switches, arguments.seed
    base = build_base(settings, Case("fp32", 0.0))

    def counted(build: Callable[[], Contender], warm: bool) -> Callable[[], dict[str, Any]]:
        def measured() -> dict[str, Any]:
            torch.compiler.reset()
            return _count(build(), n, seed, warm=warm)

        return measured

    builders: dict[str, Callable[[], Contender]] = {
        "LoRA and DoRA, adaptc": lambda: ours(base, "eager", _plans(LORA), regional=False),
        "LoRA and DoRA, PEFT under torch.compile": lambda: theirs(base, "eager", LORA)[0],
        "five kinds, adaptc": lambda: ours(base, "eager", _kinds(), regional=False),
        "five kinds, adaptc with a bank": lambda: banked(base, "eager", _kinds(), regional=False),
    }
    return {
        f"{name}, {'each was called before' if warm else 'from the first call'}": counted(build, warm)
        for name, build in builders.items() for warm in (False, True)
    }  # fmt: skip


# ------------------------------------------------------------------------------------------ times


def _times(arguments: argparse.Namespace) -> dict[str, Callable[[], dict[str, Any]]]:
    settings = Settings(
        layers=arguments.layers, hidden=arguments.hidden, tokens=arguments.tokens, rounds=arguments.rounds,
        seed=arguments.seed, backend=arguments.backend,
    )  # fmt: skip
    return {dtype: lambda d=dtype: _timed(settings, Case(d, 0.0)) for dtype in arguments.dtypes}


def _timed(settings: Settings, case: Case) -> dict[str, Any]:
    base = build_base(settings, case)
    ranks = {"a": (settings.rank, False), "b": (settings.rank, False)}
    mine = ours(base, settings.backend, _plans(ranks), regional=False)
    other, peft_model = theirs(base, settings.backend, ranks)
    kept = banked(base, settings.backend, _plans(ranks), regional=False)
    contenders = {"adaptc": mine, "adaptc with a bank": kept, "PEFT": other}
    handle: Any = mine.switch.__self__  # type: ignore[attr-defined]
    inside: dict[str, list[float]] = {}

    def timed(name: str, action: Callable[[], object]) -> None:
        start = time.perf_counter()
        action()
        inside.setdefault(name, []).append(time.perf_counter() - start)

    def switching(name: str, contender: Contender) -> Callable[[], None]:
        def step() -> None:
            for target in ("b", "a"):
                timed(f"{name} switch {target}", lambda t=target: contender.switch(t))
                contender.call()

        return step

    def merging(name: str, merge: Callable[[], object], unmerge: Callable[[], object]) -> Callable[[], None]:
        def step() -> None:
            timed(f"{name} merge", merge)
            timed(f"{name} unmerge", unmerge)

        return step

    steps: dict[str, Callable[[], object]] = {
        **{name: contender.call for name, contender in contenders.items()},
        **{f"{name}, switches and calls": switching(name, contender) for name, contender in contenders.items()},
        "adaptc, merge": merging("adaptc", handle.merge, handle.unmerge),
        "adaptc, merge to disk": merging("adaptc disk", lambda: handle.merge(keep="disk"), handle.unmerge),
        "PEFT, merge": merging("PEFT", peft_model.merge_adapter, peft_model.unmerge_adapter),
    }
    for contender in contenders.values():
        for name in ("b", "a"):
            contender.switch(name)
            contender.call()
    for _ in range(2):
        for step in steps.values():
            step()
    inside.clear()
    before = graph_counts()
    times = harness.time_interleaved(
        steps, rounds=settings.rounds, device=torch.device("cpu"), seed=settings.seed
    ) | inside
    rows = {}
    for name in contenders:
        for what in ("switch a", "merge", "unmerge") if name in ("adaptc", "PEFT") else ("switch a",):
            rows[f"{name}: {what.split()[0]} / forward"] = (f"{name} {what}", name)
        rows[f"{name}: two calls, a switch before each / forward"] = (f"{name}, switches and calls", name)
    rows["adaptc: merge to disk / forward"] = ("adaptc disk merge", "adaptc")
    rows["adaptc: unmerge from disk / forward"] = ("adaptc disk unmerge", "adaptc")
    rows["forward, adaptc / PEFT"] = ("adaptc", "PEFT")
    rows["forward, adaptc with a bank / adaptc"] = ("adaptc with a bank", "adaptc")
    ratios = {name: harness.ratio_interval(times[a], times[b]) for name, (a, b) in rows.items()}
    milliseconds = {name: harness.median_interval([1e3 * t for t in times[a]]) for name, (a, _) in rows.items()}
    return {
        "ratios": {name: dataclasses.asdict(r) for name, r in ratios.items()},
        "milliseconds": {name: dataclasses.asdict(r) for name, r in milliseconds.items()},
        "graphs while timed": (graph_counts() - before).graphs,
        "seconds": times,
    }


PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Callable[[], dict[str, Any]]]]] = {
    "counts": _counts, "times": _times,
}  # fmt: skip


def markdown(results: dict[str, Any]) -> str:
    """The tables of a result file."""
    lines = ["# Switching and merging", "", f"{results['machine']}.", ""]
    if results["counts"]:
        lines += [f"{results['method']['counts']}.", ""]
        lines += ["| what | switches | signatures | graphs compiled | adaptc's count |", "|---|---|---|---|---|"]
        for name, row in results["counts"].items():
            shown = ["" if row[c] is None else str(row[c]) for c in ("switches", "signatures", "graphs", "own count")]
            lines.append(f"| {name} | {' | '.join(shown)} |")
        lines.append("")
    if results["times"]:
        lines += [f"{results['method']['times']}.", ""]
        lines += ["| dtype | what | ratio | interval | milliseconds | interval |", "|---|---|---|---|---|---|"]
        for dtype, row in results["times"].items():
            for name, r in row["ratios"].items():
                t = row["milliseconds"][name]
                cells = [dtype, name, *_shown(r), *_shown(t)]
                lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def _shown(interval: Mapping[str, float]) -> tuple[str, str]:
    return f"{interval['median']:.3g}", f"{interval['low']:.3g} to {interval['high']:.3g}"
