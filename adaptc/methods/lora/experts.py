"""LoRA on the fused weights of a mixture of experts (the layouts are those of transformers 5 and PEFT).

    y_i = x_i W_e^T + s (x_i A_e^T) B_e^T    row i routed to expert e; W (E, N, K), A (E, r, K), B (E, N, r)

transformers stores all experts of a layer as two parameters, ``gate_up_proj`` (``up_proj`` where nothing is gated) and
``down_proj``, either (E, N, K) or, where the class ``is_transposed``, (E, K, N). PEFT adapts them by W_e + s B_e A_e
for every expert in every forward. Here the module's forward is computed in its place, as transformers' own
``grouped_mm_experts_forward`` does it, rows sorted by expert once, with the low-rank product beside the frozen one:
nothing of the size of the weights is made, forward or backward.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from adaptc.ir.derive import derive
from adaptc.ir.ops.grouped import grouped_mm
from adaptc.ir.ops.lora import draw_tensor
from adaptc.methods.base import Adapter, anchor_of
from adaptc.methods.lora.options import LoRAOptions
from adaptc.methods.lora.parameters import ParameterAdapter
from adaptc.methods.quantised import Refusal
from adaptc.methods.rows import Groups, Rows
from adaptc.transformers_names import EXPERTS_MARKS, has_post_expert_norm


def products(module: nn.Module) -> tuple[str, str]:
    """The names of the two stacks of weights of an experts module, in the order in which they are read."""
    return ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")


def is_experts(module: nn.Module) -> bool:
    """Whether transformers computes the module by its grouped forward, whatever its own forward says."""
    if not all(hasattr(module, mark) for mark in EXPERTS_MARKS) or not hasattr(type(module).forward, "__wrapped__"):
        return False
    weights = [module._parameters.get(name) for name in products(module)]
    return all(weight is not None and weight.dim() == 3 for weight in weights)


class ExpertsAdapter(ParameterAdapter):
    """``lora_A`` (E, r, K) and ``lora_B`` (E, N, r) of one of the two stacks of an experts module."""

    rounds_base = True  # by its own order of products

    def __init__(
        self, method: LoRAOptions, module: nn.Module, name: str, *, dtype: torch.dtype | None = None, site_id: int = 0
    ) -> None:
        super().__init__(method, module, name, dtype=dtype, site_id=site_id)
        # Read here, because Dynamo cannot: what the three arguments are called differs between classes.
        self.arguments = tuple(inspect.signature(type(module).forward).parameters)[1:]

    @classmethod
    def parameter_refusal(cls, method: LoRAOptions, module: nn.Module, name: str) -> str | None:
        first, second = products(module)
        if name not in (first, second):
            return f"of a {type(module).__name__} LoRA adapts {first} and {second}"
        if module._is_expert_parallel:
            return "its experts are spread over several processes, which is not in this version"
        return super().parameter_refusal(method, module, name)

    def rows_refusal(self, module: nn.Module, *, spans: bool) -> Refusal | None:
        return None  # the experts' own permutation takes the rows with it

    def run_inside(self, module: nn.Module, adapters: Sequence[Adapter], *args: Any, **kwargs: Any) -> torch.Tensor:
        return self._run(module, (adapters,), None, args, kwargs)

    def run_rows(self, module: nn.Module, groups: Groups, rows: Rows, *args: Any, **kwargs: Any) -> Any:
        return self._run(module, groups, rows, args, kwargs)

    def _run(
        self, module: nn.Module, groups: Groups, rows: Rows | None, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> torch.Tensor:
        given = [*args, *(kwargs[name] for name in self.arguments[len(args) :])]
        hidden, expert_ids, weights = given
        count, k = expert_ids.shape
        ids, order = torch.sort(expert_ids.reshape(-1), stable=True)
        first, second = products(module)
        experts = torch.arange(module.get_parameter(second).shape[0], device=ids.device)
        offs = torch.searchsorted(ids, experts, right=True, out_int32=True)
        sorted_rows = None if rows is None else Rows(rows.of(hidden)[order // k], False)
        h = _product(module, first, groups, sorted_rows, hidden[order // k], ids, offs)
        h = module._apply_gate(h) if module.has_gate else module.act_fn(h)  # type: ignore[operator]
        y = _product(module, second, groups, sorted_rows, h, ids, offs)
        if has_post_expert_norm(module):
            y = module.post_expert_norm(y)  # type: ignore[operator]
        y = y * weights.reshape(-1)[order][:, None]
        back = torch.zeros_like(order).scatter(0, order, torch.arange(count * k, device=order.device))
        out: torch.Tensor = y[back].view(count, k, y.shape[-1]).sum(1).to(hidden.dtype)
        return out


def _product(
    module: nn.Module, name: str, groups: Groups, rows: Rows | None, x: torch.Tensor, ids: torch.Tensor,
    offs: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """The product of sorted rows with the stack ``name``, corrected by its adapters: of the one group there is, or each
    row by those of its group."""
    weight = module.get_parameter(name)
    x = x.to(weight.dtype)
    y: torch.Tensor = grouped_mm(x, weight if module.is_transposed else weight.transpose(1, 2), offs)
    for number, adapters in enumerate(groups):
        for adapter in adapters:
            if adapter.parameter != name:
                continue
            factors = adapter.lora_A, adapter.lora_B, adapter.scale, offs
            if rows is None:
                y = experts_site(adapter.site_id, x, y, *factors)
            else:
                own, before = rows.only(number, x), rows.only(number, y)
                y = rows.put(number, experts_site(adapter.site_id, own, before, *factors), y)
    if module.has_bias:
        y = y + module.get_parameter(f"{name}_bias")[ids]
    return y


def body(
    x: torch.Tensor, y: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scale: torch.Tensor, offs: torch.Tensor
) -> torch.Tensor:
    """y + (scale * x A_e^T) B_e^T by groups of rows, computed in the dtype of ``x``; ``y`` has that dtype too."""
    wide = torch.float32 if x.dtype.itemsize < 4 else x.dtype
    h = grouped_mm(x, A.to(x.dtype).transpose(1, 2), offs)
    h = (h.to(wide) * scale.to(wide)).to(x.dtype)
    delta: torch.Tensor = grouped_mm(h, B.to(x.dtype).transpose(1, 2), offs)
    return y + delta


def sample(draw: Any) -> tuple[Any, ...]:
    from hypothesis import strategies as st

    sizes = draw(st.lists(st.integers(0, 4), min_size=1, max_size=4))
    K, N, r = (draw(st.integers(1, 7)) for _ in range(3))
    S, E = sum(sizes), len(sizes)
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
    wide = dtype if dtype.itemsize >= 4 else draw(st.sampled_from([dtype, torch.float32]))
    x, y = draw_tensor(draw, (S, K), dtype), draw_tensor(draw, (S, N), dtype)
    A, B = draw_tensor(draw, (E, r, K), wide), draw_tensor(draw, (E, N, r), wide)
    offs = torch.tensor(sizes).cumsum(0).to(torch.int32)
    return x, y, A, B, draw_tensor(draw, (1,), torch.float64), offs


EXPERTS = derive(
    "lora_experts",
    "(Tensor x, Tensor y, Tensor A, Tensor B, Tensor scale, Tensor offs) -> Tensor",
    body,
    sample=sample,
)

ANCHORS = (anchor_of(EXPERTS),)
experts_site = ANCHORS[0].function
