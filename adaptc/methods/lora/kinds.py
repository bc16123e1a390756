"""LoRA at every kind of site: what the update of each kind of module is, one file a kind.

Each kind is an adapter class with ``refusal(method, module)``: why LoRA with these options cannot adapt the module, or
for a parameter of a module ``parameter_refusal(method, module, name)``.
"""

from __future__ import annotations

from torch import nn

from adaptc.methods.lora.attention import AttentionAdapter
from adaptc.methods.lora.conv import CONVOLUTIONS, ConvAdapter
from adaptc.methods.lora.embedding import EmbeddingAdapter
from adaptc.methods.lora.experts import ExpertsAdapter, is_experts
from adaptc.methods.lora.linear import LoRAAdapter
from adaptc.methods.lora.parameters import ParameterAdapter
from adaptc.methods.lora.site import SiteAdapter


def kind_of(module: nn.Module) -> type[LoRAAdapter | SiteAdapter]:
    """The adapter class of LoRA for ``module``: the linear layers' for whatever is of no other kind."""
    if isinstance(module, nn.Embedding):
        return EmbeddingAdapter
    if isinstance(module, nn.MultiheadAttention):
        return AttentionAdapter
    if isinstance(module, CONVOLUTIONS):
        return ConvAdapter
    return LoRAAdapter


def parameter_kind_of(module: nn.Module) -> type[ParameterAdapter]:
    """The adapter class of LoRA for a parameter of ``module``."""
    return ExpertsAdapter if is_experts(module) else ParameterAdapter
