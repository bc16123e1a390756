"""How far merged weights are from the exact ones, as an error of the output.

The exact weight W* is what the frozen weight and the adapters make together, in fp64; the merged one is W' = W*
rounded to its dtype, and E = W' - W*. For an input x the layer's output is off by x E^T. Beside it stands what the
arithmetic of a dtype rounds in every product, merged or not, which is not counted here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import nn

from adaptc.methods import linear


@dataclasses.dataclass(frozen=True)
class TensorError:
    """Of one merged tensor.

    Attributes:
        path: its path in the model.
        rms: root mean square of x E^T over outputs, for inputs x whose entries are independent with mean 0 and
            variance 1; in units of the output.
        bound: the largest entry that x E^T can have where no entry of x is larger than 1 in magnitude.
        relative: rms over that of x W*^T, the output itself.
    """

    path: str
    rms: float
    bound: float
    relative: float


@dataclasses.dataclass(frozen=True)
class MergeReport:
    """What ``merge`` did.

    Attributes:
        names: the adapters that are merged, in the order in which they act.
        tensors: a row for each tensor that was written.
        bytes_kept: what the kept base takes, in memory or on disk.
        output: the largest difference between the model's output unmerged and merged, on the inputs that were given;
            None without inputs.
    """

    names: tuple[str, ...]
    tensors: tuple[TensorError, ...]
    bytes_kept: int
    output: float | None = None

    def compared(self, unmerged: Sequence[torch.Tensor], merged: Sequence[torch.Tensor]) -> MergeReport:
        """The report with the difference of two calls' outputs."""
        pairs = [(a, b) for a, b in zip(unmerged, merged, strict=True) if a.is_floating_point() and a.numel()]
        differences = (float((a.double() - b.double()).abs().max()) for a, b in pairs)
        return dataclasses.replace(self, output=max(differences, default=0.0))

    @property
    def worst(self) -> TensorError | None:
        """The tensor whose error is the largest part of its output."""
        return max(self.tensors, key=lambda row: row.relative, default=None)

    def __str__(self) -> str:
        lines = [f"merged {', '.join(self.names)}: {len(self.tensors)} tensors, {self.bytes_kept:,} bytes kept"]
        lines += lines_of(self.tensors)
        if self.output is not None:
            lines.append(f"  largest difference of the model's output: {self.output:.2e}")
        return "\n".join(lines)


def lines_of(rows: Sequence[TensorError]) -> list[str]:
    """A line of text for each row."""
    width = max((len(row.path) for row in rows), default=0)
    return [
        f"  {row.path:<{width}}  rms {row.rms:.2e}  bound {row.bound:.2e}  relative {row.relative:.2e}" for row in rows
    ]


def error_of(path: str, module: nn.Module, exact: torch.Tensor, value: torch.Tensor) -> TensorError:
    """The error of ``value``, which is ``exact`` rounded, as the tensor at ``path`` of ``module``."""
    wide = exact.detach().double()
    error = _by_output(path, module, value.detach().double() - wide)
    size = _by_output(path, module, wide).square().sum(1).mean().sqrt()
    rms = error.square().sum(1).mean().sqrt()
    relative = 0.0 if not bool(rms) else float(rms / size)
    return TensorError(path, float(rms), float(error.abs().sum(1).max()), relative)


def _by_output(path: str, module: nn.Module, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor as a matrix with a row for each output: what multiplies the inputs that it depends on."""
    if tensor.dim() < 2 or isinstance(module, nn.Embedding):  # a bias, or rows that are looked up
        return tensor.reshape(-1, 1)
    is_transposed = tensor.dim() == 3 and bool(getattr(module, "is_transposed", False))  # experts as (E, K, N)
    if is_transposed or linear.is_conv1d(module):
        tensor = tensor.mT
    outputs = tensor.shape[:2] if tensor.dim() == 3 and not isinstance(module, nn.Conv1d) else tensor.shape[:1]
    return tensor.reshape(torch.Size(outputs).numel(), -1)


def errors(rows: Sequence[TensorError]) -> tuple[TensorError, ...]:
    """``rows`` in the order of their paths."""
    return tuple(sorted(rows, key=lambda row: row.path))
