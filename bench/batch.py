"""Batches whose rows use different LoRA adapters, over the frozen base and PEFT's ``adapter_names``."""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench import harness, machine
from bench.contenders import Base, build_base, fill_adapter
from bench.errors import DisagreementError
from bench.settings import Case, Settings

RANKS = (8, 16, 24, 32, 40, 48, 56, 64)
METHOD = (
    "one call of a Llama whose adapters are on all linear layers of its blocks; the frozen base and adaptc are "
    "compiled by Inductor, PEFT is as it is and under torch.compile (its adapter_names are for inference only); a "
    "decode step is one token of every sequence, without a cache, which no contender adapts"
)
#: PEFT's rows of the base and adaptc's differ by rounding: largest difference over largest value.
TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``python -m bench batch``."""
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS), help="what is measured")
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--rounds", type=int, default=20, help="timed rounds")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--out", type=Path, help="folder of the result files; bench/results/<device> by default")


def run(arguments: argparse.Namespace) -> list[Path]:
    """Measure, and write ``batch-cpu.json`` and ``.md``. Rows that are there and are not measured now stay, where they
    are of the same machine and versions."""
    machine.keep_freed_memory()
    device = torch.device("cpu")
    about = {"machine": machine.machine_class(device), "versions": machine.versions()}
    out = arguments.out or machine.results_folder(device)
    out.mkdir(parents=True, exist_ok=True)
    data = out / "batch-cpu.json"
    rows = _rows_of(data, about)
    flags = {name: value for name, value in vars(arguments).items() if isinstance(value, int | str | list)}
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    for part in arguments.parts:
        for name, measured in PARTS[part](arguments):
            print(name, file=sys.stderr, flush=True)
            rows[name] = {**measured(), "date": date, "flags": flags}
            results = {**about, "method": METHOD, "interval": harness.INTERVAL_METHOD, "rows": rows}
            data.write_text(json.dumps(results, indent=1) + "\n")
            data.with_suffix(".md").write_text(markdown(results))
    return [data, data.with_suffix(".md")]


def _rows_of(data: Path, about: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What a result file holds that is about the same."""
    known = json.loads(data.read_text()) if data.is_file() else {}
    same = all(known.get(name) == value for name, value in about.items())
    return dict(known["rows"]) if known and same else {}


def _settings(arguments: argparse.Namespace, **changes: Any) -> Settings:
    own = {"layers": arguments.layers, "hidden": arguments.hidden, "seed": arguments.seed, "backend": arguments.backend}
    return Settings(**{**own, "rounds": arguments.rounds, **changes})


def adapted(base: Base, settings: Settings, ranks: Sequence[int]) -> nn.Module:
    """adaptc with an adapter ``a0``, ``a1``, ... for each rank."""
    import adaptc

    model: Any = base.fresh_model()
    for i, rank in enumerate(ranks):
        lora = adaptc.LoRA(r=rank, alpha=2 * rank, targets="all-linear")
        if i == 0:
            model = adaptc.compile(model, lora, name="a0", backend=settings.backend, regional=False)
        else:
            model.adaptc.add(f"a{i}", lora)
    named = dict(model.adaptc.named_parameters())
    for i in range(len(ranks)):
        _fill({n.replace(f".adapters.a{i}.", "."): p for n, p in named.items() if f".adapters.a{i}." in n}, settings, i)
    found: nn.Module = model
    return found


def wrapped(base: Base, settings: Settings, ranks: Sequence[int]) -> nn.Module:
    """PEFT with the same adapters."""
    import peft

    model: Any = None
    for i, rank in enumerate(ranks):
        options: dict[str, Any] = {"r": rank, "lora_alpha": 2 * rank, "lora_dropout": 0.0}
        config = peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", **options)
        if model is None:
            inner: Any = base.fresh_model()
            model = peft.get_peft_model(inner, config, adapter_name="a0")
        else:
            model.add_adapter(f"a{i}", config)
    for i in range(len(ranks)):
        suffix = f".a{i}.weight"
        own = {n.removeprefix("base_model.model.").removesuffix(suffix): p for n, p in model.named_parameters()
               if n.endswith(suffix)}  # fmt: skip
        _fill(own, settings, i)
    found: nn.Module = model.eval()
    return found


def _fill(own: dict[str, nn.Parameter], settings: Settings, number: int) -> None:
    fill_adapter(own, settings.seed + number)


#: Adapters up to which PEFT is compiled too: its graph has every adapter at every layer, and compiles for long.
MOST_COMPILED = 8


def _forwards(settings: Settings, case: Case, ranks: Sequence[int]) -> dict[str, Any]:
    """One forward without gradients, a row an adapter."""
    base = build_base(settings, case)
    names: list[str | None] = [f"a{i}" for i in range(len(ranks))]
    embeds = base.embeds
    ours, theirs = adapted(base, settings, ranks).eval(), wrapped(base, settings, ranks)
    floor = torch.compile(base.fresh_model().eval(), backend=settings.backend)

    def no_grad(call: Callable[[], Any]) -> Callable[[], torch.Tensor]:
        def step() -> torch.Tensor:
            with torch.no_grad():
                logits: torch.Tensor = call().logits
            return logits

        return step

    def batched() -> Any:
        handle: Any = ours.adaptc
        with handle.batch(names):
            return ours(inputs_embeds=embeds)

    steps = {
        "base": no_grad(lambda: floor(inputs_embeds=embeds)),
        "adaptc": no_grad(batched),
        "peft": no_grad(lambda: theirs(inputs_embeds=embeds, adapter_names=names)),
    }
    pairs = [("adaptc", "base"), ("peft", "base"), ("adaptc", "peft")]
    if len(ranks) <= MOST_COMPILED:
        compiled = torch.compile(copy.deepcopy(theirs), backend=settings.backend)
        steps["peft compiled"] = no_grad(lambda: compiled(inputs_embeds=embeds, adapter_names=names))
        pairs.append(("adaptc", "peft compiled"))
    found, want = steps["adaptc"](), steps["peft"]()
    distance = float((found - want).abs().max() / want.abs().max())
    if not distance <= TOLERANCE[case.dtype]:
        raise DisagreementError(f"adaptc and PEFT differ by {distance:.1e} of the largest logit")
    return _ratios(steps, settings, pairs)


def _training(settings: Settings, case: Case, count: int) -> dict[str, Any]:
    """A training step of ``count`` adapters of one rank in one batch, over the same batch with one adapter."""
    base = build_base(settings, case)
    ours: Any = adapted(base, settings, [settings.rank] * count)
    mixed = [f"a{i % count}" for i in range(settings.batch)]

    def step(names: list[str] | None) -> Callable[[], object]:
        def run() -> object:
            for parameter in ours.parameters():
                parameter.grad = None
            if names is None:
                loss = ours(inputs_embeds=base.embeds, labels=base.labels).loss
            else:
                with ours.adaptc.batch(names):
                    loss = ours(inputs_embeds=base.embeds, labels=base.labels).loss
            loss.backward()
            return loss

        return run

    steps = {"mixed": step(mixed), "one in the batch": step(["a0"] * settings.batch), "one": step(None)}
    return _ratios(steps, settings, [("mixed", "one"), ("mixed", "one in the batch")])


def _ratios(
    steps: dict[str, Callable[[], object]], settings: Settings, pairs: Sequence[tuple[str, str]]
) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(3):
            for step in steps.values():
                step()
        times = harness.time_interleaved(steps, rounds=settings.rounds, device=torch.device("cpu"), seed=settings.seed)
    ratios = {f"{a} / {b}": harness.ratio_interval(times[a], times[b]) for a, b in pairs}
    return {
        "ratios": {name: {"median": r.median, "low": r.low, "high": r.high} for name, r in ratios.items()},
        "seconds": times,
    }


Rows = Sequence[tuple[str, Callable[[], dict[str, Any]]]]


def _layers(settings: Settings) -> str:
    return f"{settings.layers} layer" + "s" * (settings.layers > 1)


def _forward_rows(arguments: argparse.Namespace) -> Rows:
    settings = _settings(arguments, batch=len(RANKS), tokens=128)
    return [
        (
            f"8 adapters, r = 8 to 64, 8 x 128 tokens, {_layers(settings)}, {dtype}",
            lambda d=dtype: _forwards(settings, Case(d, 0.0), RANKS),
        )
        for dtype in arguments.dtypes
    ]


def _training_rows(arguments: argparse.Namespace) -> Rows:
    settings = _settings(arguments, batch=4, tokens=128)
    return [
        (
            f"training, 4 adapters, r = 16, 4 x 128 tokens, {_layers(settings)}, {dtype}",
            lambda d=dtype: _training(settings, Case(d, 0.0), 4),
        )
        for dtype in arguments.dtypes
    ]


def _decode_rows(arguments: argparse.Namespace) -> Rows:
    small = _settings(arguments, batch=32, tokens=1)
    large = _settings(arguments, batch=32, tokens=1, hidden=4096, layers=2, head_dim=128)
    case = Case("fp32", 0.0)
    return [
        (
            f"decode, 32 adapters, r = 16, hidden {s.hidden}, {_layers(s)}, fp32",
            lambda s=s: _forwards(s, case, [16] * 32),
        )
        for s in (small, large)
    ]


PARTS: dict[str, Callable[[argparse.Namespace], Rows]] = {
    "forward": _forward_rows, "training": _training_rows, "decode": _decode_rows,
}  # fmt: skip


def markdown(results: dict[str, Any]) -> str:
    """The table of a result file."""
    where = results["machine"]
    lines = [
        "# Batches whose rows use different LoRA adapters",
        "",
        f"{where['cpu']}, {where['cores']} cores, {where['threads']} threads. {results['method']}.",
        "",
        "| what | ratio | median | interval |",
        "|---|---|---|---|",
    ]
    for name, row in results["rows"].items():
        for pair, r in row["ratios"].items():
            lines.append(f"| {name} | {pair} | {r['median']:.2f} | {r['low']:.2f} to {r['high']:.2f} |")
    return "\n".join([*lines, ""])
