"""The options of LoRA, and which of them exclude each other."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch

from adaptc.methods import patterns
from adaptc.methods.base import Method
from adaptc.methods.lora import initial


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAOptions(Method):
    """The fields of :class:`adaptc.LoRA`, which describes them: what the adapters at every kind of site read."""

    kind: ClassVar[str] = "lora"
    peft_kind: ClassVar[str | None] = "LORA"
    mergeable: ClassVar[bool] = True
    batchable: ClassVar[bool] = True
    bankable: ClassVar[bool] = True
    quantised: ClassVar[bool] = True

    r: int = 8
    alpha: float = 8
    dropout: float = 0.0
    rslora: bool = False
    init: str = "default"
    corda_method: str = "ipm"
    dora: bool = False
    lora_bias: bool = False
    bias: str = "none"
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict, hash=False)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict, hash=False)
    compute_dtype: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        ranks = [self.r, *self.rank_pattern.values()]
        self.require("r", all(isinstance(r, int) and r > 0 for r in ranks), "a positive integer")
        self.require("dropout", 0.0 <= self.dropout < 1.0, "a number in [0, 1)")
        known_init = initial.is_init(self.init)
        self.require("init", known_init, f"one of {', '.join(initial.INITS)}, pissa_niter_<k>")
        self.require("corda_method", self.corda_method in ("ipm", "kpm"), "ipm or kpm")
        self._check_combinations(ranks)
        biases = ("none", "lora_only", "all")
        self.require("bias", self.bias in biases, f"one of {', '.join(biases)}")
        finite = all(math.isfinite(a) for a in [self.alpha, *self.alpha_pattern.values()])
        self.require("alpha", finite, "a finite number")
        known = self.compute_dtype is None or isinstance(getattr(torch, self.compute_dtype, None), torch.dtype)
        self.require("compute_dtype", known, 'a torch dtype name such as "float32"')

    def _check_combinations(self, ranks: list[int]) -> None:
        """What PEFT refuses as well, and what would not mean what it means there."""
        if self.init == "orthogonal":
            self.require("r", all(r % 2 == 0 for r in ranks), 'an even number with init "orthogonal"')
        if initial.reads_weight(self.init):
            alphas = [self.alpha, *self.alpha_pattern.values()]
            self.require("alpha", min(alphas) > 0, f'a positive number with init "{self.init}"')
            # PEFT drops inputs of the trained part of W only, so the frozen part would no longer cancel it.
            self.require("dropout", self.dropout == 0, f'0 with init "{self.init}"')
        if self.lora_bias:
            self.require("lora_bias", not self.dora, "no lora_bias with dora")
            plain = ("default", "gaussian", "random")
            self.require("lora_bias", self.init in plain, f"init one of {', '.join(plain)} with lora_bias")

    @property
    def needs_covariance(self) -> bool:
        return self.init == "corda"

    @property
    def scaling(self) -> float:
        return self.alpha / math.sqrt(self.r) if self.rslora else self.alpha / self.r

    def at(self, path: str) -> Self:
        r = patterns.value_at(self.rank_pattern, path, self.r)
        alpha = patterns.value_at(self.alpha_pattern, path, self.alpha)
        return dataclasses.replace(self, r=r, alpha=alpha, rank_pattern={}, alpha_pattern={})

    def patterns(self) -> Mapping[str, Mapping[str, Any]]:
        return {"rank_pattern": self.rank_pattern, "alpha_pattern": self.alpha_pattern}

    def reads_weight(self) -> str | None:
        if self.dora:
            return "dora"
        return f'init "{self.init}"' if initial.reads_weight(self.init) else None
