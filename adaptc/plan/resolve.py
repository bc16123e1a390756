"""Fit a plan to a model: which module gets which method, and what stands in the way."""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from adaptc import methods
from adaptc.errors import PlanError, SiteError
from adaptc.methods.base import Adapter, Method
from adaptc.methods.patterns import fits, idle_keys
from adaptc.plan.lifts import lifted_modules
from adaptc.plan.rules import Rule
from adaptc.plan.select import Selection, nearest_names, select
from adaptc.plan.tree import ModuleTree, self_and_parents


@dataclasses.dataclass(frozen=True)
class Assignment:
    """One method at one module, or at one parameter of a module.

    Attributes:
        path: the first path of the module or parameter; paths: all of them (a shared module object is one site).
        module: the module, or the one that owns the parameter.
        rule: index of the rule in the plan.
        method: as it applies at this site (``Full`` for ``train: full``).
        train: "full" when a copy of the module is trained.
        stacked: this comes on top of what an earlier rule put on the module.
        tied_to: parameters elsewhere in the model that are the same object as one of this module's.
        parameter: the parameter's name in the module; None for a module.
    """

    path: str
    paths: tuple[str, ...]
    module: nn.Module
    rule: int
    method: Method
    train: str | None = None
    stacked: bool = False
    tied_to: tuple[str, ...] = ()
    parameter: str | None = None

    @property
    def module_path(self) -> str:
        """The module's first path."""
        return self.module_paths[0]

    @property
    def module_paths(self) -> tuple[str, ...]:
        """Every path of the module."""
        return self.paths if self.parameter is None else tuple(path.rpartition(".")[0] for path in self.paths)

    def build(self, *, dtype: torch.dtype | None, site_id: int) -> Adapter:
        """A fresh adapter for the site."""
        if self.parameter is None:
            return self.method.build(self.path, self.module, dtype=dtype, site_id=site_id)
        return self.method.build_parameter(self.path, self.module, self.parameter, dtype=dtype, site_id=site_id)


@dataclasses.dataclass(frozen=True)
class Resolution:
    """What a plan means on a model.

    Attributes:
        sites: in model order; several per module only where rules stack.
        shadowed: (rule, path, winner): the rule matches, but the winner came first.
        left_out: (path, reason): meant by "all-linear" or a pattern, and not adapted.
        lifted: paths of the modules that ``passes.lift_no_grad`` names, in model order.
    """

    sites: list[Assignment]
    shadowed: list[tuple[int, str, int]]
    left_out: list[tuple[str, str]]
    lifted: tuple[str, ...] = ()


def resolve(rules: tuple[Rule, ...], lifts: Sequence[str], model: nn.Module) -> Resolution:
    """Assign every module that a rule selects to the first rule that does; ``lifts``: ``passes.lift_no_grad``.

    ``train: full`` takes the whole module: what lies inside is shadowed if its rule comes later, and an
    error if it comes earlier, since half a module cannot be trained as a whole.

    Raises:
        PlanError: a rule, an entry of it, a key of its patterns, or a lift, that selects nothing; rules that
            contradict each other.
        SiteError: a module that a rule names and that its method cannot adapt.
    """
    tree = ModuleTree(model)
    lifted = lifted_modules(lifts, tree)
    selections = [select(rule, number, tree) for number, rule in enumerate(rules, start=1)]
    _check_patterns(tree, rules, selections)
    winners, shadowed = _first_matches(rules, selections)
    _check_shared(tree, rules, selections, winners)
    winners, inside = _enclosed(rules, winners)
    order = tree.order
    sites = list(_assignments(tree, rules, winners))
    sites += _tied_sites(tree, sites)
    sites.sort(key=lambda site: (order[site.path], site.stacked, site.rule))
    left_out = {path: reason for s in reversed(selections) for path, reason in s.left_out.items()}
    adapted = {path for site in sites for path in site.paths}
    trained = {path for site in sites if site.train for path in site.paths}
    left_out_list = [
        (path, left_out[path])
        for path in sorted(left_out, key=order.__getitem__)
        if path not in adapted and not trained.intersection(self_and_parents(path))
    ]
    return Resolution(sites, sorted(shadowed + inside), left_out_list, tuple(lifted))


_Winners = dict[str, list[int]]


def _first_matches(rules: Iterable[Rule], selections: list[Selection]) -> tuple[_Winners, list[tuple[int, str, int]]]:
    """Per path the rules that act on it: the first that matches, and those that stack."""
    winners: _Winners = defaultdict(list)
    first: dict[str, int] = {}
    shadowed: list[tuple[int, str, int]] = []
    for index, (rule, selection) in enumerate(zip(rules, selections, strict=True)):
        for path in selection.taken:
            if rule.stack or path not in first:
                winners[path].append(index)
            else:
                shadowed.append((index, path, first[path]))
            if not rule.stack:
                first.setdefault(path, index)
    return dict(winners), shadowed


def _tied_sites(tree: ModuleTree, sites: list[Assignment]) -> list[Assignment]:
    """What is done to an embedding, at the modules that are tied to it and have no rule of such a kind themselves."""
    done = {(site.path, site.method.kind) for site in sites}
    found: dict[str, Assignment] = {}
    for site in sites:
        if not site.method.follows_ties or not isinstance(site.module, nn.Embedding):
            continue
        for tied in site.tied_to:
            holder, _, name = tied.rpartition(".")
            paths = tree.paths_of(tree.module(holder))
            if name == "weight" and (paths[0], site.method.kind) not in done:
                found[paths[0]] = dataclasses.replace(site, path=paths[0], paths=paths, module=tree.module(holder))
    return list(found.values())


def _check_patterns(tree: ModuleTree, rules: tuple[Rule, ...], selections: list[Selection]) -> None:
    """Each key of a method's patterns must change something."""
    paths = _paths_of_methods(rules, selections)
    for number, rule in enumerate(rules, start=1):
        for option, pattern in _patterns(rule).items():
            for key, winner in idle_keys(pattern, paths[rule.method]).items():
                headline = f"rule {number}: {option} {json.dumps(key)}"
                raise _idle_key(tree, headline, rule, key, winner, paths[rule.method])


def _paths_of_methods(rules: Iterable[Rule], selections: list[Selection]) -> dict[Method | None, list[str]]:
    """What each method is for. Rules with one method go together: a PEFT config becomes one rule for its modules and
    one for its parameters."""
    paths: dict[Method | None, list[str]] = defaultdict(list)
    for rule, selection in zip(rules, selections, strict=True):
        paths[rule.method] += selection.taken
    return paths


def _patterns(rule: Rule) -> Mapping[str, Mapping[str, Any]]:
    return {} if rule.method is None else rule.method.patterns()


def drop_idle_keys(rules: Sequence[Rule], model: nn.Module) -> tuple[list[Rule], dict[str, list[str]]]:
    """The rules without the keys of patterns that change nothing on ``model``, and these keys by option.

    Rules that do not fit the model come back as they are.
    """
    kept, dropped = list(rules), dict[str, list[str]]()
    if not any(pattern for rule in rules for pattern in _patterns(rule).values()):
        return kept, dropped
    tree = ModuleTree(model)
    try:
        selections = [select(rule, number, tree) for number, rule in enumerate(rules, start=1)]
    except (PlanError, SiteError):
        return kept, dropped
    paths = _paths_of_methods(rules, selections)
    for i, rule in enumerate(rules):
        changes: dict[str, Any] = {}
        for option, pattern in _patterns(rule).items():
            if idle := idle_keys(pattern, paths[rule.method]):
                dropped.setdefault(option, []).extend(key for key in idle if key not in dropped[option])
                changes[option] = {key: value for key, value in pattern.items() if key not in idle}
        if changes and rule.method is not None:
            kept[i] = dataclasses.replace(rule, method=dataclasses.replace(rule.method, **changes))
    return kept, dropped


def _idle_key(
    tree: ModuleTree, headline: str, rule: Rule, key: str, winner: str | None, sites: list[str]
) -> PlanError:
    if winner is not None:
        return PlanError(
            f"{headline} changes nothing: an earlier key counts",
            rule=rule, found=f'"{winner}" fits the same sites and comes first', do="put the narrower key first",
        )  # fmt: skip
    elsewhere = next((path for path in tree.order if path not in sites and fits(key, path)), None)
    if elsewhere is not None:
        found, do = f"it fits {elsewhere}, which the rule does not adapt", "correct the key, or adapt that one too"
    else:
        found, do = nearest_names(key, sites), "correct the key, an expression on the paths of the rule's sites"
    return PlanError(f"{headline} matches nothing", rule=rule, found=found, do=do)


def _check_shared(tree: ModuleTree, rules: tuple[Rule, ...], selections: list[Selection], winners: _Winners) -> None:
    """One module object at several paths is one site: every rule must mean all of it."""
    for path, acting in winners.items():
        for other in tree.same(path):
            if other == path:
                continue
            for index in acting:
                refused = selections[index].filtered.get(other)
                if refused is not None:
                    reason = f"rule {index + 1} takes {path}, and {refused} {other}"
                    raise _shared_error(tree, path, other, reason)
            if other in winners and winners[other] != acting:
                reason = f"{path} falls to {_rules(acting)}, {other} to {_rules(winners[other])}"
                raise _shared_error(tree, path, other, reason)
            for index in acting:
                method = rules[index].method
                if method is not None and other in winners and method.at(path) != method.at(other):
                    reason = f"rule {index + 1} gives {method.at(path)} and {method.at(other)}"
                    raise _shared_error(tree, path, other, reason)


def _rules(indices: list[int]) -> str:
    return " and ".join(f"rule {index + 1}" for index in indices)


def _shared_error(tree: ModuleTree, path: str, other: str, found: str) -> PlanError:
    module, name = tree.owner(path)
    kind = type(module).__name__ if name is None else f"parameter of a {type(module).__name__}"
    return PlanError(
        f"{path} and {other} are one shared {kind}, and the plan treats them differently",
        expected="one method for all paths of a shared module",
        found=found,
        do="match all of its paths by one rule",
    )


def _enclosed(rules: tuple[Rule, ...], winners: _Winners) -> tuple[_Winners, list[tuple[int, str, int]]]:
    """Settle sites that lie inside another where one of the two is trained as a whole."""
    kept: _Winners = {}
    shadowed: list[tuple[int, str, int]] = []
    # Outer modules first: one that is itself inside another is settled before what it contains.
    for path, acting in sorted(winners.items(), key=lambda item: item[0].count(".")):
        kept[path] = list(acting)
        if len(acting) > 1 and any(rules[index].train for index in acting):
            raise PlanError(
                f"{path} is trained in full and has a stacked method too ({_rules(acting)})",
                do="drop one of the two: a fully trained module has nothing left to adapt",
            )
        for index in acting:
            outer = _enclosing(rules, kept, path, index)
            if outer is None:
                continue
            winner = kept[outer][0]
            if winner > index and not (rules[index].train and rules[winner].train):
                raise _order_error(rules, outer, winner, path, index)
            kept[path].remove(index)
            if winner != index:
                shadowed.append((index, path, winner))
    return {path: acting for path, acting in kept.items() if acting}, shadowed


def _enclosing(rules: tuple[Rule, ...], kept: _Winners, path: str, index: int) -> str | None:
    """The site around ``path`` that it collides with: one of the two is trained as a whole."""
    for outer in list(self_and_parents(path))[1:]:
        if any(rules[winner].train or rules[index].train for winner in kept.get(outer, ())):
            return outer
    return None


def _order_error(rules: tuple[Rule, ...], outer: str, winner: int, path: str, index: int) -> PlanError:
    return PlanError(
        f"rule {winner + 1} takes {outer} as a whole, but rule {index + 1} already takes {path} inside it",
        rule=f"{index + 1}: {rules[index]}\n{winner + 1}: {rules[winner]}",
        do=f'put rule {winner + 1} before rule {index + 1}, or exclude "{outer}.*" in rule {index + 1}',
    )


def _assignments(tree: ModuleTree, rules: tuple[Rule, ...], winners: _Winners) -> Iterator[Assignment]:
    done: set[tuple[int, str | None]] = set()
    for path, acting in winners.items():
        module, name = tree.owner(path)
        if (id(module), name) in done:
            continue
        done.add((id(module), name))
        paths, tied = tree.same(path), tree.tied_to(module, name)
        for position, index in enumerate(acting):
            rule = rules[index]
            if rule.train and tied:
                raise SiteError(
                    f"{path} cannot be trained in full: it shares a parameter with the rest of the model",
                    rule=f"{index + 1}: {rule}",
                    found=f"tied to {', '.join(tied)}",
                    do="untie it (tie_word_embeddings=False), train a module that holds both, or adapt it",
                )
            method = methods.get("full")() if rule.method is None else rule.method.at(path)
            yield Assignment(paths[0], paths, module, index, method, rule.train, position > 0, tied, name)
