"""LoRA on an embedding (Hu et al. 2021; the layout is PEFT's).

    y' = y + s * A[:, ids]^T B^T        ids (...) int, y (..., D), A (r, V), B (D, r)

A starts at zero and B is drawn from N(0, 1). There is no dropout: ids have no entries to drop. A head that shares
the embedding's weight keeps the frozen one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from adaptc.ir.derive import derive
from adaptc.ir.ops.lora import draw_tensor
from adaptc.methods.lora.options import LoRAOptions
from adaptc.methods.lora.site import SiteAdapter, anchor_of, only_plain
from adaptc.methods.quantised import Refusal
from adaptc.methods.scaled import storage_dtype


class EmbeddingAdapter(SiteAdapter):
    """``lora_embedding_A`` (r, V) and ``lora_embedding_B`` (D, r) of one embedding.

    ``padding_idx`` (its column of A gets no gradient) and ``scale_grad_by_freq`` act as on the frozen weight. The
    gradient of A is dense, whatever ``sparse`` says.
    """

    def __init__(
        self, method: LoRAOptions, module: nn.Embedding, *, dtype: torch.dtype | None = None, site_id: int = 0
    ) -> None:
        weight = module.weight
        super(SiteAdapter, self).__init__(method, site_id, weight.device)
        dtype = storage_dtype(weight, dtype)
        rows, width = module.num_embeddings, module.embedding_dim
        self.lora_embedding_A = nn.Parameter(torch.empty(method.r, rows, dtype=dtype, device=weight.device))
        self.lora_embedding_B = nn.Parameter(torch.empty(width, method.r, dtype=dtype, device=weight.device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the initial values: A zero, or normal for the init "random"; B normal."""
        with torch.no_grad():
            self.lora_embedding_A.zero_()
            if self.method.init == "random":
                self.lora_embedding_A.normal_()
            self.lora_embedding_B.normal_()

    @classmethod
    def refusal(cls, method: LoRAOptions, module: nn.Module) -> str | None:
        kind = type(module).__name__
        assert isinstance(module, nn.Embedding)
        if type(module).forward is not nn.Embedding.forward and not _is_scaled(module):
            return f"{kind} has a forward of its own: its input may not be the ids"
        if module.max_norm is not None:
            return "max_norm rewrites rows of the weight in every forward, and the base is frozen"
        if not module.weight.is_floating_point():
            return f"its weight is {module.weight.dtype}, not a floating-point tensor"
        return only_plain(method, module)

    def rows_refusal(self, module: nn.Module, *, spans: bool) -> Refusal | None:
        if getattr(module, "scale_grad_by_freq", False):
            return Refusal("scale_grad_by_freq counts the tokens of all rows together")
        return super().rows_refusal(module, spans=spans)

    def apply_to(self, module: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        assert isinstance(module, nn.Embedding)
        padding = -1 if module.padding_idx is None else module.padding_idx
        factor = getattr(module, "embed_scale", None) if _is_scaled(module) else None
        # What multiplies the rows multiplies the correction too.
        scale = self.scale if factor is None else self.scale * factor
        corrected: torch.Tensor = embedding_site(
            x, y, self.site_id, 0.0, False, self.method.compute_dtype,
            self.lora_embedding_A, self.lora_embedding_B, scale, padding, module.scale_grad_by_freq,
        )  # fmt: skip
        return corrected

    def delta(self) -> torch.Tensor:
        """s (B A)^T, the update of the (V, D) weight, in fp64."""
        return self.scaling * (self.lora_embedding_B.double() @ self.lora_embedding_A.double()).mT

    def deltas(self) -> dict[str, torch.Tensor]:
        return {"weight": self.delta()}

    def products(self) -> tuple[tuple[str, ...], ...]:
        return (("lora_embedding_A", "lora_embedding_B"),)

    def peft_tensors(self) -> dict[str, torch.Tensor]:
        return {"lora_embedding_A": self.lora_embedding_A, "lora_embedding_B": self.lora_embedding_B}


def _is_scaled(module: nn.Module) -> bool:
    """transformers' ``...ScaledWordEmbedding``: the rows times ``embed_scale``."""
    return type(module).__name__.endswith("ScaledWordEmbedding") and hasattr(module, "embed_scale")


def body(
    ids: torch.Tensor, y: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scale: torch.Tensor, padding: int,
    by_frequency: bool,
) -> torch.Tensor:  # fmt: skip
    """y + scale * A[:, ids]^T B^T, computed in the dtype of ``y``; ``padding`` -1 means none."""
    h = torch.embedding(A.t(), ids, padding, by_frequency).to(y.dtype)
    delta = h @ B.to(y.dtype).t()
    wide = torch.float32 if y.dtype.itemsize < 4 else y.dtype
    return y + (scale.to(wide) * delta.to(wide)).to(y.dtype)


def sample(draw: Any) -> tuple[Any, ...]:
    from hypothesis import strategies as st

    rows, width, r = (draw(st.integers(1, 7)) for _ in range(3))
    shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=2))
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
    wide = dtype if dtype.itemsize >= 4 else draw(st.sampled_from([dtype, torch.float32]))
    ids = torch.randint(rows, shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 2**31))))
    factors = draw_tensor(draw, (r, rows), wide), draw_tensor(draw, (width, r), wide)
    y, scale = draw_tensor(draw, (*shape, width), dtype), draw_tensor(draw, (1,), torch.float64)
    return ids, y, *factors, scale, draw(st.integers(-1, rows - 1)), draw(st.booleans())


EMBEDDING = derive(
    "lora_embedding",
    "(Tensor ids, Tensor y, Tensor A, Tensor B, Tensor scale, int padding, bool by_frequency) -> Tensor",
    body,
    sample=sample,
)


ANCHORS = (anchor_of(EMBEDDING),)
embedding_site = ANCHORS[0].function
