"""SSF: a trained scale and shift on every channel of a module's output (Lian et al. 2022, section 3.2).

    y' = gamma * y + beta      gamma, beta (C,); y (..., C), or (batch, C, ...) after a convolution or batch norm

It goes after linear layers, normalisations, convolutions (patch embeddings), embeddings and attention. The product
is made in the wider of the two dtypes and rounded once to the activation's.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import nn

from adaptc.ir.derive import derive
from adaptc.ir.ops.lora import draw_tensor
from adaptc.methods import linear
from adaptc.methods.base import Adapter, Method, anchor_of
from adaptc.methods.quantised import Refusal
from adaptc.methods.scaled import storage_dtype

_BY_CHANNEL = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.modules.instancenorm._InstanceNorm)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SSF(Method):
    """Scale and shift the channels of a module's output.

    Args:
        init: "default" (gamma normal around 1, beta around 0, both with std 0.02: the authors' values, not the
            identity) or "identity" (exactly 1 and 0).
    """

    kind: ClassVar[str] = "ssf"
    mergeable: ClassVar[bool] = True
    batchable: ClassVar[bool] = True
    bankable: ClassVar[bool] = True
    quantised: ClassVar[bool] = True

    init: str = "default"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("init", self.init in ("default", "identity"), "default or identity")

    def refusal(self, path: str, module: nn.Module) -> str | None:
        return None if channels(module) is not None else f"the channels of {type(module).__name__} are not known"

    def build(self, path: str, module: nn.Module, *, dtype: torch.dtype | None, site_id: int) -> SSFAdapter:
        return SSFAdapter(self, module, dtype=dtype, site_id=site_id)


def channels(module: nn.Module) -> tuple[int, bool] | None:
    """(number of channels, whether they are dimension 1 and not the last) of a module's output, or None."""
    if linear.is_linear(module):
        # Attention of torch reads this one's weight without calling it.
        if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
            return None
        return linear.features(module)[1], False
    if isinstance(module, _CONVOLUTIONS):
        return module.out_channels, True
    if isinstance(module, nn.MultiheadAttention):
        return module.embed_dim, False
    if isinstance(module, nn.Embedding):
        return module.embedding_dim, False
    if isinstance(module, _BY_CHANNEL):
        size = module.num_channels if isinstance(module, nn.GroupNorm) else module.num_features
        return size, True
    return _of_norm(module)


def _of_norm(module: nn.Module) -> tuple[int, bool] | None:
    """Normalisations over the last dimension; RMS norms are classes of each model, so the name decides."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.dim() != 1 or "norm" not in type(module).__name__.lower():
        return None
    return weight.shape[0], getattr(module, "data_format", "channels_last") == "channels_first"


class SSFAdapter(Adapter):
    """``ssf_scale`` and ``ssf_shift`` (C,) of one site."""

    takes_any_output: ClassVar[bool] = True

    method: SSF

    def __init__(
        self, method: SSF, module: nn.Module, *, dtype: torch.dtype | None = None, site_id: int = 0
    ) -> None:
        super().__init__(method, site_id)
        known = channels(module)
        assert known is not None  # asked by refusal
        size, self.channels_first = known
        model: torch.Tensor = next(module.parameters(), torch.empty(0))
        dtype = storage_dtype(model, dtype)
        self.ssf_scale = nn.Parameter(torch.ones(size, dtype=dtype, device=model.device))
        self.ssf_shift = nn.Parameter(torch.zeros(size, dtype=dtype, device=model.device))
        if method.init == "default":
            nn.init.normal_(self.ssf_scale, mean=1.0, std=0.02)
            nn.init.normal_(self.ssf_shift, std=0.02)

    def rows_refusal(self, module: nn.Module, *, spans: bool) -> Refusal | None:
        if spans and self.channels_first:
            return Refusal(f"a {type(module).__name__} has channels, and not tokens, in dim 1")
        return super().rows_refusal(module, spans=spans)

    def apply_to(self, module: nn.Module, x: torch.Tensor, y: Any) -> Any:
        if isinstance(y, tuple):  # attention also returns its weights
            return (self.apply_to(module, x, y[0]), *y[1:])
        return ssf_site(self.site_id, y, self.ssf_scale, self.ssf_shift, self.channels_first)

    def signature(self) -> tuple[object, ...]:
        return (*super().signature(), self.channels_first)


def body(y: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, channels_first: bool) -> torch.Tensor:
    """y (..., C) or (batch, C, ...) * scale (C,) + shift (C,)."""
    if channels_first:
        shape = [-1] + [1] * (y.dim() - 2)
        scale, shift = scale.view(shape), shift.view(shape)
    return (y * scale + shift).to(y.dtype)


def sample(draw: Any) -> tuple[Any, ...]:
    from hypothesis import strategies as st

    shape = draw(st.lists(st.integers(1, 5), min_size=2, max_size=4))
    first = draw(st.booleans())
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
    wide = dtype if dtype.itemsize >= 4 else draw(st.sampled_from([dtype, torch.float32]))
    size = (shape[1 if first else -1],)
    return draw_tensor(draw, tuple(shape), dtype), draw_tensor(draw, size, wide), draw_tensor(draw, size, wide), first


SSF_AFFINE = derive(
    "ssf_affine", "(Tensor y, Tensor scale, Tensor shift, bool channels_first) -> Tensor", body, sample=sample
)
ANCHORS = (anchor_of(SSF_AFFINE),)
ssf_site = ANCHORS[0].function
