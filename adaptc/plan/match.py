"""Selectors: which modules, or which parameters of modules, a rule means, written against their dotted paths.

=====================================  ===============================================================
``"q_proj"``, ``"self_attn.q_proj"``   the path itself, or its last components
``"layers.*.mlp"``, ``"*_proj"``       the same, where ``*`` stands for any characters, dots included
``"re:.*mlp\\.(gate|up)_proj"``        a regular expression on the whole path
``"all-linear"``                       every linear layer but output heads and MoE routers (``all_linear``)
``"."``                                the model itself, for methods that act on it as a whole
=====================================  ===============================================================

A selector means modules. Where it fits none that the method can adapt it means parameters, for a method that adapts
some: ``"experts.gate_up_proj"``.

``exclude`` takes the same forms, ``"all-linear"`` excepted. An excluded container does not exclude what is
inside it, as in PEFT: write ``"classifier.*"``.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable

from adaptc.errors import PlanError

ALL_LINEAR = "all-linear"
MODEL = "."
_REGEX = "re:"
Span = tuple[int, int | None]


def is_pattern(selector: str) -> bool:
    """Whether the selector describes modules (wildcard, regular expression, all-linear), not names one."""
    return selector == ALL_LINEAR or selector.startswith(_REGEX) or "*" in selector


@functools.lru_cache(maxsize=4096)
def matcher(selector: str) -> Callable[[str], bool]:
    """The predicate on module paths that ``selector`` stands for.

    Raises:
        PlanError: the selector is empty, or its regular expression is not legal.
    """
    if not selector.strip() or selector == _REGEX:
        raise PlanError("an empty selector", do='name a module ("q_proj"), or "all-linear"')
    if selector.startswith(_REGEX):
        try:
            regex = re.compile(selector.removeprefix(_REGEX))
        except re.error as error:
            raise PlanError(
                f'selector "{selector}" is not a regular expression', found=str(error), do="correct it"
            ) from error
        return lambda path: regex.fullmatch(path) is not None
    if "*" in selector:
        body = ".*".join(re.escape(part) for part in selector.split("*"))
        regex = re.compile(rf"(?:.*\.)?{body}", re.DOTALL)
        return lambda path: regex.fullmatch(path) is not None
    suffix = f".{selector}"
    return lambda path: path == selector or path.endswith(suffix)


def strings(value: object, name: str) -> tuple[str, ...]:
    """A string, or a collection of them, as a tuple without repeats; ``name`` is for the error."""
    if isinstance(value, str):
        items: list[object] = [value]
    elif isinstance(value, set | frozenset):
        items = sorted(value, key=str)  # sets have no order: give every run the same plan
    elif isinstance(value, list | tuple):
        items = list(value)
    else:
        raise PlanError(f"{name} is not a list of strings", found=repr(value))
    wrong = [item for item in items if not isinstance(item, str)]
    if wrong:
        raise PlanError(f"{name} has an entry that is not a string", found=repr(wrong[0]))
    return tuple(dict.fromkeys(str(item) for item in items))


def parse_layers(value: object) -> tuple[Span, ...]:
    """Layer numbers as sorted, disjoint spans ``(first, last)``, both included; last None is open.

    Takes ``"0-3,8,10-"``, one number, or a collection of numbers.

    Raises:
        PlanError: empty, negative, reversed, or not layer numbers at all.
    """
    if isinstance(value, str):
        spans = [_parse_span(part.strip(), value) for part in value.split(",")]
    elif isinstance(value, Iterable):
        spans = [_number(item, value) for item in value]
    else:
        spans = [_number(value, value)]
    if not spans:
        raise _bad_layers(value, "no layers at all")
    merged: list[Span] = []
    for first, last in sorted(spans, key=lambda span: span[0]):
        if merged and (merged[-1][1] is None or first <= merged[-1][1] + 1):
            before, end = merged[-1]
            merged[-1] = (before, None if end is None or last is None else max(end, last))
        else:
            merged.append((first, last))
    return tuple(merged)


def _number(item: object, whole: object) -> Span:
    if isinstance(item, bool) or not isinstance(item, int) or item < 0:
        raise _bad_layers(whole, f"{item!r} is not a layer number (0, 1, ...)")
    return (item, item)


def _parse_span(part: str, whole: str) -> Span:
    found = re.fullmatch(r"([0-9]+)(\s*-\s*([0-9]+)?)?", part)
    if found is None:
        raise _bad_layers(whole, f'"{part}" is not "3", "0-3" or "3-"')
    first = int(found[1])
    last = first if found[2] is None else None if found[3] is None else int(found[3])
    if last is not None and last < first:
        raise _bad_layers(whole, f'"{part}" runs backwards')
    return (first, last)


def _bad_layers(value: object, why: str) -> PlanError:
    return PlanError("layers is not a set of layer numbers", found=f"{value!r}: {why}", do='e.g. "0-3,8,10-"')


def _span_text(span: Span) -> str:
    first, last = span
    return f"{first}-" if last is None else str(first) if first == last else f"{first}-{last}"


@dataclasses.dataclass(frozen=True)
class Match:
    """Which modules a rule applies to.

    Args:
        targets: selectors (see the module's docstring); each must select something.
        exclude: selectors taken away again; each must match something.
        layers: restricts to layers, by the first number in the path, as ``"0-3,8,10-"`` or a list of
            numbers; kept in the text form.
        layers_pattern: selectors of the list that the layer number indexes (``"decoder.layers"``), for
            models with several; without it, any list counts.
    """

    targets: tuple[str, ...]
    exclude: tuple[str, ...] = ()
    layers: str | tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("targets", "exclude", "layers_pattern"):
            object.__setattr__(self, name, strings(getattr(self, name), name))
            for selector in getattr(self, name):
                matcher(selector)
        if not self.targets:
            raise PlanError("a match without targets", do='name the modules, or use "all-linear"')
        for name in ("exclude", "layers_pattern"):
            if ALL_LINEAR in getattr(self, name):
                raise PlanError(f'"{ALL_LINEAR}" in {name}', expected="names, wildcards or re:...")
        if self.layers is not None:
            text = ",".join(_span_text(span) for span in parse_layers(self.layers))
            object.__setattr__(self, "layers", text)
        elif self.layers_pattern:
            raise PlanError("layers_pattern without layers", do="give layers, or drop layers_pattern")

    @property
    def layer_spans(self) -> tuple[Span, ...] | None:
        """``layers`` as spans ``(first, last)``, both included; last None is open. None: every layer."""
        return None if self.layers is None else parse_layers(self.layers)

    def layer_of(self, path: str) -> int | None:
        """The layer number of a path: its first integer component (below ``layers_pattern``, if given)."""
        components = path.split(".")
        for depth, component in enumerate(components):
            if component.isdecimal():
                holder = ".".join(components[:depth])
                if not self.layers_pattern or any(matcher(p)(holder) for p in self.layers_pattern):
                    return int(component)
        return None

    def in_layers(self, path: str) -> bool:
        """Whether ``layers`` allows the path; a path without a layer number is in none."""
        spans = self.layer_spans
        if spans is None:
            return True
        layer = self.layer_of(path)
        return layer is not None and any(first <= layer and (last is None or layer <= last) for first, last in spans)

    def is_excluded(self, path: str) -> bool:
        return any(matcher(selector)(path) for selector in self.exclude)
