"""The keys of PEFT's LoRA config, what each may hold, and what adaptc does with it.

The set is that of PEFT 0.21.2; keys that older versions wrote are known too. A key is

``used``      translated into the plan;
``ignored``   has no influence on what the adapter computes or trains;
``init``      how a new adapter would be initialised; without influence when values are loaded;
``refused``   changes the mathematics in a way that adaptc does not have, unless it is switched off.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from adaptc.errors import ConfigError, ConfigTypeError, UnknownConfigKeyError, UnsupportedKindError

PEFT_VERSION = "0.21.2"
Check = Callable[[Any], bool]


@dataclasses.dataclass(frozen=True)
class Option:
    """One key: PEFT's default, the role (see the module), and for used keys what a value must be."""

    default: Any
    role: str
    expected: str = ""
    check: Check | None = None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_rank(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, str) and v for v in value)


def _is_regex(value: Any) -> bool:
    if not isinstance(value, str) or not value:
        return False
    try:
        re.compile(value)
    except re.error:
        return False
    return True


def _is_expressions(value: Any) -> bool:
    """Names that PEFT puts into regular expressions as they are."""
    return _is_names(value) and all(_is_regex(v) for v in value)


def _is_layer(value: Any) -> bool:
    return type(value) is int and value >= 0


def _patterns(check: Check) -> Check:
    def is_patterns(value: Any) -> bool:
        return isinstance(value, Mapping) and all(_is_regex(k) and check(v) for k, v in value.items())

    return is_patterns


def _optional(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


_TEXT = _optional(lambda value: isinstance(value, str))
_MODULES = _optional(lambda value: _is_names(value) or _is_regex(value))
_BIASES = ("none", "all", "lora_only")

OPTIONS: dict[str, Option] = {
    "peft_type": Option("LORA", "used", '"LORA"', lambda value: value == "LORA"),
    "r": Option(8, "used", "a positive integer", _is_rank),
    "lora_alpha": Option(8, "used", "a number", _is_number),
    "lora_dropout": Option(0.0, "used", "a number in [0, 1)", lambda v: _is_number(v) and 0 <= v < 1),
    "use_rslora": Option(False, "used", "true or false", _is_bool),
    "bias": Option("none", "used", "none, all or lora_only", lambda value: value in _BIASES),
    "target_modules": Option(None, "used", "a list of names, or a regular expression", _MODULES),
    "exclude_modules": Option(None, "used", "a list of names, a regular expression or null", _MODULES),
    "modules_to_save": Option(None, "used", "a list of names or null", _optional(_is_expressions)),
    "layers_to_transform": Option(
        None, "used", "a layer number, a list of them or null",
        _optional(lambda v: _is_layer(v) or (isinstance(v, list) and all(_is_layer(i) for i in v))),
    ),
    "layers_pattern": Option(
        None, "used", "a name, a list of names or null",
        _optional(lambda value: value == "" or _is_regex(value) or _is_expressions(value)),
    ),
    "rank_pattern": Option(
        {}, "used", "a map from regular expressions to positive integers", _optional(_patterns(_is_rank))
    ),
    "alpha_pattern": Option(
        {}, "used", "a map from regular expressions to numbers", _optional(_patterns(_is_number))
    ),
    "init_lora_weights": Option(
        True, "used", "true, false or a name", _optional(lambda v: isinstance(v, bool | str))
    ),
    # PEFT corrects this one itself, by the class of the layer; so does a site here.
    "fan_in_fan_out": Option(False, "ignored", "true or false", _is_bool),
    "task_type": Option(None, "ignored", "text or null", _TEXT),
    "base_model_name_or_path": Option(None, "ignored", "text or null", _TEXT),
    "revision": Option(None, "ignored", "text or null", _TEXT),
    "peft_version": Option(PEFT_VERSION, "ignored", "text or null", _TEXT),
    "auto_mapping": Option(
        None, "ignored", "an object or null", _optional(lambda value: isinstance(value, Mapping))
    ),
    "inference_mode": Option(False, "ignored", "true or false", _is_bool),
    "megatron_config": Option(None, "ignored"),
    "megatron_core": Option("megatron.core", "ignored"),
    "qalora_group_size": Option(16, "ignored"),
    "loftq_config": Option({}, "init"),
    "eva_config": Option(None, "init"),
    "corda_config": Option(None, "init"),
    "lora_ga_config": Option(None, "init"),
    "use_dora": Option(False, "refused"),
    "lora_bias": Option(False, "refused"),
    "target_parameters": Option(None, "refused"),
    "trainable_token_indices": Option(None, "refused"),
    "layer_replication": Option(None, "refused"),
    "alora_invocation_tokens": Option(None, "refused"),
    "arrow_config": Option(None, "refused"),
    "kasa_config": Option(None, "refused"),
    "monteclora_config": Option(None, "refused"),
    "velora_config": Option(None, "refused"),
    "use_bdlora": Option(None, "refused"),
    "use_qalora": Option(False, "refused"),
    "ensure_weight_tying": Option(False, "refused"),
}  # fmt: skip

#: Keys that other versions wrote: read, never written.
_OTHER_VERSIONS = {
    "runtime_config": Option(None, "ignored"),
    "merge_weights": Option(False, "ignored"),
    "enable_lora": Option(None, "refused"),
}

#: ``init_lora_weights`` -> ``LoRA.init``; None switches PEFT's own initialisation off, like false.
INITS: dict[Any, str] = {True: "default", False: "random", None: "random", "gaussian": "gaussian"}
#: Initialisations that adaptc does not have but that leave the base alone, so that values can be loaded.
VALUES_ONLY = ("orthogonal", "eva")
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def check_config(config: Mapping[str, Any], *, loading: bool) -> dict[str, Any]:
    """The config with every used key present and of a legal value; refuses what cannot be honoured.

    An unknown key that is null configures nothing, by PEFT's convention for keys to come, and is accepted.

    Raises:
        UnsupportedKindError, UnknownConfigKeyError, ConfigTypeError: see their docstrings.
    """
    kind = config.get("peft_type")
    if not isinstance(kind, str):
        raise ConfigError("the config does not name its kind", expected='peft_type: "LORA"', found=repr(kind))
    if kind != "LORA":
        raise UnsupportedKindError(
            f"adapters of PEFT's kind {kind} are not in this version",
            expected="LORA", found=kind, do="load it with PEFT, and convert it to LoRA there if it can be",
        )  # fmt: skip
    known = {**OPTIONS, **_OTHER_VERSIONS}
    for key, value in config.items():
        if key in known:
            _check_option(key, value, known[key], loading=loading)
        elif value is not None:
            near = difflib.get_close_matches(str(key), known, n=1)
            raise UnknownConfigKeyError(
                f"unknown key {key!r} in the adapter's config: it may change what the adapter computes",
                expected=f"the keys of PEFT {PEFT_VERSION}", found=f"{key} = {value!r}",
                do=f"did you mean {near[0]}?" if near
                else "update adaptc, or remove the key if you know that it changes nothing",
            )  # fmt: skip
    used = {key: config.get(key, option.default) for key, option in OPTIONS.items() if option.role == "used"}
    _check_init(used["init_lora_weights"], loading=loading)
    _check_layers(used)
    return used


def _check_option(key: str, value: Any, option: Option, *, loading: bool) -> None:
    if option.check is not None and not option.check(value):
        raise ConfigTypeError(
            f"{key} in the adapter's config has a value that is not legal",
            expected=option.expected, found=repr(value), do="correct adapter_config.json",
        )  # fmt: skip
    switched_off = value is None or value is False or value in ("", [], {}) or value == option.default
    refused = option.role == "refused" or (option.role == "init" and not loading)
    if refused and not switched_off:
        raise UnsupportedKindError(
            f"PEFT's LoRA option {key} is not in this version",
            expected=f"{key} = {option.default!r}", found=repr(value), do="load this adapter with PEFT",
        )  # fmt: skip


def _check_init(init: bool | str | None, *, loading: bool) -> None:
    if init in INITS:
        return
    name = str(init)
    if name in VALUES_ONLY and loading:
        return
    if name.startswith(_CHANGES_BASE):
        reason, do = (
            "it changes the base weights, which the adapter's files do not hold",
            "save it in PEFT with path_initial_model_for_weight_conversion, which makes a plain LoRA of it",
        )
    elif name in VALUES_ONLY:
        reason, do = "not in this version", 'use "gaussian" or true, or load an adapter that has its values'
    elif name == "mica":
        reason, do = "it freezes lora_B in training, which is not in this version", "load it with PEFT"
    else:
        reason, do = "not an initialisation of PEFT that adaptc knows", "load it with PEFT"
    raise UnsupportedKindError(
        f"init_lora_weights = {name!r} is refused: {reason}", expected='true, false or "gaussian"', do=do
    )


def _check_layers(used: Mapping[str, Any]) -> None:
    """PEFT's own rules on the combination of targets and layers."""
    layers = used["layers_to_transform"] not in (None, [])
    pattern = used["layers_pattern"] not in (None, [], "")
    if isinstance(used["target_modules"], str) and (layers or pattern):
        raise ConfigTypeError(
            "layers_to_transform and layers_pattern need target_modules as a list",
            found=f"target_modules = {used['target_modules']!r}", do="put the layers into the expression",
        )  # fmt: skip
    if pattern and not layers:
        raise ConfigTypeError("layers_pattern without layers_to_transform", do="give both, or neither")
    if not used["target_modules"]:
        raise ConfigTypeError(
            "target_modules is empty: PEFT would choose the modules by the model's architecture",
            found=repr(used["target_modules"]), do='name the modules, or use "all-linear"',
        )  # fmt: skip
