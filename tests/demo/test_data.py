"""The demo's corpus: labels that are true, splits that do not leak."""

from __future__ import annotations

import collections
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptc.demo import data
from adaptc.demo.data import Corpus, DemoDataError, build_corpus, normalise, without_duplicates


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return data.load_corpus()


def _topic(name: str, conversations: int) -> list[list[str]]:
    return [[f"{name} question {i}", f"{name} answer {i}"] for i in range(conversations)]


def test_no_text_is_in_two_splits_or_has_two_labels(corpus: Corpus) -> None:
    forms = [normalise(e.text) for split in corpus.splits().values() for e in split]
    assert len(forms) > 1000
    assert len(set(forms)) == len(forms)
    assert "" not in forms


def test_a_text_that_two_topics_share_is_in_no_split(corpus: Corpus) -> None:
    folder = data.package_folder("chatterbot_corpus", "chatterbot-corpus") / "data" / "english"
    topics_of = collections.defaultdict(set)
    for topic, conversations in data.read_topics(folder).items():
        for turns in conversations:
            for text in turns:
                topics_of[normalise(text)].add(topic)
    shared = {form for form, topics in topics_of.items() if len(topics) > 1}
    assert shared  # else this test says nothing
    assert shared.isdisjoint(normalise(e.text) for split in corpus.splits().values() for e in split)


def test_labels_are_the_files_the_texts_stand_in(corpus: Corpus) -> None:
    folder = data.package_folder("chatterbot_corpus", "chatterbot-corpus") / "data" / "english"
    topics = data.read_topics(folder)
    said = {name: {normalise(t) for turns in topics[name] for t in turns} for name in corpus.topics}
    for split in corpus.splits().values():
        assert all(normalise(e.text) in said[corpus.topics[e.label]] for e in split)


def test_no_conversation_is_in_two_splits(corpus: Corpus) -> None:
    places = collections.defaultdict(set)
    for name, split in corpus.splits().items():
        for e in split:
            places[e.label, e.conversation].add(name)
    assert all(len(names) == 1 for names in places.values())


def test_every_topic_has_its_conversations_and_its_share_of_each_split(corpus: Corpus) -> None:
    assert len(corpus.topics) >= 5
    for label in range(len(corpus.topics)):
        counts = {n: sum(e.label == label for e in split) for n, split in corpus.splits().items()}
        total = sum(counts.values())
        conversations = {e.conversation for s in corpus.splits().values() for e in s if e.label == label}
        assert len(conversations) >= data.MIN_CONVERSATIONS
        for name, share in data.SHARES.items():
            assert counts[name] == pytest.approx(share * total, abs=2.0)


def test_the_split_depends_on_its_seed_only(corpus: Corpus) -> None:
    assert data.load_corpus(seed=0) == corpus
    assert {e.text for e in data.load_corpus(seed=1).test} != {e.text for e in corpus.test}


@pytest.mark.parametrize("other", ["What is AI?", "what is ai", "  WHAT  is, AI!", "\uff57\uff48\uff41\uff54 is ai"])
def test_case_punctuation_spacing_and_width_do_not_matter(other: str) -> None:
    assert normalise(other) == normalise("what is AI")


def test_the_first_conversation_keeps_a_repeated_text() -> None:
    kept = without_duplicates({"a": [["Hello", "one"], ["hello!", "two"], ["HELLO"]]})
    assert kept == {"a": [["Hello", "one"], ["two"]]}


def test_a_text_of_two_topics_is_dropped_from_both() -> None:
    kept = without_duplicates({"a": [["yes", "one"]], "b": [["Yes."], ["two"]]})
    assert kept == {"a": [["one"]], "b": [["two"]]}


def test_topics_are_counted_after_duplicates_are_removed() -> None:
    repeated = [["same question", "same answer"] for _ in range(100)]
    topics = {"a": _topic("a", 25), "b": _topic("b", 25), "c": repeated, "d": _topic("d", 24)}
    assert build_corpus(topics).topics == ("a", "b")


def test_too_few_topics_are_an_error_that_counts_them() -> None:
    with pytest.raises(DemoDataError, match=r"too few topics(.|\n)*at least 25(.|\n)*a 30, b 3"):
        build_corpus({"a": _topic("a", 30), "b": _topic("b", 3)})


def test_an_empty_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DemoDataError, match=r"the text corpus is empty"):
        data.read_topics(tmp_path)


def test_an_absent_package_is_an_error_that_says_what_to_install() -> None:
    with pytest.raises(DemoDataError, match=r"the demo needs the package no-such(.|\n)*pip install"):
        data.package_folder("no_such_package", "no-such")


@given(st.lists(st.integers(1, 12), min_size=20, max_size=60), st.text(max_size=4))
def test_a_split_places_every_conversation_once_and_keeps_the_shares(lengths: list[int], seed: str) -> None:
    conversations = [[f"text {i}"] * length for i, length in enumerate(lengths)]
    chosen = data.split_conversations(conversations, seed)
    assert sorted(i for indices in chosen.values() for i in indices) == list(range(len(lengths)))
    for name, indices in chosen.items():
        texts = sum(lengths[i] for i in indices)
        assert abs(texts - data.SHARES[name] * sum(lengths)) <= max(lengths)
