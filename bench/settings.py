"""What a run measures: the model, the adapter and how often; one case per dtype and dropout."""

from __future__ import annotations

import dataclasses

import torch

from bench.errors import BenchError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that two runs must share to be compared. The defaults are the published table's."""

    layers: int = 4
    hidden: int = 1024
    intermediate: int = 0
    head_dim: int = 64
    #: The head is not adapted, so a large vocabulary would only pull every ratio towards 1.
    vocab: int = 2048
    batch: int = 1
    tokens: int = 512
    rank: int = 16
    alpha: float = 32.0
    #: DoRA instead of LoRA, in every contender that has an adapter.
    dora: bool = False
    #: Every decoder layer is computed again in the backward, in every contender and the floor.
    checkpointing: bool = False
    device: str = "cpu"
    backend: str = "inductor"
    threads: int = 0
    rounds: int = 20
    warmup: int = 2
    cold: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.hidden % self.head_dim:
            raise BenchError(f"--hidden {self.hidden} is not a multiple of --head-dim {self.head_dim}")
        if not self.intermediate:
            object.__setattr__(self, "intermediate", self.hidden * 11 // 4)
        for name in ("layers", "vocab", "batch", "tokens", "rank", "rounds"):
            if getattr(self, name) < 1:
                raise BenchError(f"--{name} must be at least 1, not {getattr(self, name)}")


@dataclasses.dataclass(frozen=True)
class Case:
    """One block of the table: a base dtype and a dropout probability."""

    dtype: str
    dropout: float

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise BenchError(f"unknown dtype {self.dtype!r}; known: {', '.join(DTYPES)}")
        if not 0 <= self.dropout < 1:
            raise BenchError(f"dropout {self.dropout} is not in [0, 1)")

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    def __str__(self) -> str:
        return f"{self.dtype}, p = {self.dropout:g}"
