"""LoRA: a trainable rank-r correction of a frozen linear layer (Hu et al. 2021, section 4.1).

    y' = y + s * drop(x) A^T B^T        x (..., K), y (..., N), A (r, K), B (N, r), s = alpha / r

rsLoRA (Kalajdzievski 2023) is the same with s = alpha / sqrt(r). Dropout acts on the adapter's copy of x.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import fx, nn

from adaptc.codegen.torch_internals import node_value
from adaptc.errors import PlanError
from adaptc.ir.edit import Edit
from adaptc.ir.sites import LORA_LINEAR
from adaptc.methods import linear
from adaptc.methods.base import Adapter, Anchor, Method
from adaptc.methods.bias import bias_site

INITS = ("default", "gaussian", "random")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRA(Method):
    """Low-rank adaptation of linear layers.

    Args:
        r: rank; alpha: numerator of the scale; dropout: probability on the adapter's input, in training.
        rslora: scale alpha / sqrt(r) instead of alpha / r.
        init: "default" (A kaiming-uniform with a = sqrt(5), that is U(-1/sqrt(K), 1/sqrt(K)), B zero),
            "gaussian" (A normal with std 1/r, B zero), or "random" (as default, but B drawn like A, so that
            the adapter is not the identity: PEFT's ``init_lora_weights=False``).
        bias: "none", "lora_only" (also train the biases of the adapted layers) or "all" (every bias).
        rank_pattern, alpha_pattern: regular expression on the module path -> r or alpha at those sites, as
            in PEFT: a key matches the whole path or a dotted suffix of it; the first match counts.
        compute_dtype: dtype name ("float32") in which the correction is computed; None means the dtype of
            the site's output. Factors are cast, so a 16-bit activation is never copied in full precision.
    """

    kind: ClassVar[str] = "lora"
    peft_kind: ClassVar[str | None] = "LORA"
    mergeable: ClassVar[bool] = True
    batchable: ClassVar[bool] = True
    quantised: ClassVar[bool] = True

    r: int = 8
    alpha: float = 8
    dropout: float = 0.0
    rslora: bool = False
    init: str = "default"
    bias: str = "none"
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict, hash=False)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict, hash=False)
    compute_dtype: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        ranks = [self.r, *self.rank_pattern.values()]
        _require("r", self.r, all(isinstance(r, int) and r > 0 for r in ranks), "a positive integer")
        _require("dropout", self.dropout, 0.0 <= self.dropout < 1.0, "a number in [0, 1)")
        _require("init", self.init, self.init in INITS, f"one of {', '.join(INITS)}")
        biases = ("none", "lora_only", "all")
        _require("bias", self.bias, self.bias in biases, f"one of {', '.join(biases)}")
        finite = all(math.isfinite(a) for a in [self.alpha, *self.alpha_pattern.values()])
        _require("alpha", self.alpha, finite, "a finite number")
        known = self.compute_dtype is None or isinstance(getattr(torch, self.compute_dtype, None), torch.dtype)
        _require("compute_dtype", self.compute_dtype, known, 'a torch dtype name such as "float32"')

    @property
    def scaling(self) -> float:
        return self.alpha / math.sqrt(self.r) if self.rslora else self.alpha / self.r

    def at(self, path: str) -> LoRA:
        r = _first_match(self.rank_pattern, path, self.r)
        alpha = _first_match(self.alpha_pattern, path, self.alpha)
        return dataclasses.replace(self, r=r, alpha=alpha, rank_pattern={}, alpha_pattern={})

    def refusal(self, path: str, module: nn.Module) -> str | None:
        return linear.refusal(path, module)

    def build(self, path: str, module: nn.Module, *, dtype: torch.dtype | None, site_id: int) -> LoRAAdapter:
        return LoRAAdapter(self, module, dtype=dtype, site_id=site_id)


def _require(name: str, value: object, ok: bool, expected: str) -> None:
    if not ok:
        raise PlanError(f"LoRA: {name} is not legal", expected=expected, found=repr(value))


def _first_match(pattern: Mapping[str, Any], path: str, default: Any) -> Any:
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", path):
            return value
    return default


class LoRAAdapter(Adapter):
    """``lora_A`` (r, K) and ``lora_B`` (N, r) of one site; fp32 on a 16-bit base unless asked otherwise."""

    method: LoRA
    scale: torch.Tensor

    def __init__(
        self, method: LoRA, module: nn.Module, *, dtype: torch.dtype | None = None, site_id: int = 0
    ) -> None:
        super().__init__(method, site_id)
        inputs, outputs = linear.features(module)
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        if dtype is None:
            dtype = torch.float32 if weight.dtype.itemsize < 4 else weight.dtype
        device = weight.device
        self.lora_A = nn.Parameter(torch.empty(method.r, inputs, dtype=dtype, device=device))
        self.lora_B = nn.Parameter(torch.zeros(outputs, method.r, dtype=dtype, device=device))
        self.reset_parameters()
        base_bias = getattr(module, "bias", None)
        if method.bias != "none" and base_bias is not None:
            self.bias: nn.Parameter | None = nn.Parameter(base_bias.detach().clone().to(dtype))
        else:
            self.register_parameter("bias", None)
        # As text: of a float that differs between adapters Dynamo makes a graph input, finds that its value is
        # needed after all, and compiles a second time.
        self._dropout = repr(method.dropout)
        self._scaling = method.scaling
        self.register_buffer("scale", self._scale_tensor(), persistent=False)

    def reset_parameters(self) -> None:
        """Draw the initial values (the method's ``init``)."""
        with torch.no_grad():
            if self.method.init == "gaussian":
                self.lora_A.normal_(std=1 / self.method.r)
            else:
                nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
            if self.method.init == "random":
                nn.init.kaiming_uniform_(self.lora_B, a=math.sqrt(5))

    @property
    def scaling(self) -> float:
        """s in the formula; setting it changes data of the graph and recompiles nothing."""
        return self._scaling

    @scaling.setter
    def scaling(self, value: float) -> None:
        self._scaling = float(value)
        with torch.no_grad():
            self.scale.fill_(self._scaling)

    def _apply(self, fn: Any, recurse: bool = True) -> LoRAAdapter:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # `.half()` and `.to(dtype)` cast buffers; the scale is a number, not a weight.
        self.scale = self._scale_tensor()
        return self

    def _scale_tensor(self) -> torch.Tensor:
        # fp64, so that alpha / sqrt(r) is not rounded; one element in one dimension, because Dynamo takes the
        # value of a 0-dimensional fp64 tensor for a Python float and captures twice.
        return torch.tensor([self._scaling], dtype=torch.float64, device=self.lora_A.device)

    def apply_to(self, module: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        method = self.method
        y = lora_site(
            x, y, self.site_id, self.lora_A, self.lora_B, self.scale,
            float(self._dropout), self.training, method.compute_dtype,
        )  # fmt: skip
        if self.bias is not None:
            y = bias_site(x, y, self.site_id, self.bias, module.bias)
        return y

    def delta(self) -> torch.Tensor:
        """s B A, the update of the (out, in) weight, in fp64."""
        return self._scaling * (self.lora_B.double() @ self.lora_A.double())

    def peft_tensors(self) -> dict[str, nn.Parameter]:
        tensors = {"lora_A.weight": self.lora_A, "lora_B.weight": self.lora_B}
        return tensors if self.bias is None else {**tensors, "bias": self.bias}

    def signature(self) -> tuple[object, ...]:
        method = self.method
        return (*super().signature(), method.dropout, method.compute_dtype)


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
    dtype = y.dtype if compute_dtype is None else getattr(torch, compute_dtype)
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
    out_dtype = node_value(y).dtype
    dtype = out_dtype if compute_dtype is None else getattr(torch, compute_dtype)

    def cast(node: fx.Node, to: torch.dtype) -> fx.Node:
        return node if node_value(node).dtype == to else edit.call("to", node, to)

    dropped = edit.call(F.dropout, cast(x, dtype), dropout, training)
    operands = (dropped, cast(y, dtype), cast(A, dtype), cast(B, dtype), scale, "n")
    corrected = edit.item(edit.call(LORA_LINEAR(), *operands), 0)
    return cast(corrected, out_dtype)


ANCHORS = (Anchor(lora_site, expand_site),)
