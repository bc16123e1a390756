"""A plan: ordered rules, from whatever source, the pass options, and the one canonical form behind them."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from adaptc.errors import PlanError
from adaptc.methods.base import Method
from adaptc.plan import files
from adaptc.plan.resolve import Resolution, resolve
from adaptc.plan.rules import Passes, Rule, check_keys, quoted

VERSION = 1


@dataclasses.dataclass(frozen=True, init=False, eq=False, repr=False)
class Plan:
    """Ordered rules; the first that matches a module wins, unless a rule says ``stack``.

    Args:
        rules: a method (with ``targets``), a rule, a list of methods, rules and rule dicts, a plan, the dict
            form of a plan, the path of a plan file, a PEFT config, or an adapter folder.
        passes: pass options, as ``Passes`` or its dict form; None when nothing is asked.

    Plans compare by what they mean: equal plans have one ``canonical_json``, wherever they were written.
    """

    rules: tuple[Rule, ...]
    passes: Passes | None

    def __init__(self, rules: object, passes: Passes | Mapping[str, Any] | None = None) -> None:
        parsed, own_passes = _read_rules(rules)
        if passes is not None and not isinstance(passes, Passes):
            passes = Passes.from_dict(passes)
        if not parsed:
            raise PlanError("a plan without rules", do='e.g. Plan([LoRA(r=16, targets="all-linear")])')
        object.__setattr__(self, "rules", parsed)
        chosen = own_passes if passes is None else passes
        object.__setattr__(self, "passes", None if chosen == Passes() else chosen)

    def lifting(self, selectors: Iterable[str]) -> Plan:
        """The same with ``selectors`` added to ``passes.lift_no_grad``."""
        passes = self.passes or Passes()
        lifts = (*passes.lift_no_grad, *selectors)
        return self if not lifts else Plan(self.rules, dataclasses.replace(passes, lift_no_grad=lifts))

    @classmethod
    def coerce(cls, source: object) -> Plan:
        """``source`` itself when it is a plan, else ``Plan(source)``."""
        return source if isinstance(source, Plan) else cls(source)

    @classmethod
    def from_peft(cls, config: object, *, model: nn.Module | None = None) -> Plan:
        """The plan of a PEFT config: the object, its dict, its file, or the adapter folder it lies in.

        With ``model``, names are checked against it, and selectors are chosen that mean what PEFT means.
        """
        from adaptc.plan.peft.reading import config_to_rules

        return cls(config_to_rules(files.read_peft_config(config), model=model))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan file: YAML, JSON or TOML by its suffix."""
        try:
            return cls.from_dict(files.read(Path(path)))
        except PlanError as error:
            raise PlanError(f"{path}: {error.headline}", **error.facts) from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a plan file, YAML, JSON or TOML by its suffix; an interrupted write leaves the old file."""
        files.write(Path(path), self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """The canonical dict form: plain data, only what is set, in reading order."""
        data: dict[str, Any] = {"version": VERSION, "rules": [rule.to_dict() for rule in self.rules]}
        return data if self.passes is None else {**data, "passes": self.passes.to_dict()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """The inverse of ``to_dict``; a key that is not known is an error."""
        check_keys(data, ("version", "rules", "passes"), "plan")
        version = data.get("version", VERSION)
        if version != VERSION or isinstance(version, bool):
            raise PlanError("a plan of another version", expected=VERSION, found=repr(version))
        rules = data.get("rules", [])
        if not isinstance(rules, list | tuple):
            raise PlanError("a plan's rules are not a list", found=repr(rules))
        return cls(rules, data.get("passes"))

    def canonical_json(self) -> str:
        """One minimal text per meaning, for comparing and hashing."""
        return json.dumps(_canonical(self.to_dict()), separators=(",", ":"), ensure_ascii=True)

    def resolve(self, model: nn.Module) -> Resolution:
        """Which module gets which method; raises where the plan does not fit the model."""
        lifts = () if self.passes is None else self.passes.lift_no_grad
        return resolve(self.rules, lifts, model)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Plan):
            return NotImplemented
        return self.canonical_json() == other.canonical_json()

    def __hash__(self) -> int:
        return hash(self.canonical_json())

    def __repr__(self) -> str:
        rules = ", ".join(str(rule) for rule in self.rules)
        passes = f", passes={quoted(self.passes.to_dict())}" if self.passes else ""
        return f"Plan([{rules}]{passes})"


def _read_rules(source: object) -> tuple[tuple[Rule, ...], Passes | None]:
    if files.is_peft_config(source):
        source = Plan.from_peft(source)
    elif isinstance(source, str | os.PathLike):
        source = Plan.load(source)
    elif isinstance(source, Mapping) and "match" not in source:
        source = Plan.from_dict(source)
    if isinstance(source, Plan):
        return source.rules, source.passes
    if isinstance(source, Method | Rule | Mapping):
        source = [source]
    if not isinstance(source, Iterable):
        raise PlanError("this is not a plan", expected="rules, methods, a dict or a path", found=repr(source))
    rules = tuple(_read_rule(number, item) for number, item in enumerate(source, start=1))
    return rules, None


def _read_rule(number: int, item: object) -> Rule:
    try:
        if isinstance(item, Rule):
            return item
        if isinstance(item, Method):
            return Rule.of(item)
        if isinstance(item, Mapping):
            return Rule.from_dict(item)
    except PlanError as error:
        raise PlanError(f"rule {number}: {error.headline}", **error.facts) from error
    raise PlanError(f"rule {number} is not a rule", expected="a method, a Rule or a dict", found=repr(item))


def _canonical(data: dict[str, Any]) -> dict[str, Any]:
    """Sort what has no order. Rules, pass orders and patterns (first match counts) keep theirs."""
    rules = []
    for rule in data["rules"]:
        match = {k: sorted(v) if isinstance(v, list) else v for k, v in sorted(rule["match"].items())}
        inner = {"match": match}
        if "method" in rule:
            inner["method"] = dict(sorted(rule["method"].items()))
        rules.append(dict(sorted({**rule, **inner}.items())))
    canonical = {**data, "rules": rules}
    if "passes" in data:
        passes = dict(data["passes"])
        for name in {"skip", "lift_no_grad"} & passes.keys():
            passes[name] = sorted(passes[name])
        if isinstance(passes.get("limit"), dict):
            passes["limit"] = dict(sorted(passes["limit"].items()))
        canonical["passes"] = dict(sorted(passes.items()))
    return _whole_numbers(dict(sorted(canonical.items())))  # type: ignore[no-any-return]


def _whole_numbers(value: Any) -> Any:
    """16.0 as 16: the two are equal, and files of different formats write either."""
    if isinstance(value, dict):
        return {key: _whole_numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_whole_numbers(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
