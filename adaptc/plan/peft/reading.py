"""PEFT's ``adapter_config.json``, as the rules of a plan."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from adaptc.errors import AdaptcWarning, ConfigTypeError
from adaptc.methods.base import Method
from adaptc.methods.codec import Part
from adaptc.plan.all_linear import all_linear
from adaptc.plan.match import ALL_LINEAR, MODEL, Match, matcher
from adaptc.plan.peft import fit, matching, moe, tokens
from adaptc.plan.peft.options import check_config
from adaptc.plan.resolve import drop_idle_keys
from adaptc.plan.rules import Rule
from adaptc.plan.tree import ModuleTree

_NAME = re.compile(r"[\w.-]+")


def config_to_rules(
    config: Mapping[str, Any], *, model: nn.Module | None = None, loading: bool = False
) -> list[Rule]:
    """The rules of the plan that a PEFT config means.

    ``modules_to_save`` becomes a ``train: full`` rule, in front, so that no adapter is put into such a module.

    Args:
        model: the host. PEFT accepts names that match nothing (it adds "score" and "classifier" to any
            classifier's config itself) and differs from adaptc's selectors in rare cases (the number of a
            layer at the root, "all-linear" on a model with routers). With the host, names without a match
            are left out with a warning, and where the selectors would mean other modules than PEFT's, they
            are replaced by full paths. Without it, names are taken as they are.
        loading: the adapter's values will be loaded, so how it was initialised does not matter.

    Raises:
        UnsupportedKindError: another kind, or an option that adaptc does not have, by name.
        UnknownConfigKeyError, ConfigTypeError: an unknown key, a value that is not legal.
    """
    codec, used = check_config(config, loading=loading)
    if model is not None and not loading:
        used = _as_peft_reads(used, config.get("task_type"), model)
    # PEFT adds the classifier when it wraps a model for a task; in files it is written out.
    added = () if loading else matching.classifier_names(config.get("task_type"))
    if model is not None and not codec.on_model:
        used = fit.fitted(used, model)
    saved = list(dict.fromkeys([*(used["modules_to_save"] or ()), *added]))
    if model is not None:
        saved = fit.present(saved, "modules_to_save", matching.saved_paths, list(matching.module_paths(model)))
    if codec.on_model:
        adapted = [Rule(Match((MODEL,)), part.method) for part in codec.rules(used)]
    else:
        adapted = _adapted(used, codec.rules(used), model, config.get("task_type"))
    rules = [Rule(Match(_saved_selectors(saved, model)), train="full")] if saved else []
    rules += [*tokens.rules_of(used, model), *adapted]
    return rules if model is None else without_idle_keys(rules, model)


def without_idle_keys(rules: Sequence[Rule], model: nn.Module) -> list[Rule]:
    """The rules without the keys of their patterns that change nothing on ``model``, which a warning names: PEFT passes
    over them, and adaptc's own files did once."""
    kept, idle = drop_idle_keys(rules, model)
    for option, keys in idle.items():
        fit.warn(f"{option} of the adapter's config has keys that change nothing at its sites: {', '.join(keys)}")
    return kept


def _adapted(
    used: Mapping[str, Any], parts: Sequence[Part], model: nn.Module | None, task_type: str | None
) -> list[Rule]:
    """The rules for modules and for parameters; with the host, those only that select something on it."""
    names = used.get("target_parameters")
    layers = moe.layers_among(names or (), model)
    method = parts[0].method
    if model is not None and layers:
        parts = [dataclasses.replace(p, method=moe.beside_layers(p.method, layers, model)) for p in parts]
    modules = _as_written(used, parts) if used["target_modules"] else []
    parameters = _parameter_rules(names, layers, model, method) if names else []
    if model is None:
        _check_names(modules)
        return [*modules, *parameters]
    fitting = _rules_on(model, used, parts, task_type) if modules else []
    there = matching.target_parameters(names, matching.parameter_paths(model))
    if modules and not fitting and there:
        fit.warn(f"target_modules of the adapter's config select nothing on this model: {used['target_modules']}")
    if there:
        return [*fitting, *parameters]
    # When nothing is matched: resolving the plan names near misses.
    return fitting or modules or parameters


def _as_peft_reads(used: Mapping[str, Any], task_type: str | None, model: nn.Module) -> dict[str, Any]:
    """What a config for new adapters means on this model; a file has the names that its tensors belong to."""
    given = {**used, "task_type": task_type}
    read = moe.as_read(given, model)
    if read != given:
        moe.warn_of_lost(given, read, model)
    return {key: read[key] for key in used}


def _as_written(used: Mapping[str, Any], parts: Sequence[Part]) -> list[Rule]:
    return [Rule(_match_as_written(_of_part(used, part)), part.method) for part in parts]


def _parameter_rules(
    names: Sequence[str], layers: Sequence[str], model: nn.Module | None, method: Method
) -> list[Rule]:
    """Rules for parameters, after one for ``layers`` that could only be named by theirs (``peft_moe``)."""
    if model is None or not layers:
        return [Rule(_parameter_match(names, model), method)]
    short = tuple(dict.fromkeys(path.rpartition(".")[2] for path in layers))
    exact = set(matching.suffixed(short, matching.module_paths(model))) == set(layers)
    match = Match(short) if exact else Match((f"re:{exactly(layers)}",))
    rules = [Rule(match, moe.of_layers(method, layers))]
    rest = moe.other_parameters(names, layers, model)
    if rest:
        rules.append(Rule(_parameter_match(rest, model), moe.beside_layers(method, layers, model)))
    return rules


def _parameter_match(names: Sequence[str], model: nn.Module | None) -> Match:
    """What selects the parameters that PEFT takes for ``names``, whose last components they are; no modules."""
    written = Match(tuple(dict.fromkeys(names)))
    if model is None:
        return written
    paths, modules = matching.parameter_paths(model), list(matching.module_paths(model))
    found = fit.present(list(written.targets), "target_parameters", matching.suffixed, paths)
    # Where such a name is also a module's, it means the module to adaptc.
    if not found or (all(map(is_name, found)) and not matching.suffixed(found, modules)):
        return Match(tuple(found) or written.targets)
    return Match((f"re:{exactly(matching.target_parameters(found, paths))}",))


def _of_part(used: Mapping[str, Any], part: Part) -> Mapping[str, Any]:
    return used if part.targets is None else {**used, "target_modules": part.targets}


def _check_names(rules: Iterable[Rule]) -> None:
    for rule in rules:
        if (odd := _odd_name((*rule.match.targets, *rule.match.exclude))) is not None:
            raise ConfigTypeError(
                f"{odd!r} in a list of modules is not a module's name",
                expected="names; PEFT takes an expression as one string, not in a list",
                do='write "target_modules": "<expression>"',
            )


def _rules_on(
    model: nn.Module, used: Mapping[str, Any], parts: Sequence[Part], task_type: str | None
) -> list[Rule]:
    """Rules that select the modules that PEFT selects on this model; parts that have none there are left out."""
    chosen = used
    if str(used["target_modules"]).lower() == ALL_LINEAR:
        chosen = {**used, "target_modules": matching.all_linear_paths(model, task_type)}
    wanted = matching.target_paths(chosen, matching.module_paths(model))
    rules: list[Rule] = []
    taken: set[str] = set()
    for part in parts:
        own = [path for path in wanted if path not in taken and part.holds(path)]
        if own:
            written = _match_as_written(_of_part(used, part))
            rules.append(Rule(_match_on(model, chosen, written, own, taken), part.method))
            taken.update(own)
    return rules


def _match_as_written(used: Mapping[str, Any]) -> Match:
    """The config's selection in adaptc's selectors, one for each of its entries."""
    layers = used.get("layers_to_transform")
    return Match(
        _selectors(used["target_modules"]),
        _selectors(used.get("exclude_modules")),
        layers=None if layers in (None, []) else (layers,) if isinstance(layers, int) else tuple(layers),
        layers_pattern=_layer_lists(used.get("layers_pattern")),
    )


def _saved_selectors(names: list[str], model: nn.Module | None) -> tuple[str, ...]:
    """PEFT takes any path that ends in the text: "classifier" means DistilBERT's pre_classifier too."""
    if model is not None:
        paths = list(matching.module_paths(model))
        if matching.saved_paths(names, paths) == matching.suffixed(names, paths) and all(map(is_name, names)):
            return tuple(names)
    return (f"re:.*(?:{'|'.join(re.escape(name) for name in names)})",)


def _selectors(value: str | list[str] | None) -> tuple[str, ...]:
    if not value:
        return ()
    if isinstance(value, str):
        return (ALL_LINEAR,) if value.lower() == ALL_LINEAR else (f"re:{value}",)
    return tuple(dict.fromkeys(value))


def _layer_lists(value: str | list[str] | None) -> tuple[str, ...]:
    """PEFT reads these as expressions on the path of the list that a layer number indexes."""
    names = [value] if isinstance(value, str) else value or []
    return tuple(name if _NAME.fullmatch(name) else rf"re:(?:.*\.)?(?:{name})" for name in names if name)


def is_name(selector: str) -> bool:
    return _NAME.fullmatch(selector) is not None and selector != ALL_LINEAR


def _odd_name(selectors: Iterable[str]) -> str | None:
    """The first entry of a list of modules that PEFT would take literally and adaptc would not."""
    odd = (s for s in selectors if not (s.startswith("re:") or s == ALL_LINEAR or is_name(s)))
    return next(odd, None)


def _match_on(
    model: nn.Module, used: Mapping[str, Any], written: Match, wanted: list[str], taken: set[str]
) -> Match:
    """A match that selects ``wanted``, beside what earlier rules have taken: as written, if it does."""
    if _selected(written, model, used) - taken == set(wanted):
        return written
    return Match((f"re:{exactly(wanted)}",))


def _selected(match: Match, model: nn.Module, used: Mapping[str, Any]) -> set[str]:
    """What adaptc's selectors choose, less what ``modules_to_save`` protects."""
    everything = {**used, "target_modules": ".*", "exclude_modules": None, "layers_to_transform": None}
    open_paths = matching.target_paths(everything, matching.module_paths(model))
    linear = set(all_linear(ModuleTree(model))[0]) if ALL_LINEAR in match.targets else set()
    return {
        path
        for path in open_paths
        if (path in linear or any(s != ALL_LINEAR and matcher(s)(path) for s in match.targets))
        and not match.is_excluded(path)
        and match.in_layers(path)
    }


def exactly(paths: Iterable[str]) -> str:
    return "|".join(re.escape(path) for path in paths)


def means(config: Mapping[str, Any], rules: Sequence[Rule], model: nn.Module | None) -> bool:
    """Whether the config, read with or without the host, gives the rules."""
    names = [name for key in ("target_modules", "exclude_modules") for name in _selectors(config.get(key))]
    readings = [model] if model is None or _odd_name(names) is not None else [model, None]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AdaptcWarning)  # they were given when the adapter was loaded
        return any(config_to_rules(config, model=m, loading=True) == list(rules) for m in readings)
