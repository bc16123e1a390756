"""Prompt tuning: trained embeddings in front of the input's (Lester et al. 2021, section 2).

    h = [P; E[ids]]        P (n, d), ids (batch, tokens) -> h (batch, n + tokens, d)

A causal language model computes h at its root: labels get n rows that do not count, so that the last prompt row
predicts the first token, as in PEFT; its logits and hidden states come back without the prompt's rows. A model with
an encoder and a decoder computes it in its encoder, whose output keeps the prompt's rows: the decoder attends to them.
Other models compute it in their backbone, whose last hidden state comes back without the prompt's rows, so that heads
read the caller's tokens; a pooler of the first row reads the prompt's first, as in PEFT. Attention weights keep all
rows.

Unlike PEFT: position ids that the caller gives are shifted, not dropped, so that padding on the left changes nothing;
token type ids are continued with zeros.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from adaptc.errors import UnsupportedError
from adaptc.ir.derive import derive
from adaptc.ir.ops.lora import draw_tensor
from adaptc.methods import tokens
from adaptc.methods.base import Adapter, Method, anchor_of
from adaptc.methods.codec import Codec, Option
from adaptc.methods.rows import Groups, of_rows
from adaptc.methods.scaled import storage_dtype
from adaptc.methods.tokens import TokenAdapter, TokenMethod

INITS = ("random", "vocabulary", "tokens")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt(TokenMethod):
    """Train embeddings in front of the input's.

    Args:
        num_virtual_tokens: rows of the prompt.
        init: "random" (normal), "vocabulary" (embeddings of tokens drawn at random) or "tokens" (those of
            ``init_ids``, repeated or cut to the number of rows). ``Prompt.from_text`` makes ids of a text.
        num_transformer_submodules: how many times ``num_virtual_tokens`` rows there are. Only the first are read: for
            models with an encoder and a decoder PEFT's files have 2, which is None there; 1 does with half the rows.
    """

    kind: ClassVar[str] = "prompt"
    peft_kind: ClassVar[str | None] = "PROMPT_TUNING"
    batchable: ClassVar[bool] = True

    init: str = "random"
    init_ids: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("init", self.init in INITS, " or ".join(INITS))
        ids: Any = self.init_ids
        if isinstance(ids, list):
            ids = tuple(ids)
            object.__setattr__(self, "init_ids", ids)
        known = isinstance(ids, tuple) and bool(ids) and all(type(i) is int and i >= 0 for i in ids)
        self.require("init_ids", known if self.init == "tokens" else ids is None, 'token ids, with init="tokens"')

    @classmethod
    def from_text(cls, text: str, tokenizer: Any, **options: Any) -> Prompt:
        """A prompt that starts as ``text``; by default it has as many rows as the text has tokens.

        The plan keeps the ids, so that nobody who loads the adapter needs ``tokenizer`` (one of transformers).
        """
        ids = tuple(tokenizer(text)["input_ids"])
        return cls(**{"num_virtual_tokens": len(ids), **options, "init": "tokens", "init_ids": ids})

    def refusal(self, path: str, module: nn.Module) -> str | None:
        reason = super().refusal(path, module)
        if reason is not None:
            return reason
        if getattr(module, "embed_scale", 1.0) not in (None, 1.0):
            return (
                f"{type(module).__name__} scales its tokens' embeddings after looking them up: PEFT's prompts leave the"
                " scale out, so that its model reads other tokens than it learned"
            )
        embeddings = module.get_input_embeddings()  # type: ignore[operator]
        if not isinstance(getattr(embeddings, "weight", None), torch.Tensor):
            return f"{type(module).__name__} embeds by a {type(embeddings).__name__}, not by a table of tokens"
        if self.init_ids is not None:
            size = embeddings.weight.shape[0]
            if max(self.init_ids) >= size:
                return f"init_ids has {max(self.init_ids)}, the model's vocabulary {size} tokens"
        return None

    def refusal_of_decoder(self, path: str, module: nn.Module) -> str | None:
        return None if tokens.is_encoder(path) else super().refusal_of_decoder(path, module)

    def place(self, model: nn.Module) -> str:
        encoder = tokens.encoder(model)
        if encoder is not None:
            return encoder
        return "" if tokens.has_language_head(model) else tokens.backbone(model)

    def build(self, path: str, module: nn.Module, *, dtype: torch.dtype | None, site_id: int) -> PromptAdapter:
        cls = EncoderPromptAdapter if tokens.is_encoder(path) else PromptAdapter
        return cls(self, module, dtype=dtype, site_id=site_id)


class PromptAdapter(TokenAdapter):
    """``prompt`` (n, d)."""

    method: Prompt
    #: Whether what the module computes of the prompt's rows is part of its output.
    keeps_rows: ClassVar[bool] = False

    def __init__(
        self, method: Prompt, module: nn.Module, *, dtype: torch.dtype | None = None, site_id: int = 0
    ) -> None:
        super().__init__(method, module, site_id)
        weight: torch.Tensor = module.get_input_embeddings().weight  # type: ignore[operator]
        self.shifts_labels = tokens.has_language_head(module)
        size = self.rows(method), method.shape(module)[0]
        self.prompt = nn.Parameter(torch.empty(size, dtype=storage_dtype(weight, dtype), device=weight.device))
        self.reset_parameters(weight)

    def rows(self, method: Prompt) -> int:
        """How many rows the table has."""
        return method.num_virtual_tokens

    def read(self) -> torch.Tensor:
        """The rows of the table that are in front of the input's (n, d)."""
        return self.prompt

    def reset_parameters(self, weight: torch.Tensor) -> None:
        """Draw the initial values (the method's ``init``) from the embeddings ``weight`` (vocabulary, d)."""
        method, count = self.method, self.prompt.shape[0]
        if method.init == "random":
            nn.init.normal_(self.prompt)
            return
        if method.init == "vocabulary":
            chosen = torch.randint(0, weight.shape[0], (count,))
        else:
            ids = method.init_ids or ()
            chosen = torch.tensor((ids * -(-count // len(ids)))[:count])
        with torch.no_grad():
            self.prompt.copy_(weight[chosen.to(weight.device)])

    def run_tables(self, module: nn.Module, groups: Groups, ids: torch.Tensor | None, given: dict[str, Any]) -> Any:
        """Puts the tables in front of every row."""
        adapters: Sequence[Adapter] = groups[0]
        count = sum(a.count for a in adapters if isinstance(a, TokenAdapter))
        tokens.lengthen_mask(given, count)
        positions = given.get("position_ids")
        if tokens.is_begun(given, adapters):
            if positions is not None:
                given["position_ids"] = positions + count
            return type(module).forward(module, **given)
        embeds = given.get("inputs_embeds")
        if embeds is None:
            embeds = module.get_input_embeddings()(given["input_ids"])  # type: ignore[operator]
        batch, length = embeds.shape[:2]
        for place, adapter in reversed(list(enumerate(adapters))):
            tables = [group[place].read() for group in groups]
            embeds = prompt_site(adapter.site_id, embeds, tables[0] if ids is None else of_rows(tables, ids))
        given["input_ids"], given["inputs_embeds"] = None, embeds
        if positions is not None:
            front = torch.arange(count, device=positions.device, dtype=positions.dtype)
            given["position_ids"] = torch.cat([front.expand(*positions.shape[:-1], count), positions + count], dim=-1)
        types = given.get("token_type_ids")
        if types is not None:
            given["token_type_ids"] = torch.cat([types.new_zeros(batch, count), types], dim=1)
        as_tuple = given.pop("return_dict", None) is False
        if self.shifts_labels:
            output = self._run_language_model(module, given, count, length)
        else:
            output = type(module).forward(module, **given)
        if not self.keeps_rows:
            self._drop_rows(output, count)
        tokens.begin_output(output, adapters)
        return output.to_tuple() if as_tuple else output

    @staticmethod
    def _drop_rows(output: Any, count: int) -> None:
        if output.get("last_hidden_state") is not None:
            output["last_hidden_state"] = output["last_hidden_state"][:, count:]
        if output.get("hidden_states") is not None:
            output["hidden_states"] = tuple(h[:, count:] for h in output["hidden_states"])

    @staticmethod
    def _run_language_model(module: nn.Module, given: dict[str, Any], count: int, length: int) -> Any:
        if given.get("shift_labels") is not None:
            raise UnsupportedError("a prompt and shift_labels", do="give labels: they are shifted here")
        labels, keep = given.get("labels"), given.get("logits_to_keep", 0)
        if labels is not None:
            given["labels"] = torch.cat([labels.new_full((labels.shape[0], count), -100), labels], dim=1)
        if isinstance(keep, torch.Tensor):
            given["logits_to_keep"] = keep + count
        output = type(module).forward(module, **given)
        if not isinstance(keep, torch.Tensor) and (keep == 0 or keep > length):
            output["logits"] = output["logits"][:, -length:]
        return output

    def peft_tensors(self) -> dict[str, torch.Tensor]:
        return {"prompt_embeddings": self.prompt}


class EncoderPromptAdapter(PromptAdapter):
    """``prompt`` (n or 2 n, d) of an encoder whose decoder attends to the first n rows as to the input's."""

    keeps_rows: ClassVar[bool] = True
    changes_tapped: ClassVar[bool] = True
    tap = tokens.DECODER

    def rows(self, method: Prompt) -> int:
        return method.num_virtual_tokens * (method.num_transformer_submodules or 2)

    def read(self) -> torch.Tensor:
        return self.prompt[: self.count]

    def method_now(self) -> Method:
        """Says how many rows there are: what PEFT takes None for depends on the task."""
        count = self.prompt.shape[0] // self.count
        return dataclasses.replace(self.method, num_transformer_submodules=count)

    def change_tapped(self, kwargs: dict[str, Any], live: Sequence[Adapter]) -> dict[str, Any]:
        """Let the decoder see what the encoder put in front: the caller's mask has the caller's tokens only."""
        states, mask = kwargs.get("encoder_hidden_states"), kwargs.get("encoder_attention_mask")
        if states is None or mask is None or mask.dim() != 2:
            return kwargs
        count = sum(a.count for a in live if isinstance(a, TokenAdapter))
        # Else they are states of the encoder without its prompts, or the caller's mask is wrong, which the model tells.
        if states.shape[1] - mask.shape[1] != count:
            return kwargs
        return {**kwargs, "encoder_attention_mask": torch.cat([mask.new_ones(mask.shape[0], count), mask], dim=1)}


def body(embeds: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
    """(batch, tokens, d) with prompt (n, d), or of every row (batch, n, d), in front: (batch, n + tokens, d), in the
    dtype of ``embeds``."""
    rows = prompt.to(embeds.dtype).expand(embeds.shape[0], *prompt.shape[-2:])
    return torch.cat([rows, embeds], dim=1)


def sample(draw: Any) -> tuple[Any, ...]:
    from hypothesis import strategies as st

    batch, tokens, n, d = (draw(st.integers(1, 4)) for _ in range(4))
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
    wide = dtype if dtype.itemsize >= 4 else draw(st.sampled_from([dtype, torch.float32]))
    own = draw(st.booleans())
    return draw_tensor(draw, (batch, tokens, d), dtype), draw_tensor(draw, (batch, n, d) if own else (n, d), wide)


PROMPT = derive("prompt_rows", "(Tensor embeds, Tensor prompt) -> Tensor", body, sample=sample)
ANCHORS = (anchor_of(PROMPT),)
prompt_site = ANCHORS[0].function

CODEC = Codec(
    peft_type="PROMPT_TUNING", kind="prompt", label="prompt tuning", on_model=True, stored=tokens.without_dimensions,
    options={
        **tokens.OPTIONS,
        # Texts and tokenizers are made token ids of before there is a plan: Prompt.from_text.
        "prompt_tuning_init": Option("RANDOM", "init"),
        "prompt_tuning_init_text": Option(None, "init"),
        "tokenizer_name_or_path": Option(None, "ignored", carried=True),
        "tokenizer_kwargs": Option(None, "init"),
    },
)  # fmt: skip
