"""(IA)^3: learned vectors that rescale activations (Liu et al. 2022, section 3.3).

    y' = l * y        l (N,), on keys and values
    y  = W (l * x)    l (K,), on the input of a feed-forward layer's second product (``feedforward``)

The product is made in the wider of the two dtypes and rounded once to the activation's, as in PEFT.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import nn

from adaptc.ir.derive import derive
from adaptc.ir.lora import draw_tensor
from adaptc.methods import linear
from adaptc.methods.base import Adapter, Method, anchor_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class IA3(Method):
    """Rescale the outputs of linear layers, or their inputs.

    Args:
        feedforward: the vector multiplies the input (PEFT's ``feedforward_modules``) instead of the output.
        init: "default" (ones: the identity) or "random" (normal values, PEFT's ``init_ia3_weights=False``).
    """

    kind: ClassVar[str] = "ia3"
    peft_kind: ClassVar[str | None] = "IA3"
    mergeable: ClassVar[bool] = True
    batchable: ClassVar[bool] = True
    quantised: ClassVar[bool] = True

    feedforward: bool = False
    init: str = "default"

    def refusal(self, path: str, module: nn.Module) -> str | None:
        return linear.refusal(path, module)

    def build(self, path: str, module: nn.Module, *, dtype: torch.dtype | None, site_id: int) -> Adapter:
        kind = IA3BeforeAdapter if self.feedforward else IA3Adapter
        return kind(self, module, dtype=dtype, site_id=site_id)


class IA3Adapter(Adapter):
    """``ia3_l`` (N,) of one site."""

    #: Whether the vector is as long as the input.
    size_of: ClassVar[int] = 1

    def __init__(
        self, method: IA3, module: nn.Module, *, dtype: torch.dtype | None = None, site_id: int = 0
    ) -> None:
        super().__init__(method, site_id)
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        if dtype is None:
            dtype = torch.float32 if weight.dtype.itemsize < 4 else weight.dtype
        size = linear.features(module)[self.size_of]
        values = torch.ones(size, dtype=dtype, device=weight.device)
        self.ia3_l = nn.Parameter(values if method.init == "default" else torch.randn_like(values))

    def apply_to(self, module: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return ia3_site(self.site_id, y, self.ia3_l)


class IA3BeforeAdapter(IA3Adapter):
    """``ia3_l`` (K,) of a feed-forward site."""

    acts_before: ClassVar[bool] = True
    size_of: ClassVar[int] = 0

    def apply_before(self, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return ia3_site(self.site_id, x, self.ia3_l)

    def apply_to(self, module: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return y


def body(t: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """t (..., n) * scale (n,)."""
    return (t * scale).to(t.dtype)


def sample(draw: Any) -> tuple[Any, ...]:
    from hypothesis import strategies as st

    shape = draw(st.lists(st.integers(1, 5), min_size=2, max_size=3))
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
    wide = dtype if dtype.itemsize >= 4 else draw(st.sampled_from([dtype, torch.float32]))
    return draw_tensor(draw, tuple(shape), dtype), draw_tensor(draw, (shape[-1],), wide)


SCALE = derive("ia3_scale", "(Tensor t, Tensor scale) -> Tensor", body, sample=sample)
_ANCHOR = anchor_of(SCALE)
ia3_site = _ANCHOR.function
ANCHORS = (_ANCHOR,)
