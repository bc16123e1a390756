"""Bottleneck adapters: a small two-layer network with a nonlinearity (Houlsby et al. 2019, section 2.1).

    f(h) = U act(D drop(h) + d) + u        h (..., K), D (r, K), d (r,), U (N, r), u (N,)

    series_in    x' = x + s f(x)           before the frozen module
    series_out   y' = y + s f(y)           after it
    parallel     y' = y + s f(x)           beside it

Placements of published adapters are plans: see ``adaptc.plan.presets``.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import nn

from adaptc.errors import UnsupportedError
from adaptc.ir.derive import derive
from adaptc.ir.ops.lora import draw_tensor
from adaptc.methods import linear
from adaptc.methods.base import Adapter, Method, anchor_of
from adaptc.methods.scaled import storage_dtype

PLACEMENTS = ("series_in", "series_out", "parallel")
ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu", "tanh", "identity")
INITS = ("default", "bert", "houlsby", "random")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bottleneck(Method):
    """A residual bottleneck before, after or beside a module.

    Args:
        r: width of the bottleneck; dropout: probability on its input, in training.
        placement: "series_in", "series_out" or "parallel".
        activation: "relu", "gelu", "gelu_tanh", "silu", "tanh" or "identity".
        scale: s in the formula; learn_scale: s is trained, from this value on (LLM-Adapters, AdaptFormer).
        bias: whether d and u are there.
        init: "default" (D kaiming-uniform with a = sqrt(5), U zero: the identity), "bert" (both normal with std
            0.02, LLM-Adapters), "houlsby" (both normal with std 1e-3, cut at two) or "random" (both
            kaiming-uniform). Biases start at zero.
        features: width of the activations, where the module does not say it (a dropout, a whole block).
    """

    kind: ClassVar[str] = "bottleneck"
    batchable: ClassVar[bool] = True
    bankable: ClassVar[bool] = True
    changes_input: ClassVar[bool] = True
    quantised: ClassVar[bool] = True

    r: int = 64
    placement: str = "series_out"
    activation: str = "relu"
    dropout: float = 0.0
    scale: float = 1.0
    learn_scale: bool = False
    bias: bool = True
    init: str = "default"
    features: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("r", type(self.r) is int and self.r > 0, "a positive integer")
        self.require("placement", self.placement in PLACEMENTS, " or ".join(PLACEMENTS))
        self.require("activation", self.activation in ACTIVATIONS, " or ".join(ACTIVATIONS))
        self.require("dropout", 0.0 <= self.dropout < 1.0, "a number in [0, 1)")
        self.require("scale", math.isfinite(self.scale), "a finite number")
        self.require("learn_scale", isinstance(self.learn_scale, bool), "true or false")
        self.require("bias", isinstance(self.bias, bool), "true or false")
        self.require("init", self.init in INITS, " or ".join(INITS))
        known = self.features is None or (type(self.features) is int and self.features > 0)
        self.require("features", known, "a positive integer")

    def refusal(self, path: str, module: nn.Module) -> str | None:
        return None if self.widths(module) is not None else linear.unknown_width(module)

    def widths(self, module: nn.Module) -> tuple[int, int] | None:
        """(width that the bottleneck reads, width that it adds to), or None when it is not known."""
        if self.features is not None:
            return self.features, self.features
        if linear.refusal("", module) is not None:
            return None
        inputs, outputs = linear.features(module)
        return {"series_in": (inputs, inputs), "series_out": (outputs, outputs)}.get(self.placement, (inputs, outputs))

    def build(self, path: str, module: nn.Module, *, dtype: torch.dtype | None, site_id: int) -> BottleneckAdapter:
        kind = BottleneckBeforeAdapter if self.placement == "series_in" else BottleneckAdapter
        return kind(self, module, dtype=dtype, site_id=site_id)


class Branch(Adapter):
    """The factors of a two-layer network: ``down`` (r, K), ``up`` (N, r), with biases ``down_bias`` (r,) and
    ``up_bias`` (N,), and its ``scale`` (1,): trained, or a number of the graph.

    ``method`` has r, scale, learn_scale, bias and init as in :class:`Bottleneck`.
    """

    scale: torch.Tensor
    down_bias: torch.Tensor | None
    up_bias: torch.Tensor | None

    def __init__(
        self, method: Any, module: nn.Module, widths: tuple[int, int], *, dtype: torch.dtype | None, site_id: int
    ) -> None:
        super().__init__(method, site_id)
        model: torch.Tensor = next(module.parameters(), torch.empty(0, dtype=torch.float32, device="cpu"))
        options: dict[str, Any] = {"dtype": storage_dtype(model, dtype), "device": model.device}
        inputs, outputs = widths
        self.down = nn.Parameter(torch.empty(method.r, inputs, **options))
        self.up = nn.Parameter(torch.empty(outputs, method.r, **options))
        for name, size in (("down_bias", method.r), ("up_bias", outputs)):
            self.register_parameter(name, nn.Parameter(torch.zeros(size, **options)) if method.bias else None)
        if method.learn_scale:
            self.scale = nn.Parameter(torch.full((1,), method.scale, **options))
        else:
            self.register_buffer("scale", self._scale_tensor(method.scale), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the initial values (the method's ``init``)."""
        init = self.method.init  # type: ignore[attr-defined]
        for weight in (self.down, self.up):
            if init == "bert":
                nn.init.normal_(weight, std=0.02)
            elif init == "houlsby":
                nn.init.trunc_normal_(weight, std=1e-3, a=-2e-3, b=2e-3)
            else:
                nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
        if init == "default":
            nn.init.zeros_(self.up)

    def _scale_tensor(self, scale: float) -> torch.Tensor:
        return torch.tensor([scale], dtype=torch.float64, device=self.down.device)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if not isinstance(self.scale, nn.Parameter):  # a number, not a weight: never cast
            self.scale = self._scale_tensor(self.method.scale)  # type: ignore[attr-defined]
        return self


class BottleneckAdapter(Branch):
    """``down`` (r, K), ``up`` (N, r) and, with biases, ``down_bias`` (r,), ``up_bias`` (N,) of one site."""

    takes_any_output: ClassVar[bool] = True

    method: Bottleneck

    def __init__(
        self, method: Bottleneck, module: nn.Module, *, dtype: torch.dtype | None = None, site_id: int = 0
    ) -> None:
        widths = method.widths(module)
        assert widths is not None  # asked by refusal
        super().__init__(method, module, widths, dtype=dtype, site_id=site_id)
        self.set_dropout(method.dropout)

    def apply_to(self, module: nn.Module, x: torch.Tensor, y: Any) -> Any:
        if isinstance(y, tuple):  # a whole block
            return (self.apply_to(module, x, y[0]), *y[1:])
        return self.add(x if self.method.placement == "parallel" else y, y)

    def add(self, h: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """residual + s f(h)."""
        dropout = float(self._dropout)
        if dropout > 0:
            h = F.dropout(h, dropout, self.training)
        biases = self.down_bias, self.up_bias
        return bottleneck_site(
            self.site_id, h, residual, self.down, self.up, *biases, self.scale, self.method.activation
        )

    def products(self) -> tuple[tuple[str, ...], ...]:
        # Every activation is zero at zero; with a bias the second factor multiplies another value.
        return () if self.method.bias else (("down", "up"),)

    def signature(self) -> tuple[object, ...]:
        method = self.method
        return (*super().signature(), method.placement, method.activation, self._dropout)


class BottleneckBeforeAdapter(BottleneckAdapter):
    """The adapter of a series_in site: it changes the input."""

    acts_before: ClassVar[bool] = True

    def apply_before(self, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return self.add(x, x)

    def apply_to(self, module: nn.Module, x: torch.Tensor, y: Any) -> Any:
        return y


def activate(z: torch.Tensor, activation: str) -> torch.Tensor:
    """The activation called ``activation`` of z."""
    match activation:
        case "relu":
            return F.relu(z)
        case "gelu":
            return F.gelu(z)
        case "gelu_tanh":
            return F.gelu(z, approximate="tanh")
        case "silu":
            return F.silu(z)
        case "tanh":
            return torch.tanh(z)
        case "identity":
            return z
    raise UnsupportedError(f"no activation {activation!r}", expected=", ".join(ACTIVATIONS))


def branch(
    h: torch.Tensor,
    down: torch.Tensor,
    up: torch.Tensor,
    down_bias: torch.Tensor | None,
    up_bias: torch.Tensor | None,
    activation: str,
    dtype: torch.dtype,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """mask * act(h (..., K) down^T + down_bias) up^T + up_bias: products in ``dtype``, the rest in fp32 or wider."""
    wide = torch.float32 if dtype.itemsize < 4 else dtype
    z = (h.to(dtype) @ down.to(dtype).mT).to(wide)
    if down_bias is not None:
        z = z + down_bias.to(wide)
    z = activate(z, activation)
    if mask is not None:
        z = z * mask.to(wide)
    out = (z.to(dtype) @ up.to(dtype).mT).to(wide)
    return out if up_bias is None else out + up_bias.to(wide)


def body(
    h: torch.Tensor,
    residual: torch.Tensor,
    down: torch.Tensor,
    up: torch.Tensor,
    down_bias: torch.Tensor | None,
    up_bias: torch.Tensor | None,
    scale: torch.Tensor,
    activation: str,
) -> torch.Tensor:
    """residual (..., N) + scale * (act(h (..., K) down^T + down_bias) up^T + up_bias), in the residual's dtype.

    Biases, activation and scale are applied in fp32 or wider; each product is rounded once.
    """
    dtype = residual.dtype
    wide = torch.float32 if dtype.itemsize < 4 else dtype
    out = branch(h, down, up, down_bias, up_bias, activation, dtype)
    return (residual.to(wide) + scale.to(wide) * out).to(dtype)


def sample(draw: Any) -> tuple[Any, ...]:
    from hypothesis import strategies as st

    rows = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=2)))
    k, n, r = (draw(st.integers(1, 5)) for _ in range(3))
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
    wide = dtype if dtype.itemsize >= 4 else draw(st.sampled_from([dtype, torch.float32]))
    bias = draw(st.booleans())
    return (
        draw_tensor(draw, (*rows, k), dtype), draw_tensor(draw, (*rows, n), dtype),
        draw_tensor(draw, (r, k), wide), draw_tensor(draw, (n, r), wide),
        draw_tensor(draw, (r,), wide) if bias else None, draw_tensor(draw, (n,), wide) if bias else None,
        draw_tensor(draw, (1,), torch.float64), draw(st.sampled_from(ACTIVATIONS)),
    )  # fmt: skip


BOTTLENECK = derive(
    "bottleneck",
    "(Tensor h, Tensor residual, Tensor down, Tensor up, Tensor? down_bias, Tensor? up_bias, Tensor scale,"
    " str activation) -> Tensor",
    body,
    sample=sample,
)
ANCHORS = (anchor_of(BOTTLENECK),)
bottleneck_site = ANCHORS[0].function
