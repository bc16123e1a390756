"""Trained tokens in front of a model's input: what prompt tuning and prefix tuning share.

They act on a whole model, so a plan names no modules: ``targets`` is ``"."``, which the method sets itself. The site is
the module of the model whose call they change, at ``place(model)``. Tokens are part of the graph of that call:

* a 2-D attention mask gets a column of ones per token; position ids given by the caller are shifted by their number;
* tokens go in once: a call with a filled cache finds them there. ``generate`` counts the caller's tokens only.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from adaptc.errors import BatchError, UnsupportedError
from adaptc.methods.base import Adapter, Method
from adaptc.methods.codec import Option, is_rank, optional
from adaptc.methods.quantised import Refusal
from adaptc.methods.rows import Groups, Rows
from adaptc.transformers_names import cache_argument, cache_in_output, given_cache, rename_cache

#: Options that the model's config answers.
MODEL_KEYS = ("token_dim", "num_attention_heads", "num_layers")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenMethod(Method):
    """Options of PEFT's prompt learning; ``token_dim``, ``num_attention_heads`` and ``num_layers`` are the model's own
    where None, and must be what the model has where given."""

    on_model: ClassVar[bool] = True
    quantised: ClassVar[bool] = True
    of_model: ClassVar[tuple[str, ...]] = (*MODEL_KEYS, "num_transformer_submodules")

    num_virtual_tokens: int = 20
    token_dim: int | None = None
    num_attention_heads: int | None = None
    num_layers: int | None = None
    num_transformer_submodules: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        count = self.num_virtual_tokens
        self.require("num_virtual_tokens", type(count) is int and count > 0, "a positive integer")
        for name in MODEL_KEYS:
            value = getattr(self, name)
            self.require(name, value is None or (type(value) is int and value > 0), "a positive integer")
        self.require("num_transformer_submodules", _is_stacks(self.num_transformer_submodules), "1, 2 or None")

    def shape(self, model: nn.Module) -> tuple[int, int, int]:
        """(token_dim, num_attention_heads, num_layers) of the table, by the model's config."""
        config: Any = model.config
        return config.hidden_size, config.num_attention_heads, config.num_hidden_layers

    def refusal(self, path: str, module: nn.Module) -> str | None:
        config: Any = getattr(module, "config", None)
        sizes = ("hidden_size", "num_attention_heads", "num_hidden_layers")
        if config is None or not all(isinstance(getattr(config, name, None), int) for name in sizes):
            return f"{type(module).__name__} is not a transformer of transformers with one stack of layers"
        if has_decoder(module):
            reason = self.refusal_of_decoder(path, module)
            if reason is not None:
                return reason
        elif self.num_transformer_submodules == 2:
            return "num_transformer_submodules is 2, which is for models with an encoder and a decoder"
        own = dict(zip(MODEL_KEYS, self.shape(module), strict=True))
        for name, value in own.items():
            if getattr(self, name) not in (None, value):
                return f"{name} is {getattr(self, name)}, the model's is {value}"
        return None

    def refusal_of_decoder(self, path: str, module: nn.Module) -> str | None:
        """Why this method cannot act at ``path`` of a model with an encoder and a decoder, or None when it can."""
        return "models with an encoder and a decoder are not supported"


_ENCODER, DECODER = "encoder", "decoder"


def has_decoder(model: nn.Module) -> bool:
    """Whether ``model`` (of transformers, or a part of one) has an encoder and a decoder."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def has_language_head(model: nn.Module) -> bool:
    """Whether ``model`` generates."""
    can_generate = getattr(model, "can_generate", None)
    return bool(callable(can_generate) and can_generate())


def is_encoder(path: str) -> bool:
    """Whether ``path``, where a method acts, is that of the encoder of a model with a decoder."""
    return path.rpartition(".")[2] == _ENCODER


def encoder(model: nn.Module) -> str | None:
    """Path of the encoder of tokens that has its decoder beside it, or None."""
    if not has_decoder(model):
        return None
    modules = dict(model.named_modules())
    for path, module in modules.items():
        if is_encoder(path) and f"{path.removesuffix(_ENCODER)}{DECODER}" in modules:
            return path if "input_ids" in inspect.signature(type(module).forward).parameters else None
    return None


def backbone(model: nn.Module) -> str:
    """Path of the part of a transformers model without its head; "" when it has none."""
    prefix = str(getattr(model, "base_model_prefix", ""))
    return prefix if prefix and isinstance(getattr(model, prefix, None), nn.Module) else ""


class TokenAdapter(Adapter):
    """An adapter that changes the arguments of a model's call."""

    acts_inside = True
    method: TokenMethod

    def __init__(self, method: TokenMethod, module: nn.Module, site_id: int) -> None:
        super().__init__(method, site_id)
        signature = inspect.signature(type(module).forward)
        #: Of the model's forward, without self: a call may pass its arguments by position.
        self.parameter_names = tuple(signature.parameters)[1:]
        #: What the forward calls its cache; None: it takes none.
        self.cache_name = cache_argument(self.parameter_names)
        self.count = method.num_virtual_tokens

    def rows_refusal(self, module: nn.Module, *, spans: bool) -> Refusal | None:
        return Refusal("virtual tokens are of a whole row, not of tokens of it") if spans else None

    @classmethod
    def check_rows_together(cls, path: str, groups: Groups) -> None:
        """All rows have as many virtual tokens, of one kind: masked ones would change how those of others round."""
        kinds = [tuple((a.method.kind, a.count) for a in group if a.acts_inside) for group in groups]
        if len(set(kinds)) > 1:
            named = (", ".join(f"{count} of {kind}" for kind, count in kind) or "none" for kind in dict.fromkeys(kinds))
            raise BatchError(
                f"batch: {path}: rows with different numbers or kinds of virtual tokens", found="; ".join(named),
                expected="as many in every row, so that all attend over one length", do="call the model for them apart",
            )  # fmt: skip

    def run_inside(self, module: nn.Module, adapters: Sequence[Adapter], *args: Any, **kwargs: Any) -> Any:
        return self.run_tables(module, (adapters,), None, named_arguments(self, args, kwargs))

    def run_rows(self, module: nn.Module, groups: Groups, rows: Rows, *args: Any, **kwargs: Any) -> Any:
        return self.run_tables(module, groups, rows.ids, named_arguments(self, args, kwargs))

    def run_tables(self, module: nn.Module, groups: Groups, ids: torch.Tensor | None, given: dict[str, Any]) -> Any:
        """The module's output for the arguments ``given``, which are changed: with the tables of the one group there
        is, or with ``ids`` (B,) of rows those of each row's group, which has as many."""
        raise NotImplementedError(f"{type(self).__name__}.run_tables")

    def signature(self) -> tuple[object, ...]:
        return (*super().signature(), self.count)


def named_arguments(adapter: TokenAdapter, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name; the cache by the name that the forward has for it."""
    given = {**dict(zip(adapter.parameter_names, args, strict=False)), **kwargs}
    rename_cache(given, adapter.cache_name)
    return given


def lengthen_mask(given: dict[str, Any], count: int, name: str = "attention_mask") -> None:
    """Let every row see ``count`` tokens more, by the mask called ``name``.

    Raises:
        UnsupportedError: a mask other than (batch, tokens), or boundaries of packed sequences.
    """
    for packed in ("cu_seq_lens_q", "cu_seq_lens_k", "block_mask"):
        if given.get(packed) is not None:
            raise UnsupportedError(
                f"virtual tokens and {packed}", found="packed sequences in one row",
                do="one sequence per row, padded; or no prompt and prefix adapters",
            )  # fmt: skip
    mask = given.get(name)
    if mask is None:
        return
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2:
        found = f"{mask.dim()} dimensions" if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise UnsupportedError(
            "virtual tokens need an attention mask that they can lengthen",
            expected="(batch, tokens), or none", found=found, do="generate without a static cache",
        )  # fmt: skip
    given[name] = torch.cat([mask.new_ones(mask.shape[0], count), mask], dim=1)
    everywhere = given.get(f"global_{name}")
    if everywhere is not None:  # which tokens attend to all others: of the caller's
        given[f"global_{name}"] = torch.cat([everywhere.new_zeros(mask.shape[0], count), everywhere], dim=1)


#: On a cache: ``TokenMethod.kind`` and count of the tokens that it begins with.
_BEGUN = "_adaptc_begun_with"


def begin_output(output: Mapping[str, Any], adapters: Sequence[Adapter]) -> None:
    """:func:`begin` for the cache of a model's output."""
    found = cache_in_output(output)
    if found is not None:
        begin(found[1], adapters)


def begin(cache: Any, adapters: Sequence[Adapter]) -> None:
    """Remember on a cache (None: nobody asked for one) that it begins with the tokens of ``adapters``."""
    own = own_attention(cache)
    if own is not None and hasattr(own, "layers"):
        setattr(own, _BEGUN, _mark(adapters))


def own_attention(cache: Any) -> Any:
    """The part of a cache that grows by the tokens of a call: a decoder's has the encoder's output in another."""
    return getattr(cache, "self_attention_cache", cache)


def _mark(adapters: Sequence[Adapter]) -> tuple[tuple[str, int], ...]:
    return tuple((a.method.kind, a.count) for a in adapters if isinstance(a, TokenAdapter))


def is_begun(given: Mapping[str, Any], adapters: Sequence[Adapter]) -> bool:
    """Whether the call goes on from a cache that holds the tokens already.

    Raises:
        UnsupportedError: a cache of a fixed size, or one that was filled without the tokens.
    """
    past = own_attention(given_cache(given))
    if past is None:
        return False
    if not hasattr(past, "layers") or getattr(past, "is_compileable", False):
        raise UnsupportedError(
            "virtual tokens in a cache of a fixed size",
            expected="a DynamicCache", found=type(past).__name__, do="leave out cache_implementation",
        )  # fmt: skip
    if past.get_seq_length() == 0:
        return False
    if getattr(past, _BEGUN, None) != _mark(adapters):
        raise UnsupportedError("this cache was filled without these virtual tokens", do="start from an empty cache")
    return True


def _is_stacks(value: Any) -> bool:
    return value is None or (type(value) is int and value in (1, 2))


#: Keys of every config of PEFT's prompt learning.
OPTIONS = {
    "num_virtual_tokens": Option(None, "used", "a positive integer", is_rank, field="num_virtual_tokens"),
    **{key: Option(None, "used", "a positive integer or null", optional(is_rank), field=key) for key in MODEL_KEYS},
    "num_transformer_submodules": Option(None, "used", "1, 2 or null", _is_stacks, field="num_transformer_submodules"),
}


def without_dimensions(method: Method) -> Method:
    """The method without what the model itself says."""
    return dataclasses.replace(method, **dict.fromkeys(MODEL_KEYS))
