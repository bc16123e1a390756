"""Which base model an adapter was trained on, told by a cheap sample of its frozen weights."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from adaptc.distributed import own_class, whole
from adaptc.methods import quantised

#: Values per site. Training steps, other checkpoints and other seeds change nearly every weight, so a
#: handful that agree exactly says "same weights"; an edit made to deceive is not what this is against.
SAMPLE = 256
#: Of those, the ones also kept rounded to bfloat16, to recognise a copy of the base in another dtype.
COARSE = 16
#: bfloat16 keeps 8 bits: two roundings of one number (through float16, say) differ by at most this ratio.
RATIO = 2.0**-7
#: float16 rounds smaller numbers than this to multiples of it.
SMALLEST = 2.0**-24


def fingerprint(model: nn.Module, paths: Iterable[str]) -> dict[str, Any]:
    """What the base looks like at the adapted ``paths``: class, shapes, dtypes and samples of the weights.

    Costs a copy of 256 values per site. A weight without plain values is described by its shape and dtype only; the
    dtype of a quantised one is how it is quantised. Sharded weights are gathered one by one: all processes must call.
    """
    sites = {}
    for path in sorted(set(paths)):
        found = _describe_weight(model.get_submodule(path))
        if found is not None:
            sites[path] = found
    return {"class": own_class(model).__name__, "sites": sites}


def compare_fingerprint(
    saved: Mapping[str, Any], model: nn.Module, let_go: Callable[[], None] = lambda: None
) -> list[str]:
    """How ``model`` differs from the base that ``saved`` describes; empty when it does not.

    ``let_go``: called when the weights of a site have been read.

    Every difference is a reason to warn, none to refuse: a copy of the base in another dtype, or a sister
    model, is a legitimate host. Shapes that do not fit are refused when the tensors are read.
    """
    differences = []
    kind = own_class(model).__name__
    if saved.get("class") != kind:
        differences.append(f"saved on a {saved.get('class')}, this is a {kind}")
    faults: dict[str, list[str]] = {}
    sites = saved.get("sites") or {}
    for path, then in sites.items():
        try:
            now = _describe_weight(model.get_submodule(path))
        except AttributeError:
            now = None
        let_go()
        fault = _difference(then, now)
        if fault is not None:
            faults.setdefault(fault, []).append(path)
    for fault, paths in faults.items():
        differences.append(f"{fault} at {len(paths)} of {len(sites)} sites, first {paths[0]}")
    return differences


def _difference(then: Mapping[str, Any], now: Mapping[str, Any] | None) -> str | None:
    if now is None:
        return "no frozen weight is found"
    if list(then["shape"]) != now["shape"]:
        return f"the frozen weight has shape {now['shape']}, it had {list(then['shape'])}"
    if then["dtype"] == now["dtype"]:
        known = None not in (then["hash"], now["hash"])
        return "the frozen weights have other values" if known and then["hash"] != now["hash"] else None
    if None in (then["sample"], now["sample"]):
        return f"the dtype is {now['dtype']}, it was {then['dtype']}, so the values cannot be compared"
    if _close(then["sample"], now["sample"]):
        return f"the same weights in another dtype ({now['dtype']}, it was {then['dtype']})"
    return f"the frozen weights have other values, in {now['dtype']} (it was {then['dtype']})"


def _weight(module: nn.Module) -> torch.Tensor | None:
    """The module's ``weight``, or its first own parameter."""
    own = dict(module.named_parameters(recurse=False)) or dict(module.named_parameters())
    own = {name: tensor for name, tensor in own.items() if not name.startswith("adapters.")}
    return own.get("weight", next(iter(own.values()), None))


def _describe_weight(module: nn.Module) -> dict[str, Any] | None:
    weight = _weight(module)
    how = quantised.describe(module)
    if weight is None or how is None:
        return None if weight is None else _describe(weight)
    # The codes' layout is the quantiser's own and may change from call to call: only what they stand for is told.
    shape = [module.out_features, module.in_features] if isinstance(module, nn.Linear) else list(weight.shape)
    return {"shape": shape, "dtype": how, "hash": None, "sample": None}


def _describe(weight: torch.Tensor) -> dict[str, Any]:
    found: dict[str, Any] = {
        "shape": list(weight.shape),
        "dtype": str(weight.dtype).removeprefix("torch."),
        "hash": None,
        "sample": None,
    }
    if not weight.is_floating_point() or weight.is_meta or weight.numel() == 0:
        return found
    flat = whole(weight.detach()).reshape(-1)
    places = torch.linspace(0, flat.numel() - 1, SAMPLE, dtype=torch.float64).long()
    picked = flat[places.to(flat.device)].cpu()
    found["hash"] = hashlib.sha256(_bytes(picked)).hexdigest()[:32]
    found["sample"] = _bytes(picked[:: SAMPLE // COARSE].to(torch.bfloat16)).hex()
    return found


def _bytes(values: torch.Tensor) -> bytes:
    return bytes(values.contiguous().view(torch.uint8).tolist())


def _close(then: str, now: str) -> bool:
    pairs = zip(_values(then), _values(now), strict=True)
    return all(abs(a - b) <= max(RATIO * max(abs(a), abs(b)), SMALLEST) for a, b in pairs)


def _values(sample: str) -> list[float]:
    """The numbers of a hexadecimal sample: a (little-endian) bfloat16 is the upper half of a float32."""
    raw = bytes.fromhex(sample)
    return [struct.unpack("<f", b"\0\0" + raw[i : i + 2])[0] for i in range(0, len(raw), 2)]
