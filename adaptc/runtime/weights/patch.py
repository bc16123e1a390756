"""Other values in the place of some of a model's own tensors, and the bytes that were there.

What was overwritten comes back by overwriting: nothing is added and taken off again. The tensors stay the same objects
in the same memory. While a patch is in place

* ``state_dict`` of the model and of its parts gives the base's own values;
* a copy of the model, or one that was pickled, has the patch too, and copies of what it keeps, in memory;
* a part of the model does not take in a ``state_dict`` of its own: that would be lost when the base comes back.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from adaptc.errors import AdaptcWarning, UnsupportedError
from adaptc.runtime.weights.keep import Keep, Stamp, bits


@dataclasses.dataclass
class Slot:
    """A tensor of the model.

    Attributes:
        paths: every path that it has there; of tensors that share its memory too.
        kept: the base's own values.
        written: the ``id`` and the version of the tensor when it was last written here; None: not told.
    """

    paths: tuple[str, ...]
    kept: torch.Tensor
    written: tuple[int, int] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "written": None}  # a copy of a tensor begins anew


class Patch:
    """What stands in the place of some tensors of a model, and what is kept of them.

    Args:
        slots: the tensors, with what is kept.
        keep: where it is kept.
        stamps: of the files in which it is kept, if it is in files of the base.
    """

    def __init__(self, slots: Sequence[Slot], keep: Keep, stamps: Sequence[Stamp] = ()) -> None:
        self.slots, self.keep, self.stamps = list(slots), keep, list(stamps)

    def __getstate__(self) -> dict[str, Any]:
        # The tensors of a copy are in memory, wherever they were.
        return {"slots": self.slots, "keep": "memory", "stamps": []}

    @property
    def bytes_kept(self) -> int:
        """What the kept base takes in memory or on disk."""
        return 0 if self.keep is None else sum(slot.kept.nbytes for slot in self.slots)

    def write(self, model: nn.Module, slot: Slot, value: torch.Tensor) -> None:
        """Put ``value`` into the slot's tensor, rounded to its dtype."""
        for target in tensors_at(model, slot.paths):
            put(target, value)
            slot.written = _mark(target)

    def restore(self, model: nn.Module) -> None:
        """Overwrite the tensors by what is kept, to the bit; in the dtype and on the device that they have now. May be
        called again after it was interrupted.

        Raises:
            UnsupportedError: a tensor has another shape now; CheckpointError: a file of the base was changed. Nothing
                was written then.
        """
        for stamp in self.stamps:
            stamp.check()
        found = [(slot, list(tensors_at(model, slot.paths))) for slot in self.slots]
        for slot, targets in found:
            self._check(slot, targets)
        for slot, targets in found:
            slot.written = None  # an interrupted write is none of the user's
            for target in targets:
                put_back(target, slot.kept)
        unguard(model)

    @staticmethod
    def _check(slot: Slot, targets: Sequence[torch.Tensor]) -> None:
        path = slot.paths[0]
        if not targets:
            message = f"{path} was removed while adapters were merged into it: its own values are not put back"
            warnings.warn(AdaptcWarning(message), stacklevel=6)
        for target in targets:
            if target.shape != slot.kept.shape:
                raise UnsupportedError(
                    f"{path} was replaced while adapters were merged into it", expected=tuple(slot.kept.shape),
                    found=tuple(target.shape), do="put a tensor of its shape there, and unmerge before it is resized",
                )  # fmt: skip
            now = _mark(target)
            if slot.written is not None and now is not None and now[0] == slot.written[0] and now != slot.written:
                message = f"{path} was written to while adapters were merged into it, which is lost"
                warnings.warn(AdaptcWarning(message), stacklevel=6)

    def guard(self, model: nn.Module) -> None:
        """Let the modules that own the tensors give the base's values as their state, and take in none."""
        kept: dict[str, dict[str, torch.Tensor]] = {}
        for slot in self.slots:
            for path in slot.paths:
                owner, _, name = path.rpartition(".")
                kept.setdefault(owner, {})[name] = slot.kept
        for owner, values in kept.items():
            module = model.get_submodule(owner)
            module.register_state_dict_post_hook(BaseState(values))  # type: ignore[no-untyped-call]
            if owner:
                module.register_load_state_dict_pre_hook(refuse_load)  # type: ignore[no-untyped-call]

    @contextlib.contextmanager
    def lifted(self, model: nn.Module) -> Iterator[None]:
        """A block in which the tensors have the base's own values: other memory is put under them, and taken away
        again."""
        swapped: list[tuple[torch.Tensor, torch.Tensor]] = []
        try:
            for slot in self.slots:
                for target in tensors_at(model, slot.paths):
                    swapped.append((target, target.data))
                    target.data = as_now(slot.kept, target)
            yield
        finally:
            for target, data in reversed(swapped):
                target.data = data


@dataclasses.dataclass
class Merged:
    """Adapters that are folded into the base.

    Attributes:
        names: which, in the order in which they act.
        before: those that were live, and will be.
        patch: what was written.
        values: of each tensor of the adapters (by ``id``) how often it had been written.
        report: how far the rounded weights are from the exact ones.
    """

    names: tuple[str, ...]
    before: tuple[str, ...]
    patch: Patch
    values: dict[int, int]
    report: Any = None


class BaseState:
    """Hook after ``state_dict`` of a module with merged tensors: gives the base's own."""

    def __init__(self, kept: Mapping[str, torch.Tensor]) -> None:
        self.kept = dict(kept)

    def __call__(self, module: nn.Module, state: dict[str, Any], prefix: str, local_metadata: Any) -> None:
        for name, kept in self.kept.items():
            given = state.get(prefix + name)
            if isinstance(given, torch.Tensor):
                value = as_now(kept, given)
                as_it_is = isinstance(given, nn.Parameter)
                state[prefix + name] = nn.Parameter(value, given.requires_grad) if as_it_is else value


def refuse_load(module: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
    """Hook before a module with merged tensors takes in a state; the model itself unmerges before."""
    if any(key.startswith(prefix) and ".adapters." not in f".{key}" for key in state_dict):
        raise UnsupportedError(
            f"load_state_dict of a {type(module).__name__}: adapters are merged into its weights",
            expected="the base's own weights, which would be overwritten when the merge is undone",
            do="model.adaptc.unmerge() first",
        )


def unguard(module: nn.Module) -> None:
    """Take the hooks of a patch off a module and what is inside it."""
    for inner in module.modules():
        for hooks in (inner._state_dict_hooks, inner._load_state_dict_pre_hooks):
            for key in [key for key, hook in hooks.items() if isinstance(hook, BaseState) or _is_refusal(hook)]:
                del hooks[key]


def _is_refusal(hook: Any) -> bool:
    return getattr(hook, "hook", hook) is refuse_load


def as_now(kept: torch.Tensor, now: torch.Tensor) -> torch.Tensor:
    """``kept`` in the dtype and on the device of ``now``; itself where it is so."""
    return kept.to(now.device).to(now.dtype)


def put(target: torch.Tensor, value: torch.Tensor) -> None:
    """Write ``value`` into the memory of ``target``, rounded to its dtype."""
    with torch.no_grad(), torch.inference_mode(target.is_inference()):
        target.copy_(value)


def put_back(target: torch.Tensor, kept: torch.Tensor) -> None:
    """Overwrite ``target`` by ``kept``, bit for bit."""
    if target.is_meta:
        return
    with torch.no_grad(), torch.inference_mode(target.is_inference()):
        bits(target.detach()).copy_(bits(as_now(kept, target)))


def _mark(tensor: torch.Tensor) -> tuple[int, int] | None:
    return None if tensor.is_inference() else (id(tensor), tensor._version)


def tensors_at(model: nn.Module, paths: Iterable[str]) -> Iterator[torch.Tensor]:
    """The tensors at ``paths``, each object once; those that are gone are passed over."""
    seen: set[int] = set()
    for path in paths:
        tensor = tensor_at(model, path)
        if tensor is not None and id(tensor) not in seen:
            seen.add(id(tensor))
            yield tensor


def tensor_at(model: nn.Module, path: str) -> torch.Tensor | None:
    """The parameter or buffer at ``path``, or None."""
    module: nn.Module | None = model
    *owners, name = path.split(".")
    for owner in owners:
        module = None if module is None else module._modules.get(owner)
    if module is None:
        return None
    found = module._parameters.get(name)
    return module._buffers.get(name) if found is None else found
