"""LoRA on one parameter that a module's own forward reads (PEFT's ``target_parameters``).

    W' = W + s * B A        W (N, K), A (r, K), B (N, r)

A parameter of three dimensions is a stack (E, N, K) of such weights with A (E, r, K) and B (E, N, r); where the module
says that it ``is_transposed`` the stack is (E, K, N). The forward runs on W' in the place of W (``weights``). Where a
graph shows that W' is only read by linear products, the pass ``canonicalise`` makes the low-rank form of it.

In PEFT's files a stack's factors are matrices, interleaved in two ways: ``lora_A`` (r E, K) has row e r + i for row i
of A_e, ``lora_B`` (N, r E) has column i E + e for column i of B_e.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from adaptc.methods import run_again
from adaptc.methods.lora.attention import WeightsAdapter
from adaptc.methods.lora.options import LoRAOptions
from adaptc.methods.lora.site import SiteAdapter, only_plain
from adaptc.methods.quantised import Refusal
from adaptc.methods.scaled import draw_factors, storage_dtype


class ParameterAdapter(WeightsAdapter):
    """``lora_A`` (..., r, K) and ``lora_B`` (..., N, r) of the parameter called ``parameter``."""

    parameter: str

    def __init__(
        self, method: LoRAOptions, module: nn.Module, name: str, *, dtype: torch.dtype | None = None, site_id: int = 0
    ) -> None:
        weight = module.get_parameter(name)
        super(SiteAdapter, self).__init__(method, site_id, weight.device)
        self.parameter = name
        self.transposed = weight.dim() == 3 and bool(getattr(module, "is_transposed", False))
        *stack, N, K = weight.mT.shape if self.transposed else weight.shape
        options: dict[str, Any] = {"dtype": storage_dtype(weight, dtype), "device": weight.device}
        self.lora_A = nn.Parameter(torch.empty(*stack, method.r, K, **options))
        self.lora_B = nn.Parameter(torch.empty(*stack, N, method.r, **options))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the initial values (the method's ``init``), at the sizes that the factors have in PEFT's files."""
        A, B = (torch.empty_like(t) for t in self.peft_tensors().values())
        draw_factors(self.method.init, self.method.r, A, B)
        self.set_peft_tensors({"lora_A.weight": A, "lora_B.weight": B})

    @classmethod
    def parameter_refusal(cls, method: LoRAOptions, module: nn.Module, name: str) -> str | None:
        """Why LoRA with these options cannot adapt the module's parameter, or None when it can."""
        weight = module.get_parameter(name)
        if type(weight) is not nn.Parameter or weight.layout != torch.strided:
            return f"it is a {type(weight).__name__}, not a plain dense tensor"
        if weight.dim() not in (2, 3):
            return f"it has {weight.dim()} dimensions: LoRA adapts matrices, and stacks of matrices"
        if not weight.is_floating_point() or weight.dtype.itemsize < 2:
            return f"it is {weight.dtype}, not a floating-point tensor of 16 bits or more"
        if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
            return "nn.MultiheadAttention reads it without calling the module: adapt the attention module"
        if type(module).forward is nn.Module.forward:
            return f"{type(module).__name__} has no forward: what reads the parameter is elsewhere"
        if method.dropout:
            return "dropout on the input of a parameter's product does not exist here, nor in PEFT: use dropout=0"
        if method.compute_dtype is not None:
            return "compute_dtype is for modules: a parameter's update has its dtype"
        return only_plain(method, module)

    def rows_refusal(self, module: nn.Module, *, spans: bool) -> Refusal | None:
        if spans:
            return Refusal(f"a {type(module).__name__} may mix the tokens of a row")
        return run_again.refusal(module)

    def factors(self) -> Mapping[str, tuple[torch.Tensor, torch.Tensor]]:
        if self.transposed:
            return {self.parameter: (self.lora_B.mT, self.lora_A.mT)}
        return {self.parameter: (self.lora_A, self.lora_B)}

    def delta(self) -> torch.Tensor:
        """s B A in the parameter's own layout, in fp64."""
        return self.deltas()[self.parameter]

    def signature(self) -> tuple[object, ...]:
        return (*super().signature(), self.parameter)

    def peft_tensors(self) -> dict[str, torch.Tensor]:
        if self.lora_A.dim() == 2:
            return {"lora_A.weight": self.lora_A, "lora_B.weight": self.lora_B}
        A, B = self.lora_A.flatten(0, 1), self.lora_B.permute(1, 2, 0).flatten(1)
        return {"lora_A.weight": A, "lora_B.weight": B}

    @torch.no_grad()
    def set_peft_tensors(self, values: Mapping[str, torch.Tensor]) -> None:
        A, B = values["lora_A.weight"], values["lora_B.weight"]
        if self.lora_A.dim() == 3:
            E, N, r = self.lora_B.shape
            A, B = A.reshape(E, r, -1), B.reshape(N, r, E).permute(2, 0, 1)
        self.lora_A.copy_(A)
        self.lora_B.copy_(B)
