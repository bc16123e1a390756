"""Which modules a PEFT config means, by PEFT's own rules, given the module paths of a model.

Used in both directions: a plan made from a config is checked against it, and a config is only written when
it selects exactly the sites that the plan has.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from adaptc.methods.linear import is_linear
from adaptc.plan.tree import ModuleTree

#: Heads that PEFT takes for the classifier, and trains and saves, when the task is classification.
CLASSIFIER_NAMES = ("classifier", "score")
CLASSIFICATION = ("SEQ_CLS", "TOKEN_CLS")
ANSWER_NAMES = ("qa_outputs",)


def module_paths(model: nn.Module) -> dict[str, nn.Module]:
    """The base model's modules by their first path, as PEFT walks them (a shared module counts once)."""
    seen: set[int] = set()
    paths = {}
    for path, module in ModuleTree(model).modules.items():
        if id(module) not in seen:
            seen.add(id(module))
            paths[path] = module
    return paths


def target_paths(config: Mapping[str, Any], paths: Iterable[str]) -> list[str]:
    """The paths that PEFT adapts. ``"all-linear"`` must be replaced by names before."""
    return [path for path in paths if _is_target(config, path)]


def _is_target(config: Mapping[str, Any], path: str) -> bool:
    exclude = config.get("exclude_modules")
    if exclude:
        if isinstance(exclude, str):
            if re.fullmatch(exclude, path):
                return False
        elif any(has_suffix(path, name) for name in exclude):
            return False
    # PEFT reads these names as expressions, and protects everything inside such a module.
    if any(re.match(rf"(^|.*\.){name}($|\..*)", path) for name in config.get("modules_to_save") or ()):
        return False
    targets = config["target_modules"] or []
    if isinstance(targets, str):
        return re.fullmatch(targets, path) is not None
    if path in targets:
        return True
    return any(has_suffix(path, name) for name in targets) and in_layers(config, path)


def parameter_paths(model: nn.Module) -> list[str]:
    """The parameters of the base model's modules by the paths of :func:`module_paths`."""
    tree = ModuleTree(model)
    first = set(module_paths(model))
    return [path for path, (holder, _) in tree.parameters.items() if holder in first]


def target_parameters(names: Sequence[str] | None, paths: Iterable[str]) -> list[str]:
    """The parameters that PEFT adapts: layers and excluded modules do not matter to it here."""
    return [path for path in paths if any(has_suffix(path, name) for name in names or ())]


def shortest_names(parameters: Iterable[str], paths: Sequence[str]) -> list[str]:
    """The shortest names that mean exactly these of ``paths``, by PEFT's rules."""
    full = sorted(parameters)
    for depth in (2, 1):
        names = sorted({".".join(path.split(".")[-depth:]) for path in full})
        if set(target_parameters(names, paths)) == set(full):
            return names
    return full


def has_suffix(path: str, name: str) -> bool:
    """True when ``name`` is the path or its last components."""
    return path == name or path.endswith(f".{name}")


def suffixed(names: Sequence[str], paths: Iterable[str]) -> list[str]:
    return [path for path in paths if any(has_suffix(path, name) for name in names)]


def in_layers(config: Mapping[str, Any], path: str) -> bool:
    """Whether the path lies in the layers that the config names; in any, where it names none."""
    layers = config.get("layers_to_transform")
    if layers is None or layers == []:
        return True
    patterns = config.get("layers_pattern") or ()
    patterns = [patterns] if isinstance(patterns, str) else patterns
    expressions = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in patterns] or [r".*?\.[^.]*\.(\d+)\."]
    found = next((m for m in (re.match(e, path) for e in expressions) if m), None)
    return found is not None and int(found[1]) in ([layers] if isinstance(layers, int) else layers)


def saved_paths(names: Sequence[str] | None, paths: Iterable[str]) -> list[str]:
    """The modules that PEFT trains as a whole for ``modules_to_save``: any path that ends in a name."""
    return [path for path in paths if any(path.endswith(name) for name in names or ())]


def classifier_names(task_type: str | None) -> tuple[str, ...]:
    """What PEFT adds to ``modules_to_save`` when it wraps a model for this task."""
    if task_type in CLASSIFICATION:
        return CLASSIFIER_NAMES
    return ANSWER_NAMES if task_type == "QUESTION_ANS" else ()


def all_linear_paths(model: nn.Module, task_type: str | None) -> list[str]:
    """What ``"all-linear"`` means to PEFT: every linear layer but the output embeddings or classifier."""
    paths = module_paths(model)
    head: object = None
    if hasattr(model, "get_output_embeddings"):
        with contextlib.suppress(NotImplementedError):  # transformers' way to say that there are none
            head = model.get_output_embeddings()  # type: ignore[operator]
        if head is None and task_type == "SEQ_CLS":
            head = getattr(model, "score", None) or getattr(model, "classifier", None)
    return [path for path, module in paths.items() if is_linear(module) and module is not head]
