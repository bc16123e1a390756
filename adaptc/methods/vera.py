"""VeRA: trained vectors around frozen random matrices that all sites share (Kopiczko et al. 2024, section 3.1).

    y' = y + b * (B (d * (A drop(x))))     x (..., K), y (..., N), A (r, K), B (N, r), d (r,), b (N,)

A and B are the first K columns of ``vera_A`` (r, largest K) and the first N rows of ``vera_B`` (largest N, r), which
one adapter has once. They are drawn from ``projection_prng_key`` as PEFT draws them, value for value.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from adaptc.ir.derive import derive
from adaptc.ir.ops.lora import draw_tensor
from adaptc.methods import linear
from adaptc.methods.base import Adapter, Method, anchor_of
from adaptc.methods.codec import LAYERS, Codec, Option, Shared, is_bool, is_number, is_probability, is_rank
from adaptc.methods.scaled import storage_dtype


@dataclasses.dataclass(frozen=True, kw_only=True)
class VeRA(Method):
    """Vectors on frozen random projections of linear layers.

    Args:
        r: inner dimension; dropout: probability on the adapter's input, in training.
        d_initial: initial value of ``vera_lambda_d``; ``vera_lambda_b`` starts at zero.
        projection_prng_key: seed of the random matrices.
        init: "default", or "random" (d normal and b one, as PEFT leaves them with ``init_weights=False``).
    """

    kind: ClassVar[str] = "vera"
    peft_kind: ClassVar[str | None] = "VERA"
    mergeable: ClassVar[bool] = True
    batchable: ClassVar[bool] = True
    bankable: ClassVar[bool] = True
    quantised: ClassVar[bool] = True

    r: int = 256
    dropout: float = 0.0
    d_initial: float = 0.1
    projection_prng_key: int = 0
    init: str = "default"

    def __post_init__(self) -> None:
        super().__post_init__()
        whole = isinstance(self.r, int) and not isinstance(self.r, bool)
        self.require("r", whole and self.r > 0, "a positive integer")
        self.require("dropout", 0.0 <= self.dropout < 1.0, "a number in [0, 1)")
        self.require("d_initial", math.isfinite(self.d_initial), "a finite number")
        key = self.projection_prng_key
        self.require("projection_prng_key", isinstance(key, int) and not isinstance(key, bool), "an integer")
        self.require("init", self.init in ("default", "random"), "default or random")

    def refusal(self, path: str, module: nn.Module) -> str | None:
        return linear.refusal(path, module)

    def build(self, path: str, module: nn.Module, *, dtype: torch.dtype | None, site_id: int) -> VeRAAdapter:
        return VeRAAdapter(self, module, dtype=dtype, site_id=site_id)

    @classmethod
    def link(cls, adapters: Sequence[Adapter]) -> None:
        """Give all sites of one adapter, rank and seed one pair of matrices, which the first site owns."""
        groups: dict[tuple[int, int], list[VeRAAdapter]] = {}
        for adapter in adapters:
            assert isinstance(adapter, VeRAAdapter)
            groups.setdefault((adapter.method.r, adapter.method.projection_prng_key), []).append(adapter)
        for (r, key), group in groups.items():
            largest = max(a.inputs for a in group), max(a.outputs for a in group)
            first = group[0].vera_lambda_d
            # PEFT keeps them in the base's dtype first: on a 16-bit base they are rounded.
            shared = Projections(r, *largest, key).to(group[0].base_dtype).to(device=first.device, dtype=first.dtype)
            group[0].projections = shared
            for other in group[1:]:
                # A plain reference: registered at every site, the matrices would be saved once a site.
                object.__setattr__(other, "projections", shared)


class Projections(nn.Module):
    """``vera_A`` (r, inputs) and ``vera_B`` (outputs, r), frozen."""

    vera_A: torch.Tensor  # noqa: N815  the names in PEFT's files
    vera_B: torch.Tensor  # noqa: N815

    def __init__(self, r: int, inputs: int, outputs: int, key: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(key)
        # PEFT's order and arithmetic: fp32 on the CPU, uniform with variance 2 / fan_in, A before B.
        for name, shape in (("vera_A", (r, inputs)), ("vera_B", (outputs, r))):
            values = torch.empty(shape, dtype=torch.float32, device="cpu")
            self.register_buffer(name, nn.init.kaiming_uniform_(values, generator=generator))


class VeRAAdapter(Adapter):
    """``vera_lambda_d`` (r,) and ``vera_lambda_b`` (N,) of one site, and the shared ``projections``."""

    method: VeRA
    projections: Projections

    def __init__(
        self, method: VeRA, module: nn.Module, *, dtype: torch.dtype | None = None, site_id: int = 0
    ) -> None:
        super().__init__(method, site_id)
        self.inputs, self.outputs = linear.features(module)
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        self.base_dtype = weight.dtype if weight.is_floating_point() else torch.float32
        dtype = storage_dtype(weight, dtype)
        d = torch.full((method.r,), method.d_initial, dtype=dtype, device=weight.device)
        b = torch.zeros(self.outputs, dtype=dtype, device=weight.device)
        random = method.init == "random"
        self.vera_lambda_d = nn.Parameter(torch.randn_like(d) if random else d)
        self.vera_lambda_b = nn.Parameter(torch.ones_like(b) if random else b)
        self.set_dropout(method.dropout)

    def apply_to(self, module: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        dropout, shared = float(self._dropout), self.projections
        if dropout > 0:
            x = F.dropout(x, dropout, self.training)
        # Sites of a model that is spread over devices still have one pair of matrices.
        A, B = shared.vera_A.to(x.device), shared.vera_B.to(x.device)
        return vera_site(self.site_id, x, y, A, B, self.vera_lambda_d, self.vera_lambda_b)

    @property
    def adds(self) -> bool:
        return True

    def delta(self) -> torch.Tensor:
        """diag(b) B diag(d) A, the update of the (out, in) weight, in fp64."""
        A = self.projections.vera_A[:, : self.inputs].double()
        B = self.projections.vera_B[: self.outputs].double()
        return (self.vera_lambda_b.double()[:, None] * B) @ (self.vera_lambda_d.double()[:, None] * A)

    def products(self) -> tuple[tuple[str, ...], ...]:
        return (("vera_lambda_d", "vera_lambda_b"),)

    def peft_tensors(self) -> Mapping[str, torch.Tensor]:
        return {"vera_lambda_b": self.vera_lambda_b, "vera_lambda_d": self.vera_lambda_d}

    def signature(self) -> tuple[object, ...]:
        shared = self.projections
        return (*super().signature(), shared.vera_A.shape, shared.vera_B.shape, shared.vera_A.dtype, self._dropout)


def body(
    x: torch.Tensor, y: torch.Tensor, A: torch.Tensor, B: torch.Tensor, d: torch.Tensor, b: torch.Tensor
) -> torch.Tensor:
    """The correction is computed in the dtype of y; vectors multiply in fp32 or wider, and round once."""
    dtype = y.dtype
    wide = torch.float32 if dtype.itemsize < 4 else dtype
    A, B = A[:, : x.shape[-1]].to(dtype), B[: y.shape[-1]].to(dtype)
    h = ((x.to(dtype) @ A.mT).to(wide) * d.to(wide)).to(dtype)
    return y + ((h @ B.mT).to(wide) * b.to(wide)).to(dtype)


def sample(draw: Any) -> tuple[Any, ...]:
    from hypothesis import strategies as st

    rows = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=2)))
    k, n, r, more = (draw(st.integers(1, 5)) for _ in range(4))
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
    wide = dtype if dtype.itemsize >= 4 else draw(st.sampled_from([dtype, torch.float32]))
    return (
        draw_tensor(draw, (*rows, k), dtype), draw_tensor(draw, (*rows, n), dtype),
        draw_tensor(draw, (r, k + more), wide), draw_tensor(draw, (n + more, r), wide),
        draw_tensor(draw, (r,), wide), draw_tensor(draw, (n,), wide),
    )  # fmt: skip


VERA = derive(
    "vera_linear", "(Tensor x, Tensor y, Tensor A, Tensor B, Tensor d, Tensor b) -> Tensor", body, sample=sample
)
ANCHORS = (anchor_of(VERA),)
vera_site = ANCHORS[0].function


def _projections(adapters: Mapping[str, Adapter]) -> dict[str, torch.Tensor]:
    shared = next(a.projections for a in adapters.values() if isinstance(a, VeRAAdapter))
    return {"vera_A": shared.vera_A, "vera_B": shared.vera_B}


def _assign(adapters: Mapping[str, Adapter], values: Mapping[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in _projections(adapters).items():
            if name in values:
                tensor.copy_(values[name])


CODEC = Codec(
    peft_type="VERA", kind="vera", label="VeRA",
    options={
        **LAYERS,
        "r": Option(256, "used", "a positive integer", is_rank, field="r"),
        "vera_dropout": Option(0.0, "used", "a number in [0, 1)", is_probability, field="dropout"),
        "d_initial": Option(0.1, "used", "a number", is_number, field="d_initial"),
        "projection_prng_key": Option(
            0, "used", "an integer", lambda value: type(value) is int, field="projection_prng_key"
        ),
        "init_weights": Option(
            True, "used", "true or false", is_bool, field="init", values={True: "default", False: "random"}
        ),
        # Whether the file holds the matrices; without them they are drawn from the key.
        "save_projection": Option(True, "ignored", "true or false", is_bool),
        "bias": Option("none", "refused", "none", lambda value: value in ("none", "all", "vera_only")),
    },
    shared=Shared(_projections, _assign, lambda config: bool(config.get("save_projection", True))),
)  # fmt: skip
