"""Rows of an embedding's weight that are trained, by the ids of their tokens (PEFT's trainable tokens).

    W' = W with row indices[i] replaced by values[i]        W (V, D), values (k, D)

The values start as the rows that they replace. Modules whose weight is tied to the embedding's, such as the output
layer, compute with W' too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from adaptc.errors import SiteError
from adaptc.ir.derive import derive
from adaptc.ir.ops.lora import draw_tensor
from adaptc.methods import run_again
from adaptc.methods.base import Adapter, Method, anchor_of
from adaptc.methods.quantised import Refusal
from adaptc.methods.scaled import storage_dtype
from adaptc.torch_internals import reparametrize

#: PEFT's name of the values, below the embedding.
SUFFIX = "token_adapter.trainable_tokens_delta"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainableTokens(Method):
    """Train rows of an embedding, and of the output layer where it is tied to it.

    Args:
        indices: ids of the tokens, each once; the order is that of the rows in files.
    """

    kind: ClassVar[str] = "trainable_tokens"
    mergeable: ClassVar[bool] = True
    batchable: ClassVar[bool] = True
    follows_ties: ClassVar[bool] = True

    indices: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "indices", tuple(self.indices))
        legal = all(type(i) is int and i >= 0 for i in self.indices) and len(set(self.indices)) == len(self.indices)
        self.require("indices", bool(self.indices) and legal, "ids of tokens, at least one and each once")

    def refusal(self, path: str, module: nn.Module) -> str | None:
        weight = getattr(module, "weight", None)
        if not isinstance(module, nn.Embedding | nn.Linear) or type(weight) is not nn.Parameter:
            return f"{type(module).__name__} is no embedding, nor a linear layer that could be tied to one"
        if not weight.is_floating_point() or weight.dtype.itemsize < 2:
            return f"its weight is {weight.dtype}, not a floating-point tensor of 16 bits or more"
        if getattr(module, "max_norm", None) is not None:
            return "max_norm rewrites rows of the weight in every forward, and the base is frozen"
        if max(self.indices) >= len(weight):
            return f"it has {len(weight)} rows, and token {max(self.indices)} is to be trained"
        return None

    def build(self, path: str, module: nn.Module, *, dtype: torch.dtype | None, site_id: int) -> Adapter:
        return TokensAdapter(self, module, dtype=dtype, site_id=site_id)

    @classmethod
    def link(cls, adapters: Sequence[Adapter]) -> None:
        """Modules that share the embedding's weight share its values, which it has."""
        groups: dict[tuple[int, object], list[TokensAdapter]] = {}
        for adapter in adapters:
            assert isinstance(adapter, TokensAdapter)
            groups.setdefault((adapter.weight_id, adapter.method), []).append(adapter)
        for group in groups.values():
            source = next((a for a in group if a.of_embedding), group[0])
            for adapter in group:
                if adapter is not source:
                    adapter.follow(source)


class TokensAdapter(Adapter):
    """``trainable_tokens_delta`` (k, D), the values of one embedding's rows; fp32 on a 16-bit base by default."""

    acts_inside = True
    merges_alone = "other adapters act beside trained rows of its weight"
    method: TrainableTokens
    index: torch.Tensor

    def __init__(
        self, method: TrainableTokens, module: nn.Module, *, dtype: torch.dtype | None = None, site_id: int = 0
    ) -> None:
        super().__init__(method, site_id)
        weight = module.weight
        assert isinstance(weight, nn.Parameter)
        self.weight_id, self.of_embedding = id(weight), isinstance(module, nn.Embedding)
        index = torch.tensor(method.indices, device=weight.device)
        self.register_buffer("index", index, persistent=False)
        self.trainable_tokens_delta = nn.Parameter(weight.detach()[index].to(storage_dtype(weight, dtype)))
        # In a list, so that the embedding's adapter is no part of this one.
        self._source: list[TokensAdapter] = []

    def follow(self, source: TokensAdapter) -> None:
        """Take the values of ``source``, whose module has the same weight."""
        del self.trainable_tokens_delta
        self._source = [source]

    @property
    def values(self) -> torch.Tensor:
        return self._source[0].trainable_tokens_delta if self._source else self.trainable_tokens_delta

    @classmethod
    def check_together(cls, path: str, adapters: Sequence[Adapter]) -> None:
        seen: set[int] = set()
        for adapter in adapters:
            assert isinstance(adapter, TokensAdapter)
            if both := seen.intersection(adapter.method.indices):
                raise SiteError(
                    f"{path}: two adapters have values of their own for token {min(both)}", do="make one of them live"
                )
            seen.update(adapter.method.indices)

    def merge_refusal(self, module: nn.Module, beside: Sequence[Adapter] = ()) -> None:
        """Rows can always be written over others."""

    def merged(self, module: nn.Module, beside: Sequence[Adapter] = ()) -> dict[str, torch.Tensor]:
        weight = module.get_parameter("weight").detach()
        for adapter in (self, *beside):
            assert isinstance(adapter, TokensAdapter)
            weight = body(weight, adapter.index, adapter.values.detach())
        return {"weight": weight}

    def replaced(self, module: nn.Module, beside: Sequence[Adapter] = ()) -> Sequence[str]:
        return ("weight",)

    @property
    def adds(self) -> bool:
        return True

    def merge_key(self) -> object:
        return id(self.values)

    def rows_refusal(self, module: nn.Module, *, spans: bool) -> Refusal | None:
        if getattr(module, "scale_grad_by_freq", False):
            return Refusal("scale_grad_by_freq counts the tokens of all rows together")
        return run_again.refusal(module)

    def run_inside(self, module: nn.Module, adapters: Sequence[Adapter], *args: Any, **kwargs: Any) -> Any:
        weight: torch.Tensor = module.get_parameter("weight")
        for adapter in adapters:
            assert isinstance(adapter, TokensAdapter)
            weight = rows_site(adapter.site_id, weight, adapter.index, adapter.values)
        with reparametrize(module, {"weight": weight}):
            return type(module).forward(module, *args, **kwargs)

    def peft_tensors(self) -> dict[str, torch.Tensor]:
        return {} if self._source else {SUFFIX: self.trainable_tokens_delta}

    def signature(self) -> tuple[object, ...]:
        return (*super().signature(), self.values.shape, bool(self._source))


def body(weight: torch.Tensor, index: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """weight (V, D) with the rows ``index`` (k,) int64 replaced by ``values`` (k, D)."""
    return weight.index_copy(0, index, values.to(weight.dtype))


def sample(draw: Any) -> tuple[Any, ...]:
    from hypothesis import strategies as st

    V, D = draw(st.integers(1, 9)), draw(st.integers(1, 4))
    chosen = draw(st.lists(st.integers(0, V - 1), min_size=1, max_size=V, unique=True))
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
    wide = dtype if dtype.itemsize >= 4 else draw(st.sampled_from([dtype, torch.float32]))
    return draw_tensor(draw, (V, D), dtype), torch.tensor(chosen), draw_tensor(draw, (len(chosen), D), wide)


ROWS = derive("trained_rows", "(Tensor weight, Tensor index, Tensor values) -> Tensor", body, sample=sample)
ANCHORS = (anchor_of(ROWS),)
rows_site = ANCHORS[0].function
