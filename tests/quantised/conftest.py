"""What every test of quantised bases starts from."""

from __future__ import annotations

import bitsandbytes as bnb
import pytest


@pytest.fixture(autouse=True)
def codes_stay_as_they_are(monkeypatch):
    """On a CPU with AVX512_BF16 bitsandbytes packs a 4-bit weight anew in eval mode and rounds its scales to bf16, for
    good, and fails at widths that are no multiple of a block: the tests are of the form that it has elsewhere."""
    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: False)
