"""Why a bench run ends without a report."""

from __future__ import annotations


class BenchError(Exception):
    """A run that must not be reported, or flags that make no run."""


class DisagreementError(BenchError):
    """Two contenders do not compute the same thing, so their times must not be compared."""
