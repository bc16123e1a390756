"""Rows of one batch that use different adapters: what of a tensor belongs to which.

A row is dim 0 of a tensor, or with spans dims 0 and 1. What an adapter computes of other rows than its own is dropped
by ``torch.where``, so that these keep every bit; and it reads zeros in their place, so that no value of theirs reaches
a gradient of its own (0 * inf is not 0).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from adaptc.errors import BatchError


class Rows:
    """Which of the adapters of a batch each row of a call has.

    ``ids``: int64 (B,), or (B, S) of spans: the number of the adapter, or one past the last for the base.
    ``flat``: whether a tensor whose dim 0 is a multiple of B has the parts of row 0 first, then those of row 1, ....
    """

    def __init__(self, ids: torch.Tensor, flat: bool) -> None:
        self.ids, self.flat = ids, flat

    def of(self, t: torch.Tensor) -> torch.Tensor:
        """The ids of ``t``: of its leading dimensions, as many as they have.

        Raises:
            BatchError: its leading dimensions are not the rows.
        """
        found = self._find(t)
        if found is None:
            raise BatchError(
                "adapters by row: a tensor of an adapted module does not have the rows of the batch in front",
                expected=f"{tuple(self.ids.shape)} and more", found=tuple(t.shape),
                do="leave this module out of the adapters' plans, or call the model for each adapter apart",
            )  # fmt: skip
        return found

    def _find(self, t: torch.Tensor) -> torch.Tensor | None:
        ids = self.ids
        n, dims = ids.shape[0], ids.dim()
        if t.dim() >= dims and t.shape[:dims] == ids.shape:
            return ids
        if self.flat and t.dim() > 0 and t.shape[0] % n == 0:
            if dims == 1:
                return ids[:, None].expand(n, t.shape[0] // n).reshape(-1)
            if t.shape[0] == n * ids.shape[1]:
                return ids.reshape(-1)
        return None

    def of_products(self, t: torch.Tensor) -> torch.Tensor:
        """(M,): the ids of ``t`` (..., K) with all its dimensions but the last in one."""
        ids = self.of(t)
        return ids.view(*ids.shape, *[1] * (t.dim() - 1 - ids.dim())).expand(t.shape[:-1]).reshape(-1)

    def inputs(self, number: int, values: Mapping[Any, Any]) -> dict[Any, Any]:
        """Arguments of a module, the floating tensors that have rows in front as :meth:`only` has them."""
        return {
            name: self.only(number, value) if _is_floating(value) and self._find(value) is not None else value
            for name, value in values.items()
        }

    def mask(self, number: int, t: torch.Tensor) -> torch.Tensor:
        """Whether a row has the adapter ``number``, in a shape that broadcasts to that of ``t``."""
        ids = self.of(t)
        return (ids == number).view(*ids.shape, *[1] * (t.dim() - ids.dim()))

    def only(self, number: int, t: Any) -> Any:
        """``t`` with zeros in the rows of others, where somebody differentiates; of a tuple its first value."""
        if isinstance(t, tuple):
            return (self.only(number, t[0]), *t[1:])
        if not isinstance(t, torch.Tensor) or not torch.is_grad_enabled():
            return t
        return torch.where(self.mask(number, t), t, torch.zeros((), dtype=t.dtype, device=t.device))

    def put(self, number: int, new: Any, old: Any) -> Any:
        """``old`` with the rows of the adapter ``number`` from ``new``: tensors, alone or in tuples and mappings."""
        if new is old:
            return old
        if isinstance(new, torch.Tensor) and isinstance(old, torch.Tensor):
            return torch.where(self.mask(number, old), new, old)
        if isinstance(new, Mapping) and isinstance(old, Mapping):
            return type(old)(**{name: self.put(number, new[name], value) for name, value in old.items()})
        if isinstance(new, tuple | list) and isinstance(old, tuple | list):
            return type(old)([self.put(number, *pair) for pair in zip(new, old, strict=True)])
        if new is None or old is None:
            return old
        raise BatchError(
            f"adapters by row: a module returned a {type(old).__name__}",
            expected="tensors, in tuples or mappings", do="leave this module out of the adapters' plans",
        )  # fmt: skip


def _is_floating(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


#: For each adapter of a batch, in order, what it has at a module.
Groups = Sequence[Sequence[Any]]


def of_rows(tables: Sequence[torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """(B, ...): for each row the tensor that its adapter has, all of one shape."""
    return torch.stack(list(tables)).index_select(0, ids)
