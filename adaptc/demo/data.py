"""The demo's labelled text: chatterbot-corpus, English, one class per topic, split by conversation.

The corpus is user-contributed small talk in one YAML file per topic.  Files repeat themselves (the tech
support file has 1050 conversations and 20 different utterances), so duplicates are removed before
anything is counted or split: a text is kept once, in the first conversation that says it, and a text that
two topics share has no label and is left out.  What remains of a conversation stays in one split.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import random
import re
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path

from adaptc.errors import AdaptcError

#: Share of a topic's texts that each split aims at; whole conversations cannot be cut to fit exactly.
SHARES = {"train": 0.60, "dev": 0.15, "test": 0.25}
MIN_CONVERSATIONS = 25

Conversation = list[str]


class DemoDataError(AdaptcError, RuntimeError):
    """A package that the demo reads its text or weights from is absent or not as expected."""


@dataclasses.dataclass(frozen=True)
class Example:
    """One utterance with its topic's index; ``conversation`` is unique within the topic."""

    text: str
    label: int
    conversation: int


@dataclasses.dataclass(frozen=True)
class Corpus:
    """The three splits and the topic names that the labels index."""

    topics: tuple[str, ...]
    train: tuple[Example, ...]
    dev: tuple[Example, ...]
    test: tuple[Example, ...]

    def splits(self) -> dict[str, tuple[Example, ...]]:
        return {"train": self.train, "dev": self.dev, "test": self.test}


def package_folder(package: str, distribution: str) -> Path:
    """Where an installed package keeps its files, found without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise DemoDataError(
            f"the demo needs the package {distribution}",
            found=f"no importable module {package}",
            do="pip install 'adaptc[demo]'",
        )
    return Path(spec.origin).parent


def normalise(text: str) -> str:
    """The form in which two texts count as the same: case, punctuation and spacing do not matter."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(re.findall(r"\w+", folded))


def read_topics(folder: Path) -> dict[str, list[Conversation]]:
    """Topic name -> its conversations, from the YAML files in ``folder``, in a fixed order."""
    import yaml

    topics: dict[str, list[Conversation]] = {}
    for file in sorted(folder.glob("*.yml")):
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        topics[file.stem] = [[str(text) for text in turns] for turns in content["conversations"]]
    if not topics:
        raise DemoDataError("the text corpus is empty", expected="*.yml files", found=f"none in {folder}")
    return topics


def without_duplicates(topics: dict[str, list[Conversation]]) -> dict[str, list[Conversation]]:
    """Each text once; texts of two topics, and conversations of which nothing is left, are dropped."""
    topics_of: dict[str, set[str]] = {}
    for topic, conversations in topics.items():
        for turns in conversations:
            for text in turns:
                topics_of.setdefault(normalise(text), set()).add(topic)
    unusable = {form for form, named in topics_of.items() if len(named) > 1 or not form}
    seen: set[str] = set(unusable)
    result: dict[str, list[Conversation]] = {}
    for topic, conversations in topics.items():
        fresh = (list(_first_time(turns, seen)) for turns in conversations)
        result[topic] = [turns for turns in fresh if turns]
    return result


def _first_time(turns: Sequence[str], seen: set[str]) -> Iterator[str]:
    for text in turns:
        form = normalise(text)
        if form not in seen:
            seen.add(form)
            yield text.strip()


def split_conversations(conversations: Sequence[Conversation], seed: str) -> dict[str, list[int]]:
    """Split name -> indices of conversations, so that every split gets about its share of the texts.

    Long conversations are placed first, each into the split that lacks most: the corpus has one of 88
    turns, which a plain cut of the shuffled list would throw into any split.
    """
    order = list(range(len(conversations)))
    random.Random(seed).shuffle(order)
    order.sort(key=lambda index: -len(conversations[index]))
    total = sum(len(turns) for turns in conversations)
    lacking = {name: share * total for name, share in SHARES.items()}
    chosen: dict[str, list[int]] = {name: [] for name in SHARES}
    for index in order:
        name = max(lacking, key=lambda split: lacking[split])
        chosen[name].append(index)
        lacking[name] -= len(conversations[index])
    return chosen


def build_corpus(topics: dict[str, list[Conversation]], *, seed: int = 0) -> Corpus:
    """The splits over all topics that have at least ``MIN_CONVERSATIONS`` distinct conversations."""
    distinct = without_duplicates(topics)
    names = tuple(name for name, found in distinct.items() if len(found) >= MIN_CONVERSATIONS)
    if len(names) < 2:
        raise DemoDataError(
            "the text corpus has too few topics to classify",
            expected=f"two or more with at least {MIN_CONVERSATIONS} conversations",
            found=", ".join(f"{name} {len(convs)}" for name, convs in distinct.items()) or "no topic",
        )
    parts: dict[str, list[Example]] = {name: [] for name in SHARES}
    for label, topic in enumerate(names):
        for split, indices in split_conversations(distinct[topic], f"{seed}:{topic}").items():
            parts[split].extend(Example(text, label, i) for i in indices for text in distinct[topic][i])
    return Corpus(names, *(tuple(parts[split]) for split in SHARES))


def load_corpus(*, seed: int = 0) -> Corpus:
    """The corpus of the installed chatterbot-corpus package; ``seed`` decides the split only."""
    folder = package_folder("chatterbot_corpus", "chatterbot-corpus") / "data" / "english"
    return build_corpus(read_topics(folder), seed=seed)
