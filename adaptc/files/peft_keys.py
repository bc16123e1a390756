"""PEFT's tensor keys: adapters to tensors and back.

====================================================  ==================================================
``base_model.model.<path>.lora_A.weight``             a tensor of the method at ``<path>``
``base_model.model.<module>.lora_A.weight``           of the parameter of ``<module>`` that is adapted; of several
                                                      the last, and ``.base_layer`` once more for each before it
``base_model.<name>``                                 a tensor that the adapter has once (VeRA's projections)
``base_model.model.<path>.base_layer.bias``           a trained bias of a module that PEFT has wrapped
``base_model.model.<path>.bias``                      a trained bias of any other module
``base_model.model.<path>.<name>``                    the parameters and buffers of a fully trained module
``prompt_embeddings``                                 the tensor of a method that acts on the whole model; fully
                                                      trained modules have ``base_model.<path>.<name>`` beside it
====================================================  ==================================================

Read, not written: a key with the adapter's name inside (``lora_A.default.weight``, ``ia3_l.default``, from a
saved ``state_dict``); wrappers' names (``_orig_mod`` of torch.compile, ``_fsdp_wrapped_module``, ``module`` of
DDP); keys without ``base_model.model.`` (diffusers). Passed over: what PEFT writes by the way, that is
``<path>.original_module.*`` and ``<path>.modules_to_save.*`` for ``bias="all"`` beside a fully trained
module, and frozen base weights (``lm_head.base_layer.weight`` when the head has LoRA), which must equal
the model's, but for those of the embeddings: they belong to the adapter (``runtime.embeddings``).
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn

import torch
from torch import nn

from adaptc.errors import MissingKeyError, NonFiniteError, TensorShapeError, UnexpectedKeyError
from adaptc.files.tensor_file import check_finite
from adaptc.methods.base import Adapter
from adaptc.methods.codec import Shared, codec_of
from adaptc.runtime import embeddings

PREFIX = "base_model.model."
#: The path under which ``decode`` gives tensors that belong to no site, by their whole key.
SHARED = "(shared)"
#: The path under which it gives embeddings of the base, by the path of the parameter.
EMBEDDINGS = "(embeddings)"
_SHARED_PREFIX = "base_model."
_BASE_LAYER = ".base_layer"
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
Decoded = dict[str, dict[str, torch.Tensor]]


class _Place(NamedTuple):
    """Where the tensor ``key`` of the file belongs: ``own``, which is ``suffix`` of the adapter at ``path``."""

    path: str
    suffix: str
    own: torch.Tensor
    key: str


def tensors_of(adapter: Adapter) -> dict[str, torch.Tensor]:
    """What an adapter stores, by the suffix of its key: parameters, and a full copy's persistent buffers."""
    if adapter.replaces_forward:
        copy = adapter.copy
        assert isinstance(copy, nn.Module)  # what replaces a forward is a module of its own
        return dict(copy.state_dict(keep_vars=True))
    return dict(adapter.peft_tensors())


def shared_of(adapters: Mapping[str, Adapter]) -> tuple[Shared | None, dict[str, torch.Tensor]]:
    """How the adapters share tensors, and those tensors by their keys."""
    for adapter in adapters.values():
        codec = codec_of(adapter.method.kind)
        if codec is not None and codec.shared is not None:
            found = codec.shared.tensors(adapters)
            return codec.shared, {_SHARED_PREFIX + name: tensor for name, tensor in found.items()}
    return None, {}


def embedding_keys(
    found: Mapping[str, torch.Tensor], adapters: Mapping[str, Adapter]
) -> dict[str, torch.Tensor]:
    """Embeddings of the base (path of the parameter -> values) by their keys beside ``adapters``."""
    prefix, keyed = _prefix(adapters), {}
    for path, tensor in found.items():
        holder, _, name = path.rpartition(".")
        adapter = adapters.get(holder)
        if adapter is not None and adapter.replaces_forward:
            continue  # its own values stand under this key
        wrapped = adapter is not None and codec_of(adapter.method.kind) is not None
        tokens = ".token_adapter.base_layer" if adapter is not None and adapter.method.follows_ties else ""
        keyed[f"{prefix}{holder}{_BASE_LAYER if wrapped else tokens}.{name}"] = tensor
    return keyed


def encode(
    adapters: Mapping[str, Adapter], config: Mapping[str, Any] | None = None
) -> dict[str, torch.Tensor]:
    """The tensors of an adapter (module path -> its part there) under PEFT's keys; no copies are made.

    ``config``: the one written beside them, which can say that tensors that the adapter has once are left out.
    """
    own = {place.key: place.own.detach() for place in _places(adapters).values()}
    shared, once = shared_of(adapters)
    if shared is None or not shared.required(config or {}):
        return own
    return {**own, **{key: tensor.detach() for key, tensor in once.items()}}


def decode(
    tensors: Mapping[str, torch.Tensor],
    adapters: Mapping[str, Adapter],
    *,
    model: nn.Module | None = None,
    source: str = "the adapter",
    config: Mapping[str, Any] | None = None,
) -> Decoded:
    """The values for each adapter, by module path and suffix, checked before anything is changed.

    ``assign`` puts them into the adapters.

    Args:
        model: the host, so that frozen weights in the file can be compared with its own.
        source: what to call the file in errors.
        config: the adapter's config, which can say that tensors that it has once are not in the file.

    Raises:
        UnexpectedKeyError: a tensor that belongs nowhere (nearest keys are named), or twice in the file.
        MissingKeyError, TensorShapeError, NonFiniteError: a tensor is not there, or does not fit.
    """
    places = _places(adapters)
    shared, once = shared_of(adapters)
    places.update({key: _Place(SHARED, key, own, key) for key, own in once.items()})
    full = {path for path, adapter in adapters.items() if adapter.replaces_forward}
    base: dict[str, str] = {}
    found = _sort_keys(tensors, places, full, model, source, _prefix(adapters), base)
    if shared is not None and not shared.required(config or {}) and not any(key in found for key in once):
        places = {key: place for key, place in places.items() if key not in once}
    _check_complete(found, places, source)
    decoded: Decoded = {}
    for short, place in places.items():
        key = found[short]
        _check_tensor(key, tensors[key], place.own, source)
        decoded.setdefault(place.path, {})[place.suffix] = tensors[key]
    for name, key in base.items():
        check_finite(key, tensors[key], where=source)
        decoded.setdefault(EMBEDDINGS, {})[name] = tensors[key]
    return decoded


def assign(decoded: Decoded, adapters: Mapping[str, Adapter]) -> None:
    """Put the values of ``decode`` into the adapters that they were checked for."""
    for path, values in decoded.items():
        if path in (SHARED, EMBEDDINGS):
            continue
        if adapters[path].replaces_forward:
            for suffix, tensor in tensors_of(adapters[path]).items():
                tensor.data.copy_(values[suffix])
        else:
            adapters[path].set_peft_tensors(values)
    if decoded.get(SHARED):
        shared, _ = shared_of(adapters)
        assert shared is not None  # decode found its tensors
        once = decoded[SHARED].items()
        shared.assign(adapters, {key.removeprefix(_SHARED_PREFIX): tensor for key, tensor in once})


def _places(adapters: Mapping[str, Adapter]) -> dict[str, _Place]:
    """Key without its prefix -> the adapter's tensor."""
    wrapped = _wrapped(adapters)
    places: dict[str, _Place] = {}
    for path, adapter in adapters.items():
        for suffix, own in tensors_of(adapter).items():
            short = _key(wrapped[path], suffix, adapter)
            whole = short if _acts_on_model(adapter) else _prefix(adapters) + short
            places[short] = _Place(path, suffix, own, whole)
    return places


def _acts_on_model(adapter: Adapter) -> bool:
    return adapter.method.on_model


def _prefix(adapters: Mapping[str, Adapter]) -> str:
    """PEFT wraps a model to put adapters into it, but not for prompts."""
    return _SHARED_PREFIX if any(map(_acts_on_model, adapters.values())) else PREFIX


def _sort_keys(
    tensors: Mapping[str, torch.Tensor],
    places: Mapping[str, _Place],
    full: set[str],
    model: nn.Module | None,
    source: str,
    prefix: str,
    base: dict[str, str],
) -> dict[str, str]:
    """Key as written here -> key in the file; raises when a key of the file belongs nowhere.

    ``base`` gets the base's embeddings: path of the parameter -> key in the file.
    """
    hits: list[tuple[str, str]] = []
    names: dict[str, str] = {}
    strange = []
    layers = {} if model is None else embeddings.parameters(model)
    for key in sorted(tensors):
        short = _without_wrappers(key, places, prefix)
        place, name = _find_place(short, places, full)
        if name is not None:
            names.setdefault(name, key)
        if place is not None:
            hits.append((place, key))
        elif (own := layers.get(plain_name(short))) is not None:
            _check_embeddings(key, tensors[key], own, source)
            base[plain_name(short)] = key
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


def _wrapped(adapters: Mapping[str, Adapter]) -> dict[str, str]:
    """Path of each adapter -> the path in its keys: PEFT wraps a module once for each parameter, the last outermost.

    ``adapters`` are in model order.
    """
    found, depth = {}, Counter[str]()
    for path, adapter in reversed(list(adapters.items())):
        if adapter.parameter is None:
            found[path] = path
        else:
            holder = path.rpartition(".")[0]
            found[path] = holder + depth[holder] * _BASE_LAYER
            depth[holder] += 1
    return found


def plain_name(key: str) -> str:
    """A key without the names of wrappers between a module and what it holds."""
    return re.sub(rf"(\.token_adapter)?({re.escape(_BASE_LAYER)})+\.", ".", key)


def embedding_of(key: str) -> str:
    """The parameter's path that a key of a whole embedding in a file means."""
    bare = ".".join(part for part in key.split(".") if part not in WRAPPERS)
    head, inside, leaf = bare.removeprefix(PREFIX).partition(".modules_to_save.")
    return f"{head}.{leaf.rpartition('.')[2]}" if inside else plain_name(head)


def _key(path: str, suffix: str, adapter: Adapter) -> str:
    """The key without its prefix. PEFT finds the bias of a wrapped layer below ``base_layer``."""
    if _acts_on_model(adapter):
        return suffix
    wrapped = suffix == "bias" and codec_of(adapter.method.kind) is not None
    return f"{path}.base_layer.bias" if wrapped else f"{path}.{suffix}"


def _without_wrappers(key: str, places: Mapping[str, _Place], prefix: str) -> str:
    """The key without its prefix and, where the host has no such names itself, those of wrappers."""
    plain = key.removeprefix(prefix)
    if plain in places:
        return plain
    bare = ".".join(part for part in key.split(".") if part not in WRAPPERS)
    return bare.removeprefix("module.").removeprefix(prefix)


def _find_place(key: str, places: Mapping[str, _Place], full: set[str]) -> tuple[str | None, str | None]:
    """The key as written here, and the adapter's name when it is part of the key in the file."""
    if key in places:
        return key, None
    head, _, leaf = key.rpartition(".")
    stem, _, name = head.rpartition(".")
    plain = f"{stem}.{leaf}"
    if plain in places and places[plain].path not in full and "." in places[plain].suffix:
        return plain, name
    # ``ia3_l.default`` of a saved state_dict, ``lora_magnitude_vector.default.weight``
    for stem, _, name in (key.rpartition("."), key.removesuffix(".weight").rpartition(".")):
        place = places.get(stem)
        if place is not None and place.path not in full and "." not in place.suffix.removeprefix(_SHARED_PREFIX):
            return (stem, name) if place.suffix != "bias" else (None, None)
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
    name = plain_name(key)
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


def _check_embeddings(key: str, tensor: torch.Tensor, own: torch.Tensor, source: str) -> None:
    if tensor.shape != own.shape or not (tensor.is_floating_point() and own.is_floating_point()):
        raise TensorShapeError(
            f"{source} holds embeddings of another size than the model's: {key}",
            expected=_shape(own), found=_shape(tensor),
            do=f"model.resize_token_embeddings({len(tensor)}) first, as before training",
        )  # fmt: skip


def _raise_unexpected(strange: list[str], places: Mapping[str, _Place], source: str) -> NoReturn:
    known = [place.key for place in places.values()]
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
    missing = [place.key for key, place in places.items() if key not in found]
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
