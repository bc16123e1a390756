"""Which of Dynamo's guards a call does without: it pays for each of them every time.

It does without those on what only adaptc changes, beginning another epoch then, and those on the hooks of adapted
modules while these have no others than adaptc's: ``Watch`` looks at them, which takes less time. Frames behind a graph
break keep every guard, and so do captures that are not adaptc's.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_SITE = "._modules['adapters']"
#: Where a module keeps its parts: always in a dict.
_PARTS = re.compile(r"\._(modules|parameters|buffers)$")
_HOOKS = re.compile(r"\._(forward|backward)(_pre)?_hooks")


def unneeded(guards: Sequence[tuple[str, str]], *, hooked: bool) -> list[bool]:
    """Of each guard, by its kind and by the source of what it guards on: whether the call does without it.

    ``hooked``: an adapted module has a hook of the user.
    """
    read = f"{_SITE}.epoch"  # by the hook of every adapted module
    sites = {source.removesuffix(read) for _, source in guards if source.endswith(read)}

    def is_unneeded(kind: str, source: str) -> bool:
        if kind == "TYPE_MATCH" and _PARTS.search(source):
            return True
        if hooks := _HOOKS.search(source):
            return not hooked and source[: hooks.start()] in sites
        before, found, rest = source.rpartition(_SITE)
        if not found or before not in sites:
            return False
        return rest in ("", ".epoch") or kind == "NOT_PRESENT_IN_GENERIC_DICT"

    return [is_unneeded(kind, source) for kind, source in guards]


__all__ = ["unneeded"]
