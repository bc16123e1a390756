"""What of a PEFT config selects nothing on a model: PEFT passes over it, so it is left out, with a warning.

Where nothing would be left of an option it stays as it is: resolving the plan then says what is wrong.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from adaptc.errors import AdaptcWarning
from adaptc.plan.peft import matching

#: Of which kind the names of an option are, where they are not modules.
_NOUNS = {"target_parameters": "parameters", "layers_to_transform": "layers", "layers_pattern": "lists of layers"}


def warn(message: str) -> None:
    warnings.warn(message, AdaptcWarning, stacklevel=5)


def fitted(used: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """The config without the entries that select nothing on ``model`` by PEFT's rules, which a warning names."""
    paths = list(matching.module_paths(model))
    found = dict(used)
    if isinstance(used.get("target_modules"), list):
        kept = _fit_targets(found, paths)
        gone = set(used["target_modules"]) - set(kept)
        found["target_modules"] = kept
        # (IA)^3 names some of its targets a second time.
        if isinstance(beside := found.get("feedforward_modules"), list):
            found["feedforward_modules"] = [name for name in beside if name not in gone]
    exclude = used.get("exclude_modules")
    if isinstance(exclude, list):
        found["exclude_modules"] = present(exclude, "exclude_modules", matching.suffixed, paths)
    elif exclude and not any(re.fullmatch(exclude, path) for path in paths):
        _tell("exclude_modules", [exclude])
        found["exclude_modules"] = None
    return found


def _fit_targets(used: dict[str, Any], paths: list[str]) -> list[str]:
    """The target names that select something in the config's layers; layers without any are taken out of ``used``."""
    names = present(used["target_modules"], "target_modules", matching.suffixed, paths)
    if not names:
        return list(used["target_modules"])
    covered = matching.suffixed(names, paths)
    for key in ("layers_pattern", "layers_to_transform"):
        if used.get(key) not in (None, [], ""):
            used[key] = _fit_layers(used, key, covered)

    def in_layers(names: Sequence[str], paths: Iterable[str]) -> list[str]:
        everywhere = {**used, "target_modules": list(names), "exclude_modules": None, "modules_to_save": None}
        return matching.target_paths(everywhere, paths)

    return present(names, "target_modules", in_layers, covered, "that are not in layers_to_transform") or names


def _fit_layers(used: Mapping[str, Any], key: str, covered: list[str]) -> Any:
    """The layer numbers, or the lists of layers, that a target lies in."""

    def holds(entries: Sequence[Any], paths: Iterable[str]) -> list[str]:
        everywhere = {"layers_to_transform": None, **used, key: list(entries)}
        return [path for path in paths if matching.in_layers(everywhere, path)]

    entries = used[key] if isinstance(used[key], list) else [used[key]]
    return present(entries, key, holds, covered) or used[key]


def present(
    names: list[Any], key: str, select: Callable[[Sequence[Any], Any], Any], paths: Any, why: str = ""
) -> list[Any]:
    """The entries that select something, as PEFT passes over the others; they are named in a warning."""
    found = [name for name in names if select([name], paths)]
    absent = [name for name in names if name not in found]
    # PEFT itself adds both of its names for classifiers, so these say nothing about the user's intent.
    task_names = (*matching.CLASSIFIER_NAMES, *matching.ANSWER_NAMES) if key == "modules_to_save" else ()
    told = [name for name in absent if name not in task_names]
    if told and (found or key not in ("target_modules", "layers_to_transform", "layers_pattern")):
        _tell(key, told, why)
    return found


def _tell(key: str, names: Sequence[Any], why: str = "") -> None:
    noun = _NOUNS.get(key, "modules")
    why = why or "that this model does not have"
    warn(f"{key} of the adapter's config names {noun} {why}, which PEFT ignores: {', '.join(map(str, names))}")
