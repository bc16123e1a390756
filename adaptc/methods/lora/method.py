"""LoRA: a trainable low-rank correction of frozen layers (Hu et al. 2021), at every kind of site."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from adaptc.methods.base import Adapter
from adaptc.methods.lora import attention, conv, dora, embedding, experts, kinds, linear, rows
from adaptc.methods.lora.options import LoRAOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRA(LoRAOptions):
    """Low-rank adaptation of linear layers.

    Args:
        r: rank; alpha: numerator of the scale; dropout: probability on the adapter's input, in training.
        rslora: scale alpha / sqrt(r) instead of alpha / r.
        init: "default" (A kaiming-uniform with a = sqrt(5), that is U(-1/sqrt(K), 1/sqrt(K)), B zero),
            "gaussian" (A normal with std 1/r, B zero), or "random" (as default, but B drawn like A, so that
            the adapter is not the identity: PEFT's ``init_lora_weights=False``). "orthogonal" (even r), "pissa",
            "pissa_niter_<k>", "olora" and "corda" as in PEFT, on an unchanged base; see ``methods.lora.initial``.
        corda_method: with init "corda", "ipm" (adapt what the calibration inputs use most) or "kpm" (least).
        dora: also train the length of every row of the corrected weight (Liu et al. 2024).
        lora_bias: also train a bias (N,) of the second factor.
        bias: "none", "lora_only" (also train the biases of the adapted layers) or "all" (every bias).
        rank_pattern, alpha_pattern: regular expression on the module path -> r or alpha at those sites, as
            in PEFT: a key matches the whole path or a dotted suffix of it; the first match counts. A key that
            changes nothing at any site of its rule is refused.
        compute_dtype: dtype name ("float32") in which the correction is computed; None means the dtype of
            the site's output. Factors are cast, so a 16-bit activation is never copied in full precision.
    """

    def refusal(self, path: str, module: nn.Module) -> str | None:
        return kinds.kind_of(module).refusal(self.at(path), module)

    def build(self, path: str, module: nn.Module, *, dtype: torch.dtype | None, site_id: int) -> Adapter:
        return kinds.kind_of(module)(self, module, dtype=dtype, site_id=site_id)

    def parameter_refusal(self, path: str, module: nn.Module, name: str) -> str | None:
        return kinds.parameter_kind_of(module).parameter_refusal(self.at(path), module, name)

    def build_parameter(
        self, path: str, module: nn.Module, name: str, *, dtype: torch.dtype | None, site_id: int
    ) -> Adapter:
        return kinds.parameter_kind_of(module)(self, module, name, dtype=dtype, site_id=site_id)


_MODULES = (attention, conv, dora, embedding, experts, linear, rows)
ANCHORS = tuple(anchor for module in _MODULES for anchor in module.ANCHORS)
#: Where its row in PEFT's file format is.
CODEC = "adaptc.methods.lora.codec:CODEC"
