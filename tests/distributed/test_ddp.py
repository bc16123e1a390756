"""DistributedDataParallel in two processes gives the gradients of one: the formula on the whole batch."""

from __future__ import annotations

import pytest

from tests.distributed import ddp
from tests.distributed.processes import run


def test_gradients_and_sites():
    run(ddp.one_step)


@pytest.mark.slow
@pytest.mark.parametrize("check", [
    ddp.by_block, ddp.cut_at_buckets, ddp.two_forwards_before_a_backward, ddp.accumulate_without_sync, ddp.switch,
    ddp.refuse_what_is_not_averaged, ddp.accelerate_prepare,
], ids=lambda check: check.__name__)  # fmt: skip
def test_in_two_processes(check):
    run(check)


@pytest.mark.slow
def test_adapters_and_full_checkpoints_load_in_one_process(tmp_path):
    run(ddp.save_and_load, str(tmp_path))
