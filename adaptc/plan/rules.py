"""A plan: ordered rules ``match -> method``, the pass options, and the one canonical form behind them."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptc import methods
from adaptc.errors import PlanError
from adaptc.methods.base import Method
from adaptc.plan.match import MODEL, Match, matcher, strings

if TYPE_CHECKING:
    from torch import nn

    from adaptc.plan.resolve import Resolution

VERSION = 1
_SHORTHAND = tuple(field.name for field in dataclasses.fields(Method))


@dataclasses.dataclass(frozen=True)
class Rule:
    """One line of a plan: what is done to the modules of ``match``.

    Args:
        match: the modules.
        method: the adapter method; or
        train: ``"full"``: train a copy of the whole module (PEFT's ``modules_to_save``).
        stack: add to what earlier rules put on a module, where otherwise the first matching rule wins.
    """

    match: Match
    method: Method | None = None
    train: str | None = None
    stack: bool = False

    def __post_init__(self) -> None:
        if self.method is not None and self.method.kind == "full":
            object.__setattr__(self, "method", None)
            object.__setattr__(self, "train", "full")
        if (self.method is None) == (self.train is None):
            found = "both" if self.method is not None else "neither"
            raise PlanError("a rule has one of method and train", found=found)
        if self.train not in (None, "full"):
            raise PlanError("a rule's train option is not known", expected="full", found=repr(self.train))
        if not isinstance(self.stack, bool):
            raise PlanError("a rule's stack option is not true or false", found=repr(self.stack))
        if self.stack and self.train:
            raise PlanError("train: full cannot be stacked", do="drop stack, and put the rule first")
        if self.method is not None and _shorthand(self.method):
            names = ", ".join(_shorthand(self.method))
            raise PlanError(f"a rule's method has {names} of its own", do="put them into the rule's match")

    @classmethod
    def of(cls, method: Method) -> Rule:
        """The rule that a method with ``targets``, ``exclude`` and ``layers`` stands for."""
        if method.targets is None and method.on_model:
            method = dataclasses.replace(method, targets=(MODEL,))
        if method.targets is None:
            name = type(method).__name__
            raise PlanError(
                f"{name} without targets",
                do=f'name the modules, {name}(targets=["q_proj", "v_proj"]), or use targets="all-linear"',
            )
        match = Match(**_shorthand(method))
        return cls(match, dataclasses.replace(method, **dict.fromkeys(_SHORTHAND)))

    def to_dict(self) -> dict[str, Any]:
        match = {name: _plain(value) for name, value in _set_fields(self.match).items()}
        data: dict[str, Any] = {"match": match}
        if self.method is not None:
            data["method"] = {"kind": self.method.kind, **_plain(self.method.options())}
        else:
            data["train"] = self.train
        if self.stack:
            data["stack"] = True
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Rule:
        _check_keys(data, ("match", "method", "train", "stack"), "rule")
        if "match" not in data:
            raise PlanError("a rule without match", do='e.g. match: {targets: ["q_proj"]}')
        _check_keys(data["match"], [f.name for f in dataclasses.fields(Match)], "match")
        match = Match(**{"targets": (), **_without_none(data["match"])})
        method = None if data.get("method") is None else _method_from_dict(data["method"])
        return cls(match, method, data.get("train"), data.get("stack", False))

    def __str__(self) -> str:
        """As one would write it in Python, in the shorter form where that says everything."""
        match, name = _set_fields(self.match), type(self.method).__name__
        if self.method is None:
            return f'Rule({_call("Match", match)}, train="full")'
        if not self.stack and match.keys() <= set(_SHORTHAND):
            return _call(name, {**match, **self.method.options()})
        stack = ", stack=True" if self.stack else ""
        return f"Rule({_call('Match', match)}, {_call(name, self.method.options())}{stack})"


@dataclasses.dataclass(frozen=True)
class Passes:
    """Which passes run: ``skip`` some, give the whole ``order``, or ``limit`` how often they apply.

    ``limit`` is one number for every pass, or a number per pass name. Names are checked by the pass manager.
    ``lift_no_grad``: selectors of modules (as in ``targets``); where one runs under ``torch.no_grad`` inside the
    model's forward, that region records gradients instead.
    """

    skip: tuple[str, ...] = ()
    order: tuple[str, ...] | None = None
    limit: Mapping[str, int] | int | None = dataclasses.field(default=None, hash=False)
    lift_no_grad: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "skip", strings(self.skip, "passes.skip"))
        object.__setattr__(self, "lift_no_grad", strings(self.lift_no_grad, "passes.lift_no_grad"))
        for selector in self.lift_no_grad:
            matcher(selector)
        self._check_lifts()
        if self.order is not None:
            object.__setattr__(self, "order", strings(self.order, "passes.order"))
        if isinstance(self.limit, Mapping):
            strings(list(self.limit), "passes.limit")
            object.__setattr__(self, "limit", dict(self.limit))
        counts = list(self.limit.values()) if isinstance(self.limit, Mapping) else [self.limit]
        if self.limit is None:
            counts = []
        wrong = [n for n in counts if isinstance(n, bool) or not isinstance(n, int) or n < 0]
        if wrong:
            raise PlanError(
                "passes.limit is not a count", expected="a number >= 0, or one per pass", found=repr(wrong[0])
            )

    @property
    def says_which(self) -> bool:
        """Whether anything is said of which passes run, and how often."""
        return bool(self.skip or self.order is not None or self.limit is not None)

    def _check_lifts(self) -> None:
        """Raise PlanError where the pass that lifts regions would not run."""
        left_out = self.order is not None and "lift_no_grad" not in self.order
        if self.lift_no_grad and (left_out or "lift_no_grad" in self.skip):
            raise PlanError(
                "passes.lift_no_grad names modules, and the pass lift_no_grad does not run",
                found="it is not in order" if left_out else "it is in skip", do="drop one of the two",
            )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        return {name: _plain(value) for name, value in _set_fields(self).items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Passes:
        _check_keys(data, [f.name for f in dataclasses.fields(cls)], "passes")
        return cls(**_without_none(data))


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
        from adaptc.files.peft_format import config_to_plan
        from adaptc.plan.files import read_peft_config

        return config_to_plan(read_peft_config(config), model=model)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan file: YAML, JSON or TOML by its suffix."""
        from adaptc.plan.files import read

        try:
            return cls.from_dict(read(Path(path)))
        except PlanError as error:
            raise PlanError(f"{path}: {error.headline}", **error.facts) from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a plan file, YAML, JSON or TOML by its suffix; an interrupted write leaves the old file."""
        from adaptc.plan.files import write

        write(Path(path), self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """The canonical dict form: plain data, only what is set, in reading order."""
        data: dict[str, Any] = {"version": VERSION, "rules": [rule.to_dict() for rule in self.rules]}
        return data if self.passes is None else {**data, "passes": self.passes.to_dict()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """The inverse of ``to_dict``; a key that is not known is an error."""
        _check_keys(data, ("version", "rules", "passes"), "plan")
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
        from adaptc.plan.resolve import resolve

        return resolve(self, model)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Plan):
            return NotImplemented
        return self.canonical_json() == other.canonical_json()

    def __hash__(self) -> int:
        return hash(self.canonical_json())

    def __repr__(self) -> str:
        rules = ", ".join(str(rule) for rule in self.rules)
        passes = f", passes={_quoted(self.passes.to_dict())}" if self.passes else ""
        return f"Plan([{rules}]{passes})"


def _read_rules(source: object) -> tuple[tuple[Rule, ...], Passes | None]:
    from adaptc.plan.files import is_peft_config

    if is_peft_config(source):
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


def _method_from_dict(data: object) -> Method:
    if not isinstance(data, Mapping) or "kind" not in data:
        raise PlanError("a method without kind", expected="e.g. {kind: lora, r: 16}", found=repr(data))
    kind = data["kind"]
    if kind not in methods.kinds():
        near = difflib.get_close_matches(str(kind), methods.kinds(), n=1)
        do = f"did you mean {near[0]}?" if near else None
        raise PlanError(f'no adapter method "{kind}"', expected=", ".join(methods.kinds()), do=do)
    method_type = methods.get(kind)
    options = {name: value for name, value in data.items() if name != "kind"}
    misplaced = sorted(set(options).intersection(_SHORTHAND))
    if misplaced:
        raise PlanError(f"{', '.join(misplaced)} inside method", do="put them into match")
    known = [f.name for f in dataclasses.fields(method_type) if f.name not in _SHORTHAND]
    _check_keys(options, known, f"method {kind}")
    try:
        return method_type(**options)
    except TypeError as error:
        raise PlanError(f"method {kind}: an option has a wrong type", found=str(error)) from error


def _check_keys(data: object, known: Iterable[str], where: str) -> None:
    if not isinstance(data, Mapping):
        raise PlanError(f"{where} is not a mapping", found=repr(data))
    known = list(known)
    for key in data:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            raise PlanError(
                f'{where}: unknown key "{key}"',
                expected=", ".join(known),
                do=f"did you mean {near[0]}?" if near else None,
            )


def _shorthand(method: Method) -> dict[str, Any]:
    values = {name: getattr(method, name) for name in _SHORTHAND}
    return {name: value for name, value in values.items() if value is not None}


def _set_fields(record: Match | Passes) -> dict[str, Any]:
    values = {f.name: (getattr(record, f.name), f.default) for f in dataclasses.fields(record)}
    return {name: value for name, (value, default) in values.items() if value != default}


def _without_none(data: Mapping[str, Any]) -> dict[str, Any]:
    """``exclude:`` with nothing behind it is how YAML writes an empty list."""
    return {key: value for key, value in data.items() if value is not None}


def _call(name: str, options: Mapping[str, Any]) -> str:
    return f"{name}({', '.join(f'{key}={_quoted(_plain(value))}' for key, value in options.items())})"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _quoted(value: Any) -> str:
    """``repr`` with double quotes, as plan files and messages write names."""
    if isinstance(value, list):
        return f"[{', '.join(_quoted(item) for item in value)}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_quoted(k)}: {_quoted(v)}" for k, v in value.items()) + "}"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


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
