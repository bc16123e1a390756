"""Options that give sites values of their own: maps from expressions on a site's path to values, as in PEFT.

A key fits a path that it matches, or of which it matches the last components. The first key that fits counts.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any


def fits(key: str, path: str) -> bool:
    return re.match(rf"(.*\.)?({key})$", path) is not None


def first_key(pattern: Mapping[str, Any], path: str) -> str | None:
    """The key whose value the site at ``path`` gets."""
    return next((key for key in pattern if fits(key, path)), None)


def value_at(pattern: Mapping[str, Any] | None, path: str, default: Any) -> Any:
    key = first_key(pattern or {}, path)
    return default if key is None or pattern is None else pattern[key]


def idle_keys(pattern: Mapping[str, Any], paths: Collection[str]) -> dict[str, str | None]:
    """The keys that change nothing at the sites ``paths``: key -> the first of the earlier keys that have all its
    sites, or None where it fits no site. A key that says what an earlier one says is not idle."""
    idle: dict[str, str | None] = {}
    for key, value in pattern.items():
        winners = [first_key(pattern, path) for path in paths if fits(key, path)]
        if not any(winner is not None and pattern[winner] == value for winner in winners):
            idle[key] = winners[0] if winners else None
    return idle
