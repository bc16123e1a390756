"""LoRA on weights that a module's forward reads without calling the module that owns them.

    W' = W + s * B A        W (..., N, K), A (..., r, K), B (..., N, r)

The forward runs on W' in the place of W. The sum is made in fp32 (fp64 on an fp64 weight) and rounded once. There is
no dropout: nothing here sees the input of the product.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from adaptc.ir.derive import derive
from adaptc.ir.ops.lora import draw_tensor
from adaptc.methods import quantised, run_again
from adaptc.methods.base import Adapter, anchor_of
from adaptc.methods.codec import PEFT_VERSION
from adaptc.methods.lora.options import LoRAOptions
from adaptc.methods.lora.site import SiteAdapter, only_plain
from adaptc.methods.quantised import Refusal
from adaptc.methods.scaled import draw_factors, storage_dtype
from adaptc.torch_internals import reparametrize


class Factors(nn.Module):
    """``lora_A`` (r, K) and ``lora_B`` (N, r) of one weight."""

    def __init__(self, weight: torch.Tensor, r: int, dtype: torch.dtype) -> None:
        super().__init__()
        rows, columns = weight.shape
        self.lora_A = nn.Parameter(torch.empty(r, columns, dtype=dtype, device=weight.device))
        self.lora_B = nn.Parameter(torch.empty(rows, r, dtype=dtype, device=weight.device))


class WeightsAdapter(SiteAdapter):
    """Factors for several weights of one module."""

    acts_inside = True

    def factors(self) -> Mapping[str, tuple[torch.Tensor, torch.Tensor]]:
        """Path of a weight below the module -> A and B of its update s B A."""
        raise NotImplementedError(f"{type(self).__name__}.factors")

    def reset_parameters(self) -> None:
        """Draw the initial values (the method's ``init``)."""
        for A, B in self.factors().values():
            draw_factors(self.method.init, self.method.r, A, B)

    def run_inside(self, module: nn.Module, adapters: Sequence[Adapter], *args: Any, **kwargs: Any) -> Any:
        weights: dict[str, torch.Tensor] = {}
        for adapter in adapters:
            assert isinstance(adapter, WeightsAdapter)
            for name, (A, B) in adapter.factors().items():
                weight = weights[name] if name in weights else module.get_parameter(name)
                weights[name] = weight_site(adapter.site_id, weight, A, B, adapter.scale)
        with reparametrize(module, weights):
            return type(module).forward(module, *args, **kwargs)

    def updated(self) -> Sequence[str]:
        return list(self.factors())

    def deltas(self) -> dict[str, torch.Tensor]:
        return {name: self.scaling * (B.double() @ A.double()) for name, (A, B) in self.factors().items()}


class AttentionAdapter(WeightsAdapter):
    """LoRA on both weights of an ``nn.MultiheadAttention``, as in PEFT.

    ``lora_A`` (r, E) and ``lora_B`` (3E, r) for ``in_proj_weight``; ``out_proj.lora_A`` (r, E) and
    ``out_proj.lora_B`` (E, r) for ``out_proj.weight``. PEFT computes something else: :meth:`peft_difference`.
    """

    def __init__(
        self, method: LoRAOptions, module: nn.MultiheadAttention, *, dtype: torch.dtype | None = None, site_id: int = 0
    ) -> None:
        weight = module.in_proj_weight
        super(SiteAdapter, self).__init__(method, site_id, weight.device)
        dtype = storage_dtype(weight, dtype)
        inner = Factors(weight, method.r, dtype)
        self.lora_A, self.lora_B = inner.lora_A, inner.lora_B
        self.out_proj = Factors(module.out_proj.weight, method.r, dtype)
        self.reset_parameters()

    def rows_refusal(self, module: nn.Module, *, spans: bool) -> Refusal | None:
        return Refusal("attention mixes the tokens of a row") if spans else run_again.refusal(module)

    @classmethod
    def refusal(cls, method: LoRAOptions, module: nn.Module) -> str | None:
        assert isinstance(module, nn.MultiheadAttention)
        if not module._qkv_same_embed_dim:
            return "its keys or values have another width (kdim, vdim), so that it has three weights instead of one"
        if method.dropout:
            return "it reads its weights without calling a module, so dropout has no input to act on: use dropout=0"
        if type(module).forward is not nn.MultiheadAttention.forward:
            return f"{type(module).__name__} has a forward of its own, which may not read these weights"
        if how := quantised.describe(module.out_proj):
            return f"LoRA adds to the values of out_proj's weight, and that is quantised ({how})"
        return only_plain(method, module)

    def factors(self) -> Mapping[str, tuple[torch.Tensor, torch.Tensor]]:
        inner = self.out_proj
        return {"in_proj_weight": (self.lora_A, self.lora_B), "out_proj.weight": (inner.lora_A, inner.lora_B)}

    def products(self) -> tuple[tuple[str, ...], ...]:
        return ("lora_A", "lora_B"), ("out_proj.lora_A", "out_proj.lora_B")

    def peft_tensors(self) -> dict[str, torch.Tensor]:
        return {
            "lora_A.weight": self.lora_A,
            "lora_B.weight": self.lora_B,
            "base_layer.out_proj.lora_A.weight": self.out_proj.lora_A,
            "base_layer.out_proj.lora_B.weight": self.out_proj.lora_B,
        }

    def peft_difference(self) -> str:
        # Its merge of the attention adds the update, then merges the projection too. The second addition is not part
        # of its autograd graph.
        return (
            f"PEFT {PEFT_VERSION} adds the update of out_proj twice (W + 2 s B A, with the gradients of W + s B A), "
            "adaptc once (W + s B A); outputs are the same where out_proj.lora_B is doubled here, or halved there"
        )


def body(weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """weight (..., N, K) + scale * B A, rounded once to the dtype of ``weight``."""
    wide = torch.float32 if weight.dtype.itemsize < 4 else weight.dtype
    return (weight.to(wide) + scale.to(wide) * (B.to(wide) @ A.to(wide))).to(weight.dtype)


def sample(draw: Any) -> tuple[Any, ...]:
    from hypothesis import strategies as st

    rows, columns, r = (draw(st.integers(1, 7)) for _ in range(3))
    stack = tuple(draw(st.lists(st.integers(1, 3), max_size=1)))
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
    wide = dtype if dtype.itemsize >= 4 else draw(st.sampled_from([dtype, torch.float32]))
    factors = draw_tensor(draw, (*stack, r, columns), wide), draw_tensor(draw, (*stack, rows, r), wide)
    return draw_tensor(draw, (*stack, rows, columns), dtype), *factors, draw_tensor(draw, (1,), torch.float64)


WEIGHT = derive("lora_weight", "(Tensor weight, Tensor A, Tensor B, Tensor scale) -> Tensor", body, sample=sample)
ANCHORS = (anchor_of(WEIGHT),)
weight_site = ANCHORS[0].function
