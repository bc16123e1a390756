"""A plan and its sites, as PEFT's ``adapter_config.json`` of a LoRA adapter."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from torch import nn

from adaptc.errors import UnsupportedError
from adaptc.methods.base import Method
from adaptc.methods.linear import is_conv1d
from adaptc.methods.lora import LoRA
from adaptc.plan.match import Match, is_pattern
from adaptc.plan.rules import Plan
from adaptc.runtime import peft_matching as peft
from adaptc.runtime.peft_import import exactly, means
from adaptc.runtime.peft_options import INITS, OPTIONS, PEFT_VERSION

#: Keys without influence on the adapter, taken over from the config it was loaded with.
_CARRIED = ("base_model_name_or_path", "revision", "auto_mapping", "megatron_config", "megatron_core")


class Assignment(Protocol):
    """What is done at one site."""

    @property
    def path(self) -> str: ...
    @property
    def module(self) -> nn.Module: ...
    @property
    def method(self) -> Method | None: ...


@dataclasses.dataclass(frozen=True)
class _Sites:
    """The assignments of a plan, sorted into what a PEFT config has room for."""

    lora: dict[str, LoRA]
    modules: dict[str, nn.Module]
    full: list[str]


def plan_to_config(
    plan: Plan,
    assignments: Iterable[Assignment],
    *,
    base_model_name: str | None = None,
    task_type: str | None = None,
    original: Mapping[str, Any] | None = None,
    model: nn.Module | None = None,
) -> dict[str, Any]:
    """The config with which PEFT builds exactly the sites of ``assignments``.

    Args:
        plan: what the user wrote; its own names are kept where they mean the same to PEFT.
        assignments: objects with ``path``, ``module`` and ``method`` (LoRA, or kind "full" or None for a
            module that is trained as a whole).
        base_model_name: ``base_model_name_or_path``; None takes it from ``original``.
        task_type: PEFT's task. PEFT trains the classifier of a classification task always, so the task is
            left out (with ``auto_mapping`` in its place) when the plan does not train it.
        original: the config the adapter was loaded with. While it still means ``plan`` and the sites, it is
            returned as it is; else the keys without influence are taken over.
        model: the host. With it short names are used where they select the right modules and no others;
            without it every site is written with its full path.

    Raises:
        UnsupportedError: names what PEFT cannot express.
    """
    sites = _sort_sites(assignments)
    if original is not None and means(original, plan, model) and _same_values(original, sites):
        return dict(original)
    carried = {key: original[key] for key in _CARRIED if original and key in original}
    config = {**{key: option.default for key, option in OPTIONS.items()}, **carried}
    config["peft_version"] = PEFT_VERSION
    config["inference_mode"] = True
    config["modules_to_save"] = _names_to_save(sites, model)
    config.update(_uniform_options(sites, original))
    config.update(_patterns_of(sites, plan))
    config.update(_targets_of(sites, plan, config, model))
    config["fan_in_fan_out"] = all(is_conv1d(sites.modules[path]) for path in sites.lora)
    if base_model_name is not None:
        config["base_model_name_or_path"] = base_model_name
    if task_type is None and original is not None:
        task_type = original.get("task_type")
    config["task_type"] = task_type if _task_fits(task_type, sites, model) else None
    if config["task_type"] is not None:
        config["auto_mapping"] = None
    elif model is not None:
        names = {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}
        config["auto_mapping"] = names
    return config


def _same_values(config: Mapping[str, Any], sites: _Sites) -> bool:
    """Whether the sites still have the ranks and scales of the config: a scale can be changed by hand."""
    ranks, alphas = config.get("rank_pattern"), config.get("alpha_pattern")
    return all(
        peft.pattern_value(ranks, path, config.get("r", OPTIONS["r"].default)) == method.r
        and peft.pattern_value(alphas, path, config.get("lora_alpha", OPTIONS["lora_alpha"].default))
        == method.alpha
        for path, method in sites.lora.items()
    )


def _sort_sites(assignments: Iterable[Assignment]) -> _Sites:
    sites = _Sites({}, {}, [])
    for assignment in assignments:
        method, path = assignment.method, assignment.path
        if path in sites.modules:
            raise UnsupportedError(
                f"PEFT's format has no place for two methods on one module: {path}",
                do="save them as two adapters",
            )
        sites.modules[path] = assignment.module
        if method is None or method.kind == "full":
            sites.full.append(path)
        elif isinstance(method, LoRA):
            sites.lora[path] = method.at(path)
        elif method.kind != "bias":
            raise UnsupportedError(f"PEFT's format for LoRA has no place for {method.kind} at {path}")
    loose = [p for p in sites.modules if p not in sites.lora and p not in sites.full]
    if loose and any(method.bias != "all" for method in sites.lora.values()):
        raise UnsupportedError(
            f"PEFT's format cannot say which biases are trained, only those of all modules: {loose[0]}",
            expected='LoRA(bias="all")', do='use bias="lora_only" or "all", or save with another format',
        )  # fmt: skip
    if not sites.lora:
        raise UnsupportedError("PEFT's format needs at least one LoRA site", found="none in this adapter")
    return sites


def _uniform_options(sites: _Sites, original: Mapping[str, Any] | None) -> dict[str, Any]:
    """Options that PEFT has once per adapter."""
    config = {}
    for name, key in (("dropout", "lora_dropout"), ("rslora", "use_rslora"), ("bias", "bias")):
        values: dict[Any, str] = {}
        for path, method in sites.lora.items():
            values.setdefault(getattr(method, name), path)
        if len(values) > 1:
            found = ", ".join(f"{value!r} at {path}" for value, path in values.items())
            raise UnsupportedError(
                f"PEFT's format has one {name} for all LoRA sites",
                found=found, do=f"give every LoRA rule the same {name}",
            )  # fmt: skip
        config[key] = next(iter(values))
    inits = {method.init for method in sites.lora.values()}
    written = {value: key for key, value in INITS.items() if key is not None}
    config["init_lora_weights"] = written[inits.pop()] if len(inits) == 1 else True
    if original is not None and config["init_lora_weights"] is True:
        config["init_lora_weights"] = original.get("init_lora_weights", True)
    return config


def _patterns_of(sites: _Sites, plan: Plan) -> dict[str, Any]:
    """``r`` and ``lora_alpha``, and a pattern for each site that differs from the most common value.

    The plan's own patterns are kept when they still mean the same: PEFT writes them sorted, and the first
    that matches counts.
    """
    config: dict[str, Any] = {}
    rules = [rule.method for rule in plan.rules if isinstance(rule.method, LoRA)]
    for name, key, pattern in (("r", "r", "rank_pattern"), ("alpha", "lora_alpha", "alpha_pattern")):
        values = {path: _whole(getattr(method, name)) for path, method in sites.lora.items()}
        if len(rules) == 1:
            own = dict(sorted(getattr(rules[0], pattern).items()))
            default = _whole(getattr(rules[0], name))
            if all(peft.pattern_value(own, path, default) == value for path, value in values.items()):
                config.update({key: default, pattern: {k: _whole(v) for k, v in own.items()}})
                continue
        common = Counter(values.values()).most_common(1)[0][0]
        config[key] = common
        config[pattern] = {f"^{re.escape(p)}": v for p, v in values.items() if v != common}
    return config


def _whole(value: float) -> float:
    """16.0 as 16, as PEFT's own configs have it."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _names_to_save(sites: _Sites, model: nn.Module | None) -> list[str] | None:
    if not sites.full:
        return None
    paths = list(sites.modules) if model is None else list(peft.module_paths(model))
    names = sorted({path.rpartition(".")[2] for path in sites.full})
    for candidate in (names, sorted(sites.full)):
        if model is None and candidate is names:
            continue
        if set(peft.saved_paths(candidate, paths)) == set(sites.full):
            return candidate
    wrong = sorted(set(peft.saved_paths(sites.full, paths)) - set(sites.full))
    raise UnsupportedError(
        "PEFT's format cannot name the fully trained modules: it takes any path that ends in a name",
        expected=", ".join(sites.full), found=f"{', '.join(wrong)} too",
    )  # fmt: skip


def _targets_of(
    sites: _Sites, plan: Plan, config: Mapping[str, Any], model: nn.Module | None
) -> dict[str, Any]:
    """The shortest selection that means exactly the LoRA sites, by PEFT's rules."""
    wanted = set(sites.lora)
    paths = list(sites.modules) if model is None else list(peft.module_paths(model))
    for candidate in _candidates(sorted(wanted), plan, named=model is not None):
        if set(peft.lora_paths({**config, **candidate}, paths)) == wanted:
            return candidate
    inside = sorted(wanted - set(peft.lora_paths({**config, "target_modules": ".*"}, paths)))
    raise UnsupportedError(
        "PEFT's format cannot express these LoRA sites beside the fully trained modules",
        found=", ".join(inside) or "sites that are not modules of the model",
        do="PEFT never puts LoRA inside a module that it trains as a whole",
    )


def _candidates(wanted: list[str], plan: Plan, *, named: bool) -> Iterator[dict[str, Any]]:
    """Selections to try, the most readable first; the last one is exact whatever the names are."""
    if named:
        matches = [rule.match for rule in plan.rules if isinstance(rule.method, LoRA)]
        if len(matches) == 1:
            yield from _as_written(matches[0])
        last = sorted({path.rpartition(".")[2] for path in wanted})
        yield {"target_modules": last}
        layers = sorted({int(n) for path in wanted for n in re.findall(r"^.*?\.[^.]*\.(\d+)\.", path)})
        if layers:
            yield {"target_modules": last, "layers_to_transform": layers}
    yield {"target_modules": wanted}
    yield {"target_modules": exactly(wanted)}


def _as_written(match: Match) -> Iterator[dict[str, Any]]:
    """The plan's own match in PEFT's words, when it has words for it."""
    spans = match.layer_spans
    targets, exclude = _written(match.targets), _written(match.exclude)
    if targets is None or (match.exclude and exclude is None):
        return
    config: dict[str, Any] = {"target_modules": targets, "exclude_modules": exclude}
    if spans is not None:
        if isinstance(targets, str) or any(last is None for _, last in spans):
            return
        config["layers_to_transform"] = [n for first, last in spans for n in range(first, (last or 0) + 1)]
        config["layers_pattern"] = [name for name in match.layers_pattern if not is_pattern(name)] or None
    yield config


def _written(selectors: Sequence[str]) -> list[str] | str | None:
    if len(selectors) == 1 and selectors[0].startswith("re:"):
        return selectors[0].removeprefix("re:")
    return sorted(selectors) if selectors and not any(map(is_pattern, selectors)) else None


def _task_fits(task_type: str | None, sites: _Sites, model: nn.Module | None) -> bool:
    """Whether PEFT, wrapping a model for this task, would train no module that the adapter does not hold."""
    names = peft.classifier_names(task_type)
    if model is None:
        return not names or bool(sites.full)
    return set(peft.saved_paths(names, peft.module_paths(model))) <= set(sites.full)
