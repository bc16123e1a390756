"""Whether adapters can act together at the sites that they share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from adaptc.errors import SiteError
from adaptc.methods.base import Adapter

#: Path of a site -> (adapter's name, adapter) of those that are to act there, in order.
Acting = Mapping[str, Sequence[tuple[str, Adapter]]]


def check(acting: Acting) -> None:
    """Raise SiteError where two of them replace the same module, or one acts where the other's effect is lost."""
    for path, pairs in acting.items():
        _check_site(path, pairs)
    _check_enclosed(acting)


def _check_site(path: str, pairs: Sequence[tuple[str, Adapter]]) -> None:
    replacing = list(dict.fromkeys(name for name, a in pairs if a.replaces_forward))
    if len(replacing) > 1:
        raise SiteError(
            f"{path} cannot be replaced by two adapters at once",
            found=f"{' and '.join(map(repr, replacing))} train it in full",
            do="make one of them live",
        )
    inside = [(name, a) for name, a in pairs if a.acts_inside]
    if replacing and inside:
        raise SiteError(
            f"{path} is replaced by {replacing[0]!r}, inside of which {inside[0][0]!r} cannot act",
            do="make one of them live",
        )
    kinds = {type(a).run_inside: a.method.kind for _, a in inside}
    if len(kinds) > 1:
        raise SiteError(
            f"{path or 'the model'}: {' and '.join(kinds.values())} cannot act inside one module together",
            do="make one of them live",
        )
    if inside:
        type(inside[0][1]).check_together(path, [a for _, a in inside])


def _check_enclosed(acting: Acting) -> None:
    """A module that is trained in full runs as a copy: what other adapters do inside it would be lost."""
    replaced = {p: n for p, pairs in acting.items() for n, a in pairs if a.replaces_forward}
    for path, pairs in acting.items():
        outer = next((p for p in replaced if path.startswith(f"{p}.")), None)
        if pairs and outer is not None:
            raise SiteError(
                f"{path} is inside {outer}, of which {replaced[outer]!r} trains a copy:"
                f" {pairs[0][0]!r} would be lost",
                do="make one of them live",
            )
