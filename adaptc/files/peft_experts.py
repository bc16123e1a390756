"""Adapters with one LoRA per expert, which PEFT trained under transformers 4, for the fused weights of transformers 5.

    ...experts.3.gate_proj.lora_A  A_g (r, K)    W_g + s B_g A_g
    ...experts.3.up_proj.lora_A    A_u (r, K)    W_u + s B_u A_u

    ->  gate_up_proj[3] + s B A    A = [A_g; A_u] (2r, K),  B = diag(B_g, B_u) (2 I, 2r)

and ``down_proj`` alike, of one product. This is what PEFT does on reading. Where single experts have other ranks or
scales, or none has an adapter of one product, factors are filled up with zeros, and B takes the ratio of the scales.
The layers beside the experts, which have the same names, keep their adapters.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from adaptc.errors import MissingKeyError, TensorShapeError, UnsupportedError
from adaptc.files.peft_keys import PREFIX, WRAPPERS
from adaptc.methods.linear import is_linear
from adaptc.methods.lora.experts import is_experts, products
from adaptc.methods.patterns import value_at
from adaptc.plan.match import ALL_LINEAR
from adaptc.plan.peft import matching, moe
from adaptc.plan.peft.options import check_config

_KEY = re.compile(r"(?P<block>.*\.)?experts\.(?P<expert>\d+)\.(?P<name>\w+)\.(?P<suffix>lora_.*)")
_FACTOR = re.compile(r"lora_([AB])(\.\w+)?\.weight")
#: What the products of one expert were called: gate and up, which are one product now, and down.
_NAMES = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))


@dataclasses.dataclass(frozen=True)
class _Factors:
    """LoRA of one product of one expert: (r, K) and (N, r)."""

    A: torch.Tensor
    B: torch.Tensor
    scale: float

    @property
    def rank(self) -> int:
        return self.A.shape[0]


#: (expert, name of the product) -> its factors.
_Layer = dict[tuple[int, str], _Factors]


def fuse(
    config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], model: nn.Module, *, source: str
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The config and the tensors with the adapters of single experts as one of each fused parameter.

    They are returned as they are where there are no such adapters, or where the model's experts are modules.

    Raises:
        UnsupportedError: DoRA, or a bias of the second factor, of single experts.
        MissingKeyError, TensorShapeError: one of two factors, or one of another expert or another rank.
    """
    moved, found = _single_experts(tensors, model)
    if not found or config.get("peft_type") != "LORA":
        return dict(config), dict(tensors)
    _, used = check_config(config, loading=True)
    rest = {_renamed(key, moved): tensor for key, tensor in tensors.items() if key not in found}
    values: dict[str, tuple[int, float]] = {}
    for block, layer in _layers(found, tensors, used, source).items():
        path = f"{moved[block]}experts"
        module = model.get_submodule(path)
        fused = {
            name: _stack(layer, parts, module.get_parameter(name), f"{path}.{name}", source)
            for name, parts in _parts(module, layer, source).items()
        }
        wrapped = [name for name in module._parameters if name in fused]
        for name, depth in zip(wrapped, reversed(range(len(wrapped))), strict=True):
            A, B, scale = fused[name]
            key = f"{PREFIX}{path}{depth * '.base_layer'}"
            rest |= _flat(key, A, B)
            rank = A.shape[1]
            values[f"{path}.{name}"] = rank, scale * (math.sqrt(rank) if used["use_rslora"] else rank)
    before = {new: old for old, new in moved.items()}
    return _config(config, used, rest, values, before, model), rest


# ------------------------------------------------------------------------------------------- keys


def _single_experts(tensors: Iterable[str], model: nn.Module) -> tuple[dict[str, str], dict[str, re.Match[str]]]:
    """Path of a block that had experts -> that of the block that has them fused, and the keys of those experts."""
    matches = {key: _KEY.fullmatch(_plain(key)) for key in tensors}
    found = {key: match for key, match in matches.items() if match is not None}
    fused = [path for path, module in model.named_modules() if path.endswith("experts") and is_experts(module)]
    now = [path.removesuffix("experts") for path in fused]
    moved = {}
    for block in dict.fromkeys(match["block"] or "" for match in found.values()):
        # transformers has renamed some: the one block of the layer that has experts is meant.
        beside = [path for path in now if _layer_of(path) == _layer_of(block)]
        if block in now or len(beside) == 1:
            moved[block] = block if block in now else beside[0]
    return moved, {key: match for key, match in found.items() if (match["block"] or "") in moved}


def _plain(key: str) -> str:
    """A key without PEFT's prefix and the names of wrappers."""
    return ".".join(part for part in key.removeprefix(PREFIX).split(".") if part not in WRAPPERS)


def _layer_of(block: str) -> str:
    return re.sub(r"[^.]+\.$", "", block)


def _renamed(key: str, names: Mapping[str, str]) -> str:
    head, short = (PREFIX, key.removeprefix(PREFIX)) if key.startswith(PREFIX) else ("", key)
    for old, new in names.items():
        if old != new and short.startswith(old):
            return head + new + short.removeprefix(old)
    return key


def _layers(
    found: Mapping[str, re.Match[str]], tensors: Mapping[str, torch.Tensor], used: Mapping[str, Any], source: str
) -> dict[str, _Layer]:
    """Block -> the factors of its experts."""
    pairs: dict[tuple[str, int, str], dict[str, str]] = {}
    for key, match in found.items():
        factor = _FACTOR.fullmatch(match["suffix"])
        if factor is None:
            raise UnsupportedError(
                f"{source} has one adapter per expert, which the model's fused experts have no place for: {key}",
                expected="lora_A.weight and lora_B.weight", found=match["suffix"],
                do="load it with the transformers 4 that it was trained with, and merge it there",
            )  # fmt: skip
        pairs.setdefault((match["block"] or "", int(match["expert"]), match["name"]), {})[factor[1]] = key
    layers: dict[str, _Layer] = {}
    for (block, expert, name), keys in pairs.items():
        path = f"{block}experts.{expert}.{name}"
        if len(keys) != 2:
            raise MissingKeyError(
                f"{source} has one of the two factors of {path}", expected="lora_A and lora_B",
                found=next(iter(keys.values())), do="check that the file is complete",
            )  # fmt: skip
        A, B = tensors[keys["A"]], tensors[keys["B"]]
        rank = value_at(used["rank_pattern"], path, used["r"])
        if A.dim() != 2 or B.dim() != 2 or A.shape[0] != rank or B.shape[1] != rank:
            raise TensorShapeError(
                f"the factors of {path} in {source} do not have the rank that the config gives them",
                expected=f"({rank}, in) and (out, {rank})", found=f"{tuple(A.shape)} and {tuple(B.shape)}",
                do="check r and rank_pattern in adapter_config.json",
            )  # fmt: skip
        alpha = value_at(used["alpha_pattern"], path, used["lora_alpha"])
        scale = alpha / (math.sqrt(rank) if used["use_rslora"] else rank)
        layers.setdefault(block, {})[expert, name] = _Factors(A, B, scale)
    return layers


# ------------------------------------------------------------------------------------------- values


def _parts(module: nn.Module, layer: _Layer, source: str) -> dict[str, tuple[str, ...]]:
    """Fused parameter -> the products that it holds, one above the other, where one of them has an adapter."""
    if module.is_transposed:
        raise UnsupportedError(
            f"{source} has one adapter per expert, and {type(module).__name__} stores its experts transposed",
            expected="experts that were layers of their own once",
            do="give the base model that it was trained with",
        )
    first, second = products(module)
    there = {name for _, name in layer}
    gate, up, down = next((names for names in _NAMES if there <= set(names)), _NAMES[0])
    parts = {first: (gate, up) if module.has_gate else (up,), second: (down,)}
    if stray := there - {name for names in parts.values() for name in names}:
        raise UnsupportedError(
            f"the fused experts of {type(module).__name__} have no place for adapters of {', '.join(sorted(stray))}",
            expected=", ".join(_NAMES[0]), do="load this adapter with the transformers 4 that it was trained with",
        )  # fmt: skip
    return {name: products for name, products in parts.items() if there & set(products)}


def _stack(
    layer: _Layer, parts: tuple[str, ...], weight: torch.Tensor, path: str, source: str
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """A (E, r, K), B (E, N, r) and the scale of one fused parameter (E, N, K)."""
    E, N, K = weight.shape
    rows = N // len(parts)
    own = {place: factors for place, factors in layer.items() if place[1] in parts}
    for (expert, name), factors in own.items():
        if expert >= E or factors.A.shape[1] != K or factors.B.shape[0] != rows:
            raise TensorShapeError(
                f"expert {expert} of {source} does not fit {path}: {name}",
                expected=f"experts 0 to {E - 1}, lora_A (r, {K}), lora_B ({rows}, r)",
                found=f"lora_A {tuple(factors.A.shape)}, lora_B {tuple(factors.B.shape)}",
                do="check that the base model is the one it was trained with",
            )  # fmt: skip
    # Ranks of the parts, and where each part begins.
    ranks = [max((f.rank for (_, name), f in own.items() if name == part), default=0) for part in parts]
    starts = [sum(ranks[:i]) for i in range(len(ranks))]
    scale = max((factors.scale for factors in own.values()), key=abs) or 1.0
    first = next(iter(own.values()))
    A, B = first.A.new_zeros(E, sum(ranks), K), first.B.new_zeros(E, N, sum(ranks))
    for (expert, name), f in own.items():
        i = parts.index(name)
        columns = slice(starts[i], starts[i] + f.rank)
        A[expert, columns] = f.A
        B[expert, i * rows : (i + 1) * rows, columns] = f.B if f.scale == scale else f.B * (f.scale / scale)
    return A, B, scale


def _flat(key: str, A: torch.Tensor, B: torch.Tensor) -> dict[str, torch.Tensor]:
    """As PEFT stores them (``methods.lora.parameters``)."""
    return {f"{key}.lora_A.weight": A.flatten(0, 1), f"{key}.lora_B.weight": B.permute(1, 2, 0).flatten(1).contiguous()}


# ------------------------------------------------------------------------------------------- config


def _config(
    config: Mapping[str, Any],
    used: Mapping[str, Any],
    tensors: Iterable[str],
    values: Mapping[str, tuple[int, float]],
    before: Mapping[str, str],
    model: nn.Module,
) -> dict[str, Any]:
    """The config of the same adapter with fused experts: it names what the file has values for."""
    held = {_plain(key).partition(".lora_")[0].removesuffix(".base_layer") for key in tensors if ".lora_" in key}
    held -= {path.rpartition(".")[0] for path in values}
    routers = [path for path in _routers(model) if path.removesuffix(".weight") in held]
    layers = [path for path in matching.module_paths(model) if path in held and f"{path}.weight" not in routers]
    patterns: dict[str, Any] = {}
    for index, (key, pattern) in enumerate((("r", "rank_pattern"), ("lora_alpha", "alpha_pattern"))):
        old = {path: _renamed(path.removesuffix(".weight"), before) for path in (*layers, *routers)}
        own = {path: value_at(used[pattern], there, used[key]) for path, there in old.items()}
        patterns[key], patterns[pattern] = moe.patterned(own | {path: v[index] for path, v in values.items()})
    names = matching.shortest_names([*values, *routers], matching.parameter_paths(model))
    return {**config, **_layers_named(config, layers, model), **patterns, "target_parameters": names}


def _routers(model: nn.Module) -> list[str]:
    """Routers that are modules of their own now, and were linear layers."""
    blocks = [path.removesuffix("experts") for path, module in model.named_modules() if is_experts(module)]
    parameters, modules = set(matching.parameter_paths(model)), matching.module_paths(model)
    own = [f"{block}gate" for block in blocks if f"{block}gate.weight" in parameters]
    return [f"{path}.weight" for path in own if not is_linear(modules[path])]


def _layers_named(config: Mapping[str, Any], layers: list[str], model: nn.Module) -> dict[str, Any]:
    """What selects the layers, by PEFT's rules: as written, less what is not there, else their paths."""
    if not layers:
        return {"target_modules": [], "layers_to_transform": None, "layers_pattern": None, "exclude_modules": None}
    targets, paths = config.get("target_modules"), list(matching.module_paths(model))
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        return {"target_modules": layers}
    if isinstance(targets, list):
        targets = [name for name in targets if any(matching.has_suffix(path, name) for path in layers)]
    if targets and matching.target_paths({**config, "target_modules": targets}, paths) == layers:
        return {"target_modules": targets}
    return {"target_modules": layers, "layers_to_transform": None, "layers_pattern": None, "exclude_modules": None}
