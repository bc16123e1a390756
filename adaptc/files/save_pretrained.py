"""``save_pretrained`` of a compiled model: the adapter, or the model with the adapter folded in.

A class's own ``save_pretrained`` writes every tensor of the model, and its ``from_pretrained`` passes over the
adapter's, so that what is read back is the bare base. While a model has adapters the method is therefore replaced on
the instance: on the model itself by :class:`AdapterSaver`, on parts of it that have one too by :class:`PartSaver`.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adaptc import distributed
from adaptc.errors import AdapterNameError, CheckpointError, ResumeError, UnsupportedError
from adaptc.files import composite, folder
from adaptc.files.checkpoint import WEIGHTS
from adaptc.runtime.adapters import ACTIVE, AdapterSet
from adaptc.runtime.names import adapter_directory
from adaptc.runtime.site_adapters import adapters_of

_METHOD = "save_pretrained"
#: How transformers knows that a quantised model has adapters to train.
_ADAPTED = "_hf_peft_config_loaded"
#: Methods of a PEFT model that the handle has too.
ALIASES = ("print_trainable_parameters", "disable_adapter", "merge_and_unload")
#: Arguments of transformers' method that are about the files of a whole model, and the values that change nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "push_to_hub": (False,),
    "variant": (None,),
    "safe_serialization": (True,),
    "save_peft_format": (True,),
    "distributed_checkpoint": (False,),
}
#: Arguments of transformers' (and accelerate's) method that do not matter to an adapter's two files.
_IDLE = {"max_shard_size", "token", "save_original_format", "save_function"}
#: The one tensor of the file that stops a trainer which does not know of adapters (see :func:`guard`).
GUARD = "adaptc: resume with adaptc.integrations.AdapterTrainerMixin"
_GUARD_FILE = "model.safetensors"
#: Where a model whose modules write their own files keeps its adapters as adaptc reads them.
ADAPTERS = "adaptc"
#: Which adapters a directory holds and which of them were live.
LIST = "adaptc_adapters.json"


class OnModel:
    """Something under the name that it has on a PEFT model; copied and pickled with the model, and gone when the
    model is detached."""


class AdapterSaver(OnModel):
    """Installed as ``save_pretrained`` of the compiled model."""

    def __init__(self, adapters: AdapterSet) -> None:
        self.adapters = adapters

    def __call__(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: Mapping[str, torch.Tensor] | None = None,
        *,
        merge: bool = False,
        **options: Any,
    ) -> None:
        """Write the adapter in PEFT's format; with ``merge``, the whole model with the adapter folded into it.

        The live adapter goes into ``save_directory`` itself and every other one into the sub-directory of its
        name. When several are live, each has its sub-directory. A model without adapters is written as ever.

        Args:
            is_main_process: False writes nothing. Where parameters are sharded all processes call, and the first one
                writes, whatever this says.
            state_dict: the model's own tensors, if they are given at all.
            merge: fold the live adapters' updates into the weights, in fp64, rounded once. The model stays as it
                is, bit for bit. Other options are then those of the class's own method.

        Raises:
            UnsupportedError: an option that an adapter's files have no place for, a ``state_dict`` of other values, or
                an adapter that cannot be written in PEFT's format, or not be merged.
            CheckpointError: a merged model into a directory that holds an adapter.
        """
        model = self.adapters.model
        plain = functools.partial(_own_save, model)
        shared = {"is_main_process": is_main_process, **options}
        if not self.adapters.records:
            plain(save_directory, state_dict=state_dict, **shared)
        elif merge:
            save_merged(self.adapters, save_directory, plain, **shared)
        else:
            _check_options(options)
            sharded = distributed.is_sharded(model)
            if sharded and state_dict is not None:
                # Who gives one has gathered it, and may be the only process that calls.
                raise UnsupportedError(
                    "save_pretrained: a sharded model gathers its adapters itself, in all processes together",
                    found="a state_dict", do="model.adaptc.save(directory), or this without state_dict, in all of them",
                )  # fmt: skip
            _check_state(state_dict, self.adapters)
            if is_main_process or sharded:
                save_adapters(self.adapters, save_directory)


def _own_save(model: nn.Module, *args: Any, **options: Any) -> None:
    """The class's own ``save_pretrained``, which would ask PEFT for the adapters of a model that says it has some."""
    says = model.__dict__.pop(_ADAPTED, None)
    try:
        type(model).save_pretrained(model, *args, **options)  # type: ignore[attr-defined]
    finally:
        if says is not None:
            model.__dict__[_ADAPTED] = says


class CompositeSaver(OnModel):
    """Installed as ``save`` and ``save_pretrained`` of a model whose modules write their own files."""

    def __init__(self, adapters: AdapterSet) -> None:
        self.adapters = adapters

    def __call__(self, path: Any, *args: Any, merge: bool = False, **options: Any) -> None:
        """As the class's own method: everything is written that its class needs to read the model back, with the live
        adapters' effect; see :mod:`adaptc.files.composite`. In a trainer's checkpoint, and where there are adapters
        that are not live, all of them are written too, as adaptc reads them, into the folder ``adaptc``.

        Raises:
            UnsupportedError: an adapter that can be written in no way, before anything was written.
        """
        adapters = self.adapters
        if path is None or not adapters.records:
            type(adapters.model).save(adapters.model, path, *args, **options)  # type: ignore[attr-defined]
            return
        composite.save(adapters, path, *args, merge=merge, **options)
        if _is_checkpoint(Path(path)) or len(own_names(adapters)) > 1:
            save_adapters(adapters, Path(path) / ADAPTERS)


class PartSaver:
    """Installed as ``save_pretrained`` of parts of a compiled model that have such a method."""

    def __init__(self, part: nn.Module) -> None:
        self.part = part

    def __call__(self, save_directory: str | os.PathLike[str], *args: Any, **options: Any) -> None:
        """The class's own method, unless the part holds adapters, which it would write so that they are lost."""
        kind = type(self.part)
        if any(adapters_of(module) is not None for module in self.part.modules()):
            raise UnsupportedError(
                f"save_pretrained of a {kind.__name__} inside a compiled model would lose its adapters",
                do="save the compiled model itself, or call .adaptc.save(directory) on it",
            )
        kind.save_pretrained(self.part, save_directory, *args, **options)  # type: ignore[attr-defined]


class Alias(OnModel):
    """A method of the handle."""

    def __init__(self, handle: object, name: str) -> None:
        self.handle, self.name = handle, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.handle, self.name)(*args, **kwargs)


def has_saver(model: nn.Module) -> bool:
    """Whether the model's class has a ``save_pretrained`` that is replaced."""
    return isinstance(model.__dict__.get(_METHOD), AdapterSaver | CompositeSaver)


def arm(adapters: AdapterSet, handle: object) -> Any:
    """Install the savers, the methods of a PEFT model where their names are free, and the check that a trainer's
    checkpoint is read by one who can; returns what removes the check."""
    model = adapters.model
    if composite.is_composite(model):
        for name in ("save", _METHOD):
            if callable(getattr(type(model), name, None)):
                model.__dict__[name] = CompositeSaver(adapters)
    elif callable(getattr(type(model), _METHOD, None)):
        model.__dict__[_METHOD] = AdapterSaver(adapters)
    for module in model.modules():
        if module is not model and callable(getattr(type(module), _METHOD, None)):
            module.__dict__[_METHOD] = PartSaver(module)
    if getattr(model, "is_quantized", False) and getattr(model, _ADAPTED, None) is False:
        model.__dict__[_ADAPTED] = True  # transformers.Trainer refuses a quantised model without
    for name in ALIASES:
        if not hasattr(model, name):
            model.__dict__[name] = Alias(handle, name)
    return model.register_load_state_dict_pre_hook(refuse_guard)  # type: ignore[no-untyped-call]


def disarm(model: nn.Module) -> None:
    """Undo :func:`arm`, but for the check."""
    for module in model.modules():
        if isinstance(module.__dict__.get(_METHOD), AdapterSaver | PartSaver):
            del module.__dict__[_METHOD]
    model.__dict__.pop(_ADAPTED, None)
    model.__dict__.pop(ACTIVE, None)
    for name, value in list(model.__dict__.items()):
        if isinstance(value, OnModel):
            del model.__dict__[name]


# ------------------------------------------------------------------------------------------ adapters


def places(adapters: AdapterSet, directory: str | os.PathLike[str]) -> dict[str, Path]:
    """Adapter name -> its directory below ``directory``: the live one there, the others in their own.

    What is only a reference to train against is in a trainer's checkpoint, which must not lose it, and nowhere else.
    """
    root = Path(directory)
    names = [*own_names(adapters), *(references(adapters) if _is_checkpoint(root) else [])]
    alone = adapters.acting[0] if len(adapters.acting) == 1 else None
    found = {name: root if name == alone else root / name for name in names}
    for name in names:
        adapter_directory(root, name)  # raises when a link leads out of it
    return found


def own_names(adapters: AdapterSet) -> list[str]:
    """The adapters that files of the model hold."""
    return [name for name, record in adapters.records.items() if not record.reference]


def references(adapters: AdapterSet) -> list[str]:
    """The frozen copies that a trainer compares with."""
    return [name for name, record in adapters.records.items() if record.reference]


def _is_checkpoint(directory: Path) -> bool:
    if directory.name == ADAPTERS:
        directory = directory.parent
    return re.fullmatch(r"checkpoint-\d+", directory.name) is not None


def save_adapters(adapters: AdapterSet, directory: str | os.PathLike[str]) -> None:
    """Write every adapter of the model, each to its place, and in a trainer's checkpoint the guard."""
    root = Path(directory)
    for name, place in places(adapters, root).items():
        folder.save(adapters, place, name)
    if not distributed.writes(adapters.model):
        return
    in_checkpoint = _is_checkpoint(root)
    if in_checkpoint or len(own_names(adapters)) > 1:
        (root / LIST).write_text(json.dumps({"adapters": own_names(adapters), "live": adapters.acting}))
    if in_checkpoint and root.name != ADAPTERS and not (root / _GUARD_FILE).exists():
        import safetensors.torch

        safetensors.torch.save_file(guard(adapters.model), root / _GUARD_FILE, metadata={"format": "pt"})


def load_adapters(adapters: AdapterSet, directory: str | os.PathLike[str]) -> None:
    """Read back what :func:`save_adapters` wrote, into the adapters of the same names.

    Raises:
        ResumeError: the model has other adapters, or others are live.
        CheckpointError: the files of one are malformed or do not fit.
    """
    directory = Path(directory)
    if (directory / ADAPTERS).is_dir():
        directory = directory / ADAPTERS
    now = {"adapters": own_names(adapters), "live": list(adapters.acting)}
    file = directory / LIST
    then = json.loads(file.read_text()) if file.is_file() else None
    if then != now if then is not None else len(now["adapters"]) != 1:
        raise ResumeError(
            f"{directory} does not say that it holds this model's adapters",
            expected=now, found=then or f"no {LIST}: one adapter",
            do="add the same adapters in the same order and make the same ones live before training is taken up",
        )  # fmt: skip
    adapters.unmerge()
    for name, place in places(adapters, directory).items():
        if place.is_dir() or not adapters.records[name].reference:
            folder.load(adapters, place, name)


def guard(model: nn.Module) -> dict[str, torch.Tensor]:
    """A model file that makes a checkpoint of adapters unreadable to a trainer that would read the bare base from it.

    ``transformers.Trainer`` takes up training from the file of a whole model only, and passes over keys that fit
    nothing. One entry is what a compiled model knows and raises for; the other is an empty tensor in the place of a
    weight, for which every other model raises.
    """
    weight = next((name for name, tensor in model.state_dict().items() if tensor.numel() > 0), None)
    return {name: torch.zeros(0) for name in (GUARD, weight) if name is not None}


def refuse_guard(
    module: nn.Module, state_dict: Mapping[str, Any], prefix: str, local_metadata: Any, strict: bool, *_: Any
) -> None:
    """Hook before ``load_state_dict`` of a compiled model; module-level, so that models copy and pickle."""
    handle: Any = getattr(module, "adaptc", None)
    read_by_parts = composite.is_composite(module) and strict and getattr(handle, "records", None)
    if GUARD in state_dict or (read_by_parts and _is_without_adapters(state_dict)):
        raise ResumeError(
            "this checkpoint holds adapters, which the trainer does not read by itself",
            expected="a trainer of class MyTrainer(adaptc.integrations.AdapterTrainerMixin, Trainer)",
            found="a trainer without the mixin; nothing was loaded",
            do="resume, or load the best model, with the mixin; or model.adaptc.load(checkpoint)",
        )
    if handle is not None and handle.adapters.merged is not None:
        handle.unmerge()  # what is read is the base and the adapters, apart


def _is_without_adapters(state: Mapping[str, Any]) -> bool:
    """As of a model that sentence-transformers' trainer reads from a checkpoint, to take its values over."""
    return not any(".adapters." in f".{name}" for name in state)


def _check_options(options: Mapping[str, Any]) -> None:
    for name, value in options.items():
        if name in _NEUTRAL and value not in _NEUTRAL[name]:
            raise UnsupportedError(
                f"save_pretrained: an adapter's files have no place for {name}",
                expected=" or ".join(map(repr, _NEUTRAL[name])), found=repr(value),
                do="model.push_to_hub(...)" if name == "push_to_hub" else "leave it out, or give merge=True",
            )  # fmt: skip
        if name not in _NEUTRAL and name not in _IDLE:
            raise TypeError(f"save_pretrained() got an unexpected keyword argument {name!r}")


def _check_state(state: Mapping[str, torch.Tensor] | None, adapters: AdapterSet) -> None:
    """Raise unless a given state has the adapters' tensors as the model has them."""
    if state is None:
        return
    for name, own in adapters.model.state_dict().items():
        if ".adapters." in f".{name}" and not (name in state and torch.equal(state[name].to(own), own)):
            raise UnsupportedError(
                f"save_pretrained: state_dict has other values than the model: {name}",
                expected="the model's own state_dict(), or none",
                do="load the values into the model first",
            )


# -------------------------------------------------------------------------------------------- merged


def save_merged(adapters: AdapterSet, directory: str | os.PathLike[str], write: Any, **options: Any) -> None:
    """Write the whole model with its live adapters folded in, by ``write``, the class's own method."""
    from adaptc.runtime.folding import folded_state

    if not adapters.acting:
        raise AdapterNameError("save_pretrained(merge=True): no adapter is live", do="model.adaptc.switch(name)")
    path = Path(directory)
    if (path / WEIGHTS).exists():
        raise CheckpointError(
            f"{path} holds an adapter: the merged model read from there would get it a second time",
            do="give a directory of its own",
        )
    write(directory, state_dict=folded_state(adapters), **options)
