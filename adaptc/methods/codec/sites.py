"""The sites of one adapter, for writing its config in PEFT's format."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from adaptc.errors import UnsupportedError
from adaptc.methods.base import Method
from adaptc.methods.codec.keys import Option
from adaptc.methods.patterns import value_at


@dataclasses.dataclass(frozen=True)
class Sites:
    """The sites of one adapter, for writing its config.

    Attributes:
        label, options: the row's.
        methods: module path -> the method as it applies there, as it is ``stored``.
        written: the methods of the plan's rules, likewise.
        config: what is decided already: every key's default, the selection of modules.
        original: the config that the adapter was loaded with.
    """

    label: str
    options: Mapping[str, Option]
    methods: Mapping[str, Method]
    written: Sequence[Method]
    config: Mapping[str, Any]
    original: Mapping[str, Any] | None

    def values(self) -> dict[str, Any]:
        """The keys that are fields of the method.

        Raises:
            UnsupportedError: a field that PEFT has once per adapter differs between sites.
        """
        found: dict[str, Any] = {}
        for key, option in self.options.items():
            if option.pattern:
                found[key], found[option.pattern] = self.patterned(option.field, option.pattern)
            elif option.field == "init":
                found[key] = self._initialisation(key, option)
            elif option.field:
                value = self.uniform(option.field)
                found[key] = value if option.values is None else _inverse(option.values)[value]
        return found

    def uniform(self, name: str) -> Any:
        """The one value of a field at all sites; raises UnsupportedError when there are several."""
        found: dict[Any, str] = {}
        for path, method in self.methods.items():
            found.setdefault(getattr(method, name), path)
        if len(found) > 1:
            raise UnsupportedError(
                f"PEFT's format has one {name} for all {self.label} sites",
                found=", ".join(f"{value!r} at {path}" for value, path in found.items()),
                do=f"give every {self.label} rule the same {name}",
            )
        return next(iter(found))

    def patterned(self, name: str, pattern: str) -> tuple[float, dict[str, float]]:
        """The most common value, and a pattern for each site that differs from it.

        The plan's own patterns are kept when they still mean the same: PEFT writes them sorted, and the first
        that matches counts.
        """
        values = {path: _whole(getattr(method, name)) for path, method in self.methods.items()}
        if len(self.written) == 1:
            own = dict(sorted(getattr(self.written[0], pattern).items()))
            default = _whole(getattr(self.written[0], name))
            if all(value_at(own, path, default) == value for path, value in values.items()):
                return default, {key: _whole(value) for key, value in own.items()}
        common = Counter(values.values()).most_common(1)[0][0]
        return common, {f"^{re.escape(p)}": v for p, v in values.items() if v != common}

    def _initialisation(self, key: str, option: Option) -> Any:
        inits = {method.init for method in self.methods.values()}  # type: ignore[attr-defined]
        value = option.default
        if len(inits) == 1 and option.values is not None:
            value = _inverse(option.values).get(inits.pop(), value)
        if self.original is not None and value == option.default:
            return self.original.get(key, value)
        return value


def _inverse(values: Mapping[Any, str]) -> dict[str, Any]:
    return {value: key for key, value in values.items() if key is not None}


def _whole(value: float) -> float:
    """16.0 as 16, as PEFT's own configs have it."""
    return int(value) if isinstance(value, float) and value.is_integer() else value
