"""Adapters with a convolution along the tokens (PETL-AST, Cappellazzo et al. 2024, section 3; Jie and Deng 2022).

    conformer   f(h) = m * (U silu(bn(conv(glu(D norm(h) + d)))) + u)      D (2r, K), conv depthwise, k = 31
    convpass    f(h) = U (m * qg(conv(qg(D h + d)))) + u                   D (r, K), conv dense, k = 3

    parallel    y' = y + f(x),  with a residual y + f(x) + x     beside the module
    series      y' = f(y),      with a residual y + f(y)         after it

h (batch, tokens, K), U (N, r), conv r to r channels over k tokens, zeros beyond the ends ("same": (k - 1) // 2 before),
qg(z) = z sigmoid(1.702 z), m dropout's mask. ``bn`` is a batch norm: statistics of the batch over rows and tokens in
training, running ones (momentum 0.1) in eval. All tokens take part, class tokens and padding too.

The authors' code computes the norm of conformer and the convolution of convpass and drops them, so that they never
train; here they are what the paper describes. Where the paper puts them: ``bottleneck_plans.petl_ast_plan``.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from adaptc.errors import SiteError
from adaptc.ir.derive import derive
from adaptc.ir.ops.lora import draw_tensor
from adaptc.methods import linear
from adaptc.methods.base import Adapter, Method, anchor_of
from adaptc.methods.quantised import Refusal
from adaptc.methods.scaled import storage_dtype

STYLES = ("conformer", "convpass")
PLACEMENTS = ("parallel", "series")
INITS = ("default", "identity", "random")
_EPS = 1e-5
_MOMENTUM = 0.1
#: Convolved tokens where the plan does not say.
_KERNEL = {"conformer": 31, "convpass": 3}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvAdapter(Method):
    """A bottleneck with a convolution along the tokens, beside or after a module.

    Args:
        r: channels of the convolution (the authors': width / reduction rate).
        style: "conformer" or "convpass"; kernel: tokens that it convolves, 31 and 3 where None.
        placement: "parallel" or "series"; residual: whether the input of the branch is added to the output as well.
        dropout: probability in training; on f (conformer), on its r channels (convpass).
        init: "default" (the authors': torch's own for conformer, which is not the identity; for convpass xavier-uniform
            with U zero), "identity" (the same with U and u zero) or "random" (no factor zero).
        features: width of the activations; default that of the last linear layer in the site.
    """

    kind: ClassVar[str] = "conv_adapter"
    batchable: ClassVar[bool] = True
    quantised: ClassVar[bool] = True

    r: int = 32
    style: str = "conformer"
    kernel: int | None = None
    placement: str = "parallel"
    residual: bool = False
    dropout: float = 0.1
    init: str = "default"
    features: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("r", type(self.r) is int and self.r > 0, "a positive integer")
        self.require("style", self.style in STYLES, " or ".join(STYLES))
        some = self.kernel is None or (type(self.kernel) is int and self.kernel > 0)
        self.require("kernel", some, "a positive integer")
        self.require("placement", self.placement in PLACEMENTS, " or ".join(PLACEMENTS))
        self.require("residual", isinstance(self.residual, bool), "true or false")
        self.require("dropout", 0.0 <= self.dropout < 1.0, "a number in [0, 1)")
        self.require("init", self.init in INITS, " or ".join(INITS))
        known = self.features is None or (type(self.features) is int and self.features > 0)
        self.require("features", known, "a positive integer")

    def refusal(self, path: str, module: nn.Module) -> str | None:
        return None if self.width(module) is not None else linear.unknown_width(module)

    def width(self, module: nn.Module) -> int | None:
        """Width of the activations that ``module`` reads and returns, or None when it is not known."""
        return self.features if self.features is not None else linear.last_width(module)

    def build(self, path: str, module: nn.Module, *, dtype: torch.dtype | None, site_id: int) -> ConvAdapterAdapter:
        return ConvAdapterAdapter(self, module, dtype=dtype, site_id=site_id)


class ConvAdapterAdapter(Adapter):
    """``down`` (r or 2r, K), ``conv`` (r, 1 or r, k), ``up`` (N, r), each with its bias ``down_bias``, ``conv_bias``,
    ``up_bias``; conformer also ``norm_weight``, ``norm_bias`` (K,), ``bn_weight``, ``bn_bias`` (r,) and the buffers
    ``running_mean``, ``running_var`` (r,)."""

    takes_any_output: ClassVar[bool] = True

    method: ConvAdapter
    up: nn.Parameter
    bn_weight: nn.Parameter
    bn_bias: nn.Parameter
    running_mean: torch.Tensor
    running_var: torch.Tensor

    def __init__(
        self, method: ConvAdapter, module: nn.Module, *, dtype: torch.dtype | None = None, site_id: int = 0
    ) -> None:
        super().__init__(method, site_id)
        width = method.width(module)
        assert width is not None  # asked by refusal
        model = next(module.parameters(), torch.empty(0))
        dtype = storage_dtype(model, dtype)
        conformer, r = method.style == "conformer", method.r
        kernel = method.kernel or _KERNEL[method.style]
        shapes: dict[str, tuple[int, ...]] = {
            "up": (width, r), "up_bias": (width,), "conv": (r, 1 if conformer else r, kernel), "conv_bias": (r,),
            "down": (2 * r if conformer else r, width), "down_bias": (2 * r if conformer else r,),
        }  # fmt: skip
        norms = {"norm_weight": (width,), "norm_bias": (width,), "bn_weight": (r,), "bn_bias": (r,)}
        for name, shape in {**shapes, **(norms if conformer else {})}.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=dtype, device=model.device)))
        if conformer:
            # Running statistics are fp32 at least, as are the batch's.
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            self.register_buffer("running_mean", torch.zeros(r, dtype=wide, device=model.device))
            self.register_buffer("running_var", torch.ones(r, dtype=wide, device=model.device))
        self.reset_parameters()
        self.set_dropout(method.dropout)

    def reset_parameters(self) -> None:
        """Draw the initial values (the method's ``init``)."""
        init, named = self.method.init, dict(self.named_parameters())
        xavier = self.method.style == "convpass"
        for name in ("down", "conv", "up"):
            weight, bias = named[name], named[f"{name}_bias"]
            if xavier:
                nn.init.xavier_uniform_(weight)
                nn.init.zeros_(bias)
            else:  # of nn.Linear and nn.Conv1d
                nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
                bound = 1 / math.sqrt(weight[0].numel())
                nn.init.uniform_(bias, -bound, bound)
        for name in ("norm", "bn") if not xavier else ():
            nn.init.ones_(named[f"{name}_weight"])
            nn.init.zeros_(named[f"{name}_bias"])
        if init == "identity" or (init == "default" and xavier):
            nn.init.zeros_(named["up"])
            nn.init.zeros_(named["up_bias"])

    def rows_refusal(self, module: nn.Module, *, spans: bool) -> Refusal | None:
        if spans:
            return Refusal("it convolves along the tokens of a row")
        if self.training and self.method.style == "conformer":
            return Refusal("its batch norm takes statistics over all rows in training", 'style="convpass" has none')
        return super().rows_refusal(module, spans=spans)

    def apply_to(self, module: nn.Module, x: torch.Tensor, y: Any) -> Any:
        if isinstance(y, tuple):  # attention also returns its weights
            return (self.apply_to(module, x, y[0]), *y[1:])
        if y.dim() != 3:
            raise SiteError(
                f"a {type(module).__name__} returned a tensor of {y.dim()} dimensions",
                expected="(batch, tokens, width): a ConvAdapter convolves along the tokens",
                found=tuple(y.shape), do="leave this module out of the plan",
            )  # fmt: skip
        method = self.method
        if method.placement == "parallel":
            h, base = x, y + x if method.residual else y
        else:
            h, base = y, y if method.residual else None
        return self._branch(h, base)

    def _branch(self, h: torch.Tensor, base: torch.Tensor | None) -> torch.Tensor:
        style, conformer = self.method.style, self.method.style == "conformer"
        norm = (self.norm_weight, self.norm_bias) if conformer else (None, None)
        z = front_site(self.site_id, h, *norm, self.down, self.down_bias, self.conv, self.conv_bias, style)
        if conformer:
            # Its running statistics are written to, which no op of ours may do.
            mean, var, wide = self.running_mean, self.running_var, self.running_mean.dtype
            weight, bias = self.bn_weight.to(wide), self.bn_bias.to(wide)
            normed = F.batch_norm(z.to(wide).transpose(1, 2), mean, var, weight, bias, self.training, _MOMENTUM, _EPS)
            z = normed.transpose(1, 2).to(h.dtype)
        mask, dropout = None, float(self._dropout)
        if dropout > 0 and self.training:
            width = self.up.shape[0 if conformer else 1]
            # fp32: 1 / (1 - p) rounded to 16 bits would scale the branch.
            wide = torch.float32 if h.dtype.itemsize < 4 else h.dtype
            mask = F.dropout(torch.ones(*z.shape[:-1], width, dtype=wide, device=z.device), dropout, True)
        return back_site(self.site_id, z, base, self.up, self.up_bias, mask, style)

    def signature(self) -> tuple[object, ...]:
        method = self.method
        return (*super().signature(), method.style, method.placement, method.residual, self._dropout)


def _quick_gelu(z: torch.Tensor) -> torch.Tensor:
    return z * torch.sigmoid(1.702 * z)


def front(
    h: torch.Tensor,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    down: torch.Tensor,
    down_bias: torch.Tensor,
    conv: torch.Tensor,
    conv_bias: torch.Tensor,
    style: str,
) -> torch.Tensor:
    """(batch, tokens, K) -> (batch, tokens, r): up to and with the convolution, in the dtype of ``h``; products are
    rounded to it, the rest is in fp32 or wider."""
    dtype = h.dtype
    wide = torch.float32 if dtype.itemsize < 4 else dtype
    if norm_weight is not None and norm_bias is not None:
        h = F.layer_norm(h.to(wide), h.shape[-1:], norm_weight.to(wide), norm_bias.to(wide), _EPS).to(dtype)
    z = (h @ down.to(dtype).mT).to(wide) + down_bias.to(wide)
    z = F.glu(z, -1) if style == "conformer" else _quick_gelu(z)
    size = conv.shape[-1]
    padded = F.pad(z.to(dtype).transpose(1, 2), ((size - 1) // 2, size // 2))
    groups = z.shape[-1] if style == "conformer" else 1
    out = F.conv1d(padded, conv.to(dtype), groups=groups).transpose(1, 2).to(wide) + conv_bias.to(wide)
    return out.to(dtype)


def back(
    z: torch.Tensor,
    base: torch.Tensor | None,
    up: torch.Tensor,
    up_bias: torch.Tensor,
    mask: torch.Tensor | None,
    style: str,
) -> torch.Tensor:
    """(batch, tokens, r) -> base + (batch, tokens, N): from the convolution on, in the dtype of ``z``."""
    dtype = z.dtype
    wide = torch.float32 if dtype.itemsize < 4 else dtype
    a = F.silu(z.to(wide)) if style == "conformer" else _quick_gelu(z.to(wide))
    if mask is not None and style == "convpass":
        a = a * mask.to(wide)
    out = (a.to(dtype) @ up.to(dtype).mT).to(wide) + up_bias.to(wide)
    if mask is not None and style == "conformer":
        out = out * mask.to(wide)
    return (out if base is None else base.to(wide) + out).to(dtype)


def _draw_dtypes(draw: Any) -> tuple[torch.dtype, torch.dtype]:
    from hypothesis import strategies as st

    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
    return dtype, dtype if dtype.itemsize >= 4 else draw(st.sampled_from([dtype, torch.float32]))


def sample_front(draw: Any) -> tuple[Any, ...]:
    from hypothesis import strategies as st

    batch, tokens, r, kernel = (draw(st.integers(1, 4)) for _ in range(4))
    k = draw(st.integers(2, 5))
    style = draw(st.sampled_from(STYLES))
    dtype, wide = _draw_dtypes(draw)
    conformer = style == "conformer"
    norm = [draw_tensor(draw, (k,), wide) for _ in range(2)] if conformer else [None, None]
    rows = 2 * r if conformer else r
    shapes = [(rows, k), (rows,), (r, 1 if conformer else r, kernel), (r,)]
    factors = [draw_tensor(draw, shape, wide) for shape in shapes]
    return draw_tensor(draw, (batch, tokens, k), dtype), *norm, *factors, style


def sample_back(draw: Any) -> tuple[Any, ...]:
    from hypothesis import strategies as st

    batch, tokens, r, n = (draw(st.integers(1, 4)) for _ in range(4))
    style = draw(st.sampled_from(STYLES))
    dtype, wide = _draw_dtypes(draw)
    base = draw_tensor(draw, (batch, tokens, n), dtype)
    mask = draw_tensor(draw, (batch, tokens, n if style == "conformer" else r), wide)
    return (
        draw_tensor(draw, (batch, tokens, r), dtype), draw(st.sampled_from([None, base])),
        draw_tensor(draw, (n, r), wide), draw_tensor(draw, (n,), wide), draw(st.sampled_from([None, mask])), style,
    )  # fmt: skip


CONV_FRONT = derive(
    "conv_adapter_front",
    "(Tensor h, Tensor? norm_weight, Tensor? norm_bias, Tensor down, Tensor down_bias, Tensor conv, Tensor conv_bias,"
    " str style) -> Tensor",
    front,
    sample=sample_front,
)
CONV_BACK = derive(
    "conv_adapter_back",
    "(Tensor z, Tensor? base, Tensor up, Tensor up_bias, Tensor? mask, str style) -> Tensor",
    back,
    sample=sample_back,
)
_FRONT, _BACK = anchor_of(CONV_FRONT), anchor_of(CONV_BACK)
front_site, back_site = _FRONT.function, _BACK.function
ANCHORS = (_FRONT, _BACK)
