"""FSDP2 (``fully_shard`` for each layer) in two processes gives the gradients of one."""

from __future__ import annotations

import pytest

from tests.distributed import fsdp
from tests.distributed.processes import run

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("check", [
    fsdp.one_step, fsdp.by_block, fsdp.train, fsdp.switch, fsdp.refuse_what_is_sharded,
], ids=lambda check: check.__name__)  # fmt: skip
def test_in_two_processes(check):
    run(check)


@pytest.mark.parametrize("check", [fsdp.save_and_load, fsdp.fail_to_write], ids=lambda check: check.__name__)
def test_files(check, tmp_path):
    run(check, str(tmp_path))
