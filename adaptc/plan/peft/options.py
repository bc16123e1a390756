"""What the keys of a PEFT config may hold, checked by the row of its kind (``adaptc.methods.codec``).

The set of keys is that of PEFT 0.21.2; keys that older versions wrote are known too.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from adaptc.errors import ConfigError, ConfigTypeError, UnknownConfigKeyError, UnsupportedKindError
from adaptc.methods.codec import PEFT_VERSION, Codec, Option, codecs


def check_config(config: Mapping[str, Any], *, loading: bool) -> tuple[Codec, dict[str, Any]]:
    """The row of the config's kind, and the config with every used key present and of a legal value.

    An unknown key that is null configures nothing, by PEFT's convention for keys to come, and is accepted.

    Raises:
        UnsupportedKindError, UnknownConfigKeyError, ConfigTypeError: see their docstrings.
    """
    codec = codec_for(config)
    keys = codec.keys()
    known = {**keys, **codec.older}
    for key, value in config.items():
        if key in known:
            _check_option(key, value, known[key], codec, loading=loading)
        elif value is not None:
            near = difflib.get_close_matches(str(key), known, n=1)
            raise UnknownConfigKeyError(
                f"unknown key {key!r} in the adapter's config: it may change what the adapter computes",
                expected=f"the keys of PEFT {PEFT_VERSION}", found=f"{key} = {value!r}",
                do=f"did you mean {near[0]}?" if near
                else "update adaptc, or remove the key if you know that it changes nothing",
            )  # fmt: skip
    used = {key: config.get(key, option.default) for key, option in keys.items() if option.role == "used"}
    codec.check(used, loading)
    if not codec.on_model:
        _check_layers(used, loading=loading)
    return codec, used


def codec_for(config: Mapping[str, Any]) -> Codec:
    """The row of the kind that a config names.

    Raises:
        ConfigError: it names none; UnsupportedKindError: this version has no row for it.
    """
    kind = config.get("peft_type")
    if not isinstance(kind, str):
        raise ConfigError("the config does not name its kind", expected='peft_type: "LORA"', found=repr(kind))
    rows = codecs()
    if kind not in rows:
        raise UnsupportedKindError(
            f"adapters of PEFT's kind {kind} are not in this version",
            expected=", ".join(rows), found=kind,
            do="load it with PEFT, and convert it to LoRA there if it can be",
        )  # fmt: skip
    return rows[kind]


def _check_option(key: str, value: Any, option: Option, codec: Codec, *, loading: bool) -> None:
    if option.check is not None and not option.check(value):
        raise ConfigTypeError(
            f"{key} in the adapter's config has a value that is not legal",
            expected=option.expected, found=repr(value), do="correct adapter_config.json",
        )  # fmt: skip
    switched_off = value is None or value is False or value in ("", [], {}) or value == option.default
    refused = option.role == "refused" or (option.role == "init" and not loading)
    if refused and not switched_off:
        raise UnsupportedKindError(
            f"PEFT's {codec.label} option {key} is not in this version",
            expected=f"{key} = {option.default!r}", found=repr(value), do="load this adapter with PEFT",
        )  # fmt: skip


def _check_layers(used: Mapping[str, Any], *, loading: bool) -> None:
    """PEFT's own rules on the combination of targets and layers."""
    layers = used.get("layers_to_transform") not in (None, [])
    pattern = used.get("layers_pattern") not in (None, [], "")
    if isinstance(used["target_modules"], str) and (layers or pattern):
        raise ConfigTypeError(
            "layers_to_transform and layers_pattern need target_modules as a list",
            found=f"target_modules = {used['target_modules']!r}", do="put the layers into the expression",
        )  # fmt: skip
    if pattern and not layers:
        raise ConfigTypeError("layers_pattern without layers_to_transform", do="give both, or neither")
    # Without target_modules PEFT takes those that it knows for the architecture, beside the parameters too.
    only_parameters = used.get("target_parameters") and (used["target_modules"] == [] or loading)
    if not used["target_modules"] and not only_parameters:
        raise ConfigTypeError(
            "target_modules is empty: PEFT would choose the modules by the model's architecture",
            found=repr(used["target_modules"]), do='name the modules, or use "all-linear"',
        )  # fmt: skip
