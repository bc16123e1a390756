"""Repeated layers on one line: ``model.layers.{0..31}.self_attn.q_proj`` stands for exactly 32 paths."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

#: A component of a folded path: a name, or the numbers that it stands for.
_Part = str | tuple[int, ...]


def fold(paths: Iterable[str]) -> list[str]:
    """``paths`` as few patterns, in order of first appearance.

    Paths are joined only where they differ in one number and agree in everything else, so a pattern stands for
    these paths and no others; :func:`unfold` gives them back.
    """
    folded: list[tuple[_Part, ...]] = [_parts(path) for path in dict.fromkeys(paths)]
    for position in range(max(map(len, folded), default=0)):
        groups: dict[tuple[_Part | None, ...], list[tuple[_Part, ...]]] = {}
        for parts in folded:
            numbered = position < len(parts) and isinstance(parts[position], tuple)
            rest = (*parts[:position], None, *parts[position + 1 :]) if numbered else parts
            groups.setdefault(rest, []).append(parts)
        folded = [_joined(members, position) for members in groups.values()]
    return [".".join(_part_text(part) for part in parts) for parts in folded]


def unfold(pattern: str) -> list[str]:
    """The paths that a pattern of :func:`fold` stands for."""
    return [".".join(parts) for parts in _unfolded(_split(pattern))]


def ranges(numbers: Iterable[int]) -> str:
    """``0..3,8`` for 0, 1, 2, 3, 8."""
    texts: list[str] = []
    ordered = sorted(set(numbers))
    start = 0
    for i in range(1, len(ordered) + 1):
        if i == len(ordered) or ordered[i] != ordered[i - 1] + 1:
            run = ordered[start:i]
            texts.append(f"{run[0]}..{run[-1]}" if len(run) > 2 else ",".join(map(str, run)))
            start = i
    return ",".join(texts)


def _parts(path: str) -> tuple[_Part, ...]:
    # Only plain numbers fold: "007" is a name.
    return tuple((int(c),) if re.fullmatch(r"0|[1-9][0-9]*", c) else c for c in path.split("."))


def _joined(members: Sequence[tuple[_Part, ...]], position: int) -> tuple[_Part, ...]:
    if len(members) == 1:
        return members[0]
    numbers = sorted(n for parts in members for n in parts[position] if isinstance(n, int))
    return (*members[0][:position], tuple(numbers), *members[0][position + 1 :])


def _part_text(part: _Part) -> str:
    if isinstance(part, str):
        return part
    return str(part[0]) if len(part) == 1 else f"{{{ranges(part)}}}"


def _split(pattern: str) -> list[str]:
    return re.findall(r"(?:[^.{}]|\{[^}]*\})+", pattern)


def _unfolded(parts: list[str]) -> Iterator[list[str]]:
    if not parts:
        yield []
        return
    for rest in _unfolded(parts[1:]):
        for choice in _choices(parts[0]):
            yield [choice, *rest]


def _choices(part: str) -> Iterator[str]:
    if not part.startswith("{"):
        yield part
        return
    for span in part[1:-1].split(","):
        first, _, last = span.partition("..")
        yield from map(str, range(int(first), int(last or first) + 1))
