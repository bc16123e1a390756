"""The adapters of one model: which there are, at which sites, and which are live."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from adaptc.errors import AdaptcWarning, AdapterNameError, PlanError, SiteError, UnsupportedError
from adaptc.methods.base import Adapter, Method
from adaptc.passes.manager import Pipeline
from adaptc.plan import Assignment, Plan, bypassed
from adaptc.runtime import attach, embeddings, together
from adaptc.runtime.bank import Bank, Occupancy, size_of
from adaptc.runtime.calibrate import covariances
from adaptc.runtime.fresh import fresh, have_one_weight, with_all_biases
from adaptc.runtime.names import check_adapter_name
from adaptc.runtime.options import pipeline_of
from adaptc.runtime.site_adapters import adapter_name, adapters_of, entry_of
from adaptc.runtime.weights.patch import Merged, unguard

#: Where a model says which adapter is live, by PEFT's name for it, if it says so at all.
ACTIVE = "active_adapter"


@dataclasses.dataclass(frozen=True)
class Site:
    """One module with adapters, for itself or for parameters of it.

    ``paths``: every path of it, when it is used in several places.
    """

    path: str
    paths: tuple[str, ...]
    id: int
    module: nn.Module = dataclasses.field(repr=False, compare=False)

    @property
    def adapters(self) -> dict[str, Adapter]:
        """Entry -> adapter. The entry is the adapter's name; what a stacked rule put there has ``name~1`` ...."""
        found = adapters_of(self.module)
        return {} if found is None else dict(found.items())  # type: ignore[arg-type]

    def of(self, name: str) -> list[Adapter]:
        """Everything that the adapter called ``name`` has at this site, in order."""
        return [a for entry, a in self.adapters.items() if adapter_name(entry) == name]

    def parts(self, name: str) -> list[tuple[str, Adapter]]:
        """As :meth:`of`, each with its path: the module's, or that of the module's parameter."""
        return [(self.path if a.parameter is None else f"{self.path}.{a.parameter}", a) for a in self.of(name)]


@dataclasses.dataclass
class AdapterRecord:
    """What is known of one named adapter: its plan, and where it came from."""

    plan: Plan
    #: (path of the module or parameter, entry, index of the rule, method as it applies there), in model order.
    sites: list[tuple[str, str, int, Method]]
    #: ``adapter_config.json`` as it was read, for an adapter loaded from PEFT's format.
    config: dict[str, Any] | None = None
    #: Of the base's embeddings, where its file holds others than the base has.
    rows: list[embeddings.Rows] = dataclasses.field(default_factory=list)
    #: A frozen copy of another adapter, which is no part of what the model's files hold.
    reference: bool = False


class AdapterSet:
    """Attaches, detaches and switches adapters. Checks everything before it changes anything."""

    def __init__(self, model: nn.Module, dtype: torch.dtype | None) -> None:
        self.model = model
        self.dtype = dtype
        self.records: dict[str, AdapterRecord] = {}
        self.live: tuple[str, ...] = ()
        #: What is folded into the base's weights; no adapter is live then.
        self.merged: Merged | None = None
        #: path -> (site id, every path of the module), in model order
        self._sites: dict[str, tuple[int, tuple[str, ...]]] = {}
        self._next_site_id = 0
        #: path -> the module that adapters were put on
        self._adapted: dict[str, nn.Module] = {}
        #: What the adapters may be at most, in a model with a bank.
        self.bank: Occupancy | None = None

    def open_bank(self, bank: Bank) -> None:
        """Give every site of ``bank`` a slot, on a model without adapters.

        Raises:
            BankError, PlanError, SiteError: its sites do not fit the model; nothing has changed then.
        """
        found = bank.paths(self.model)
        for path, _, module in found:
            attach.check_attachable(path, module)
            if adapters_of(module) is not None:
                raise SiteError(
                    f"{path} has adapters that are not this model's", found="it was compiled as part of another model",
                    do="detach that model first, or leave this module out of the bank's sites",
                )  # fmt: skip
        for number, (path, paths, module) in enumerate(found):
            attach.add_slot(module, number, changes_input=bank.changes_input)
            self._sites[path] = (number, paths)
        self._next_site_id = len(found)
        self.bank = Occupancy(bank, self._sites)

    def close_bank(self) -> None:
        """Take the slots off a model that has no adapters."""
        for site in self.sites if self.bank is not None else ():
            attach.remove_slot(site.module)
        self.bank, self._sites = None, {}

    @property
    def sites(self) -> list[Site]:
        modules = dict(self.model.named_modules(remove_duplicate=False))
        gone = [p for p in self._sites if p not in modules or adapters_of(modules[p]) is None]
        for path in gone:
            del self._sites[path]
            message = f"{path} was replaced or removed, and its adapters with it: it is no site any more"
            warnings.warn(AdaptcWarning(message), stacklevel=3)
        return [Site(path, paths, number, modules[path]) for path, (number, paths) in self._sites.items()]

    @property
    def acting(self) -> tuple[str, ...]:
        """The adapters that outputs have: the live ones, or those that are merged."""
        return self.live if self.merged is None else self.merged.names

    def let_go(self) -> None:
        """Called when a site's weights have been read, for those that are mapped from files; here there are none."""

    def record(self, name: str) -> AdapterRecord:
        if name not in self.records:
            known = ", ".join(self.records) or "none"
            raise AdapterNameError(f"no adapter named {name!r}", found=f"adapters: {known}")
        return self.records[name]

    def install(
        self, name: str, plan: Plan, *, config: dict[str, Any] | None = None, calibration: Iterable[Any] | None = None
    ) -> bool:
        """Attach fresh adapters of ``plan`` under ``name``, not live. True when captured graphs are out of date:
        the set of sites grew, or a module got a hook.

        ``calibration``: batches, for methods whose initial values depend on their inputs.

        Raises:
            AdapterNameError: ``name`` is taken or not legal; PlanError, SiteError: the plan does not fit.
        """
        if name in self.records:
            raise AdapterNameError(
                f"an adapter named {name!r} is there already", do=f"model.adaptc.remove({name!r}) first"
            )
        check_adapter_name(name)
        with self.base_alone():  # what is initialised from a weight, or copies it, means the base's own
            return self._install(name, plan, config, calibration)

    def _install(
        self, name: str, plan: Plan, config: dict[str, Any] | None, calibration: Iterable[Any] | None
    ) -> bool:
        assignments = with_all_biases(plan.resolve(self.model), self.model)
        built: list[tuple[Assignment, str, Adapter]] = []
        sites, next_id = dict(self._sites), self._next_site_id
        stacked: dict[str, int] = {}
        for assignment in assignments:
            path = assignment.module_path
            if path not in sites:
                sites[path], next_id = (next_id, assignment.module_paths), next_id + 1
            level = stacked[assignment.path] = stacked.get(assignment.path, -1) + 1
            entry = entry_of(name, level, assignment.parameter)
            self._check_free(path, assignment.module, entry)
            adapter = fresh(assignment, self.dtype, sites[path][0])
            self.let_go()
            own_forward = adapter.replaces_forward or adapter.acts_inside
            attach.check_attachable(path, assignment.module, own_forward=own_forward)
            built.append((assignment, entry, adapter))
        if self.bank is not None:
            self.bank.check(name, self._sizes(), [(a.path, adapter) for a, _, adapter in built])
        for kind in dict.fromkeys(type(adapter.method) for _, _, adapter in built):
            with torch.inference_mode(False):
                kind.link([adapter for _, _, adapter in built if type(adapter.method) is kind])
        modules = dict(self.model.named_modules(remove_duplicate=False))
        taps = [
            (a.module, adapter.tap, attach.find_tap(a.path, adapter.tap, modules))
            for a, _, adapter in built
            if adapter.tap is not None
        ]
        self._calibrate([(a, adapter) for a, _, adapter in built if adapter.method.needs_covariance], calibration)
        changed = [attach.attach(a.module_path, a.module, entry, adapter) for a, entry, adapter in built]
        changed += [attach.add_tap(*tap) for tap in taps]
        grew = len(sites) > len(self._sites) or any(changed)
        order = {path: i for i, path in enumerate(modules)}
        self._sites, self._next_site_id = dict(sorted(sites.items(), key=lambda s: order[s[0]])), next_id
        self._warn_of_idle([a.path for a, _, adapter in built if not adapter.acts_inside])
        self._adapted.update((a.module_path, a.module) for a, _, _ in built)
        recorded = [(a.path, entry, a.rule, adapter.method) for a, entry, adapter in built]
        self.records[name] = AdapterRecord(plan, recorded, config)
        return grew

    def bank_counts(self) -> dict[str, int]:
        """What of the bank is taken; nothing without one."""
        if self.bank is None:
            return {}
        taken = size_of(a for site in self.sites for a in site.adapters.values())
        return {"bank_slots": self.bank.bank.slots, "bank_used": len(self.records), "bank_bytes": taken}

    def _sizes(self) -> dict[str, int]:
        """Adapter -> what its tensors take, in bytes."""
        found: dict[str, list[Adapter]] = {name: [] for name in self.records}
        for site in self.sites:
            for entry, adapter in site.adapters.items():
                found[adapter_name(entry)].append(adapter)
        return {name: size_of(parts) for name, parts in found.items()}

    def _warn_of_idle(self, paths: Sequence[str]) -> None:
        """Say which of the sites' weights are read past their calls."""
        reasons: dict[str, list[str]] = {}
        for path in paths:
            if reason := bypassed.idle(self.model, path):
                reasons.setdefault(reason, []).append(path)
        for reason, found in reasons.items():
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            warnings.warn(AdaptcWarning(f"{found[0]}{more}: {reason}"), stacklevel=5)

    def copy_frozen(self, name: str, new: str) -> None:
        """Put a copy of the adapter ``name`` as it is now beside it, under ``new``, not live and not trained.

        Captured graphs stay: the copy's sites are those of ``name``, and have their hooks.

        Raises:
            AdapterNameError: there is no adapter ``name``, or ``new`` is taken or not legal.
        """
        record = self.record(name)
        if new in self.records:
            raise AdapterNameError(f"an adapter named {new!r} is there already", do="remove it first")
        check_adapter_name(new)
        if self.bank is not None:
            sizes = self._sizes()
            self.bank.check_room(new, sizes, sizes[name])
        own = {id(t): t for t in (*self.model.parameters(), *self.model.modules())}
        copied = [(site, key, a) for site in self.sites for key, a in site.adapters.items()]
        copied = [row for row in copied if adapter_name(row[1]) == name]
        for _, _, adapter in copied:  # what is theirs is copied, what they only refer to is not
            for part in (*adapter.parameters(), *adapter.modules()):
                own.pop(id(part), None)
        with torch.inference_mode(False):
            twins = [copy.deepcopy(adapter, own).requires_grad_(False) for _, _, adapter in copied]
        for (site, key, _), twin in zip(copied, twins, strict=True):
            attach.attach(site.path, site.module, new + key[len(name) :], twin)
        sites = [(path, new + key[len(name) :], rule, method) for path, key, rule, method in record.sites]
        self.records[new] = dataclasses.replace(record, sites=sites, rows=list(record.rows), reference=True)

    def check_weights(self) -> None:
        """Raise UnsupportedError where a site's module was replaced by a copy of it with another weight: its adapters
        were copied too, and what they add is no longer of this layer."""
        adapted = {id(module) for module in self._adapted.values()}  # one may have another path by now
        for site in self.sites:
            was = self._adapted.get(site.path, site.module)
            if id(site.module) not in adapted and not have_one_weight(was, site.module):
                raise UnsupportedError(
                    f"{site.path}: an adapted {type(was).__name__} was replaced by a copy with another weight",
                    expected="the weight that was adapted: fuse_modules folds a normalisation into it",
                    do="fold the adapters in first (model.adaptc.merge_and_unload()) and fuse then, or adapt the model"
                    " anew",
                )

    def _check_free(self, path: str, module: nn.Module, entry: str) -> None:
        found = adapters_of(module)
        if found is not None and entry in found:
            raise SiteError(
                f"{path} has an adapter {entry!r} that is not this model's",
                found="it was compiled as part of another model",
                do="detach that model first, or give this adapter another name",
            )

    def _calibrate(self, chosen: Sequence[tuple[Assignment, Adapter]], calibration: Iterable[Any] | None) -> None:
        """Give ``chosen`` adapters the covariances of their modules' inputs in the model without adapters."""
        if not chosen:
            return
        if calibration is None:
            assignment, adapter = chosen[0]
            raise PlanError(
                f"{assignment.path}: {adapter.method.kind} is to start from the covariance of its inputs",
                expected="calibration batches", found="none", do="adaptc.compile(model, plan, calibration=batches)",
            )  # fmt: skip
        live = self.live
        self.set_live(())
        try:
            found = covariances(self.model, {a.path: a.module for a, _ in chosen}, calibration)
        finally:
            self.set_live(live)
        for assignment, adapter in chosen:
            weight = assignment.module.weight
            assert isinstance(weight, torch.Tensor)
            adapter.set_covariance(assignment.path, weight, found.of(assignment.path))

    def remove(self, name: str) -> bool:
        """Take the adapter ``name`` off the model, and unmerge first. True when the set of sites shrank."""
        self.record(name)
        self.unmerge()
        self.set_rows(name, [])
        sites = self.sites
        for site in sites:
            for entry in list(site.adapters):
                if adapter_name(entry) == name:
                    attach.remove(site.module, entry)
        del self.records[name]
        slots = frozenset() if self.bank is None else self.bank.sites
        left = {site.path for site in sites if site.adapters} | slots
        shrank = set(self._sites) != left
        self._sites = {path: s for path, s in self._sites.items() if path in left}
        self.set_live(tuple(n for n in self.live if n != name))
        return shrank

    def check_together(self, names: tuple[str, ...]) -> None:
        """Raise unless ``names`` can act together.

        Raises:
            AdapterNameError: an unknown name, or one given twice.
            SiteError: two of them replace the same module.
        """
        for name in names:
            self.record(name)
        if len(set(names)) != len(names):
            raise AdapterNameError(f"a name is given twice: {', '.join(names)}")
        together.check({site.path: [(n, a) for n in names for a in site.of(n)] for site in self.sites})
        groups = {name: rows for name in names if (rows := self.records[name].rows)}
        if groups:
            with self.base_alone():
                embeddings.check_together(self.model, groups)

    def set_live(self, names: tuple[str, ...]) -> None:
        """Make exactly ``names`` live, in this order; what is merged is undone.

        Raises:
            AdapterNameError, SiteError: as :meth:`check_together`; nothing has changed then.
        """
        self.check_together(names)
        self._restore()
        for site in self.sites:
            found = adapters_of(site.module)
            assert found is not None  # a site without adapters is none
            found.make_live([adapter for name in names for adapter in site.of(name)])
        for rows in reversed(self._live_rows()):
            rows.put(self.model, False)
        self.live = names
        for rows in self._live_rows():
            rows.put(self.model, True)
        self.say_active()

    def say_active(self) -> None:
        """Tell who asks the model as a PEFT model which adapters act."""
        if ACTIVE in self.model.__dict__:
            names = self.acting
            self.model.__dict__[ACTIVE] = names[0] if len(names) == 1 else list(names)

    def unmerge(self) -> None:
        """Put the base's own weights back, bit for bit, and make those live that were so before the merge."""
        if self.merged is not None:
            self.set_live(tuple(name for name in self.merged.before if name in self.records))

    def _restore(self) -> None:
        if self.merged is not None:
            self.merged.patch.restore(self.model)
            self.merged = None

    def _live_rows(self) -> list[embeddings.Rows]:
        return [rows for name in self.live if name in self.records for rows in self.records[name].rows]

    def base_alone(self) -> contextlib.AbstractContextManager[None]:
        """A block in which the base has its own weights, and its embeddings their own rows."""
        if self.merged is not None:  # no adapter is live, nor are its rows
            return self.merged.patch.lifted(self.model)
        return embeddings.base_alone(self.model, self._live_rows())

    def set_rows(self, name: str, rows: list[embeddings.Rows]) -> None:
        """Give the adapter ``name`` other rows of the base's embeddings; they are at work if it is live."""
        record = self.record(name)
        if name in self.acting:
            self.unmerge()
        inside = self._live_rows()
        with self.base_alone():
            if name in self.live:
                others = {n: self.records[n].rows for n in self.live if n != name}
                embeddings.check_together(self.model, {**others, name: rows})
        for part in reversed(inside):
            part.put(self.model, False)
        record.rows = rows
        for part in self._live_rows():
            part.put(self.model, True)

    def keep_merged(self) -> None:
        """Leave what is merged in the base for good: it is part of the base's own weights from here on."""
        merged, self.merged = self.merged, None
        unguard(self.model)
        for name in merged.names if merged is not None else ():
            self.records[name].rows = []

    def pipeline(self) -> Pipeline:
        """The passes that the live adapters' plans ask for (the first plan that says anything)."""
        plans = [self.records[name].plan for name in (*self.live, *self.records)]
        return pipeline_of(next((plan for plan in plans if plan.passes and plan.passes.says_which), None))

    @property
    def has_taps(self) -> bool:
        """Whether some adapter reads the input of another module than its own."""
        return any(a.tap is not None for site in self.sites for a in site.adapters.values())

    def signature(self) -> tuple[object, ...]:
        """What captured graphs depend on: for every site, the signatures of its live adapters."""
        return tuple(tuple(a.signature() for n in self.live for a in site.of(n)) for site in self.sites)

    def named_parameters(self, name: str | None = None) -> Iterator[tuple[str, nn.Parameter]]:
        """(name in the model, parameter) of one adapter, or of all."""
        if name is not None:
            self.record(name)
        for site in self.sites:
            for entry, adapter in site.adapters.items():
                if name is None or adapter_name(entry) == name:
                    for local, parameter in adapter.named_parameters():
                        yield f"{site.path}.adapters.{entry}.{local}".lstrip("."), parameter
