"""What PEFT makes of a LoRA config for a mixture of experts that transformers 5 stores as fused weights.

Under transformers 4 every expert had linear layers of its own, and a config named those. For the model types below PEFT
replaces the names by those of the fused parameters, on every read, before it looks at the model:

    target_modules: [q_proj, gate_proj, up_proj, down_proj]
    ->  target_modules: [q_proj], target_parameters: [gate_up_proj, down_proj], with twice the rank for gate_up_proj

Dense layers and shared experts have the same names, and lose their adapters in silence. An expression, or "all-linear",
first becomes the last names of all that it matches. So for these models such a layer is written as the parameter that
it holds, ``"<path>.weight"``: PEFT then computes the same, and reading makes it an adapter of the layer again.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from adaptc.errors import AdaptcWarning, ConfigError
from adaptc.methods.base import Method
from adaptc.methods.codec import PEFT_VERSION
from adaptc.methods.linear import is_linear
from adaptc.methods.patterns import fits
from adaptc.plan.match import ALL_LINEAR
from adaptc.plan.peft import matching

_WEIGHT = ".weight"

#: Facts of PEFT 0.21.2 (``peft.utils.transformers_weight_conversion``): layout of a model type -> its table.
TABLES: dict[str, dict[str, str]] = {
    "mixtral": {"gate": "gate.weight", "w1": "gate_up_proj", "w3": "gate_up_proj", "w2": "down_proj"},
    "qwen2_moe": {
        "gate": "gate.weight", "gate_proj": "gate_up_proj", "up_proj": "gate_up_proj", "down_proj": "down_proj",
    },
}  # fmt: skip

#: Model types of transformers 5.24 by their layout; an installed version that knows more adds to them.
_MIXTRAL = ("minimax", "minimax_m2", "mixtral")
_QWEN2_MOE = (
    "afmoe", "beam", "cohere2_moe", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1", "ernie4_5_moe",
    "exaone_moe", "flex_olmo", "glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm_moe_dsa", "hunyuan_v1_moe",
    "longcat_flash", "mellum", "olmoe", "qwen3_moe", "qwen3_next", "qwen3_omni_moe", "qwen3_omni_moe_text",
    "qwen3_omni_moe_thinker", "sarvam_mla", "solar_open",
)  # fmt: skip
LAYOUTS: dict[str, str] = {**dict.fromkeys(_MIXTRAL, "mixtral"), **dict.fromkeys(_QWEN2_MOE, "qwen2_moe")}


def table_of(model: nn.Module | None) -> Mapping[str, str]:
    """Name of a module -> the parameter that PEFT reads it as, for the type of ``model``; empty for most."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if not isinstance(kind, str):
        return {}
    return TABLES.get({**_layouts_installed(), **LAYOUTS}.get(kind, ""), {})


def _layouts_installed() -> Mapping[str, str]:
    """What the installed transformers says, from which PEFT takes it."""
    try:
        from transformers import conversion_mapping
    except ImportError:
        return {}
    found = getattr(conversion_mapping, "_MODEL_TO_CONVERSION_PATTERN", {})
    return found if isinstance(found, Mapping) else {}


def _entry(name: str, table: Mapping[str, str]) -> str | None:
    """The key of the table that a target is to PEFT, by its last component."""
    last = name.rpartition(".")[2]
    return last if last in table else None


# ------------------------------------------------------------------------------------------- reading


def as_read(config: Mapping[str, Any], model: nn.Module | None) -> dict[str, Any]:
    """The config as PEFT has it after it has seen the model.

    Raises:
        ConfigError: PEFT refuses it: one of two names that became one parameter.
    """
    table = table_of(model)
    targets = config.get("target_modules")
    if model is None or not table or not targets or config.get("peft_type") != "LORA":
        return dict(config)
    if isinstance(targets, str):
        targets = _last_names(config, model, table) or targets
        if isinstance(targets, str):
            return dict(config)
    found = {target: _entry(target, table) for target in targets}
    entries = {entry for entry in found.values() if entry is not None}
    read = dict(config)
    kept = [target for target in targets if found[target] is None]
    read["target_modules"] = kept if isinstance(config["target_modules"], list) else sorted(kept)
    if not entries:
        return read
    given = config.get("target_parameters") or ()
    read["target_parameters"] = sorted({*given, *(table[entry] for entry in entries)})
    for parameter, parts in _fused(table).items():
        absent = sorted(parts - entries)
        if absent and parts & entries:
            raise ConfigError(
                f"PEFT refuses {', '.join(sorted(parts & entries))} without {', '.join(absent)} for this model: "
                f"they are one parameter, {parameter}",
                do=f'name both, or the layers by "target_parameters": ["<path>{_WEIGHT}"]',
            )
        if not absent:
            key = rf".*\.{parameter}"
            for value, pattern in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
                read[pattern] = {**(config.get(pattern) or {}), key: len(parts) * config.get(value, 8)}
    return read


def _fused(table: Mapping[str, str]) -> dict[str, set[str]]:
    """Parameter -> the names that became it, where these are several."""
    parts = {new: {old for old in table if table[old] == new} for new in table.values()}
    return {new: old for new, old in parts.items() if len(old) > 1}


def _last_names(config: Mapping[str, Any], model: nn.Module, table: Mapping[str, str]) -> list[str]:
    """What an expression, or "all-linear", is to PEFT: last names, those that were the experts' among them."""
    if config["target_modules"].lower() == ALL_LINEAR:
        paths = matching.all_linear_paths(model, config.get("task_type"))
        return sorted({path.rpartition(".")[2] for path in paths} | table.keys())
    parameters = [name for name, _ in model.named_parameters()]
    matched = matching.target_paths(config, [name for name, _ in model.named_modules() if name] + parameters)
    names = {path.rpartition(".")[2] for path in matched}
    for old, new in table.items():
        before = [f"{name.rpartition('.')[0]}.{old}" for name in parameters if name.rpartition(".")[2] == new]
        if matching.target_paths(config, before):
            names.add(old)
    return sorted(names)


def selects(config: Mapping[str, Any], paths: Iterable[str], model: nn.Module | None) -> set[str] | None:
    """The modules, of ``paths``, that PEFT adapts on this model; None where it makes parameters of some names."""
    try:
        read = as_read(config, model)
    except ConfigError:
        return None
    if read.get("target_parameters") != config.get("target_parameters"):
        return None
    return set(matching.target_paths(read, paths))


def warn_of_lost(config: Mapping[str, Any], read: Mapping[str, Any], model: nn.Module) -> None:
    """Name the layers that PEFT leaves without an adapter, as it reads the config."""
    table, paths = table_of(model), matching.module_paths(model)
    if read.get("target_parameters") == config.get("target_parameters"):
        return
    meant = config
    if str(config["target_modules"]).lower() == ALL_LINEAR:
        meant = {**config, "target_modules": matching.all_linear_paths(model, config.get("task_type"))}
    named = [path for path in matching.target_paths(meant, paths) if _entry(path, table) is not None]
    layers = set(named) - set(layers_among(read["target_parameters"], model))
    lost = [path for path in named if path in layers and is_linear(paths[path])]
    if lost:
        _warn(
            f"{len(lost)} layers get no adapter, first {lost[0]}: for this type of model PEFT takes their names in "
            f'target_modules for the fused experts. To adapt them, name "target_parameters": ["{lost[0]}{_WEIGHT}", '
            f"...], or give adaptc.LoRA(targets=...)"
        )


def layers_among(names: Sequence[str], model: nn.Module | None) -> list[str]:
    """The linear layers that a config names by their weights, because PEFT's table has their names."""
    table = table_of(model)
    if model is None or not table:
        return []
    modules = matching.module_paths(model)
    named = matching.target_parameters(names, matching.parameter_paths(model))
    held = [path for path in named if path.endswith(_WEIGHT)]
    layers = [path.removesuffix(_WEIGHT) for path in held]
    return [path for path in layers if _entry(path, table) is not None and is_linear(modules[path])]


def other_parameters(names: Sequence[str], layers: Iterable[str], model: nn.Module) -> list[str]:
    """Names for what is left of ``names`` without the weights of ``layers``, by PEFT's rules; unknown ones stay."""
    paths = matching.parameter_paths(model)
    taken = {path + _WEIGHT for path in layers}
    rest = [path for path in matching.target_parameters(names, paths) if path not in taken]
    kept = [name for name in names if not taken.intersection(matching.target_parameters([name], paths))]
    return kept if matching.target_parameters(kept, paths) == rest else rest


def of_layers(method: Method, layers: Sequence[str]) -> Method:
    """The method of a config at layers that it names by their weights: its patterns are on the weights' paths."""
    there = {path: method.at(path + _WEIGHT) for path in layers}
    changes: dict[str, Any] = {}
    for name, pattern in (("r", "rank_pattern"), ("alpha", "alpha_pattern")):
        values = {path: getattr(at, name) for path, at in there.items()}
        changes[name], changes[pattern] = patterned(values)
    return dataclasses.replace(method, **changes)


def beside_layers(method: Method, layers: Sequence[str], model: nn.Module) -> Method:
    """The method at the other sites: without the keys of patterns that are on nothing but the weights of ``layers``."""
    weights = [path + _WEIGHT for path in layers]
    others = {*matching.module_paths(model), *matching.parameter_paths(model)}.difference(weights)
    changes: dict[str, Any] = {
        option: {
            key: value for key, value in pattern.items()
            if not any(fits(key, path) for path in weights) or any(fits(key, path) for path in others)
        }
        for option, pattern in method.patterns().items()
    }  # fmt: skip
    return dataclasses.replace(method, **changes)


def patterned(values: Mapping[str, float]) -> tuple[float, dict[str, float]]:
    """The most common value of some paths, and a pattern for each path that has another one."""
    common = Counter(values.values()).most_common(1)[0][0]
    return common, {f"^{re.escape(path)}": value for path, value in values.items() if value != common}


# ------------------------------------------------------------------------------------------- writing


def weights_of(
    adapted: Mapping[str, Method], modules: Mapping[str, nn.Module], parameters: Iterable[str], model: nn.Module | None
) -> dict[str, str] | None:
    """Layers whose names PEFT would replace -> the paths of their weights, which it takes for parameters.

    None where PEFT has no adapter of such a weight; a warning says so.
    """
    table = table_of(model)
    layers = [path for path in adapted if path not in set(parameters) and _entry(path, table) is not None]
    if not layers or next(iter(adapted.values())).kind != "lora":
        return {}
    for path in layers:
        if (reason := _refusal(adapted[path], path, modules[path])) is not None:
            _warn(
                f"PEFT {PEFT_VERSION} will not read this file right, adaptc will: for this type of model it replaces "
                f"the names of {len(layers)} adapted layers, first {path}, by those of the fused experts, and has no "
                f"such adapter of their weights: {reason}"
            )
            return None
    return {path: path + _WEIGHT for path in layers}


def without_dropout(adapted: Mapping[str, Method], renamed: Mapping[str, str]) -> dict[str, Method]:
    """The methods by the paths that PEFT takes; it refuses dropout beside parameters."""
    if renamed and any(getattr(method, "dropout", 0) for method in adapted.values()):
        _warn(
            f"the config for PEFT says lora_dropout = 0: {len(renamed)} adapted layers, first {next(iter(renamed))}, "
            f"have to be written as parameters for this type of model, and PEFT has no dropout there; only training "
            f"on in PEFT is affected"
        )
        adapted = {path: _without_dropout(method) for path, method in adapted.items()}
    return {renamed.get(path, path): method for path, method in adapted.items()}


def _refusal(method: Method, path: str, module: nn.Module) -> str | None:
    """Why PEFT has no adapter of the layer's weight with these options, or None."""
    if not is_linear(module):
        return f"it is a {type(module).__name__}"
    # In the file these leave no trace: the values are there, and how they were computed is not.
    plain = dataclasses.replace(_without_dropout(method), init="default", compute_dtype=None)  # type: ignore[call-arg]
    return plain.parameter_refusal(path, module, _WEIGHT[1:])


def _without_dropout(method: Method) -> Method:
    return dataclasses.replace(method, dropout=0.0)  # type: ignore[call-arg]


def _warn(text: str) -> None:
    warnings.warn(text, AdaptcWarning, stacklevel=6)
