"""The keys of PEFT's configs: what one is, and those that several kinds have."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from adaptc.methods.codec.checks import Check, is_bool, is_expressions, is_layer, is_modules, is_regex, optional

PEFT_VERSION = "0.21.2"


@dataclasses.dataclass(frozen=True)
class Option:
    """One key of a config.

    Attributes:
        default: PEFT's default.
        role: "used" (part of the plan), "ignored" (no influence on what the adapter computes or trains), "init"
            (how a new adapter is initialised; no influence when values are loaded), or "refused" (changes the
            mathematics in a way that adaptc does not have, unless it is switched off).
        expected, check: what a value must be, in words and as a test; None takes anything.
        field, pattern, values: see the package.
        carried: written back as it was read.
    """

    default: Any
    role: str
    expected: str = ""
    check: Check | None = None
    field: str = ""
    pattern: str = ""
    values: Mapping[Any, str] | None = None
    carried: bool = False


_TEXT = optional(lambda value: isinstance(value, str))

#: What every config has.
COMMON: dict[str, Option] = {
    "target_modules": Option(
        None, "used", "a list of names, or a regular expression", optional(is_modules)
    ),
    "modules_to_save": Option(None, "used", "a list of names or null", optional(is_expressions)),
    # PEFT corrects this one itself, by the class of the layer; so does a site here.
    "fan_in_fan_out": Option(False, "ignored", "true or false", is_bool),
    "task_type": Option(None, "ignored", "text or null", _TEXT),
    "base_model_name_or_path": Option(None, "ignored", "text or null", _TEXT, carried=True),
    "revision": Option(None, "ignored", "text or null", _TEXT, carried=True),
    "peft_version": Option(PEFT_VERSION, "ignored", "text or null", _TEXT),
    "auto_mapping": Option(
        None, "ignored", "an object or null", optional(lambda v: isinstance(v, Mapping)), carried=True
    ),
    "inference_mode": Option(False, "ignored", "true or false", is_bool),
}  # fmt: skip

#: Those that a config without modules does not have.
OF_MODULES = ("target_modules", "fan_in_fan_out")

EXCLUDE: dict[str, Option] = {
    "exclude_modules": Option(
        None, "used", "a list of names, a regular expression or null", optional(is_modules)
    ),
}

LAYERS: dict[str, Option] = {
    "layers_to_transform": Option(
        None, "used", "a layer number, a list of them or null",
        optional(lambda v: is_layer(v) or (isinstance(v, list) and all(is_layer(i) for i in v))),
    ),
    "layers_pattern": Option(
        None, "used", "a name, a list of names or null",
        optional(lambda value: value == "" or is_regex(value) or is_expressions(value)),
    ),
}  # fmt: skip
