"""Banks: models whose graphs stay, whatever adapters come, go and act (``adaptc.Bank``)."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from adaptc import methods
from adaptc.errors import BankError
from adaptc.methods import linear
from adaptc.methods.base import Adapter
from adaptc.methods.lora.method import LoRA
from adaptc.plan import Plan
from adaptc.plan.match import ALL_LINEAR, strings
from adaptc.plan.tree import blocks_of

_UNITS = {"": 1, "B": 1, "kB": 1000, **{f"{p}{unit}": base**i for base, unit in ((1000, "B"), (1024, "iB"))
                            for i, p in enumerate("KMGT", 1)}}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Bank:
    """What the adapters of a model may be at most, so that its graphs serve them all.

    Args:
        kinds: of adapters, named as in plan files: ``["lora", "ia3"]``.
        max_rank: the largest inner dimension of an adapter at a layer. One of rank 4 costs rank 4, whatever this is.
        slots: how many adapters the model has at a time.
        bytes: what their tensors take together: a number, or text such as "2GiB"; None: no bound of its own.
        sites: the linear layers that adapters may be at, as targets of a plan; default: those of the blocks that
            repeat, or all (but heads and routers) where none do.

    Raises:
        BankError: a value that is not legal, or a kind that cannot be in a bank.
    """

    kinds: Sequence[str] | str
    max_rank: int
    slots: int
    bytes: int | str | None = None
    sites: Sequence[str] | str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "kinds", strings(self.kinds, "kinds"))
        if self.sites is not None:
            object.__setattr__(self, "sites", strings(self.sites, "sites"))
        if self.bytes is not None:
            object.__setattr__(self, "bytes", _bytes(self.bytes))
        can = [kind for kind, found in methods.capabilities().items() if found.bankable]
        for kind in self.kinds:
            if kind not in can:
                raise BankError(
                    f"Bank: adapters of kind {kind!r} cannot be in a bank", expected=f"of {', '.join(can)}",
                    found="no such kind" if kind not in methods.kinds() else
                    "it acts inside of modules, or on more than linear layers",
                )  # fmt: skip
        if not self.kinds:
            raise BankError("Bank: no kinds", expected=f"of {', '.join(can)}")
        for name, least in (("max_rank", 0), ("slots", 1)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise BankError(f"Bank: {name} is not legal", expected=f"a whole number from {least} on", found=value)

    @classmethod
    def from_adapters(cls, directories: Iterable[Any], *, slots: int | None = None) -> Bank:
        """The bank that holds the adapters of these folders, all at a time, or as many as ``slots``.

        Raises:
            BankError: a kind that cannot be in a bank, or no folder. PlanError, CheckpointError: a folder is malformed.
        """
        plans = {str(directory): Plan.coerce(Path(directory)) for directory in directories}
        if not plans:
            raise BankError("Bank.from_adapters: no folder")
        rules = [rule for plan in plans.values() for rule in plan.rules]
        for where, plan in plans.items():
            for rule in plan.rules:
                if rule.method is None:
                    raise BankError(f"Bank: {where} trains modules in full, which cannot be in a bank", found=rule)
        used = [rule.method for rule in rules if rule.method is not None]
        patterns = [value for m in used for value in m.patterns().get("r", {}).values()]
        targets = [target for rule in rules for target in rule.match.targets]
        return cls(
            kinds=sorted({m.kind for m in used}),
            max_rank=max(0, *(m.rank for m in used), *patterns),
            slots=len(plans) if slots is None else slots,
            sites=tuple(dict.fromkeys(targets)),
        )

    @property
    def changes_input(self) -> bool:
        """Whether some adapters may change the inputs of layers."""
        return any(methods.get(kind).changes_input for kind in self.kinds)

    def paths(self, model: nn.Module) -> list[tuple[str, tuple[str, ...], nn.Module]]:
        """(path, all its paths, module) of the sites, in the order of the model.

        Raises:
            PlanError, SiteError: ``sites`` fit no module. BankError: one that is no linear layer.
        """
        targets = ALL_LINEAR if self.sites is None else strings(self.sites, "sites")
        found = Plan([LoRA(r=1, targets=targets)]).resolve(model).sites
        if self.sites is None:
            inside = [f"{path}." for path, _ in blocks_of(model)]
            repeated = [site for site in found if any(site.path.startswith(path) for path in inside)]
            found = repeated or found
        for site in found:
            if site.path != site.module_path or not linear.is_linear(site.module):
                raise BankError(
                    f"Bank: {site.path} cannot be a site", expected="a linear layer",
                    found=type(site.module).__name__ if site.path == site.module_path else "a parameter",
                    do="leave it out of sites; adapters of it need a model without a bank",
                )  # fmt: skip
        return [(site.module_path, site.module_paths, site.module) for site in found]


class Occupancy:
    """What the adapters of a model take of its bank.

    Args:
        sizes: of the adapters that there are, what each of them takes in bytes.
    """

    def __init__(self, bank: Bank, sites: Iterable[str]) -> None:
        self.bank, self.sites = bank, frozenset(sites)

    def check(self, name: str, there: dict[str, int], adapters: Sequence[tuple[str, Adapter]]) -> None:
        """Raise BankError, naming the capacity, unless the adapter ``name`` (path and adapter of each of its sites)
        fits beside those that are ``there`` (what each takes in bytes)."""
        bank = self.bank
        for path, adapter in adapters:
            method, where = adapter.method, f"bank: {name!r} at {path}"
            if method.kind not in bank.kinds:
                raise BankError(
                    f"{where} is of kind {method.kind!r}", expected=f"kinds: {', '.join(bank.kinds)}",
                    do="name the kind in Bank(kinds=...)",
                )  # fmt: skip
            if path not in self.sites:
                raise BankError(
                    f"{where}, which is no site of the bank", expected=_named(sorted(self.sites), "sites"),
                    do="name it in Bank(sites=...), where it is a linear layer",
                )  # fmt: skip
            if adapter.acts_inside or adapter.replaces_forward or adapter.tap is not None:
                raise BankError(
                    f"{where} acts inside of the module, or reads another", found=method,
                    do="use a model without a bank for it",
                )  # fmt: skip
            if method.rank > bank.max_rank:
                raise BankError(f"{where} has rank {method.rank}", expected=f"at most {bank.max_rank} (max_rank)")
        self.check_room(name, there, size_of(adapter for _, adapter in adapters))

    def check_room(self, name: str, there: dict[str, int], size: int) -> None:
        """Raise BankError where an adapter more, of this size in bytes, is too much."""
        bank = self.bank
        if len(there) >= bank.slots:
            raise BankError(
                f"bank: {name!r} is one adapter too many", expected=f"at most {bank.slots} (slots)",
                found=_named(list(there), "there are"), do="remove one first",
            )  # fmt: skip
        used = sum(there.values())
        if bank.bytes is not None and used + size > int(bank.bytes):
            raise BankError(
                f"bank: {name!r} takes {size:,} bytes", expected=f"at most {bank.bytes:,} (bytes) of all adapters",
                found=f"{used:,} are taken", do="remove an adapter first",
            )  # fmt: skip


def size_of(adapters: Iterable[Adapter]) -> int:
    """The bytes of their tensors; what several share counts once."""
    tensors = {id(t): t for a in adapters for t in (*a.parameters(), *a.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def _named(names: Sequence[str], what: str) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return f"{what}: {', '.join(names[:4])}{more}"


def _bytes(value: object) -> int:
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kKMGT]?i?B|)\s*", value) if isinstance(value, str) else None
    if found is not None and found[2] in _UNITS:
        return int(float(found[1]) * _UNITS[found[2]])
    if type(value) is int and value > 0:
        return value
    expected = 'a positive number, or text such as "2GiB"'
    raise BankError("Bank: bytes are not legal", expected=expected, found=repr(value))
