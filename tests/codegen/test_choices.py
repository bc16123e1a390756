"""What is timed is timed once for a host, and chosen again from disk."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adaptc.codegen import choices
from adaptc.codegen.choices import MARGIN, Choice, Table, bucket, choose


@pytest.fixture(autouse=True)
def private(tmp_path, monkeypatch):
    monkeypatch.setattr(choices.torch_internals, "cache_dir", lambda: str(tmp_path))


def files(tmp_path):
    return sorted((tmp_path / "adaptc").glob("*"))


class Ways:
    """Counts how often it is asked, and how often each way runs."""

    def __init__(self):
        self.asked = 0
        self.runs = {"usual": 0, "other": 0}

    def __call__(self):
        self.asked += 1
        return {name: lambda name=name: self.run(name) for name in self.runs}

    def run(self, name):
        self.runs[name] += 1


def test_a_question_is_timed_once(tmp_path):
    ways = Ways()
    first = choose("a product", ways)
    assert ways.asked == 1 and ways.runs["usual"] == ways.runs["other"] > 3
    assert choose("a product", ways) == first and ways.asked == 1
    (file,) = files(tmp_path)
    stored = json.loads(file.read_text())
    assert stored["host"] == choices.host() and stored["choices"] == {"a product": dict(first.seconds)}
    choose("another", ways)
    assert ways.asked == 2 and list(json.loads(file.read_text())["choices"]) == ["a product", "another"]


def test_the_ways_take_turns():
    order = []
    choices._time({name: lambda name=name: order.append(name) for name in ("a", "b")})
    assert order == ["a", "b"] * (len(order) // 2)


def test_another_number_of_threads_is_another_table(tmp_path):
    threads, ways = torch.get_num_threads(), Ways()
    choose("a product", ways)
    try:
        torch.set_num_threads(threads + 1)
        choose("a product", ways)
    finally:
        torch.set_num_threads(threads)
    assert ways.asked == 2 and len(files(tmp_path)) == 2


def test_writers_keep_what_others_wrote(tmp_path):
    one, other = Table(tmp_path / "table.json"), Table(tmp_path / "table.json")
    one.add("a", {"x": 1.0, "y": 2.0})
    other.add("b", {"x": 3.0, "y": 2.0})
    assert one.read() == other.read() == {"a": {"x": 1.0, "y": 2.0}, "b": {"x": 3.0, "y": 2.0}}
    assert [f.name for f in tmp_path.iterdir()] == ["table.json"]


@pytest.mark.parametrize("content", ["", "[]", '{"choices": 3}', '{"choices": {"a": {"x": "fast", "y": 1}}}', "\xff"])
def test_a_file_that_is_not_a_table_is_timed_anew(content, tmp_path, caplog):
    ways = Ways()
    choose("a", ways)
    (file,) = files(tmp_path)
    file.write_bytes(content.encode("latin-1"))
    with caplog.at_level(logging.WARNING, logger="adaptc"):
        choose("a", ways)
    assert ways.asked == 2 and "cannot be read, and are timed again" in caplog.text
    assert list(json.loads(file.read_text())["choices"]) == ["a"]


def test_a_directory_that_cannot_be_written_is_reported(tmp_path, caplog):
    (tmp_path / "adaptc").write_text("a file")
    with caplog.at_level(logging.WARNING, logger="adaptc"):
        assert choose("a", Ways()) is not None
    assert "the choice for a is not kept" in caplog.text


def test_nothing_is_timed_under_deterministic_algorithms(tmp_path):
    ways = Ways()
    torch.use_deterministic_algorithms(True)
    try:
        assert choose("a", ways) is None
    finally:
        torch.use_deterministic_algorithms(False)
    assert ways.asked == 0 and not files(tmp_path)


@given(usual=st.floats(1e-6, 1), factor=st.floats(0.1, 10), third=st.floats(0.1, 10))
def test_the_usual_way_is_left_for_a_margin_only(usual, factor, third):
    seconds = {"usual": usual, "b": usual * factor, "c": usual * third}
    choice, best = Choice("q", seconds), min(factor, third)
    if abs(best - (1 - MARGIN)) > 1e-9:
        assert (choice.chosen == "usual") == (best > 1 - MARGIN)
    other, ratio = choice.runner_up
    assert other != choice.chosen and ratio == pytest.approx(seconds[other] / seconds[choice.chosen])
    assert all(seconds[way] >= seconds[other] for way in seconds if way not in (other, choice.chosen))
    assert f"{other} takes {ratio:.2f} times as long" in str(choice)


@given(st.integers(1, 10**9))
def test_a_bucket_is_the_next_power_of_two(size):
    found = bucket(size)
    assert found.bit_count() == 1 and found / 2 < size <= found
