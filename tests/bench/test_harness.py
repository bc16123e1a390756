"""The statistics, the visiting order and the paired timing of the bench harness."""

from __future__ import annotations

import gc
import itertools
import math
import random
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench import harness

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("n", "rank", "coverage"), [(5, 1, 0.9375), (6, 1, 0.96875), (9, 2, 0.9609375), (20, 6, 0.9586105)]
)
def test_interval_ranks_are_those_of_the_sign_test_tables(n: int, rank: int, coverage: float) -> None:
    found = harness.median_interval(random.Random(n).sample(range(1, n + 1), n))
    assert (found.low, found.high) == (rank, n + 1 - rank)
    assert found.coverage == pytest.approx(coverage, abs=1e-7)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 12])
def test_coverage_is_the_share_of_sign_patterns_that_the_interval_covers(n: int) -> None:
    rank = harness.median_interval(range(1, n + 1)).low
    # Every value lies below or above the median with equal probability: count the values below.
    below = [sum(signs) for signs in itertools.product((0, 1), repeat=n)]
    covered = sum(rank <= b <= n - rank for b in below) / 2**n
    assert harness.median_interval(range(1, n + 1)).coverage == pytest.approx(covered)


def test_interval_covers_the_median_of_a_skewed_distribution() -> None:
    rng = random.Random(5)
    true_median = math.log(2)
    hits = 0
    for _ in range(2000):
        found = harness.median_interval([rng.expovariate(1) for _ in range(20)])
        hits += found.low <= true_median <= found.high
    # 0.9586 is exact; 2000 trials scatter by 0.0045.
    assert 0.94 < hits / 2000 < 0.975


def test_no_values_have_no_median() -> None:
    with pytest.raises(ValueError, match="the median of no values is not defined"):
        harness.median_interval([])


def test_noise_that_a_round_shares_cancels_in_the_ratio() -> None:
    load = [1.0, 7.0, 2.0, 30.0, 0.5, 4.0, 9.0]
    found = harness.ratio_interval([1.25 * t for t in load], load)
    assert (found.median, found.low, found.high) == pytest.approx((1.25, 1.25, 1.25))


def test_ratios_need_equal_numbers_of_rounds() -> None:
    with pytest.raises(ValueError, match="longer than argument 1"):
        harness.ratio_interval([1.0], [1.0, 2.0])


@given(count=st.integers(1, 9), seed=st.integers(0, 10**6))
def test_every_place_and_every_predecessor_is_equally_frequent(count: int, seed: int) -> None:
    rounds = count * (2 if count % 2 else 1)
    orders = harness.visiting_orders(count, rounds, seed)
    assert all(sorted(order) == list(range(count)) for order in orders)
    places = Counter((place, who) for order in orders for place, who in enumerate(order))
    assert len(places) == count**2
    assert len(set(places.values())) == 1
    followers = Counter(pair for order in orders for pair in itertools.pairwise(order))
    assert len(followers) == count * (count - 1)
    assert len(set(followers.values())) <= 1


def test_orders_depend_on_the_seed_only_and_fill_every_round() -> None:
    assert harness.visiting_orders(4, 11, 3) == harness.visiting_orders(4, 11, 3)
    assert len(harness.visiting_orders(4, 11, 3)) == 11
    assert harness.visiting_orders(4, 11, 3) != harness.visiting_orders(4, 11, 4)


class Clock:
    """A clock that only the steps move, so that the expected times are exact."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def step(self, name: str, seconds: list[float]) -> Callable[[], None]:
        left = iter(seconds)

        def run() -> None:
            assert not gc.isenabled()
            self.calls.append(name)
            self.now += next(left)

        return run


def test_times_stand_under_their_contender_and_round(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr("bench.harness.time.perf_counter", lambda: clock.now)
    expected = {"a": [1.0, 2.0, 3.0, 4.0], "b": [10.0, 20.0, 30.0, 40.0]}
    steps = {name: clock.step(name, seconds) for name, seconds in expected.items()}
    after: list[str] = []
    found = harness.time_interleaved(steps, rounds=4, device=CPU, seed=1, after=after.append)
    assert found == expected
    orders = harness.visiting_orders(2, 4, 1)
    assert clock.calls == [["a", "b"][i] for order in orders for i in order]
    assert after == clock.calls
    assert gc.isenabled()


def test_what_happens_after_a_step_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr("bench.harness.time.perf_counter", lambda: clock.now)

    def slow_bookkeeping(name: str) -> None:
        clock.now += 100.0

    steps = {"a": clock.step("a", [1.0, 1.0])}
    found = harness.time_interleaved(steps, rounds=2, device=CPU, seed=0, after=slow_bookkeeping)
    assert found == {"a": [1.0, 1.0]}


def test_the_collector_is_on_again_after_a_step_that_fails() -> None:
    def broken() -> None:
        raise RuntimeError("step failed")

    with pytest.raises(RuntimeError, match="step failed"):
        harness.time_interleaved({"a": broken}, rounds=1, device=CPU, seed=0)
    assert gc.isenabled()
