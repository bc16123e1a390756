"""The row of a method, and where to find it."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from adaptc.errors import ConfigTypeError, PlanError
from adaptc.methods.base import Adapter, Method
from adaptc.methods.codec.keys import COMMON, OF_MODULES, Option
from adaptc.methods.codec.sites import Sites

Config = Mapping[str, Any]


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
    """PEFT's format of one method; see the package.

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
        common = {key: o for key, o in COMMON.items() if not (self.on_model and key in OF_MODULES)}
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
