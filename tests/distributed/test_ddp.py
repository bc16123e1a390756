"""DistributedDataParallel in two processes gives the gradients of one: the formula on the whole batch."""

from __future__ import annotations

import pytest

from tests.distributed import ddp
from tests.distributed.processes import run


def everything_in_one_start(rank: int) -> None:
    ddp.one_step(rank)
    ddp.switch(rank)


def test_gradients_sites_and_switching():
    run(everything_in_one_start)


@pytest.mark.slow
@pytest.mark.parametrize("check", [
    ddp.cut_at_buckets, ddp.two_forwards_before_a_backward, ddp.accumulate_without_sync,
    ddp.refuse_what_is_not_averaged, ddp.accelerate_prepare,
], ids=lambda check: check.__name__)  # fmt: skip
def test_in_two_processes(check):
    run(check)


@pytest.mark.slow
def test_adapters_and_full_checkpoints_load_in_one_process(tmp_path):
    run(ddp.save_and_load, str(tmp_path))
