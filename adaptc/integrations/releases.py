"""Which releases of the libraries that adaptc reads the inside of its tests have run with.

A release that is not in the table may rename what adaptc reads: the user is told once, before anything is compiled.
"""

from __future__ import annotations

import functools
import sys
import warnings

from packaging.version import InvalidVersion, Version

from adaptc.errors import AdaptcWarning

#: Library -> releases (major, minor) that tests ran with; docs/releases.md says which tests, in which pairs. Of torch
#: 2.11 the tests in tests/gpu.
RUN = {
    "torch": ((2, 11), (2, 13), (2, 14)),
    "transformers": ((5, 19), (5, 23), (5, 24)),
    "peft": ((0, 21),),
}


def untested() -> dict[str, str]:
    """Library -> its version, of the loaded libraries whose release is not in the table."""
    loaded = {name: str(getattr(sys.modules.get(name), "__version__", "")) for name in RUN}
    return {name: version for name, version in loaded.items() if version and _release(version) not in RUN[name]}


@functools.cache
def warn_of_untested() -> None:
    """Name untested releases in one warning; once in a process."""
    found = untested()
    if found:
        names = ", ".join(f"{name} {version}" for name, version in found.items())
        run = "; ".join(f"{name} {', '.join(f'{a}.{b}' for a, b in RUN[name])}" for name in found)
        message = f"adaptc's tests have not run with {names}: compare a step with the model's own (they ran with {run})"
        warnings.warn(AdaptcWarning(message), stacklevel=3)


def _release(version: str) -> tuple[int, ...] | None:
    try:
        return Version(version).release[:2]
    except InvalidVersion:
        return None


__all__ = ["RUN", "untested", "warn_of_untested"]
