"""Whether dim 0 of a tensor has a batch's rows in their order: told from the ATen calls that made it.

Of a run on fake tensors whose number of rows no other size is. A model may sort its rows, pick some, or turn them
round; a size does not show that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from adaptc.torch_internals import tree_leaves

#: Ops that give another shape to what stays in order.
_RESHAPE = ("view", "_unsafe_view", "reshape", "_reshape_alias")
#: Ops whose results may have dim 0 in another order than what they are given.
_MOVE = (
    "index", "index_select", "gather", "scatter", "sort", "topk", "argsort", "roll", "flip", "take", "permute", "t",
    "transpose", "as_strided", "cat", "stack", "repeat", "randperm", "set_", "resize_",
)  # fmt: skip
#: Those of them that move the entries of one dimension: op -> where that dimension is among the arguments, and what it
#: is where it is not given (none: all entries as one list).
_ALONG: dict[str, tuple[int, Any]] = {
    "index_select": (1, 0), "gather": (1, 0), "sort": (1, -1), "argsort": (1, -1), "topk": (2, -1), "roll": (2, []),
    "flip": (1, 0),
}  # fmt: skip
_KEPT, _MOVED, _COUNTS = "_adaptc_in_order", "_adaptc_moved", "_adaptc_counts"


def is_kept(value: torch.Tensor) -> bool:
    """Whether dim 0, a multiple of the number of rows, has what is of row 0 first, then what is of row 1."""
    return bool(getattr(value, _KEPT, False))


def is_moved(value: torch.Tensor) -> bool:
    """Whether dim 0 has rows, and may have them in another order than the batch."""
    return bool(getattr(value, _MOVED, False))


def follow(rows: int) -> Callable[[Any, tuple[Any, ...], dict[str, Any], Any], None]:
    """What is told of every ATen call of a run with ``rows`` rows, for ``is_kept`` and ``is_moved``."""

    def on_call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        name = func._schema.name.partition("::")[2]
        given = [t for t in tree_leaves([list(args), kwargs]) if isinstance(t, torch.Tensor)]
        for made in tree_leaves(output):
            if not isinstance(made, torch.Tensor) or made.dim() == 0 or made.shape[0] % rows:
                continue
            if made.shape[0] != rows:
                if _fits(name, given, made, rows) or _leaves_first(name, args, kwargs, made):
                    setattr(made, _KEPT, True)
            elif name.startswith("arange") or (len(given) == 1 and hasattr(given[0], _COUNTS) and name not in _MOVE):
                setattr(made, _COUNTS, True)  # 0, 1, 2, ...: an index that moves nothing
            if _moves(name, args, kwargs, rows) or any(map(is_moved, given)):
                setattr(made, _MOVED, True)

    return on_call


def _fits(name: str, given: Sequence[torch.Tensor], made: torch.Tensor, rows: int) -> bool:
    def is_in_order(value: torch.Tensor) -> bool:
        return value.dim() > 0 and (value.shape[0] == rows or is_kept(value))

    if name in _RESHAPE:
        return is_in_order(given[0])
    if name == "expand" and given[0].shape[: 1 + given[0].dim() - made.dim()] != made.shape[:1]:
        return True  # all the same
    same = [t for t in given if t.dim() > 0 and t.shape[0] == made.shape[0]]
    return name not in _MOVE and bool(same) and all(map(is_in_order, same))


def _leaves_first(name: str, args: Sequence[Any], kwargs: dict[str, Any], made: torch.Tensor) -> bool:
    """Whether a call moves other dimensions than the first of what is in order."""
    x = args[0] if args else None
    if not isinstance(x, torch.Tensor) or not is_kept(x) or x.shape[0] != made.shape[0]:
        return False
    if name == "transpose":
        dims = [kwargs.get(f"dim{i}", args[1 + i] if len(args) > 1 + i else 0) for i in (0, 1)]
        return all(dim % x.dim() for dim in dims)
    if name == "permute":
        return bool(_dims(1, [0], args, kwargs)[0] % x.dim() == 0)
    if name in ("roll", "flip", "sort"):
        dims = _dims(*_ALONG[name], args, kwargs)
        return bool(dims) and all(dim % x.dim() for dim in dims)
    return False


def _moves(name: str, args: Sequence[Any], kwargs: dict[str, Any], rows: int) -> bool:
    """Whether a call takes rows of its first argument in another order."""
    x = args[0] if args else None
    if name in ("cat", "stack"):  # of parts of the rows, in whatever order
        return len(args[0]) > 1 and _dims(1, 0, args, kwargs) == [0]
    if not isinstance(x, torch.Tensor) or x.dim() == 0 or x.shape[0] != rows:
        return False
    if name == "index":
        first = args[1][0] if args[1] else None
        return isinstance(first, torch.Tensor) and not hasattr(first, _COUNTS)
    if name not in _ALONG:
        return False
    dims = _dims(*_ALONG[name], args, kwargs)
    return not dims or any(dim % x.dim() == 0 for dim in dims)


def _dims(place: int, default: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[int]:
    given = kwargs.get("dim", kwargs.get("dims", args[place] if len(args) > place else default))
    return list(given) if isinstance(given, list | tuple) else [given]
