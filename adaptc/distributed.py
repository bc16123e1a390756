"""Whether a model is in several processes, and the whole of what they hold parts of."""

from __future__ import annotations

import sys

import torch
from torch import nn


def wrapper_of(module: nn.Module) -> str | None:
    """The name of the class that wraps or shards ``module``, or None."""
    if isinstance(module, nn.parallel.DistributedDataParallel | nn.DataParallel):
        return type(module).__name__
    # Nobody can have made one of these without importing its module.
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return None
    if isinstance(module, fsdp.FSDPModule):
        return "fully_shard"
    return "FullyShardedDataParallel" if isinstance(module, fsdp.FullyShardedDataParallel) else None


def is_distributed(tensor: object) -> bool:
    """Whether a tensor is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def is_sharded(model: nn.Module) -> bool:
    """Whether the processes hold parts of the model's parameters (FSDP2)."""
    return any(wrapper_of(m) == "fully_shard" for m in model.modules()) or any(map(is_distributed, model.parameters()))


def own_class(model: nn.Module) -> type:
    """The class of the model as its author wrote it: ``fully_shard`` puts one of its own in front."""
    kind = type(model)
    return kind.__mro__[2] if wrapper_of(model) == "fully_shard" else kind


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a sharded tensor, in every process, all of which must ask; any other as it is."""
    return tensor.full_tensor() if is_distributed(tensor) else tensor  # type: ignore[attr-defined]


def writes(model: nn.Module) -> bool:
    """Whether this process writes files: every one that is asked, or the first one where the model is sharded."""
    return not is_sharded(model) or torch.distributed.get_rank() == 0
