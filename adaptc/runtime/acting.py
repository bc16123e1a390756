"""Which adapters of a model act, and how: live, by what they compute beside the base, or merged into its weights."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from adaptc.errors import AdapterNameError, NewSignatureWarning, UnsupportedError
from adaptc.runtime import merging
from adaptc.runtime.adapters import AdapterSet
from adaptc.runtime.calls import warmup
from adaptc.runtime.calls.captures import Captures
from adaptc.runtime.weights.keep import Keep
from adaptc.runtime.weights.report import MergeReport


class Acting:
    """Changes which adapters act, and says where that is compiled anew.

    Args:
        captures: of the model.
        find: the tensors of the base's own files.
    """

    def __init__(self, captures: Captures, find: merging.Find) -> None:
        self.captures, self.find = captures, find

    @property
    def adapters(self) -> AdapterSet:
        return self.captures.adapters

    def switch(self, names: Sequence[str]) -> None:
        """See ``Handle.switch``."""
        self.adapters.set_live(tuple(names))
        self._announce()

    def merge(self, names: Sequence[str], keep: Keep, inputs: Any = None) -> MergeReport:
        """See ``Handle.merge``."""
        if not names:
            raise AdapterNameError("merge: no adapter is live", do="model.adaptc.merge(name)")
        if keep not in ("memory", "disk", None):
            raise ValueError(f'merge: keep is "memory", "disk" or None, not {keep!r}')
        self.adapters.check_together(tuple(names))
        if self.adapters.model.training and torch.is_grad_enabled():
            raise UnsupportedError(
                "merge: the model is in training mode with gradients on, and merged adapters get none",
                do="model.eval(), or with torch.no_grad()",
            )
        self._check_no_backward("merge")
        outputs = None
        if inputs is not None:
            with self.as_before():
                self.switch(names)
                outputs = self._outputs(inputs)
        report = merging.merge(self.adapters, names, keep, self.find)
        self._announce()
        return report if outputs is None else report.compared(outputs, self._outputs(inputs))

    def unmerge(self) -> None:
        """See ``Handle.unmerge``."""
        if self.adapters.merged is not None:
            self._check_no_backward("unmerge")
            self.adapters.unmerge()
            self._announce()

    @contextlib.contextmanager
    def as_before(self) -> Iterator[None]:
        """After the block what was live and merged before is so again, but for adapters that were removed meanwhile."""
        merged = self.adapters.merged
        live = self.adapters.live if merged is None else merged.before
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NewSignatureWarning)
            try:
                yield
            finally:
                self.switch([name for name in live if name in self.adapters.records])
                if merged is not None and all(name in self.adapters.records for name in merged.names):
                    merging.merge(self.adapters, merged.names, merged.patch.keep, self.find)
                    self._announce()

    def _announce(self) -> None:
        """Say that the next call compiles, if it does: with a bank it does not."""
        if self.adapters.bank is None:
            self.captures.announce()

    def _outputs(self, inputs: Any) -> list[torch.Tensor]:
        with torch.no_grad():
            return list(warmup.tensors_of(warmup.call(self.adapters.model, inputs)))

    def _check_no_backward(self, doing: str) -> None:
        if self.captures.pending.any():
            raise UnsupportedError(
                f"{doing}: a backward is still to come, which reads the weights that this call of the model had",
                do="run it, or let go of the outputs and losses; call the model in torch.no_grad() for none",
            )
