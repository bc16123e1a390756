"""Hydra: a low-rank head on a linear layer's input and one on its output (Kim et al. 2023, section 3.2).

    h = x W^T + b0                                                        the frozen layer
    y = h + s * [(drop(x A_p^T + a_p)) B_p^T + b_p] + s * [(drop(h A_s^T + a_s)) B_s^T + b_s]

A_p (r, K), B_p (N, r), A_s (r_s, N), B_s (N, r_s). Both heads are linear, so the layer can take them up:

    W' = W + s (B_p A_p + B_s A_s W)      b' = b0 + s (B_p a_p + b_p) + s (B_s (A_s b0 + a_s) + b_s)
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
from adaptc.methods.base import Adapter, Method, anchor_of
from adaptc.methods.scaled import ScaledAdapter, storage_dtype


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hydra(Method):
    """A parallel and a sequential low-rank head on linear layers.

    Args:
        r: rank of the parallel head; r_sequential: of the sequential one, None: the same. 0 leaves a head out.
        scale: s in the formula.
        dropout: probability between the two factors of a head, in training.
        bias: train the biases a_p, b_p, a_s, b_s (the vision variant has them, the language one has none).
        init: of the first factors: "xavier" (uniform), "kaiming" (uniform, a = sqrt(5)) or "normal" (std 0.02); second
            factors and biases start at zero. "random": second factors and biases are normal with std 0.02 too.
    """

    kind: ClassVar[str] = "hydra"
    mergeable: ClassVar[bool] = True
    batchable: ClassVar[bool] = True
    bankable: ClassVar[bool] = True
    quantised: ClassVar[bool] = True

    r: int = 2
    r_sequential: int | None = None
    scale: float = 1.0
    dropout: float = 0.0
    bias: bool = True
    init: str = "xavier"

    def __post_init__(self) -> None:
        super().__post_init__()
        ranks = all(isinstance(r, int) and r >= 0 for r in self.ranks) and any(self.ranks)
        self.require("r", ranks, "ranks of at least 0, not both 0", f"r={self.r}, r_sequential={self.r_sequential}")
        self.require("dropout", 0.0 <= self.dropout < 1.0, "a number in [0, 1)")
        self.require("scale", math.isfinite(self.scale), "a finite number")
        inits = ("xavier", "kaiming", "normal", "random")
        self.require("init", self.init in inits, f"one of {', '.join(inits)}")

    @property
    def ranks(self) -> tuple[int, int]:
        """Of the parallel and the sequential head."""
        return self.r, self.r if self.r_sequential is None else self.r_sequential

    @property
    def scaling(self) -> float:
        return self.scale

    def refusal(self, path: str, module: nn.Module) -> str | None:
        return linear.refusal(path, module)

    def build(self, path: str, module: nn.Module, *, dtype: torch.dtype | None, site_id: int) -> Adapter:
        return HydraAdapter(self, module, dtype=dtype, site_id=site_id)


class HydraAdapter(ScaledAdapter):
    """``parallel_A``, ``parallel_B``, ``sequential_A``, ``sequential_B`` and with ``bias`` each one's ``_bias``."""

    method: Hydra

    def __init__(self, method: Hydra, module: nn.Module, *, dtype: torch.dtype | None = None, site_id: int = 0) -> None:
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        super().__init__(method, site_id, weight.device)
        inputs, outputs = linear.features(module)
        options: dict[str, Any] = {"dtype": storage_dtype(weight, dtype), "device": weight.device}
        for head, r, size in zip(("parallel", "sequential"), method.ranks, (inputs, outputs), strict=True):
            shapes = {"A": (r, size), "B": (outputs, r)}
            for factor, shape in shapes.items():
                value = nn.Parameter(torch.zeros(shape, **options)) if r else None
                self.register_parameter(f"{head}_{factor}", value)
                bias = nn.Parameter(torch.zeros(shape[0], **options)) if r and method.bias else None
                self.register_parameter(f"{head}_{factor}_bias", bias)
        self.set_dropout(method.dropout)
        self.transposed = linear.is_conv1d(module)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the initial values (the method's ``init``)."""
        for name, parameter in self.named_parameters():
            if self.method.init != "random" and not name.endswith("_A"):
                continue
            if self.method.init == "xavier":
                nn.init.xavier_uniform_(parameter)
            elif self.method.init == "kaiming":
                nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
            else:
                nn.init.normal_(parameter, std=0.02)

    def head(self, name: str) -> tuple[torch.Tensor | None, ...]:
        """(A, a, B, b) of the "parallel" or the "sequential" head; None for what it does not have."""
        return tuple(getattr(self, f"{name}_{part}") for part in ("A", "A_bias", "B", "B_bias"))

    def apply_to(self, module: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        masks = [self._mask(value, rank) for value, rank in zip((x, y), self.method.ranks, strict=True)]
        return hydra_site(self.site_id, x, y, *self.head("parallel"), *self.head("sequential"), self.scale, *masks)

    def _mask(self, value: torch.Tensor, rank: int) -> torch.Tensor | None:
        dropout = float(self._dropout)
        if not self.training or dropout == 0 or rank == 0:
            return None
        return F.dropout(value.new_ones(*value.shape[:-1], rank), dropout, True)

    def delta(self, weight: torch.Tensor) -> torch.Tensor:
        """s (B_p A_p + B_s A_s W), the update of the (out, in) weight, in fp64; ``weight``: as the layer stores it."""
        W = weight.detach().double()
        W = W.t() if self.transposed else W
        total = torch.zeros_like(W)
        for name in ("parallel", "sequential"):
            A, _, B, _ = self.head(name)
            if A is not None and B is not None:
                total = total + B.double() @ (A.double() @ W if name == "sequential" else A.double())
        return self.scaling * total

    def delta_bias(self, bias: torch.Tensor | None) -> torch.Tensor:
        """s (B_p a_p + b_p + B_s (A_s b0 + a_s) + b_s), the update of the layer's bias b0 (N,), in fp64."""
        total = torch.zeros((), dtype=torch.float64, device=self.scale.device)
        for name in ("parallel", "sequential"):
            A, a, B, b = (None if t is None else t.double() for t in self.head(name))
            if A is None or B is None:
                continue
            inner = torch.zeros_like(A[:, 0]) if a is None else a
            if name == "sequential" and bias is not None:
                inner = inner + A @ bias.detach().double()
            total = total + B @ inner + (0 if b is None else b)
        return self.scaling * total

    def products(self) -> tuple[tuple[str, ...], ...]:
        # The second factor multiplies A x + a.
        return tuple((f"{head}_A", f"{head}_B") for head in ("parallel", "sequential") if not self.method.bias)

    def signature(self) -> tuple[object, ...]:
        return (*super().signature(), self._dropout)


def body(
    x: torch.Tensor, h: torch.Tensor, A_p: torch.Tensor | None, a_p: torch.Tensor | None, B_p: torch.Tensor | None,
    b_p: torch.Tensor | None, A_s: torch.Tensor | None, a_s: torch.Tensor | None, B_s: torch.Tensor | None,
    b_s: torch.Tensor | None, scale: torch.Tensor, mask_p: torch.Tensor | None, mask_s: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """y (..., N); computed in the dtype of h, both heads summed in fp32 at least and rounded once."""
    wide = torch.float32 if h.dtype.itemsize < 4 else h.dtype
    total = h.to(wide)
    heads = ((x.to(h.dtype), A_p, a_p, B_p, b_p, mask_p), (h, A_s, a_s, B_s, b_s, mask_s))
    for value, A, a, B, b, mask in heads:
        if A is None or B is None:
            continue
        inner = value @ A.to(h.dtype).t()
        inner = inner if a is None else (inner.to(wide) + a.to(wide)).to(h.dtype)
        inner = inner if mask is None else inner * mask.to(h.dtype)
        outer = (inner @ B.to(h.dtype).t()).to(wide)
        total = total + scale.to(wide) * (outer if b is None else outer + b.to(wide))
    return total.to(h.dtype).contiguous()


def sample(draw: Any) -> tuple[Any, ...]:
    from hypothesis import strategies as st

    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=2)))
    k, n, r, s = (draw(st.integers(1, 6)) for _ in range(4))
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
    wide = dtype if dtype.itemsize >= 4 else draw(st.sampled_from([dtype, torch.float32]))
    biased, masked = draw(st.booleans()), draw(st.booleans())
    which = draw(st.sampled_from(["both", "parallel", "sequential"]))

    def head(name: str, rank: int, size: int) -> list[torch.Tensor | None]:
        if which not in ("both", name):
            return [None] * 4
        a, b = ((draw_tensor(draw, (length,), wide) if biased else None) for length in (rank, n))
        return [draw_tensor(draw, (rank, size), wide), a, draw_tensor(draw, (n, rank), wide), b]

    masks = [draw_tensor(draw, (*shape, rank), dtype) if masked else None for rank in (r, s)]
    parallel, sequential = head("parallel", r, k), head("sequential", s, n)
    x, h = draw_tensor(draw, (*shape, k), dtype), draw_tensor(draw, (*shape, n), dtype)
    return x, h, *parallel, *sequential, draw_tensor(draw, (1,), torch.float64), *masks


HEADS = derive(
    "hydra_heads",
    "(Tensor x, Tensor h, Tensor? A_p, Tensor? a_p, Tensor? B_p, Tensor? b_p, Tensor? A_s, Tensor? a_s, Tensor? B_s,"
    " Tensor? b_s, Tensor scale, Tensor? mask_p, Tensor? mask_s) -> Tensor",
    body,
    sample=sample,
)
ANCHORS = (anchor_of(HEADS),)
hydra_site = ANCHORS[0].function
