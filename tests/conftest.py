"""One torch thread and a private compile cache per worker; Dynamo forgets between tests."""

from __future__ import annotations

import gc
import os
import tempfile

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
_cache = tempfile.TemporaryDirectory(prefix="adaptc-inductor-")
os.environ["TORCHINDUCTOR_CACHE_DIR"] = _cache.name

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

torch.set_num_threads(1)
settings.register_profile(
    "adaptc", deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)
settings.load_profile("adaptc")


def pytest_collection_finish():
    """What is imported by now stays: looking through it again and again took a tenth of the tests' time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch.manual_seed(0)
    torch.compiler.reset()
    yield
    torch.compiler.reset()
