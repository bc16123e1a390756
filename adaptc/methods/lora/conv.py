"""LoRA on a convolution (Hu et al. 2021; the layout is PEFT's).

    y' = y + s * conv(conv(drop(x), A), B)        A (r, C, k...), B (N, r / groups, 1...)

A has the frozen layer's kernel, stride and padding, B is a 1x1 convolution in the layer's groups.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from adaptc.ir.derive import derive
from adaptc.ir.ops.lora import draw_tensor
from adaptc.methods.base import Adapter
from adaptc.methods.lora.options import LoRAOptions
from adaptc.methods.lora.site import SiteAdapter, anchor_of, only_plain
from adaptc.methods.quantised import Refusal
from adaptc.methods.scaled import draw_factors, storage_dtype

_MIXES_TOKENS = Refusal("a convolution has no rows of tokens")
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)


class ConvAdapter(SiteAdapter):
    """``lora_A`` (r, C, k...) and ``lora_B`` (N, r / groups, 1...) of an ``nn.Conv1d`` or ``nn.Conv2d``."""

    def __init__(
        self, method: LoRAOptions, module: nn.Module, *, dtype: torch.dtype | None = None, site_id: int = 0
    ) -> None:
        assert isinstance(module, CONVOLUTIONS)
        weight = module.weight
        super(SiteAdapter, self).__init__(method, site_id, weight.device)
        options: dict[str, Any] = {"dtype": storage_dtype(weight, dtype), "device": weight.device}
        r, ones = method.r, (1,) * len(module.kernel_size)
        self.lora_A = nn.Parameter(torch.empty(r, module.in_channels, *module.kernel_size, **options))
        self.lora_B = nn.Parameter(torch.empty(module.out_channels, r // module.groups, *ones, **options))
        # As text, as LoRA's own: a float that differs between adapters would become a graph input.
        self.set_dropout(method.dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the initial values (the method's ``init``)."""
        draw_factors(self.method.init, self.method.r, self.lora_A, self.lora_B)

    @classmethod
    def refusal(cls, method: LoRAOptions, module: nn.Module) -> str | None:
        assert isinstance(module, CONVOLUTIONS)
        kind = type(module).__name__
        if type(module).forward not in (nn.Conv1d.forward, nn.Conv2d.forward):
            return f"{kind} has a forward of its own, which may not be this convolution"
        if method.r % module.groups:
            return f"its {module.groups} groups do not divide the rank {method.r}"
        if module.padding_mode != "zeros":
            return f'padding_mode "{module.padding_mode}" is not supported, only "zeros"'
        if any(d != 1 for d in module.dilation):
            return f"dilation {module.dilation} is not supported (PEFT's first factor would have another output size)"
        if not module.weight.is_floating_point():
            return f"its weight is {module.weight.dtype}, not a floating-point tensor"
        return only_plain(method, module)

    def rows_refusal(self, module: nn.Module, *, spans: bool) -> Refusal | None:
        return _MIXES_TOKENS if spans else super().rows_refusal(module, spans=spans)

    def apply_to(self, module: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        assert isinstance(module, CONVOLUTIONS)
        corrected: torch.Tensor = conv_site(
            x, y, self.site_id, float(self._dropout), self.training, self.method.compute_dtype,
            self.lora_A, self.lora_B, self.scale, list(module.stride), self._padding(module), module.groups,
        )  # fmt: skip
        return corrected

    def _padding(self, module: nn.Module) -> list[int]:
        """Zeros at the start and the end of every dimension, the last dimension first, as ``F.pad`` has it."""
        assert isinstance(module, CONVOLUTIONS)
        if isinstance(module.padding, str):
            return [int(n) for n in module._reversed_padding_repeated_twice]
        return [int(n) for n in reversed(module.padding) for _ in range(2)]

    def delta(self) -> torch.Tensor:
        """s B A, the update of the weight of an ungrouped convolution, in fp64."""
        flat = self.lora_B.double().flatten(1) @ self.lora_A.double().flatten(1)
        return self.scaling * flat.view(-1, *self.lora_A.shape[1:])

    def deltas(self) -> dict[str, torch.Tensor]:
        return {"weight": self.delta()}

    def merge_refusal(self, module: nn.Module, beside: Sequence[Adapter] = ()) -> Refusal | None:
        if self.lora_B.shape[1] == self.lora_A.shape[0]:
            return super().merge_refusal(module, beside)
        return Refusal(
            "its first factor reads all channels, and the grouped convolution's weight only those of its group"
        )

    def products(self) -> tuple[tuple[str, ...], ...]:
        return (("lora_A", "lora_B"),)

    def signature(self) -> tuple[object, ...]:
        return (*super().signature(), self._dropout)

    def peft_tensors(self) -> dict[str, torch.Tensor]:
        return {"lora_A.weight": self.lora_A, "lora_B.weight": self.lora_B}


def body(
    x: torch.Tensor, y: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scale: torch.Tensor, stride: list[int],
    padding: list[int], groups: int,
) -> torch.Tensor:  # fmt: skip
    """y + scale * conv(conv(x, A), B), computed in the dtype of ``x``."""
    convolve = F.conv1d if A.dim() == 3 else F.conv2d
    h = convolve(F.pad(x, padding) if any(padding) else x, A.to(x.dtype), None, stride)
    delta = convolve(h, B.to(x.dtype), None, groups=groups)
    wide = torch.float32 if x.dtype.itemsize < 4 else x.dtype
    return y + (scale.to(wide) * delta.to(wide)).to(y.dtype)


def sample(draw: Any) -> tuple[Any, ...]:
    from hypothesis import strategies as st

    dims, groups = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    channels, outputs, r = draw(st.integers(1, 4)), groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 2))
    kernel, stride = [draw(st.integers(1, 3)) for _ in range(dims)], [draw(st.integers(1, 2)) for _ in range(dims)]
    padding = [draw(st.integers(0, 1)) for _ in range(2 * dims)]
    sizes = [3 + draw(st.integers(0, 3)) for _ in range(dims)]
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
    wide = dtype if dtype.itemsize >= 4 else draw(st.sampled_from([dtype, torch.float32]))
    x = draw_tensor(draw, (2, channels, *sizes), dtype)
    A = draw_tensor(draw, (r, channels, *kernel), wide)
    B = draw_tensor(draw, (outputs, r // groups, *(1,) * dims), wide)
    ends = [padding[2 * i] + padding[2 * i + 1] for i in reversed(range(dims))]
    out = [(n + p - k) // s + 1 for n, p, k, s in zip(sizes, ends, kernel, stride, strict=True)]
    y = draw_tensor(draw, (2, outputs, *out), dtype)
    assert math.prod(out) > 0
    return x, y, A, B, draw_tensor(draw, (1,), torch.float64), stride, padding, groups


CONV = derive(
    "lora_conv",
    "(Tensor x, Tensor y, Tensor A, Tensor B, Tensor scale, int[] stride, int[] padding, int groups) -> Tensor",
    body,
    sample=sample,
)


ANCHORS = (anchor_of(CONV),)
conv_site = ANCHORS[0].function
