"""The demo's classifier and batches."""

from __future__ import annotations

import random

import pytest
import torch

from adaptc.demo.data import DemoDataError, Example
from adaptc.demo.model import LENGTH, SentenceClassifier, TokenizedTexts, batches, load_encoder, tokenize
from tests.demo import tiny


def _texts(lengths: list[int]) -> TokenizedTexts:
    rows = tuple(tuple(range(100 * i + 1, 100 * i + 1 + n)) for i, n in enumerate(lengths))
    return TokenizedTexts(rows, torch.zeros(len(rows), dtype=torch.long))


@pytest.mark.parametrize("shuffled", [False, True])
def test_every_text_is_in_the_batches_once_besides_marked_repeats(shuffled: bool) -> None:
    texts = _texts([3, 16, 17, LENGTH, 5, 9, 20, 1, 2, 4, 6])
    order = random.Random(0) if shuffled else None
    seen = [i for b in batches(texts, 4, order) for i in b.indices[: b.count].tolist()]
    assert sorted(seen) == list(range(len(texts)))


@pytest.mark.parametrize("count", [1, 3, 4, 11])
def test_every_batch_has_the_same_shape(count: int) -> None:
    found = list(batches(_texts([3 + i for i in range(count)]), 4, random.Random(1)))
    assert {tuple(b.input_ids.shape) for b in found} == {(4, LENGTH)}
    assert [b.count for b in found[:-1]] == [4] * (len(found) - 1)
    assert all(len(b.indices) == 4 for b in found)


def test_rows_hold_their_texts_and_the_mask_ends_where_they_end() -> None:
    texts = _texts([3, 16, 17, LENGTH, 5])
    for batch in batches(texts, 2):
        for index, ids, mask in zip(batch.indices, batch.input_ids, batch.attention_mask, strict=True):
            row = texts.rows[int(index)]
            assert ids[mask.bool()].tolist() == list(row)
            assert mask.tolist() == [1] * len(row) + [0] * (len(mask) - len(row))


def test_a_shuffled_order_repeats_with_its_seed_and_differs_between_epochs() -> None:
    texts = _texts([4] * 40)

    def epoch(order: random.Random) -> list[int]:
        return [i for b in batches(texts, 8, order) for i in b.indices.tolist()]

    order = random.Random(5)
    first, second = epoch(order), epoch(order)
    assert first != second
    assert epoch(random.Random(5)) == first


def test_long_texts_are_cut() -> None:
    texts = tokenize(tiny.tokenizer(), [Example("word " * 200, 3, 0), Example("short", 1, 1)])
    assert [len(row) for row in texts.rows] == [LENGTH, 3]
    assert texts.labels.tolist() == [3, 1]


def test_an_embedding_is_the_mean_of_real_tokens_and_does_not_see_padding() -> None:
    encoder, tokenizer = tiny.encoder()
    model = SentenceClassifier(encoder, 2).eval()
    ids = tokenizer(["a text of several words"], return_tensors="pt")["input_ids"]
    padded = torch.nn.functional.pad(ids, (0, 9))
    mask = (torch.arange(padded.shape[1]) < ids.shape[1]).long()[None]
    with torch.no_grad():
        hidden = encoder(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0]
        expected = hidden.sum(0) / len(hidden)
        expected = expected / (expected**2).sum() ** 0.5
        found = model.embed(padded, mask)[0]
        logits = model(padded, mask)[0]
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(logits, model.head.weight @ expected + model.head.bias)


def test_the_pretrained_encoder_knows_paraphrases() -> None:
    encoder, tokenizer = load_encoder()
    assert not any("pooler" in name for name, _ in encoder.named_parameters())
    encoder.train()
    texts = ["How do I bake bread?", "What is the way to make a loaf?", "The stock market fell today."]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        vectors = SentenceClassifier(encoder, 2).embed(batch["input_ids"], batch["attention_mask"])
        again = SentenceClassifier(encoder, 2).embed(batch["input_ids"], batch["attention_mask"])
    assert torch.equal(vectors, again)  # the frozen encoder has no dropout of its own, in training mode either
    near, far = float(vectors[0] @ vectors[1]), float(vectors[0] @ vectors[2])
    assert near > 0.5 > 0.3 > far


def test_absent_weights_are_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setattr("adaptc.demo.model.package_folder", lambda *_: tmp_path)
    with pytest.raises(DemoDataError, match=r"the encoder's weights are not there(.|\n)*model.safetensors"):
        load_encoder()
