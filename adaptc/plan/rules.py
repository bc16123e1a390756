"""What a plan consists of: rules ``match -> method``, and options of the passes."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from adaptc import methods
from adaptc.errors import PlanError
from adaptc.methods.base import Method
from adaptc.plan.match import MODEL, Match, matcher, strings

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
        check_keys(data, ("match", "method", "train", "stack"), "rule")
        if "match" not in data:
            raise PlanError("a rule without match", do='e.g. match: {targets: ["q_proj"]}')
        check_keys(data["match"], [f.name for f in dataclasses.fields(Match)], "match")
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
        check_keys(data, [f.name for f in dataclasses.fields(cls)], "passes")
        return cls(**_without_none(data))


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
    check_keys(options, known, f"method {kind}")
    try:
        return method_type(**options)
    except TypeError as error:
        raise PlanError(f"method {kind}: an option has a wrong type", found=str(error)) from error


def check_keys(data: object, known: Iterable[str], where: str) -> None:
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
    return f"{name}({', '.join(f'{key}={quoted(_plain(value))}' for key, value in options.items())})"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def quoted(value: Any) -> str:
    """``repr`` with double quotes, as plan files and messages write names."""
    if isinstance(value, list):
        return f"[{', '.join(quoted(item) for item in value)}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{quoted(k)}: {quoted(v)}" for k, v in value.items()) + "}"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)
