"""AdaptFormer: a bottleneck beside the feed-forward half of a transformer block (Chen et al. 2022, section 3.2).

    x'  = x + attention(norm(x))
    out = x' + mlp(norm2(x')) + s f(x')
    f(h) = U (m * relu(D h + d)) + u       h (..., K), D (r, K), d (r,), U (K, r), u (K,), m (..., r) dropout's mask

The site is the module to whose output s f is added (``mlp``); what the branch reads is the input of another module,
the norm in front of it (``tap="layernorm_after"``). Added to ``mlp`` it lies before the block's own dropout; with the
whole block as the site it lies behind that, where the authors have it: the same where p = 0. The block as the site does
not go with checkpointing, which keeps no value of the block for what comes after it.

A layer norm of the authors' option: "in" before D, "out" after the scale. The sequential form is
``Bottleneck(placement="series_out", scale=0.1)``.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from adaptc.ir.derive import derive
from adaptc.ir.ops.lora import draw_tensor
from adaptc.methods import linear
from adaptc.methods.base import Method, anchor_of
from adaptc.methods.bottleneck import Branch, branch

NORMS = ("none", "in", "out")
INITS = ("default", "random")
#: Of nn.LayerNorm, as the authors use it.
_EPS = 1e-5


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptFormer(Method):
    """A bottleneck from the input of one module to the output of a later one.

    Args:
        r: width of the bottleneck; dropout: probability on its r values, after relu, in training.
        scale: s in the formula; learn_scale: s is trained, from this value on (the authors' starts at 1).
        norm: "none", or a trained layer norm "in" front of the branch or on what comes "out" of it, scaled.
        init: "default" (D kaiming-uniform with a = sqrt(5), U zero: the identity) or "random" (both drawn like D).
            Biases start at zero.
        tap: the module whose input is read: a name beside the site, in it, or in what encloses it.
        features: width of the activations; default that of the last linear layer in the site.
    """

    kind: ClassVar[str] = "adaptformer"
    batchable: ClassVar[bool] = True
    quantised: ClassVar[bool] = True
    #: As in the bottleneck's other publications; not options here.
    bias: ClassVar[bool] = True

    r: int = 64
    scale: float = 0.1
    learn_scale: bool = False
    dropout: float = 0.1
    norm: str = "none"
    init: str = "default"
    tap: str = "layernorm_after"
    features: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("r", type(self.r) is int and self.r > 0, "a positive integer")
        self.require("scale", math.isfinite(self.scale), "a finite number")
        self.require("learn_scale", isinstance(self.learn_scale, bool), "true or false")
        self.require("dropout", 0.0 <= self.dropout < 1.0, "a number in [0, 1)")
        self.require("norm", self.norm in NORMS, " or ".join(NORMS))
        self.require("init", self.init in INITS, " or ".join(INITS))
        self.require("tap", isinstance(self.tap, str) and bool(self.tap), "a module's name")
        known = self.features is None or (type(self.features) is int and self.features > 0)
        self.require("features", known, "a positive integer")

    def refusal(self, path: str, module: nn.Module) -> str | None:
        return None if self.width(module) is not None else linear.unknown_width(module)

    def width(self, module: nn.Module) -> int | None:
        """Width of the residual stream at ``module``, or None when it is not known."""
        return self.features if self.features is not None else linear.last_width(module)

    def build(self, path: str, module: nn.Module, *, dtype: torch.dtype | None, site_id: int) -> AdaptFormerAdapter:
        return AdaptFormerAdapter(self, module, dtype=dtype, site_id=site_id)


class AdaptFormerAdapter(Branch):
    """``down`` (r, K), ``down_bias`` (r,), ``up`` (K, r), ``up_bias`` (K,) of one site; ``scale`` (1,) where it is
    trained; ``norm_weight`` and ``norm_bias`` (K,) with a layer norm."""

    takes_any_output: ClassVar[bool] = True

    method: AdaptFormer

    def __init__(
        self, method: AdaptFormer, module: nn.Module, *, dtype: torch.dtype | None = None, site_id: int = 0
    ) -> None:
        width = method.width(module)
        assert width is not None  # asked by refusal
        super().__init__(method, module, (width, width), dtype=dtype, site_id=site_id)
        self.tap = method.tap
        self.norm_weight = self.norm_bias = None
        if method.norm != "none":
            like = self.up[:, 0].detach()
            self.norm_weight = nn.Parameter(torch.ones_like(like))
            self.norm_bias = nn.Parameter(torch.zeros_like(like))
        self.set_dropout(method.dropout)

    def apply_to(self, module: nn.Module, x: torch.Tensor, y: Any) -> Any:
        if isinstance(y, tuple):  # a whole block
            return (self.apply_to(module, x, y[0]), *y[1:])
        mask, dropout = None, float(self._dropout)
        if dropout > 0 and self.training:
            # fp32: 1 / (1 - p) rounded to 16 bits would scale the branch.
            wide = torch.float32 if y.dtype.itemsize < 4 else y.dtype
            mask = F.dropout(torch.ones(*x.shape[:-1], self.down.shape[0], dtype=wide, device=x.device), dropout, True)
        factors = self.down, self.up, self.down_bias, self.up_bias
        norm = self.norm_weight, self.norm_bias, self.method.norm
        return adaptformer_site(self.site_id, x, y, *factors, self.scale, mask, *norm)

    def signature(self) -> tuple[object, ...]:
        return (*super().signature(), self.method.norm, self._dropout, self.method.tap)


def body(
    h: torch.Tensor,
    residual: torch.Tensor,
    down: torch.Tensor,
    up: torch.Tensor,
    down_bias: torch.Tensor,
    up_bias: torch.Tensor,
    scale: torch.Tensor,
    mask: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    norm: str,
) -> torch.Tensor:
    """residual (..., K) + scale * ((mask * relu(h (..., K) down^T + down_bias)) up^T + up_bias), with a layer norm of h
    (``norm`` "in") or of the scaled branch ("out"), in the residual's dtype; only products are rounded to it before."""
    dtype = residual.dtype
    wide = torch.float32 if dtype.itemsize < 4 else dtype

    def normed(t: torch.Tensor) -> torch.Tensor:
        assert norm_weight is not None and norm_bias is not None
        return F.layer_norm(t.to(wide), t.shape[-1:], norm_weight.to(wide), norm_bias.to(wide), _EPS)

    h = normed(h) if norm == "in" else h
    out = scale.to(wide) * branch(h, down, up, down_bias, up_bias, "relu", dtype, mask)
    return (residual.to(wide) + (normed(out) if norm == "out" else out)).to(dtype)


def sample(draw: Any) -> tuple[Any, ...]:
    from hypothesis import strategies as st

    rows = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=2)))
    k, r = draw(st.integers(2, 5)), draw(st.integers(1, 4))
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
    wide = dtype if dtype.itemsize >= 4 else draw(st.sampled_from([dtype, torch.float32]))
    norm = draw(st.sampled_from(NORMS))
    shapes = [(r, k), (k, r), (r,), (k,)]
    mask = draw_tensor(draw, (*rows, r), dtype if dtype.itemsize >= 4 else torch.float32)
    affine = [None, None] if norm == "none" else [draw_tensor(draw, (k,), wide) for _ in range(2)]
    return (
        draw_tensor(draw, (*rows, k), dtype), draw_tensor(draw, (*rows, k), dtype),
        *(draw_tensor(draw, shape, wide) for shape in shapes), draw_tensor(draw, (1,), torch.float64),
        draw(st.sampled_from([None, mask])), *affine, norm,
    )  # fmt: skip


ADAPTFORMER = derive(
    "adaptformer",
    "(Tensor h, Tensor residual, Tensor down, Tensor up, Tensor down_bias, Tensor up_bias, Tensor scale, Tensor? mask,"
    " Tensor? norm_weight, Tensor? norm_bias, str norm) -> Tensor",
    body,
    sample=sample,
)
ANCHORS = (anchor_of(ADAPTFORMER),)
adaptformer_site = ANCHORS[0].function
