"""What the value of a key of PEFT's configs may be."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

Check = Callable[[Any], bool]


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_probability(value: Any) -> bool:
    return is_number(value) and 0 <= value < 1


def is_rank(value: Any) -> bool:
    return type(value) is int and value > 0


def is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, str) and v for v in value)


def is_tokens(value: Any) -> bool:
    """A list of token ids, or a map from names of modules to such lists."""
    if isinstance(value, Mapping):
        return all(isinstance(name, str) and isinstance(ids, list) and is_tokens(ids) for name, ids in value.items())
    return isinstance(value, list) and all(type(i) is int and i >= 0 for i in value) and len(set(value)) == len(value)


def is_regex(value: Any) -> bool:
    if not isinstance(value, str) or not value:
        return False
    try:
        re.compile(value)
    except re.error:
        return False
    return True


def is_modules(value: Any) -> bool:
    return is_names(value) or is_regex(value)


def patterns(check: Check) -> Check:
    def is_patterns(value: Any) -> bool:
        return isinstance(value, Mapping) and all(is_regex(k) and check(v) for k, v in value.items())

    return is_patterns


def optional(check: Check) -> Check:
    return lambda value: value is None or check(value)


def is_expressions(value: Any) -> bool:
    """Names that PEFT puts into regular expressions as they are."""
    return is_names(value) and all(is_regex(v) for v in value)


def is_layer(value: Any) -> bool:
    return type(value) is int and value >= 0
