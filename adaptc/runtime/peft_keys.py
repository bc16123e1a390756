"""PEFT's tensor keys: adapters to tensors and back.

====================================================  ==================================================
``base_model.model.<path>.lora_A.weight``             a factor of LoRA at ``<path>``
``base_model.model.<path>.base_layer.bias``           a trained bias of a module that also has LoRA
``base_model.model.<path>.bias``                      a trained bias of any other module
``base_model.model.<path>.<name>``                    the parameters and buffers of a fully trained module
====================================================  ==================================================

Read, not written: a factor's key with the adapter's name inside (``lora_A.default.weight``, from a saved
``state_dict``); wrappers' names (``_orig_mod`` of torch.compile, ``_fsdp_wrapped_module``, ``module`` of
DDP); keys without ``base_model.model.`` (diffusers). Passed over: what PEFT writes by the way, that is
``<path>.original_module.*`` and ``<path>.modules_to_save.*`` for ``bias="all"`` beside a fully trained
module, and frozen base weights (``lm_head.base_layer.weight`` when the head has LoRA), which must equal
the model's.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import NamedTuple, NoReturn

import torch
from torch import nn

from adaptc.errors import MissingKeyError, NonFiniteError, TensorShapeError, UnexpectedKeyError
from adaptc.methods.base import Adapter
from adaptc.runtime.tensor_file import check_finite

PREFIX = "base_model.model."
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
Decoded = dict[str, dict[str, torch.Tensor]]


class _Place(NamedTuple):
    """Where a tensor of the file belongs: ``own``, which is ``suffix`` of the adapter at ``path``."""

    path: str
    suffix: str
    own: torch.Tensor


def tensors_of(adapter: Adapter) -> dict[str, torch.Tensor]:
    """What an adapter stores, by the suffix of its key: parameters, and a full copy's persistent buffers."""
    if adapter.replaces_forward:
        copy = adapter.copy
        assert isinstance(copy, nn.Module)  # what replaces a forward is a module of its own
        return dict(copy.state_dict(keep_vars=True))
    return dict(adapter.peft_tensors())


def encode(adapters: Mapping[str, Adapter]) -> dict[str, torch.Tensor]:
    """The tensors of an adapter (module path -> its part there) under PEFT's keys; no copies are made."""
    return {
        PREFIX + _key(path, suffix, adapter): tensor.detach()
        for path, adapter in adapters.items()
        for suffix, tensor in tensors_of(adapter).items()
    }


def decode(
    tensors: Mapping[str, torch.Tensor],
    adapters: Mapping[str, Adapter],
    *,
    model: nn.Module | None = None,
    source: str = "the adapter",
) -> Decoded:
    """The values for each adapter, by module path and suffix, checked before anything is changed.

    To load them::

        for path, values in decode(tensors, adapters).items():
            for suffix, tensor in tensors_of(adapters[path]).items():
                tensor.data.copy_(values[suffix])

    Args:
        model: the host, so that frozen weights in the file can be compared with its own.
        source: what to call the file in errors.

    Raises:
        UnexpectedKeyError: a tensor that belongs nowhere (nearest keys are named), or twice in the file.
        MissingKeyError, TensorShapeError, NonFiniteError: a tensor is not there, or does not fit.
    """
    places = {
        _key(path, suffix, adapter): _Place(path, suffix, own)
        for path, adapter in adapters.items()
        for suffix, own in tensors_of(adapter).items()
    }
    full = {path for path, adapter in adapters.items() if adapter.replaces_forward}
    found = _sort_keys(tensors, places, full, model, source)
    _check_complete(found, places, source)
    decoded: Decoded = {}
    for short, place in places.items():
        key = found[short]
        _check_tensor(key, tensors[key], place.own, source)
        decoded.setdefault(place.path, {})[place.suffix] = tensors[key]
    return decoded


def _sort_keys(
    tensors: Mapping[str, torch.Tensor],
    places: Mapping[str, _Place],
    full: set[str],
    model: nn.Module | None,
    source: str,
) -> dict[str, str]:
    """Key as written here -> key in the file; raises when a key of the file belongs nowhere."""
    hits: list[tuple[str, str]] = []
    names: dict[str, str] = {}
    strange = []
    for key in sorted(tensors):
        short = _without_wrappers(key, places)
        place, name = _find_place(short, places, full)
        if name is not None:
            names.setdefault(name, key)
        if place is not None:
            hits.append((place, key))
        elif not _is_frozen_copy(short, tensors[key], full, model, source):
            strange.append(key)
    if len(names) > 1:
        raise UnexpectedKeyError(
            f"{source} holds the tensors of several adapters", expected="one adapter",
            found=", ".join(f"{name} ({key})" for name, key in names.items()),
        )  # fmt: skip
    if strange:
        _raise_unexpected(strange, places, source)
    found: dict[str, str] = {}
    for place, key in sorted(hits, key=_is_aside):
        if place not in found:
            found[place] = key
        elif not _is_aside((place, key)):
            raise UnexpectedKeyError(
                f"{source} holds one tensor under two keys", found=f"{found[place]} and {key}",
                do="remove one of the two",
            )  # fmt: skip
    return found


def _is_aside(hit: tuple[str, str]) -> bool:
    """True for a key that counts only where the plain one is not there."""
    return ".modules_to_save." in hit[1]


def _key(path: str, suffix: str, adapter: Adapter) -> str:
    """The key without its prefix. PEFT finds the bias of a wrapped layer below ``base_layer``."""
    wrapped = suffix == "bias" and adapter.method.kind == "lora"
    return f"{path}.base_layer.bias" if wrapped else f"{path}.{suffix}"


def _without_wrappers(key: str, places: Mapping[str, _Place]) -> str:
    """The key without its prefix and, where the host has no such names itself, those of wrappers."""
    plain = key.removeprefix(PREFIX)
    if plain in places:
        return plain
    bare = ".".join(part for part in key.split(".") if part not in _WRAPPERS)
    return bare.removeprefix("module.").removeprefix(PREFIX)


def _find_place(key: str, places: Mapping[str, _Place], full: set[str]) -> tuple[str | None, str | None]:
    """The key as written here, and the adapter's name when it is part of the key in the file."""
    if key in places:
        return key, None
    head, _, leaf = key.rpartition(".")
    stem, _, name = head.rpartition(".")
    plain = f"{stem}.{leaf}"
    if plain in places and places[plain].path not in full and "." in places[plain].suffix:
        return plain, name
    path, inside, rest = key.partition(".modules_to_save.")
    if inside and path in full:
        name, _, shorter = rest.partition(".")
        for inner, found_name in ((rest, None), (shorter, name)):
            if f"{path}.{inner}" in places:
                return f"{path}.{inner}", found_name
    # A bias trained without LoRA here may have been trained beside LoRA there, and the reverse.
    for ours, theirs in ((".base_layer.bias", ".bias"), (".bias", ".base_layer.bias")):
        if key.endswith(ours) and key.removesuffix(ours) + theirs in places:
            return key.removesuffix(ours) + theirs, None
    return None, None


def _is_frozen_copy(
    key: str, tensor: torch.Tensor, full: set[str], model: nn.Module | None, source: str
) -> bool:
    """Whether the tensor is a frozen weight of the base that PEFT saved by the way.

    Raises:
        UnexpectedKeyError: it is one, but of another base.
    """
    if any(key.startswith(f"{path}.original_module.") for path in full):
        return True  # PEFT never computes with it while the adapter is on
    if model is None:
        return False
    name = key.replace(".base_layer.", ".")
    own = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}.get(name)
    if own is None:
        return False
    if own.shape == tensor.shape and torch.equal(tensor.to(own.dtype), own.detach().cpu()):
        return True
    raise UnexpectedKeyError(
        f"{source} changes the frozen base: {key} is not the model's {name}",
        expected=f"the model's own values, {_shape(own)}", found=_shape(tensor),
        do="give the base the adapter was trained on (its embeddings may have been resized or trained)",
    )  # fmt: skip


def _raise_unexpected(strange: list[str], places: Mapping[str, _Place], source: str) -> NoReturn:
    known = [PREFIX + key for key in places]
    lines = []
    for key in strange[:5]:
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.8)
        lines.append(f"{key}; nearest: {near[0]}" if near else key)
    if len(strange) > 5:
        lines.append(f"... and {len(strange) - 5} more")
    count = "a tensor" if len(strange) == 1 else f"{len(strange)} tensors"
    raise UnexpectedKeyError(
        f"{source} holds {count} that no site of the model takes: {strange[0]}",
        expected=f"the {len(known)} tensors of this plan", found="\n".join(lines),
        do="check that the adapter's config and the model are the ones it was trained with",
    )  # fmt: skip


def _check_complete(found: Mapping[str, str], places: Mapping[str, _Place], source: str) -> None:
    missing = [PREFIX + key for key in places if key not in found]
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise MissingKeyError(
            f"{source} lacks {len(missing)} of {len(places)} tensors, first {missing[0]}",
            expected="\n".join(missing[:5]) + more, found=f"{len(found)} tensors that fit",
            do="check that the adapter's config and the model are the ones it was trained with",
        )  # fmt: skip


def _check_tensor(key: str, tensor: torch.Tensor, own: torch.Tensor, source: str) -> None:
    if tensor.shape != own.shape or tensor.is_floating_point() != own.is_floating_point():
        raise TensorShapeError(
            f"tensor {key} in {source} does not fit its site",
            expected=_shape(own), found=_shape(tensor),
            do="check the rank, and that the base model is the one it was trained with",
        )  # fmt: skip
    check_finite(key, tensor, where=source)
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return
    largest = float(tensor.abs().max())
    if largest > torch.finfo(own.dtype).max:
        raise NonFiniteError(
            f"tensor {key} in {source} holds numbers that are infinite in {own.dtype}",
            expected=f"at most {torch.finfo(own.dtype).max:g}", found=f"{largest:g}",
            do="load it with adapter_dtype=torch.float32",
        )  # fmt: skip


def _shape(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
