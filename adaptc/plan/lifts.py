"""The modules that ``passes.lift_no_grad`` of a plan names."""

from __future__ import annotations

from collections.abc import Sequence

from adaptc.errors import PlanError
from adaptc.plan.all_linear import all_linear
from adaptc.plan.match import ALL_LINEAR, MODEL, matcher
from adaptc.plan.select import nearest_names
from adaptc.plan.tree import ModuleTree


def lifted_modules(selectors: Sequence[str], tree: ModuleTree) -> list[str]:
    """Paths of the modules that ``selectors`` name, in model order; of a parameter's path the module that owns it.

    Raises:
        PlanError: a selector names nothing.
    """
    named: set[str] = set()
    for selector in selectors:
        found = _named(selector, tree)
        if not found:
            raise PlanError(
                f'passes.lift_no_grad: "{selector}" matches nothing',
                found=nearest_names(selector, list(tree.modules), "module"),
                do="correct the name; print(model) lists the modules",
            )
        named |= found
    return [path for path, _ in tree.with_root() if path in named]


def _named(selector: str, tree: ModuleTree) -> set[str]:
    if selector == MODEL:
        return {""}
    if selector == ALL_LINEAR:
        return set(all_linear(tree)[0])
    matches = matcher(selector)
    found = {path for path in tree.modules if matches(path)}
    return found or {owner for path, (owner, _) in tree.parameters.items() if matches(path)}


__all__ = ["lifted_modules"]
