"""What needs an accelerator: ``python -m pytest -m gpu``."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> Iterator[torch.device]:
    """The accelerator, with products in full fp32."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    owners = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [owner.allow_tf32 for owner in owners]
    for owner in owners:
        owner.allow_tf32 = False
    yield torch.device("cuda")
    for owner, value in zip(owners, before, strict=True):
        owner.allow_tf32 = value
