"""Saving a model whose modules write their own files: sentence-transformers' models and modules.

Their ``save``, which ``save_pretrained`` and ``push_to_hub`` call, has every module write a folder, from which the
module's class reads it back. While such a model is compiled, ``save`` is replaced on the instance, and while it runs

* a transformers model inside it writes the live adapter in PEFT's format beside the name of its base, which
  transformers reads where PEFT is installed; where that would lose something, its whole weights with the adapter
  folded in;
* any other module writes its weights with the adapters folded in.

So what is read back computes what the compiled model computes, without adaptc. What can be written in neither way is
refused before anything is written.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from adaptc import distributed
from adaptc.errors import CheckpointError, UnsupportedError
from adaptc.files import checkpoint, peft_keys
from adaptc.files.base_files import missing_in_base
from adaptc.files.folder import Saved
from adaptc.plan.peft.writing import codec_of_sites, rules_to_config
from adaptc.runtime.adapters import AdapterSet
from adaptc.runtime.folding import folded_state
from adaptc.runtime.site_adapters import adapters_of

_LIBRARY = "sentence_transformers."
_CONFIG = "adapter_config.json"

#: PEFT's types of adapters that transformers puts into a model when it reads the model's folder, with all their values.
_READ = {"LORA", "IA3"}

#: ``(module, directory, options of its own method) -> None``
Write = Callable[..., None]


def is_composite(model: nn.Module) -> bool:
    """Whether the model's class saves it module by module."""
    ours = any(t.__module__.startswith(_LIBRARY) for t in type(model).__mro__)
    return ours and callable(getattr(type(model), "save", None))


def save(adapters: AdapterSet, path: Any, *args: Any, merge: bool = False, **options: Any) -> None:
    """The class's own ``save``, in which modules with adapters write what reads back as they compute now.

    Args:
        merge: fold the adapters into the weights everywhere, also where PEFT's format has a place for them.

    Raises:
        UnsupportedError: an adapter that can be written in no way; nothing was written.
    """
    model = adapters.model
    if distributed.is_sharded(model):
        raise UnsupportedError(
            "the modules of a sharded model cannot be written one by one",
            do="model.adaptc.save(directory) in all processes, then load it into a whole model and save that",
        )
    with _writers(adapters, merge):
        type(model).save(model, path, *args, **options)  # type: ignore[attr-defined]


@contextlib.contextmanager
def _writers(adapters: AdapterSet, merge: bool) -> Iterator[None]:
    """Modules with adapters inside write what reads back without them."""
    before: list[tuple[nn.Module, str, Any]] = []
    replaced: list[tuple[nn.Module, str, Any]] = []
    whole: list[str] = []
    for path, module in adapters.model.named_modules():
        if any(_inside(path, outer) is not None for outer in whole) or not _has_adapters(module):
            continue
        if _is_pretrained(module):
            whole.append(path)
            replaced.append((module, "save_pretrained", _pretrained_writer(adapters, path, module, merge)))
        elif _writes_its_state(module):
            replaced.append((module, "state_dict", _State(module, _state_of(adapters, path))))
    try:
        for module, name, value in replaced:
            before.append((module, name, module.__dict__.get(name)))
            module.__dict__[name] = value
        yield
    finally:
        for module, name, value in before:
            if value is None:
                del module.__dict__[name]
            else:
                module.__dict__[name] = value


def _has_adapters(module: nn.Module) -> bool:
    return any(adapters_of(inner) is not None for inner in module.modules())


def _is_pretrained(module: nn.Module) -> bool:
    """Whether it is a model of transformers, which writes its own files."""
    return callable(getattr(type(module), "save_pretrained", None)) and not is_composite(module)


def _writes_its_state(module: nn.Module) -> bool:
    """Whether its ``save`` writes its own tensors: no module inside it writes its own files."""
    inner = [m for m in module.modules() if m is not module]
    return is_composite(module) and not any(is_composite(m) or _is_pretrained(m) for m in inner)


class _State:
    """In the place of a module's ``state_dict`` while it is written."""

    def __init__(self, module: nn.Module, values: Mapping[str, torch.Tensor]) -> None:
        self.module, self.values = module, values

    def __call__(self, *_: Any, **__: Any) -> dict[str, torch.Tensor]:
        return dict(self.values)


def _state_of(adapters: AdapterSet, path: str) -> dict[str, torch.Tensor]:
    """The tensors of the module ``path``, by their names in it, with the live adapters folded in."""
    state = folded_state(adapters, within=path)
    return {name[len(path) :].lstrip("."): tensor for name, tensor in state.items()}


def _pretrained_writer(adapters: AdapterSet, path: str, part: nn.Module, merge: bool) -> Write:
    """How a model of transformers is written: as an adapter, or whole.

    Raises:
        UnsupportedError: neither is possible.
    """
    reason = None
    if not merge and _is_live_inside(adapters, path):
        try:
            return _adapter_writer(adapters, path, part)
        except UnsupportedError as error:
            reason = error
    try:
        state = _state_of(adapters, path)
    except UnsupportedError as error:
        raise error if reason is None else reason from error
    return _WholeWriter(part, state)


class _WholeWriter:
    def __init__(self, part: nn.Module, state: dict[str, torch.Tensor]) -> None:
        self.part, self.state = part, state

    def __call__(self, directory: str | os.PathLike[str], **options: Any) -> None:
        """Raises:
        CheckpointError: what is in the directory would be added to the weights when they are read.
        """
        if (Path(directory) / _CONFIG).exists():
            raise CheckpointError(
                f"{directory} holds an adapter: the whole model read from there would get it a second time",
                do="give a directory of its own",
            )
        part: Any = self.part
        type(part).save_pretrained(part, directory, state_dict=self.state, **options)


def _is_live_inside(adapters: AdapterSet, path: str) -> bool:
    sites = [site for site in adapters.sites if _inside(site.path, path) is not None]
    return any(site.of(name) for site in sites for name in adapters.acting)


def _adapter_writer(adapters: AdapterSet, path: str, part: nn.Module) -> Write:
    """What writes the live adapter's sites inside a model of transformers as that model's own adapter.

    Raises:
        UnsupportedError: the adapter, or the rest of the model, would not be read back from it as it is.
    """
    live = adapters.acting
    if len(live) != 1:
        raise UnsupportedError(f"{path}: an adapter's files hold one adapter", found=f"live: {', '.join(live)}")
    name = live[0]
    if adapters.records[name].rows:
        raise UnsupportedError(f"{path}: an adapter's files do not hold the embeddings that came with {name!r}")
    rows = [
        (local, site.module, adapter)
        for site in adapters.sites
        for where, adapter in site.parts(name)
        if (local := _inside(where, path)) is not None
    ]
    sites = [Saved(local, module, adapter.method_now(), adapter.parameter) for local, module, adapter in rows]
    codec = codec_of_sites(sites)
    # Of DoRA transformers leaves the magnitudes out (5.23; their key in PEFT's files is not the one it looks for).
    if codec is None or codec.peft_type not in _READ or any(getattr(s.method, "dora", False) for s in sites):
        kinds = ", ".join(sorted({"dora" if getattr(s.method, "dora", False) else s.method.kind for s in sites}))
        raise UnsupportedError(
            f"{path}: transformers reads no adapter of this kind ({kinds}) from a model's folder",
            do="model.adaptc.save(directory), and adaptc.compile(model, directory) to read it",
        )
    _check_base(path, part)
    config = rules_to_config(
        adapters.records[name].plan.rules, sites, base_model_name=cast(Any, part).name_or_path, model=part
    )
    tensors = peft_keys.encode({local: adapter for local, _, adapter in rows}, config)

    def write(directory: str | os.PathLike[str], **_: Any) -> None:
        checkpoint.write_adapter(directory, config=config, tensors=tensors, plan=None, fingerprint=None)

    return write


def _inside(path: str, outer: str) -> str | None:
    """``path`` below ``outer``; None when it is elsewhere."""
    if not outer:
        return path
    return path[len(outer) + 1 :] if path.startswith(f"{outer}.") else None


def _check_base(path: str, part: nn.Module) -> None:
    """Raise UnsupportedError unless the base that an adapter's config names gives everything but the adapter."""
    where = getattr(part, "name_or_path", None)
    own = {name: p for name, p in part.named_parameters() if ".adapters." not in f".{name}"}
    trained = [name for name, p in own.items() if p.requires_grad]
    reason = None
    if not where:
        reason = "it was loaded from nowhere"
    elif trained:
        reason = f"its own weights are trained too ({trained[0]})"
    elif missing := missing_in_base(str(where), own, getattr(part, "base_model_prefix", "")):
        reason = missing
    if reason is not None:
        raise UnsupportedError(
            f"{path}: an adapter alone is not enough to read this {type(part).__name__} back", found=reason,
            do="model.adaptc.save(directory), and adaptc.compile(model, directory) to read it",
        )  # fmt: skip
