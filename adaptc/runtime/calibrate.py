"""Covariances of the inputs of chosen modules over calibration batches (CorDA, Yang et al. 2024, section 3.2).

    C = (1/n) sum_i X_i^T X_i / max(X_i)^2        X_i (tokens, K): the module's input in the i-th sample

A sample is one row of the batch: one sequence. Modules that read the same tensor (q, k and v of an attention) share
one covariance, computed once. Padding counts as any other token, as in PEFT.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from adaptc.capture.call import CALL
from adaptc.errors import SiteError


class Covariances:
    """Forward pre-hooks that add up covariances, one per distinct input value.

    Which modules share is found in the first call of each; a module whose input later is not what it was found to
    share raises.
    """

    def __init__(self) -> None:
        #: path -> path of the module whose covariance it shares (its own, when it was the first to read the value)
        self.leader: dict[str, str] = {}
        self.sums: dict[str, torch.Tensor] = {}
        self.counts: dict[str, int] = {}
        #: leader -> the tensor that it read last, and the tensor's version
        self._last: dict[str, tuple[weakref.ref[torch.Tensor], int]] = {}

    def of(self, path: str) -> torch.Tensor:
        """The covariance (K, K) of the inputs of the module at ``path``.

        Raises:
            SiteError: no calibration batch reached it.
        """
        if path not in self.leader:
            raise SiteError(
                f"{path}: no calibration batch reached it", expected="batches that run every adapted module",
                do="calibrate with other batches, or leave this module out",
            )  # fmt: skip
        leader = self.leader[path]
        return self.sums[leader] / self.counts[leader]

    def watch(self, path: str, module: nn.Module) -> Any:
        """Observe the inputs of ``module``; returns the hook's removable handle."""

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._observe(path, args[0] if args else next(iter(kwargs.values())))

        return module.register_forward_pre_hook(before, with_kwargs=True)

    def _observe(self, path: str, x: torch.Tensor) -> None:
        shared = next((leader for leader in self._last if self._read(leader, x)), path)
        if self.leader.setdefault(path, shared) != shared:
            raise SiteError(
                f"{path}: its input is shared with other modules in some calibration batches only",
                expected=f"the input of {self.leader[path]}", found=f"the input of {shared}",
            )  # fmt: skip
        if shared == path:
            self._last[path] = (weakref.ref(x), x._version)
            self._add(path, x.detach())

    def _read(self, leader: str, x: torch.Tensor) -> bool:
        reference, version = self._last[leader]
        return reference() is x and version == x._version

    def _add(self, path: str, x: torch.Tensor) -> None:
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        samples = x.reshape(x.shape[0], -1, x.shape[-1]) if x.dim() > 2 else x[None]
        top = samples.amax((1, 2), keepdim=True).abs()
        total = torch.einsum("bti,btj->ij", samples / top, samples / top)
        if not bool(total.isfinite().all()):
            raise SiteError(
                f"{path}: an input in calibration is not finite, or its largest value is 0",
                expected="finite inputs, each sample with a largest value other than 0",
            )  # fmt: skip
        self.sums[path] = self.sums[path] + total if path in self.sums else total
        self.counts[path] = self.counts.get(path, 0) + samples.shape[0]


@torch.no_grad()
def covariances(model: nn.Module, modules: Mapping[str, nn.Module], batches: Iterable[Any]) -> Covariances:
    """Run ``model`` on ``batches`` in eval mode, outside captured graphs, and observe ``modules`` (path -> module).

    A batch is keyword arguments, a tuple of arguments, or one argument. Random state, buffers' training statistics
    and train flags stay as they are.

    Raises:
        SiteError: an input is not finite.
    """
    found = Covariances()
    modes = {module: module.training for module in model.modules()}
    handles = [found.watch(path, module) for path, module in modules.items()]
    CALL.depth += 1
    try:
        model.eval()
        with torch.random.fork_rng(devices=[]):
            for batch in batches:
                if isinstance(batch, Mapping):
                    model._call_impl(**batch)  # type: ignore[no-untyped-call]
                else:
                    model._call_impl(*(batch if isinstance(batch, tuple | list) else (batch,)))  # type: ignore[no-untyped-call]
    finally:
        CALL.depth -= 1
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    return found
