"""What is timed is timed once for a host, and chosen again from disk."""

from __future__ import annotations

import concurrent.futures
import json
import logging
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adaptc.codegen import choices
from adaptc.codegen.choices import MARGIN, Choice, Table, bucket, choose
from adaptc.passes.manager import Pipeline


@pytest.fixture(autouse=True)
def private(tmp_path, monkeypatch):
    monkeypatch.setattr(choices.torch_internals, "cache_dir", lambda: str(tmp_path))
    monkeypatch.setattr(choices._MEMORY, "known", {})


def another_process():
    """What this one has learned is forgotten; the files stay."""
    choices._MEMORY.known.clear()


def files(tmp_path):
    return sorted((tmp_path / "adaptc").glob("*.json"))


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
    another_process()
    assert choose("a product", ways) == first and ways.asked == 1
    (file,) = files(tmp_path)
    stored = json.loads(file.read_text())
    assert stored["host"] == choices.host() and stored["choices"] == {"a product": dict(first.seconds)}
    choose("another", ways)
    assert ways.asked == 2 and list(json.loads(file.read_text())["choices"]) == ["a product", "another"]


def test_what_was_timed_is_no_part_of_a_cache_key():
    before = Pipeline.from_options().uuid()
    assert choose("a product", Ways()) is not None
    assert Pipeline.from_options().uuid() == before


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


def test_of_those_that_ask_at_once_one_times(tmp_path):
    """Threads with tables of their own, as processes have: the lock is the file's."""
    timed, path = [], tmp_path / "table.json"

    def ask(number):
        def answer():
            timed.append(number)
            time.sleep(0.05)
            return {"x": float(number), "y": 1.0}

        return [Table(path).ask(question, answer) for question in ("a", f"own {number}")]

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = list(pool.map(ask, range(4)))
    assert len(timed) == 5 and {one["x"] for one, _ in found} == {found[0][0]["x"]}
    assert set(Table(path).read()) == {"a", *(f"own {number}" for number in range(4))}
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("error", [RuntimeError("no memory"), MemoryError()])
def test_a_way_that_fails_leaves_the_usual_one(error, tmp_path, caplog):
    asked = []

    def make():
        asked.append(0)
        raise error

    with caplog.at_level(logging.WARNING, logger="adaptc"):
        assert choose("a product", make) is None and choose("a product", make) is None
    assert len(asked) == 1 and "a product is computed as usual" in caplog.text and not files(tmp_path)


def test_timing_is_not_under_the_callers_autocast():
    seen = []
    with torch.autocast("cpu", torch.bfloat16):
        choose("a", lambda: {name: lambda: seen.append(torch.is_autocast_enabled("cpu")) for name in ("x", "y")})
    assert seen and not any(seen)


@pytest.mark.parametrize("content", ["", "[]", '{"choices": 3}', '{"choices": {"a": {"x": "fast", "y": 1}}}', "\xff"])
def test_a_file_that_is_not_a_table_is_timed_anew(content, tmp_path, caplog):
    ways = Ways()
    choose("a", ways)
    (file,) = files(tmp_path)
    file.write_bytes(content.encode("latin-1"))
    another_process()
    with caplog.at_level(logging.WARNING, logger="adaptc"):
        choose("a", ways)
    assert ways.asked == 2 and "cannot be read, and are timed again" in caplog.text
    assert list(json.loads(file.read_text())["choices"]) == ["a"]


def test_a_directory_that_cannot_be_written_is_reported(tmp_path, caplog):
    (tmp_path / "adaptc").write_text("a file")
    ways = Ways()
    with caplog.at_level(logging.WARNING, logger="adaptc"):
        assert choose("a", ways) == choose("a", ways) is not None
    assert ways.asked == 1 and "choices are not kept in" in caplog.text


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
