"""Prefix tuning: trained keys and values in front of the input's, in every attention (Li and Liang 2021, section 4).

    K_l = [T_l,k; W_k h]      V_l = [T_l,v; W_v h]       T (n, 2 L h d_h): per layer l the keys, then the values

The table goes into the model's cache before the first token does, so the input's positions start at n. With a
projection T = W_2 tanh(W_1 E + b_1) + b_2, E (n, d), which is a matter of training only: files hold T, and T is loaded.

It acts in the backbone, so heads of every kind compute with it. A model that drops its cache is an error: gradient
checkpointing does so.
"""

from __future__ import annotations

import dataclasses
import inspect
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from adaptc.errors import AdaptcWarning, UnsupportedError
from adaptc.ir.derive import derive
from adaptc.ir.lora import draw_tensor
from adaptc.methods import tokens
from adaptc.methods.base import Adapter, Method, anchor_of
from adaptc.methods.codec import Codec, Option, is_bool, is_rank, optional
from adaptc.methods.scaled import storage_dtype
from adaptc.methods.tokens import TokenAdapter, TokenMethod
from adaptc.runtime import processes

INITS = ("default", "zero")
#: PEFT's init_weights -> ours.
_INIT_NAMES = {"zero": "zero"}


def _is_init(value: Any) -> bool:
    return value in (None, "zero")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prefix(TokenMethod):
    """Train keys and values in front of the input's, in every attention.

    Args:
        num_virtual_tokens: n.
        prefix_projection: train E and a two-layer network of ``encoder_hidden_size`` instead of the table.
        init: "default" (the table or E normal; the network as torch's linear layers) or "zero" (the table is zero).
    """

    kind: ClassVar[str] = "prefix"
    peft_kind: ClassVar[str | None] = "PREFIX_TUNING"

    prefix_projection: bool = False
    encoder_hidden_size: int | None = None
    init: str = "default"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("init", self.init in INITS, " or ".join(INITS))
        self.require("prefix_projection", isinstance(self.prefix_projection, bool), "true or false")
        size = self.encoder_hidden_size
        known = (size is None and not self.prefix_projection) or (type(size) is int and size > 0)
        self.require("encoder_hidden_size", known, "a positive integer, with prefix_projection")

    def place(self, model: nn.Module) -> str:
        return tokens.backbone(model)

    def shape(self, model: nn.Module) -> tuple[int, int, int]:
        """Keys and values may have fewer heads than queries: those are the heads here, and token_dim their width."""
        config: Any = model.config
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return heads * size, heads, config.num_hidden_layers

    def refusal(self, path: str, module: nn.Module) -> str | None:
        reason = super().refusal(path, module)
        if reason is None and "past_key_values" not in inspect.signature(type(module).forward).parameters:
            return f"{type(module).__name__} takes no past_key_values"
        return reason

    def build(self, path: str, module: nn.Module, *, dtype: torch.dtype | None, site_id: int) -> PrefixAdapter:
        return PrefixAdapter(self, module, dtype=dtype, site_id=site_id)


def _no_cache(module: nn.Module, found: str) -> UnsupportedError:
    return UnsupportedError(
        f"{type(module).__name__} does not compute with its cache, which the prefix is in",
        found=found, do="model.gradient_checkpointing_disable(), or tune a prompt",
    )  # fmt: skip


class PrefixAdapter(TokenAdapter):
    """``prefix`` (n, 2 L h d_h); with a projection ``embedding`` (n, d), ``first`` and ``second`` (weights and biases).

    Values loaded from a file are a table: the projection is gone then, in this adapter.
    """

    method: Prefix

    def __init__(
        self, method: Prefix, module: nn.Module, *, dtype: torch.dtype | None = None, site_id: int = 0
    ) -> None:
        super().__init__(method, module, site_id)
        weight = next(module.parameters())
        dim, self.heads, self.layers = method.shape(module)
        options: dict[str, Any] = {"dtype": storage_dtype(weight, dtype), "device": weight.device}
        width = 2 * self.layers * dim
        if method.prefix_projection:
            hidden = method.encoder_hidden_size
            assert hidden is not None  # asked by __post_init__
            self.embedding = nn.Parameter(torch.empty(method.num_virtual_tokens, dim, **options))
            self.first, self.second = nn.Linear(dim, hidden, **options), nn.Linear(hidden, width, **options)
            self.register_parameter("prefix", None)
        else:
            self.prefix = nn.Parameter(torch.empty(method.num_virtual_tokens, width, **options))
        self.projects = method.prefix_projection
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the initial values (the method's ``init``); the network has drawn its own."""
        zero = self.method.init == "zero"
        if not self.projects:
            (nn.init.zeros_ if zero else nn.init.normal_)(self.prefix)
            return
        nn.init.normal_(self.embedding)
        if zero:
            nn.init.zeros_(self.second.weight)
            nn.init.zeros_(self.second.bias)

    def table(self) -> torch.Tensor:
        """T (n, 2 L h d_h)."""
        if not self.projects:
            return self.prefix
        z = torch.tanh(F.linear(self.embedding, self.first.weight, self.first.bias))
        return F.linear(z, self.second.weight, self.second.bias)

    def run_inside(self, module: nn.Module, adapters: Sequence[Adapter], *args: Any, **kwargs: Any) -> Any:
        given = tokens.named_arguments(self, args, kwargs)
        count = sum(a.count for a in adapters if isinstance(a, TokenAdapter))
        tokens.lengthen_mask(given, count)
        if given.get("position_ids") is not None:
            given["position_ids"] = given["position_ids"] + count
        if tokens.is_begun(given, adapters):
            return type(module).forward(module, **given)
        config: Any = module.config
        use_cache = given.get("use_cache")
        asked = config.use_cache if use_cache is None else use_cache
        keeps = given.get("past_key_values") is not None or asked
        if module.training and getattr(module, "gradient_checkpointing", False):
            raise _no_cache(module, "gradient checkpointing, which drops it")
        cache = given["past_key_values"] = self._fill(module, adapters, given)
        tokens.begin(cache, adapters)
        output = type(module).forward(module, **given)
        if cache.get_seq_length() == count:
            raise _no_cache(module, "a forward that did not add to it")
        if not keeps and hasattr(output, "past_key_values"):
            output["past_key_values"] = None
        return output

    def _fill(self, module: nn.Module, adapters: Sequence[Adapter], given: Mapping[str, Any]) -> Any:
        """The cache of a call, with the tables of ``adapters`` in it."""
        from transformers import DynamicCache

        cache = given.get("past_key_values")
        if cache is None:
            cache = DynamicCache(config=module.config)
        ids = given.get("input_ids")
        batch = (given["inputs_embeds"] if ids is None else ids).shape[0]
        weight = module.get_input_embeddings().weight  # type: ignore[operator]
        like = torch.empty(batch, dtype=weight.dtype, device=weight.device)
        for adapter in adapters:
            assert isinstance(adapter, PrefixAdapter)
            table = adapter.table()
            states = prefix_site(adapter.site_id, table, like, adapter.layers, adapter.heads)
            for layer in range(adapter.layers):
                cache.update(states[2 * layer], states[2 * layer + 1], layer)
        return cache

    def peft_tensors(self) -> dict[str, torch.Tensor]:
        return {"prompt_embeddings": self.table()}

    def set_peft_tensors(self, values: Mapping[str, torch.Tensor]) -> None:
        table = values["prompt_embeddings"]
        if self.projects and processes.is_distributed(self.embedding):
            raise UnsupportedError(
                "loading a table into a projected prefix of a sharded model",
                found="the projection's parameters are sharded, and the table would take their place",
                do="load before fully_shard, or compile with prefix_projection=False",
            )
        if self.projects:
            message = "the projection of a prefix is not in its files: what is loaded is trained on as a table"
            warnings.warn(AdaptcWarning(message), stacklevel=2)
            weight = self.embedding
            del self.embedding, self.first, self.second
            self.prefix = nn.Parameter(table.to(weight).clone())
            self.projects = False
        else:
            self.prefix.data.copy_(table)

    def method_now(self) -> Method:
        return self.method if self.projects else without_projection(self.method)

    def signature(self) -> tuple[object, ...]:
        return (*super().signature(), self.projects)


def without_projection(method: Method) -> Method:
    """The method whose parameters a file has: the table, and no dimensions that the model itself says."""
    plain = tokens.without_dimensions(method)
    return dataclasses.replace(plain, prefix_projection=False, encoder_hidden_size=None)  # type: ignore[call-arg]


def body(table: torch.Tensor, like: torch.Tensor, layers: int, heads: int) -> torch.Tensor:
    """(n, 2 layers heads d) -> (2 layers, batch, heads, n, d) in the dtype of ``like`` (batch,), per layer k and v."""
    rows = table.to(like.dtype).reshape(table.shape[0], 2 * layers, heads, -1).permute(1, 2, 0, 3)
    return rows.unsqueeze(1).repeat(1, like.shape[0], 1, 1, 1)


def sample(draw: Any) -> tuple[Any, ...]:
    from hypothesis import strategies as st

    n, layers, heads, d, batch = (draw(st.integers(1, 3)) for _ in range(5))
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
    wide = dtype if dtype.itemsize >= 4 else draw(st.sampled_from([dtype, torch.float32]))
    return draw_tensor(draw, (n, 2 * layers * heads * d), wide), draw_tensor(draw, (batch,), dtype), layers, heads


PREFIX = derive("prefix_states", "(Tensor table, Tensor like, int layers, int heads) -> Tensor", body, sample=sample)
_ANCHOR = anchor_of(PREFIX)
prefix_site = _ANCHOR.function
ANCHORS = (_ANCHOR,)

CODEC = Codec(
    peft_type="PREFIX_TUNING", kind="prefix", label="prefix tuning", on_model=True, stored=without_projection,
    options={
        **tokens.OPTIONS,
        "prefix_projection": Option(False, "used", "true or false", is_bool, field="prefix_projection"),
        "encoder_hidden_size": Option(
            None, "used", "a positive integer or null", optional(is_rank), field="encoder_hidden_size"
        ),
        "init_weights": Option(None, "used", '"zero" or null', _is_init, field="init", values=_INIT_NAMES),
    },
)  # fmt: skip
