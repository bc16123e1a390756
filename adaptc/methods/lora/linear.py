"""LoRA: a trainable rank-r correction of a frozen linear layer (Hu et al. 2021, section 4.1).

    y' = y + s * drop(x) A^T B^T        x (..., K), y (..., N), A (r, K), B (N, r), s = alpha / r

rsLoRA (Kalajdzievski 2023) is the same with s = alpha / sqrt(r). Dropout acts on the adapter's copy of x. DoRA rescales
the rows of the corrected weight (``dora``); initial values read off the weight are in ``initial``.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from adaptc.ir.edit import Edit
from adaptc.ir.ops.dora import row_norm
from adaptc.ir.ops.lora import rows as flat_rows
from adaptc.ir.ops.lora import scaled
from adaptc.ir.sites import LORA_LINEAR
from adaptc.methods import linear
from adaptc.methods.base import Adapter, Anchor
from adaptc.methods.bias import bias_site
from adaptc.methods.lora import dora, initial
from adaptc.methods.lora.options import LoRAOptions
from adaptc.methods.lora.rows import lora_rows_site
from adaptc.methods.lora.site import compute_in
from adaptc.methods.rows import Rows
from adaptc.methods.scaled import ScaledAdapter, draw_factors, storage_dtype
from adaptc.torch_internals import node_value


class LoRAAdapter(ScaledAdapter):
    """``lora_A`` (r, K) and ``lora_B`` (N, r) of one site; fp32 on a 16-bit base unless asked otherwise.

    With DoRA also ``lora_magnitude`` (N,), with ``lora_bias`` also ``lora_B_bias`` (N,). Where the initial values come
    from the weight, the buffers ``initial_A`` and ``initial_B`` keep them, and saved states hold them.
    """

    method: LoRAOptions
    initial_A: torch.Tensor | None  # noqa: N815
    initial_B: torch.Tensor | None  # noqa: N815
    #: Whether the factors are all there is. Dynamo guards on every attribute that is read, at every site and call, so
    #: what else there may be is looked for only where this is False (as in adapters that were pickled without it).
    _is_plain = False

    def __init__(
        self, method: LoRAOptions, module: nn.Module, *, dtype: torch.dtype | None = None, site_id: int = 0
    ) -> None:
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        super().__init__(method, site_id, weight.device)
        inputs, outputs = linear.features(module)
        options: dict[str, Any] = {"dtype": storage_dtype(weight, dtype), "device": weight.device}
        self.lora_A = nn.Parameter(torch.empty(method.r, inputs, **options))
        self.lora_B = nn.Parameter(torch.zeros(outputs, method.r, **options))
        self.lora_B_bias = nn.Parameter(torch.zeros(outputs, **options)) if method.lora_bias else None
        self.lora_magnitude = nn.Parameter(torch.ones(outputs, **options)) if method.dora else None
        self.transposed = linear.is_conv1d(module)
        kept = initial.reads_weight(method.init)
        self.register_buffer("initial_A", torch.zeros_like(self.lora_A.detach()) if kept else None)
        self.register_buffer("initial_B", torch.zeros_like(self.lora_B.detach()) if kept else None)
        self.reset_parameters(weight)
        base_bias = getattr(module, "bias", None)
        if method.bias != "none" and base_bias is not None:
            self.bias: nn.Parameter | None = nn.Parameter(base_bias.detach().clone().to(self.lora_A.dtype))
        else:
            self.register_parameter("bias", None)
        self.set_dropout(method.dropout)
        parts = (self.lora_B_bias, self.lora_magnitude, self.initial_A, self.bias, method.compute_dtype)
        self._is_plain = all(part is None for part in parts)

    @classmethod
    def refusal(cls, method: LoRAOptions, module: nn.Module) -> str | None:
        """Why LoRA with these options cannot adapt ``module``, or None when it can."""
        if reason := linear.refusal("", module):
            return reason
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        if reason := initial.refusal(method.init, method.r, weight):
            return reason
        return dora.refusal(module) if method.dora else None

    def reset_parameters(self, weight: torch.Tensor) -> None:
        """Draw the initial values (the method's ``init``); those of "corda" come by :meth:`set_covariance`."""
        method = self.method
        draw_factors(method.init, method.r, self.lora_A, self.lora_B)
        with torch.no_grad():
            if method.init == "random" and self.lora_B_bias is not None:
                bound = 1 / math.sqrt(method.r)
                self.lora_B_bias.uniform_(-bound, bound)
            if method.init == "orthogonal":
                self._set_factors(initial.orthogonal(method.r, self.lora_A.shape[1], self.lora_B.shape[0]))
            elif initial.reads_weight(method.init) and not method.needs_covariance:
                W = self._as_rows(weight)
                self._start_from(initial.from_weight(method.init, W, method.r, method.scaling))
            if self.lora_magnitude is not None:
                norm = row_norm(weight, *self.factors(), self.scale, self.transposed)
                self.lora_magnitude.copy_(norm)

    def set_covariance(self, path: str, weight: torch.Tensor, covariance: torch.Tensor) -> None:
        method, W = self.method, self._as_rows(weight)
        factors = initial.from_covariance(
            W, covariance, method.r, method.scaling, method=method.corda_method, path=path
        )
        self._start_from(factors)

    def _as_rows(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight as (N, K)."""
        return weight.detach().t() if self.transposed else weight.detach()

    @torch.no_grad()
    def _set_factors(self, factors: initial.Factors) -> None:
        self.lora_A.copy_(factors[0])
        self.lora_B.copy_(factors[1])

    @torch.no_grad()
    def _start_from(self, factors: initial.Factors) -> None:
        """Train ``factors``, a part of the frozen weight: the correction is their change."""
        assert self.initial_A is not None and self.initial_B is not None
        self._set_factors(factors)
        self.initial_A.copy_(self.lora_A)
        self.initial_B.copy_(self.lora_B)

    def factors(self) -> initial.Factors:
        """A and B whose scaled product corrects the weight: of rank r, or 2r where the initial product is taken off."""
        if self.initial_A is None or self.initial_B is None:
            return self.lora_A, self.lora_B
        A = torch.cat([self.lora_A, self.lora_A - self.initial_A])
        return A, torch.cat([self.lora_B - self.initial_B, self.initial_B], 1)

    def apply_to(self, module: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if self._is_plain:
            dropout = float(self._dropout)
            drops = dropout > 0 and self.training
            y = lora_site(x, y, self.site_id, self.lora_A, self.lora_B, self.scale, dropout, drops, None)
            return y
        A, B = self.factors()
        dropout, compute_dtype = float(self._dropout), self.method.compute_dtype
        if self.lora_magnitude is None:
            y = lora_site(x, y, self.site_id, A, B, self.scale, dropout, self.training, compute_dtype)
        else:
            y = dora.dora_site(
                x, y, self.site_id, module.weight, module.bias, A, B, self.lora_magnitude, self.scale,
                dropout, self.training, compute_dtype, self.transposed,
            )  # fmt: skip
        if self.lora_B_bias is not None:
            y = lora_bias_site(y, self.site_id, self.lora_B_bias, self.scale)
        if self.bias is not None:
            y = bias_site(x, y, self.site_id, self.bias, module.bias)
        return y

    @torch.no_grad()
    def correct(self, module: nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
        drops = float(self._dropout) > 0 and self.training
        if not self._is_plain or drops or not y.is_contiguous():
            super().correct(module, x, y)
            return
        with torch.autocast(y.device.type, enabled=False):
            inner = scaled(flat_rows(x).to(y.dtype) @ self.lora_A.to(y.dtype).mT, self.scale)
            # One more product beside the sum, and nothing of the size of y.
            y.view(-1, y.shape[-1]).addmm_(inner, self.lora_B.to(y.dtype).mT)

    def together(self) -> object:
        return (self._dropout, self.training) if self._is_plain else None

    def apply_rows(
        self, module: nn.Module, adapters: Sequence[Adapter], numbers: Sequence[int], rows: Rows, x: torch.Tensor,
        y: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        chosen = [a for a in adapters if isinstance(a, LoRAAdapter)]
        factors = [a.lora_A for a in chosen], [a.lora_B for a in chosen], [a.scale for a in chosen]
        dropout = float(self._dropout)
        drops = dropout > 0 and self.training
        out = lora_rows_site(self.site_id, x, y, *factors, rows.of_products(x), list(numbers), dropout, drops)
        return out  # type: ignore[no-any-return]

    def delta(self, weight: torch.Tensor | None = None) -> torch.Tensor:
        """The update of the (out, in) weight, in fp64: s B A, or with DoRA diag(m / n) (W + s B A) - W.

        Raises:
            ValueError: DoRA without ``weight``, the frozen layer's, as it is stored.
        """
        A, B = self.factors()
        update = self.scaling * (B.double() @ A.double())
        if self.lora_magnitude is None:
            return update
        if weight is None:
            raise ValueError("delta: a DoRA adapter's update depends on the frozen weight: give it")
        W = self._as_rows(weight).double()
        norm: torch.Tensor = torch.linalg.vector_norm(W + update, dim=1)
        return (self.lora_magnitude.double() / norm)[:, None] * (W + update) - W

    @property
    def adds(self) -> bool:
        return self.lora_magnitude is None

    def weight_update(self) -> torch.Tensor | None:
        return self.delta() if self.lora_magnitude is None else None

    def delta_bias(self) -> torch.Tensor | None:
        """s times the bias of the second factor, the update of the layer's bias, in fp64; None without one."""
        return None if self.lora_B_bias is None else self.scaling * self.lora_B_bias.double()

    def products(self) -> tuple[tuple[str, ...], ...]:
        return (("lora_A", "lora_B"),)

    def peft_tensors(self) -> dict[str, torch.Tensor]:
        A, B = self.factors()  # of rank 2r where the initial product is taken off
        named = {
            "lora_A.weight": A, "lora_B.weight": B, "lora_B.bias": self.lora_B_bias,
            "lora_magnitude_vector": self.lora_magnitude, "bias": self.bias,
        }  # fmt: skip
        return {suffix: tensor for suffix, tensor in named.items() if tensor is not None}

    @torch.no_grad()
    def set_peft_tensors(self, values: Mapping[str, torch.Tensor]) -> None:
        if self.initial_A is None or self.initial_B is None:
            return super().set_peft_tensors(values)
        # The inverse of `factors`, exact for any pair of rank 2r up to the rounding of one sum.
        r = self.method.r
        A, B = values["lora_A.weight"].to(self.lora_A), values["lora_B.weight"].to(self.lora_B)
        self.initial_A.copy_(A[:r] - A[r:])
        self.initial_B.copy_(B[:, r:])
        self._set_factors((A[:r], B[:, :r] + B[:, r:]))
        for suffix, own in (("lora_magnitude_vector", self.lora_magnitude), ("bias", self.bias)):
            if own is not None:
                own.copy_(values[suffix])

    def signature(self) -> tuple[object, ...]:
        method = self.method
        return (*super().signature(), self._dropout, method.compute_dtype, self.initial_A is not None)


@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]
def lora_site(
    x: torch.Tensor,
    y: torch.Tensor,
    site_id: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    scale: torch.Tensor,
    dropout: float,
    training: bool,
    compute_dtype: str | None,
) -> torch.Tensor:
    """The anchor of a LoRA site, and its reference: y + s * drop(x) A^T B^T."""
    dtype = compute_in(y, compute_dtype)
    with torch.autocast(x.device.type, enabled=False):
        dropped = F.dropout(x.to(dtype), dropout, training)
        delta = dropped @ A.to(dtype).mT @ B.to(dtype).mT
        wide = torch.float32 if dtype.itemsize < 4 else dtype
        return y + (scale.to(wide) * delta.to(wide)).to(y.dtype)


def expand_site(
    edit: Edit,
    x: fx.Node,
    y: fx.Node,
    site_id: fx.Node,
    A: fx.Node,
    B: fx.Node,
    scale: fx.Node,
    dropout: float,
    training: bool,
    compute_dtype: str | None,
) -> fx.Node:
    """The anchor's body in the dialect, with its casts written out."""
    value = node_value(y)
    dtype = compute_in(value, compute_dtype)
    dropped = edit.call(F.dropout, edit.cast(x, dtype), dropout, training)
    operands = (edit.cast(operand, dtype) for operand in (y, A, B))
    corrected = edit.item(edit.call(LORA_LINEAR(), dropped, *operands, scale, "n"), 0)
    return edit.cast(corrected, value.dtype)


@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]
def lora_bias_site(y: torch.Tensor, site_id: torch.Tensor, bias: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The anchor of the second factor's bias, and its reference: y + s * bias."""
    return y + (scale * bias).to(y.dtype)


def expand_bias_site(edit: Edit, y: fx.Node, site_id: fx.Node, bias: fx.Node, scale: fx.Node) -> fx.Node:
    """The anchor's body as plain torch: there is nothing for a later pass to match."""
    product = edit.call("to", edit.call(operator.mul, scale, bias), node_value(y).dtype)
    return edit.call(operator.add, y, product)


ANCHORS = (Anchor(lora_site, expand_site), Anchor(lora_bias_site, expand_bias_site))
