"""A model in several processes: what wraps or shards it, and what adapters need for that.

``DistributedDataParallel`` averages the gradients of the parameters that it found when it was made, and FSDP2's
``fully_shard`` shards those that a module had when it was called. An adapter that comes later would be trained by
each process on its own, without an error: so adapters come first, and one that came later is refused.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from adaptc import torch_internals
from adaptc.distributed import is_distributed, is_sharded, whole, wrapper_of, writes
from adaptc.errors import CheckpointError, UnsupportedError
from adaptc.methods.base import Adapter
from adaptc.runtime.adapters import AdapterSet

_IGNORED = "_ddp_params_and_buffers_to_ignore"
#: Buffers of adapters that never differ between processes. DDP writes the first process's buffers into the others'
#: at each forward, and a backward that is still to come has saved the scale.
_CONSTANT = ("site_id", "scale")
_ORDER = "adaptc.compile(model, plan) first, then {wrapper}: adapters are parameters like any other to it"


# ------------------------------------------------------------------------------------------ refusing


def check_unwrapped(model: nn.Module) -> None:
    """Raise when adapters put on ``model`` now would be unknown to what wraps or shards it.

    Raises:
        UnsupportedError: names the wrapper and what to do.
    """
    for path, module in model.named_modules():
        wrapper = wrapper_of(module)
        if wrapper is not None:
            where = path or "the model"
            raise UnsupportedError(
                f"{where} is wrapped by {wrapper} already, which does not know of adapters that come now",
                expected="a model that is not wrapped yet",
                do=_ORDER.format(wrapper=f"{wrapper}(model)"),
            )
    for name, parameter in model.named_parameters():
        if is_distributed(parameter):
            raise UnsupportedError(
                f"{name} is sharded already, and adapters that come now would be trained by each process on its own",
                expected="plain tensors", found=f"a DTensor, {parameter.placements}",  # type: ignore[attr-defined]
                do=_ORDER.format(wrapper="fully_shard(layer) for its layers and fully_shard(model)"),
            )  # fmt: skip


class DataParallelCheck:
    """Whether ``DistributedDataParallel`` averages every adapter that is trained; asked before each call."""

    def __init__(self, adapters: AdapterSet) -> None:
        self.adapters = adapters
        #: The wrapper that was seen last, and the trained parameters that it was made with.
        self._wrapper: weakref.ref[nn.Module] | None = None
        self._averaged: frozenset[int] = frozenset()
        #: The trained parameters, by ``id``, that were found to be averaged.
        self._passed: object = None

    def __call__(self) -> None:
        """Raise UnsupportedError for a live adapter parameter that is trained and not averaged."""
        ddp = torch_internals.active_data_parallel()
        if ddp is None or not torch.is_grad_enabled():
            return
        if self._wrapper is None or self._wrapper() is not ddp:
            self._wrapper, self._passed = weakref.ref(ddp), None
            self._averaged = frozenset(id(p) for p in ddp.parameters() if p.requires_grad)
        trained = {
            id(parameter): path
            for name in self.adapters.live
            for path, parameter in self.adapters.named_parameters(name)
            if parameter.requires_grad
        }
        if trained.keys() == self._passed:
            return
        known = torch_internals.data_parallel_parameters(ddp) & self._averaged
        for number, path in trained.items():
            if number not in known:
                raise UnsupportedError(
                    f"{path} is trained, and DistributedDataParallel does not average its gradient",
                    expected="a parameter of the model, trained, when it was wrapped",
                    found="one that was added, or whose requires_grad was set, afterwards",
                    do="wrap the model again: ddp = DistributedDataParallel(model)",
                )
        self._passed = trained.keys()


def note_constant_buffers(adapters: AdapterSet) -> None:
    """Let DDP leave alone what is equal in all processes by construction."""
    model = adapters.model
    others = [name for name in getattr(model, _IGNORED, ()) if ".adapters." not in f".{name}"]
    ours = [
        f"{site.path}.adapters.{entry}.{name}".removeprefix(".")
        for site in adapters.sites
        for entry, adapter in site.adapters.items()
        for name, _ in adapter.named_buffers()
        if name in _CONSTANT
    ]
    if others or ours:
        setattr(model, _IGNORED, [*others, *ours])
    elif _IGNORED in model.__dict__:
        delattr(model, _IGNORED)


# ------------------------------------------------------------------------------------------- sharded


@contextlib.contextmanager
def gathered(model: nn.Module, adapters: Iterable[Adapter], *, write: bool = False) -> Iterator[None]:
    """Within the block sharded parameters of ``adapters`` are whole; all processes must enter.

    Args:
        write: what was written to them in the block, the same in all processes, goes into the shards.
    """
    if not is_sharded(model):
        yield
        return
    for module in model.modules():
        # Parameters that were left whole after a forward are copies: writes to them would be lost.
        if wrapper_of(module) == "fully_shard":
            module.reshard()  # type: ignore[operator]
    swapped: list[tuple[nn.Module, str, nn.Parameter]] = []
    full: dict[int, nn.Parameter] = {}
    try:
        for adapter in adapters:
            for module in adapter.modules():
                for name, parameter in list(module.named_parameters(recurse=False)):
                    if is_distributed(parameter):
                        swapped.append((module, name, parameter))
                        if id(parameter) not in full:
                            full[id(parameter)] = nn.Parameter(whole(parameter.detach()), parameter.requires_grad)
                        module._parameters[name] = full[id(parameter)]
        yield
        if write:
            for module, name, parameter in swapped:
                _scatter(parameter, module._parameters[name])
    finally:
        for module, name, parameter in swapped:
            module._parameters[name] = parameter


@torch.no_grad()
def _scatter(shards: Any, value: Any) -> None:
    """Put this process's part of ``value`` into ``shards``; nothing is sent."""
    from torch.distributed.tensor import distribute_tensor

    part = distribute_tensor(value.detach(), shards.device_mesh, shards.placements, src_data_rank=None)
    shards.detach().to_local().copy_(part.to_local())


def write_once(model: nn.Module, write: Callable[[], object]) -> None:
    """Call ``write``; where the model is sharded, in the first process alone, while the others wait.

    Raises:
        CheckpointError: in the other processes, when the first one raised.
    """
    if not is_sharded(model):
        write()
        return
    failed: list[str | None] = [None]
    try:
        if writes(model):
            write()
    except BaseException as error:
        failed = [f"{type(error).__name__}: {error}"]
        raise
    finally:
        torch.distributed.broadcast_object_list(failed, src=0)
    if failed[0] is not None:
        raise CheckpointError("the first process could not write the adapter", found=failed[0])
