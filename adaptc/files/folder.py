"""Adapter folders and a compiled model: ``model.adaptc.save``, ``.load``, and adding from a folder."""

from __future__ import annotations

import dataclasses
import functools
import os
import warnings
from pathlib import Path
from typing import Any

import torch

from adaptc.errors import AdaptcWarning, ConfigError
from adaptc.files import checkpoint, peft_experts, peft_keys
from adaptc.files.fingerprint import compare_fingerprint, fingerprint
from adaptc.methods.base import Adapter, Method
from adaptc.plan import Assignment, Plan
from adaptc.plan.files import is_peft_config
from adaptc.plan.peft.reading import config_to_rules, without_idle_keys
from adaptc.plan.peft.writing import codec_of_sites, comparable, rules_to_config
from adaptc.runtime import embeddings, processes
from adaptc.runtime.adapters import AdapterSet
from adaptc.runtime.fresh import fresh, with_all_biases
from adaptc.runtime.names import check_adapter_name


@dataclasses.dataclass(frozen=True)
class Saved:
    """What a site's row in a file is made of."""

    path: str
    module: torch.nn.Module
    method: Method
    parameter: str | None = None


def is_adapter_directory(source: object) -> bool:
    return isinstance(source, str | os.PathLike) and Path(source).is_dir()


def plan_of(source: Any, model: torch.nn.Module | None = None) -> Plan:
    """The plan that ``source`` means, as ``adaptc.compile`` takes it; a folder's own, when it has one."""
    if is_adapter_directory(source):
        return _plan_in(_read(source, model), model)
    if model is not None and is_peft_config(source):
        return Plan.from_peft(source, model=model)
    return Plan.coerce(source)


def _read(directory: Any, model: torch.nn.Module | None) -> checkpoint.AdapterFiles:
    """The files, with adapters of single experts as PEFT fuses them for ``model``."""
    files = checkpoint.read_adapter(directory)
    if model is None or files.config is None or files.plan is not None:
        return files
    config, tensors = peft_experts.fuse(files.config, files.tensors, model, source=str(files.path))
    return dataclasses.replace(files, config=config, tensors=tensors)


def _plan_in(files: checkpoint.AdapterFiles, model: torch.nn.Module | None) -> Plan:
    if files.plan is not None:
        plan = Plan.from_dict(files.plan)
        return plan if model is None else Plan(without_idle_keys(plan.rules, model), plan.passes)
    assert files.config is not None  # read_adapter: a folder without a config has a plan
    return Plan(config_to_rules(files.config, model=model, loading=True))


@dataclasses.dataclass(frozen=True)
class Read:
    """An adapter folder, read and checked against a model."""

    files: checkpoint.AdapterFiles
    plan: Plan
    decoded: peft_keys.Decoded
    rows: list[embeddings.Rows]


def read_new(adapters: AdapterSet, directory: Any) -> Read:
    """A folder that is to become an adapter of its own; raises when it does not fit."""
    model = adapters.model
    files = _read(directory, model)
    plan = _plan_in(files, model)
    # Built once aside, to check the tensors before anything is attached.
    with torch.random.fork_rng(devices=[]):
        trial: dict[str, Adapter] = {}
        for site in with_all_biases(plan.resolve(model), model):
            trial[site.path] = fresh(site, adapters.dtype)
            adapters.let_go()
        for kind in dict.fromkeys(type(adapter.method) for adapter in trial.values()):
            kind.link([adapter for adapter in trial.values() if type(adapter.method) is kind])
    decoded = _decode(files, trial, model)
    return Read(files, plan, decoded, _rows(files, decoded, adapters))


def put(adapters: AdapterSet, name: str, read: Read) -> None:
    """Give the adapter ``name``, which was attached by the folder's plan, the folder's values."""
    peft_keys.assign(read.decoded, _parts(adapters, name))
    adapters.set_rows(name, read.rows)
    if read.files.plan is None:
        _warn_of_another_function(read.files.path, _parts(adapters, name), stacklevel=5)


def load(adapters: AdapterSet, directory: Any, name: str) -> None:
    """Replace the values of the adapter ``name`` by those of a folder.

    Where parameters are sharded all processes must call, and each keeps its part.
    """
    model, parts = adapters.model, _parts(adapters, name)
    files = _read(directory, model)
    _check_same_sites(with_all_biases(_plan_in(files, model).resolve(model), model), adapters, name)
    with processes.gathered(model, parts.values(), write=True):
        decoded = _decode(files, parts, model)
        adapters.set_rows(name, _rows(files, decoded, adapters))
        peft_keys.assign(decoded, parts)
    adapters.records[name].config = files.config
    if files.plan is None:
        _warn_of_another_function(files.path, parts)


def save(adapters: AdapterSet, directory: Any, name: str, save_embedding_layers: bool | str = "auto") -> None:
    """Write an adapter: in PEFT's format, or in adaptc's own where PEFT has no such method.

    ``save_embedding_layers``: see ``Handle.save``.

    Where parameters are sharded all processes must call, the first one writes, and the others wait for it.

    Raises:
        UnsupportedError: PEFT has the method, and its format no place for these sites or options.
    """
    model, record = adapters.model, adapters.record(name)
    check_adapter_name(name, [p for p, _ in model.named_modules() if ".adapters" not in f".{p}"])
    parts = [(site, path, adapter) for site in adapters.sites for path, adapter in site.parts(name)]
    sites = [Saved(path, s.module, a.method_now(), a.parameter) for s, path, a in parts]
    config = None
    if codec_of_sites(sites) is not None:
        config = rules_to_config(
            record.plan.rules,
            sites,
            base_model_name=None if record.config else getattr(model, "name_or_path", None) or None,
            original=record.config,
            model=model,
        )
    written = _parts(adapters, name)
    with processes.gathered(model, written.values()):
        tensors = peft_keys.encode(written, config)
    with adapters.base_alone():
        layers = embeddings.to_save(model, record.rows, save_embedding_layers)
        # What a reader finds again is the base with the rows that the file brings.
        with embeddings.at_work(model, record.rows if layers else []):
            base = fingerprint(model, [site.path for site, _, _ in parts])
    write = functools.partial(
        checkpoint.write_adapter,
        directory,
        config=config,
        tensors={**tensors, **peft_keys.embedding_keys(layers, written)},
        plan=record.plan.to_dict(),
        fingerprint=base,
    )
    processes.write_once(model, write)
    if config is not None:
        _warn_of_another_function(directory, written)


def _decode(
    files: checkpoint.AdapterFiles, adapters: dict[str, Adapter], model: torch.nn.Module
) -> peft_keys.Decoded:
    source = str(files.path)
    return peft_keys.decode(files.tensors, adapters, model=model, source=source, config=files.config)


def _rows(files: checkpoint.AdapterFiles, decoded: peft_keys.Decoded, adapters: AdapterSet) -> list[embeddings.Rows]:
    """The rows of the base's embeddings that the folder has others of; warns where the base is another one."""
    with adapters.base_alone():
        rows = embeddings.rows_of(adapters.model, decoded.get(peft_keys.EMBEDDINGS, {}), str(files.path))
        with embeddings.at_work(adapters.model, rows):
            _warn_of_another_base(files, adapters)
        return rows


def _parts(adapters: AdapterSet, name: str) -> dict[str, Adapter]:
    return {path: adapter for site in adapters.sites for path, adapter in site.parts(name)}


def _check_same_sites(theirs: list[Assignment], adapters: AdapterSet, name: str) -> None:
    ours = {path: comparable(a.method) for site in adapters.sites for path, a in site.parts(name)}
    found = {site.path: comparable(site.method) for site in theirs}
    different = sorted(path for path in ours.keys() | found.keys() if ours.get(path) != found.get(path))
    if different:
        path = different[0]
        raise ConfigError(
            f"the folder's adapter has other sites than {name!r}: {len(different)} differ, first {path}",
            expected=ours.get(path, "no adapter there"),
            found=found.get(path, "no adapter there"),
            do=f"model.adaptc.remove({name!r}) first, or load it under another name",
        )


def _warn_of_another_function(directory: Any, adapters: dict[str, Adapter], stacklevel: int = 4) -> None:
    """Say where PEFT computes something else from the same file."""
    sites: dict[str, list[str]] = {}
    for path, adapter in adapters.items():
        if difference := adapter.peft_difference():
            sites.setdefault(difference, []).append(path)
    for difference, paths in sites.items():
        more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        warnings.warn(
            f"{directory}: the adapter of {paths[0]}{more} is another function in PEFT: {difference}",
            AdaptcWarning,
            stacklevel=stacklevel,
        )


def _warn_of_another_base(files: checkpoint.AdapterFiles, adapters: AdapterSet) -> None:
    if files.fingerprint is not None:
        for difference in compare_fingerprint(files.fingerprint, adapters.model, adapters.let_go):
            warnings.warn(f"{files.path}: {difference}", AdaptcWarning, stacklevel=4)
