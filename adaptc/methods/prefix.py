"""Prefix tuning: trained keys and values in front of the input's, in every attention (Li and Liang 2021, section 4).

    K_l = [T_l,k; W_k h]      V_l = [T_l,v; W_v h]       T (n, 2 L h d_h): per layer l the keys, then the values

The table goes into the model's cache before the first token does, so the input's positions start at n. With a
projection T = W_2 tanh(W_1 E + b_1) + b_2, E (n, d), which is a matter of training only: files hold T, and T is loaded.

It acts in the backbone, so heads of every kind compute with it. A model that drops its cache is an error: gradient
checkpointing does so.

A language model with an encoder and a decoder gets it as in PEFT: in the decoder's attention to itself only, and in
PEFT's order: layer i of the decoder reads entry (2 i) mod L of the table, L the number of the encoder's layers, or of
the decoder's where these are more. An entry that no layer reads gets no gradient: every second one where L is even.
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

from adaptc import distributed
from adaptc.errors import AdaptcWarning, UnsupportedError
from adaptc.ir.derive import derive
from adaptc.ir.ops.lora import draw_tensor
from adaptc.methods import tokens
from adaptc.methods.base import Adapter, Method, anchor_of
from adaptc.methods.codec import Codec, Option, is_bool, is_rank, optional
from adaptc.methods.rows import Groups, of_rows
from adaptc.methods.scaled import storage_dtype
from adaptc.methods.tokens import TokenAdapter, TokenMethod
from adaptc.transformers_names import attention_cache_argument, cache_in_output, given_cache

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
        num_transformer_submodules: stacks of the model: 2 with an encoder and a decoder, else 1. None is the model's.
        prefix_projection: train E and a two-layer network of ``encoder_hidden_size`` instead of the table.
        init: "default" (the table or E normal; the network as torch's linear layers) or "zero" (the table is zero).
    """

    kind: ClassVar[str] = "prefix"
    peft_kind: ClassVar[str | None] = "PREFIX_TUNING"
    batchable: ClassVar[bool] = True

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
        return "" if tokens.has_decoder(model) else tokens.backbone(model)

    def shape(self, model: nn.Module) -> tuple[int, int, int]:
        """Keys and values may have fewer heads than queries: those are the heads here, and token_dim their width.

        PEFT finds heads and layers of an encoder and the width of hidden states: where a decoder has others, its users
        must say them, and our files do. ``num_layers`` may be any number that the decoder's layers do not exceed.
        """
        config: Any = model.config
        if tokens.has_decoder(model):
            heads, layers = _decoder_sizes(config)
            width = getattr(config, "d_kv", None) or config.hidden_size // heads
            return heads * width, heads, max(self.num_layers or config.num_hidden_layers, layers)
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return heads * size, heads, config.num_hidden_layers

    def refusal(self, path: str, module: nn.Module) -> str | None:
        reason = super().refusal(path, module)
        if reason is None and attention_cache_argument(inspect.signature(type(module).forward)) is None:
            return f"{type(module).__name__} takes no cache of keys and values (past_key_values)"
        return reason

    def refusal_of_decoder(self, path: str, module: nn.Module) -> str | None:
        name, parameters = type(module).__name__, inspect.signature(type(module).forward).parameters
        if not tokens.has_language_head(module):
            return f"{name} has an encoder and a decoder and no language model's head: PEFT has no prefix for it"
        if not {"input_ids", "decoder_attention_mask"} <= parameters.keys():
            return f"{name} has an encoder that does not read tokens (input_ids): PEFT has no prefix for it"
        if self.num_transformer_submodules == 1:
            return "num_transformer_submodules is 1, and the model has 2: an encoder and a decoder"
        decoder: Any = module.get_decoder()  # type: ignore[operator]
        if "decoder_causal_mask" in inspect.signature(type(decoder).forward).parameters:
            return f"{name} makes its decoder's mask without the cache, which the prefix is in"
        if hasattr(module.config, "ngram"):
            return f"{name} computes with a cache, which the prefix is in, for one token at a time only"
        return None

    def build(self, path: str, module: nn.Module, *, dtype: torch.dtype | None, site_id: int) -> PrefixAdapter:
        return PrefixAdapter(self, module, dtype=dtype, site_id=site_id)


def _decoder_sizes(config: Any) -> tuple[int, int]:
    """Heads and layers of the decoder that has an encoder; its config may say them as those of all layers."""
    layers = getattr(config, "decoder_layers", None) or getattr(config, "num_decoder_layers", None)
    heads = getattr(config, "decoder_attention_heads", None)
    return heads or config.num_attention_heads, layers or config.num_hidden_layers


def _no_cache(module: nn.Module, found: str) -> UnsupportedError:
    return UnsupportedError(
        f"{type(module).__name__} does not compute with its cache, which the prefix is in",
        found=found, do="model.gradient_checkpointing_disable(), or tune a prompt",
    )  # fmt: skip


class PrefixAdapter(TokenAdapter):
    """``prefix`` (n, 2 L h d_h); with a projection ``embedding`` (n, d), ``first`` and ``second`` (weights and biases).

    ``entries``: for each layer that gets keys and values, which of the L of the table they are.
    Values loaded from a file are a table: the projection is gone then, in this adapter.
    """

    method: Prefix

    def __init__(
        self, method: Prefix, module: nn.Module, *, dtype: torch.dtype | None = None, site_id: int = 0
    ) -> None:
        super().__init__(method, module, site_id)
        weight = next(module.parameters())
        self.dim, self.heads, self.layers = method.shape(module)
        self.of_decoder = tokens.has_decoder(module)
        self.entries = tuple(range(self.layers))
        if self.of_decoder:
            self.entries = tuple(2 * i % self.layers for i in range(_decoder_sizes(module.config)[1]))
        options: dict[str, Any] = {"dtype": storage_dtype(weight, dtype), "device": weight.device}
        width = 2 * self.layers * self.dim
        if method.prefix_projection:
            hidden = method.encoder_hidden_size
            assert hidden is not None  # asked by __post_init__
            self.embedding = nn.Parameter(torch.empty(method.num_virtual_tokens, self.dim, **options))
            self.first = nn.Linear(self.dim, hidden, **options)
            self.second = nn.Linear(hidden, width, **options)
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

    def run_tables(self, module: nn.Module, groups: Groups, ids: torch.Tensor | None, given: dict[str, Any]) -> Any:
        """Puts the tables in the module's cache."""
        adapters: Sequence[Adapter] = groups[0]
        count = sum(a.count for a in adapters if isinstance(a, TokenAdapter))
        mask, positions = "attention_mask", "position_ids"
        if self.of_decoder:
            mask, positions = f"{tokens.DECODER}_{mask}", f"{tokens.DECODER}_{positions}"
        tokens.lengthen_mask(given, count, mask)
        if given.get(positions) is not None:
            given[positions] = given[positions] + count
        self._check_cache(given_cache(given))
        if tokens.is_begun(given, adapters):
            return type(module).forward(module, **given)
        config: Any = module.config
        use_cache = given.get("use_cache")
        asked = config.use_cache if use_cache is None else use_cache
        keeps = given_cache(given) is not None or asked
        stack: Any = module.get_decoder() if self.of_decoder else module  # type: ignore[operator]
        if (module.training or stack.training) and getattr(stack, "gradient_checkpointing", False):
            raise _no_cache(module, "gradient checkpointing, which drops it")
        assert self.cache_name is not None  # else refused
        cache = given[self.cache_name] = self._fill(module, groups, ids, given)
        tokens.begin(cache, adapters)
        as_tuple = given.pop("return_dict", None) is False
        output = type(module).forward(module, **given)
        if cache.get_seq_length() == count:
            raise _no_cache(module, "a forward that did not add to it")
        found = None if keeps else cache_in_output(output)
        if found is not None:  # its place too: outputs are read by their order
            output = type(output)(**{name: value for name, value in output.items() if name != found[0]})
        return tuple(value for value in output.values() if value is not None) if as_tuple else output

    def _check_cache(self, cache: Any) -> None:
        if self.of_decoder and cache is not None and not hasattr(cache, "self_attention_cache"):
            raise UnsupportedError(
                "a cache in which a decoder's attention to itself and to its encoder are one",
                expected="an EncoderDecoderCache", found=type(cache).__name__,
                do="EncoderDecoderCache(DynamicCache(), DynamicCache()), or none",
            )  # fmt: skip

    def _fill(
        self, module: nn.Module, groups: Groups, ids: torch.Tensor | None, given: Mapping[str, Any]
    ) -> Any:
        """The cache of a call, with the tables in it."""
        from transformers import DynamicCache, EncoderDecoderCache

        cache = given_cache(given)
        if cache is None:
            cache = DynamicCache(config=module.config)
            if self.of_decoder:
                cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        batch = self._rows(given)
        weight = module.get_input_embeddings().weight  # type: ignore[operator]
        like = torch.empty(batch, dtype=weight.dtype, device=weight.device)
        for place, adapter in enumerate(groups[0]):
            tables = [group[place].table() for group in groups]
            states = tables[0] if ids is None else of_rows(tables, ids)
            states = prefix_site(adapter.site_id, states, like, adapter.layers, adapter.heads)
            for layer, entry in enumerate(adapter.entries):
                tokens.own_attention(cache).update(states[2 * entry], states[2 * entry + 1], layer)
        return cache

    def _rows(self, given: Mapping[str, Any]) -> int:
        """The batch size of a call."""
        names = ["input_ids", "inputs_embeds"]
        if self.of_decoder:  # generation has called the encoder before; labels may stand for the decoder's tokens
            names = [*(f"{tokens.DECODER}_{name}" for name in names), "labels", *names]
        found = next((given[name] for name in names if given.get(name) is not None), None)
        return int((given["encoder_outputs"][0] if found is None else found).shape[0])

    def peft_tensors(self) -> dict[str, torch.Tensor]:
        return {"prompt_embeddings": self.table()}

    def set_peft_tensors(self, values: Mapping[str, torch.Tensor]) -> None:
        table = values["prompt_embeddings"]
        if self.projects and distributed.is_distributed(self.embedding):
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
        """Of a model with an encoder and a decoder it says the dimensions: PEFT would find others in some configs."""
        method = self.method if self.projects else without_projection(self.method)
        if not self.of_decoder:
            return tokens.without_dimensions(method)
        said: dict[str, Any] = dict(zip(self.method.of_model, (self.dim, self.heads, self.layers, 2), strict=True))
        return dataclasses.replace(method, **said)

    def signature(self) -> tuple[object, ...]:
        return (*super().signature(), self.projects)


def without_projection(method: Method) -> Method:
    """The method whose parameters a file has: the table."""
    return dataclasses.replace(method, prefix_projection=False, encoder_hidden_size=None)  # type: ignore[call-arg]


def body(table: torch.Tensor, like: torch.Tensor, layers: int, heads: int) -> torch.Tensor:
    """(n, 2 layers heads d), or of every row (batch, n, 2 layers heads d) -> (2 layers, batch, heads, n, d) in the
    dtype of ``like`` (batch,), per layer k and v."""
    states = table.to(like.dtype).reshape(*table.shape[:-1], 2 * layers, heads, -1)
    if table.dim() == 3:
        return states.permute(2, 0, 3, 1, 4).clone(memory_format=torch.contiguous_format)
    return states.permute(1, 2, 0, 3).unsqueeze(1).repeat(1, like.shape[0], 1, 1, 1)


def sample(draw: Any) -> tuple[Any, ...]:
    from hypothesis import strategies as st

    n, layers, heads, d, batch = (draw(st.integers(1, 3)) for _ in range(5))
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
    wide = dtype if dtype.itemsize >= 4 else draw(st.sampled_from([dtype, torch.float32]))
    rows = draw(st.sampled_from([(n,), (batch, n)]))
    return draw_tensor(draw, (*rows, 2 * layers * heads * d), wide), draw_tensor(draw, (batch,), dtype), layers, heads


PREFIX = derive("prefix_states", "(Tensor table, Tensor like, int layers, int heads) -> Tensor", body, sample=sample)
ANCHORS = (anchor_of(PREFIX),)
prefix_site = ANCHORS[0].function

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
