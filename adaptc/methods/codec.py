"""The row of a method in PEFT's file format.

A method that PEFT has sets ``CODEC`` in its module (the row, or "module:name" where it lies). The row says what
the keys of PEFT's config are and which field of the method each one is; selection of modules, patterns, checks,
keys of tensors and files are common to all rows. The smallest row::

    CODEC = Codec(
        peft_type="VERA", kind="vera", label="VeRA",
        options={
            **LAYERS,                                       # keys that several kinds have: EXCLUDE, LAYERS
            "r": Option(256, "used", "a positive integer", is_rank, field="r"),
            "d_initial": Option(0.1, "ignored", "a number", is_number),
        },
    )

* ``Option.field``: the key is that field of the method, once per adapter; sites that differ cannot be written.
  With ``pattern`` sites may differ: the pattern's key has a field of its own name (LoRA's ``rank_pattern``).
  With ``values`` the config writes the field in other words (``{True: "default", False: "random"}``). The field
  "init" is never in the way: what was initialised is loaded or saved all the same.
* ``parts``: for a config that means several rules (``adaptc.methods.ia3``: feedforward or not).
* ``write``: further keys, from the methods of all sites (``Sites``).
* ``check``: what PEFT itself refuses about combinations of keys.
* ``stored``: the method that a file holds the values of, where that is another one than the one trained.
* ``shared``: tensors that an adapter has once, not at each site (VeRA's projections).
* Tensors of a site: ``Adapter.peft_tensors``, key suffix -> tensor in the shape that PEFT stores. Where the
  parameter has another shape, give a view (``self.ia3_l.detach()[:, None]``): loading writes through it. Where no
  view does, override ``Adapter.set_peft_tensors`` too.
* ``on_model``: the adapter acts on the whole model: its config names no modules, and the suffixes of its tensors are
  their keys.
* A trained bias of the adapted layer has the suffix "bias"; ``method.bias == "all"`` also trains the others.

A method without a row is saved in adaptc's own format: the same files without ``adapter_config.json``.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from adaptc.errors import ConfigTypeError, PlanError, UnsupportedError
from adaptc.methods.patterns import value_at

if TYPE_CHECKING:
    from adaptc.methods.base import Adapter, Method

PEFT_VERSION = "0.21.2"
Check = Callable[[Any], bool]
Config = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Option:
    """One key of a config.

    Attributes:
        default: PEFT's default.
        role: "used" (part of the plan), "ignored" (no influence on what the adapter computes or trains), "init"
            (how a new adapter is initialised; no influence when values are loaded), or "refused" (changes the
            mathematics in a way that adaptc does not have, unless it is switched off).
        expected, check: what a value must be, in words and as a test; None takes anything.
        field, pattern, values: see the module.
        carried: written back as it was read.
    """

    default: Any
    role: str
    expected: str = ""
    check: Check | None = None
    field: str = ""
    pattern: str = ""
    values: Mapping[Any, str] | None = None
    carried: bool = False


# ------------------------------------------------------------------------------------------- checks


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


def _is_expressions(value: Any) -> bool:
    """Names that PEFT puts into regular expressions as they are."""
    return is_names(value) and all(is_regex(v) for v in value)


def _is_layer(value: Any) -> bool:
    return type(value) is int and value >= 0


_TEXT = optional(lambda value: isinstance(value, str))

#: What every config has.
_COMMON: dict[str, Option] = {
    "target_modules": Option(
        None, "used", "a list of names, or a regular expression", optional(is_modules)
    ),
    "modules_to_save": Option(None, "used", "a list of names or null", optional(_is_expressions)),
    # PEFT corrects this one itself, by the class of the layer; so does a site here.
    "fan_in_fan_out": Option(False, "ignored", "true or false", is_bool),
    "task_type": Option(None, "ignored", "text or null", _TEXT),
    "base_model_name_or_path": Option(None, "ignored", "text or null", _TEXT, carried=True),
    "revision": Option(None, "ignored", "text or null", _TEXT, carried=True),
    "peft_version": Option(PEFT_VERSION, "ignored", "text or null", _TEXT),
    "auto_mapping": Option(
        None, "ignored", "an object or null", optional(lambda v: isinstance(v, Mapping)), carried=True
    ),
    "inference_mode": Option(False, "ignored", "true or false", is_bool),
}  # fmt: skip

#: Those that a config without modules does not have.
_OF_MODULES = ("target_modules", "fan_in_fan_out")

EXCLUDE: dict[str, Option] = {
    "exclude_modules": Option(
        None, "used", "a list of names, a regular expression or null", optional(is_modules)
    ),
}

LAYERS: dict[str, Option] = {
    "layers_to_transform": Option(
        None, "used", "a layer number, a list of them or null",
        optional(lambda v: _is_layer(v) or (isinstance(v, list) and all(_is_layer(i) for i in v))),
    ),
    "layers_pattern": Option(
        None, "used", "a name, a list of names or null",
        optional(lambda value: value == "" or is_regex(value) or _is_expressions(value)),
    ),
}  # fmt: skip


# ---------------------------------------------------------------------------------------------- rows


def _everywhere(path: str) -> bool:
    return True


@dataclasses.dataclass(frozen=True)
class Part:
    """One rule of the plan that a config means.

    Attributes:
        method: what PEFT does at the part's modules.
        targets: the part's own ``target_modules``; None means the config's.
        holds: which of the modules that the config selects are this part's, when no earlier part has them.
    """

    method: Method
    targets: str | list[str] | None = None
    holds: Callable[[str], bool] = _everywhere


@dataclasses.dataclass(frozen=True)
class Shared:
    """Tensors that an adapter has once.

    Attributes:
        tensors: adapters by module path -> the tensors by the key that follows ``base_model.``.
        assign: put values from a file, of these keys and shapes, into the adapters.
        required: whether a file with this config must hold them.
    """

    tensors: Callable[[Mapping[str, Adapter]], Mapping[str, torch.Tensor]]
    assign: Callable[[Mapping[str, Adapter], Mapping[str, torch.Tensor]], None]
    required: Callable[[Config], bool] = lambda config: True


def _nothing_to_check(used: Config, loading: bool) -> None:
    pass


def _as_it_is(method: Method) -> Method:
    return method


@dataclasses.dataclass(frozen=True, kw_only=True)
class Codec:
    """PEFT's format of one method; see the module.

    Attributes:
        peft_type: PEFT's name of the kind; kind: ours; label: what messages call it.
        options: the config's keys, without those that all configs have.
        older: keys that other versions of PEFT wrote: read, never written.
        parts: the values of used keys -> rules, in order; None means one, made from the fields.
        write: the sites -> values of further keys.
        check: raises for combinations that mean nothing; the second argument says that values will be loaded.
        stored: a site's method (or a rule's, with patterns) -> the one whose tensors are in the file.
        shared: tensors that the adapter has once.
        on_model: the adapter acts on the whole model, not on modules.
    """

    peft_type: str
    kind: str
    label: str
    options: Mapping[str, Option]
    older: Mapping[str, Option] = dataclasses.field(default_factory=dict)
    parts: Callable[[Config], Sequence[Part]] | None = None
    write: Callable[[Sites], Mapping[str, Any]] | None = None
    check: Callable[[Config, bool], None] = _nothing_to_check
    stored: Callable[[Method], Method] = _as_it_is
    shared: Shared | None = None
    on_model: bool = False

    def keys(self) -> dict[str, Option]:
        """Every key that PEFT writes for this kind."""
        kind = Option(
            self.peft_type, "used", f'"{self.peft_type}"', lambda value: value == self.peft_type
        )  # fmt: skip
        common = {key: o for key, o in _COMMON.items() if not (self.on_model and key in _OF_MODULES)}
        return {"peft_type": kind, **common, **self.options}

    def method(self, used: Config, **changes: Any) -> Method:
        """The method of a config's fields.

        Raises:
            ConfigTypeError: values that are legal by themselves and not together.
        """
        from adaptc import methods

        found: dict[str, Any] = {}
        for key, option in self.options.items():
            if option.field:
                value = used[key]
                found[option.field] = value if option.values is None else option.values.get(value, "default")
            if option.pattern:
                found[option.pattern] = dict(used[option.pattern] or {})
        try:
            return methods.get(self.kind)(**{**found, **changes})
        except PlanError as error:
            facts = {"do": "correct adapter_config.json", **error.facts}
            raise ConfigTypeError(f"the adapter's config: {error.headline}", **facts) from error

    def rules(self, used: Config) -> Sequence[Part]:
        """The parts of the plan that a config means."""
        return [Part(self.method(used))] if self.parts is None else self.parts(used)


@dataclasses.dataclass(frozen=True)
class Sites:
    """The sites of one adapter, for writing its config.

    Attributes:
        methods: module path -> the method as it applies there, as it is ``stored``.
        written: the methods of the plan's rules, likewise.
        config: what is decided already: every key's default, the selection of modules.
        original: the config that the adapter was loaded with.
    """

    codec: Codec
    methods: Mapping[str, Method]
    written: Sequence[Method]
    config: Config
    original: Config | None

    def values(self) -> dict[str, Any]:
        """The keys that are fields of the method.

        Raises:
            UnsupportedError: a field that PEFT has once per adapter differs between sites.
        """
        found: dict[str, Any] = {}
        for key, option in self.codec.options.items():
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
            label = self.codec.label
            raise UnsupportedError(
                f"PEFT's format has one {name} for all {label} sites",
                found=", ".join(f"{value!r} at {path}" for value, path in found.items()),
                do=f"give every {label} rule the same {name}",
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


# ------------------------------------------------------------------------------------------ registry


def codec_of(kind: str) -> Codec | None:
    """The row of a method kind, or None when PEFT's format has no place for it."""
    from adaptc import methods

    if kind not in methods.TABLE:
        return None
    row = getattr(importlib.import_module(methods.TABLE[kind].partition(":")[0]), "CODEC", None)
    if isinstance(row, str):
        module, _, name = row.partition(":")
        row = getattr(importlib.import_module(module), name)
    return row


def codecs() -> dict[str, Codec]:
    """PEFT's name of a kind -> its row, for every method that has one."""
    from adaptc import methods

    rows = [codec_of(kind) for kind in methods.kinds()]
    return {row.peft_type: row for row in rows if row is not None}
