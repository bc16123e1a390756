"""The modules and parameters that one rule selects, and the errors of a rule that does not fit the model."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections import Counter

from adaptc import methods
from adaptc.errors import PlanError, SiteError
from adaptc.methods.base import Method
from adaptc.methods.linear import is_linear
from adaptc.plan import bypassed
from adaptc.plan.all_linear import all_linear
from adaptc.plan.match import ALL_LINEAR, MODEL, is_pattern, matcher
from adaptc.plan.rules import Rule
from adaptc.plan.tree import ModuleTree


@dataclasses.dataclass
class Selection:
    """What one rule selects.

    Attributes:
        taken: paths to adapt, in model order.
        left_out: path -> why a module that a pattern or "all-linear" covers is not adapted.
        filtered: path -> "excludes" or "leaves out by layers", for paths that only targets match.
    """

    taken: list[str] = dataclasses.field(default_factory=list)
    left_out: dict[str, str] = dataclasses.field(default_factory=dict)
    filtered: dict[str, str] = dataclasses.field(default_factory=dict)


def select(rule: Rule, number: int, tree: ModuleTree) -> Selection:
    """Apply the rule's match, entry by entry; each entry must match something in the rule's layers.

    An entry means modules. One that fits none that the method can adapt means parameters, where it fits such ones:
    ``"experts.gate_up_proj"``, the fused weights of a mixture of experts.

    An entry may lose all of its modules to ``exclude``, which says so in so many words; a rule may not.

    A name means its modules: one that the method cannot adapt is an error. A pattern runs over everything:
    it passes over modules without weights of their own, and leaves out, with the reason, those that have
    weights and cannot be adapted. What a method cannot do because the base is quantised is an error for both.

    Raises:
        PlanError: an entry of ``targets``, ``exclude`` or ``layers`` selects nothing.
        SiteError: a named module that the method cannot adapt.
    """
    scope = _Scope(rule, number, tree)
    selection = Selection()
    taken: set[str] = set()
    covered: set[str] = set()
    for selector in rule.match.targets:
        hits = scope.hits(selector, selection)
        covered.update(hits)
        hits = scope.in_layers(selector, hits, selection)
        hits = scope.not_excluded(hits, selection)
        taken.update(scope.adaptable(selector, hits, selection) if hits else ())
    if not taken:
        raise scope.all_excluded(covered)
    scope.check_layers(covered)
    scope.check_excludes(covered)
    selection.taken = [path for path in tree.order if path in taken]
    return selection


class _Scope:
    """One rule on one model: the steps of ``select`` and the texts of their errors."""

    def __init__(self, rule: Rule, number: int, tree: ModuleTree) -> None:
        self.rule, self.number, self.tree = rule, number, tree
        self.match = rule.match
        self.method = methods.get("full")() if rule.method is None else rule.method

    def hits(self, selector: str, selection: Selection) -> list[str]:
        if selector == MODEL or self.method.on_model:
            hits = self._on_model(selector)
        elif selector == ALL_LINEAR:
            hits, left_out = all_linear(self.tree)
            selection.left_out.update(left_out)
        else:
            matches = matcher(selector)
            hits = [path for path in self.tree.modules if matches(path)]
            if not any(self._refusal(path) is None for path in hits):
                hits = self._parameters(selector) or hits
            elif not is_pattern(selector):
                selection.left_out.update(self._beside(selector))
        if not hits:
            raise self._matches_nothing(selector)
        return hits

    def _parameters(self, selector: str) -> list[str]:
        """The parameters that a selector fits, if the method adapts parameters.

        Of a pattern only those that it can adapt, and that no module stands for which it can adapt.
        """
        if type(self.method).parameter_refusal is Method.parameter_refusal:
            return []
        found = [path for path in self.tree.parameters if matcher(selector)(path)]
        if not is_pattern(selector):
            return found
        return [p for p in found if self._refusal(p) is None and self._refusal(self.tree.parameters[p][0]) is not None]

    def _beside(self, name: str) -> dict[str, str]:
        """Parameters that could be adapted and have the name of modules, which are meant by it."""
        alone = [p for p in self._parameters(name) if self._refusal(p) is None and "." in p]
        return {p: f'a parameter, and "{name}" means modules here: name it "{_short(p)}"' for p in alone}

    def _on_model(self, selector: str) -> list[str]:
        """Where a method that acts on the whole model does so."""
        kind = self.method.kind
        if selector != MODEL:
            raise PlanError(
                f"rule {self.number}: {kind} acts on the model as a whole",
                rule=self.rule, expected=f'targets="{MODEL}", or none', found=f'"{selector}"',
            )  # fmt: skip
        if not self.method.on_model:
            raise PlanError(
                f"rule {self.number}: {kind} acts on modules, not on the model as a whole",
                rule=self.rule, do='name the modules, or use "all-linear"',
            )  # fmt: skip
        return [self.method.place(self.tree.root)]

    def in_layers(self, selector: str, hits: list[str], selection: Selection) -> list[str]:
        kept = [path for path in hits if self.match.in_layers(path)]
        outside = set(hits).difference(kept)
        selection.filtered.update(dict.fromkeys(outside, "by its layers leaves out"))
        if not kept:
            raise PlanError(
                self._headline(selector, self.match.targets),
                rule=self.rule,
                found=f"{_count(hits)}, {self._layers_found(hits)}",
                do="correct layers, or move the entry to a rule without layers",
            )
        return kept

    def not_excluded(self, hits: list[str], selection: Selection) -> list[str]:
        kept = [path for path in hits if not self.match.is_excluded(path)]
        selection.filtered.update(dict.fromkeys(set(hits).difference(kept), "excludes"))
        return kept

    def all_excluded(self, covered: set[str]) -> PlanError:
        return PlanError(
            f"rule {self.number} matches nothing",
            rule=self.rule,
            found=f"{_count(list(covered))}, all of them excluded",
            do="correct exclude, or drop the rule",
        )

    def adaptable(self, selector: str, hits: list[str], selection: Selection) -> list[str]:
        refused = {path: reason for path in hits if (reason := self._refusal(path)) is not None}
        kept = [path for path in hits if path not in refused]
        modules = [path for path in refused if self.tree.owner(path)[1] is None]
        by_base = next(filter(None, (self.method.base_refusal(self.tree.module(p)) for p in modules)), None)
        if refused and (not kept or not is_pattern(selector) or by_base):
            raise self._cannot_adapt(selector, refused, some_can=bool(kept), do=by_base and by_base.do)
        weighty = (p for p in modules if any(True for _ in self.tree.own_parameters(self.tree.module(p))))
        for path in weighty:
            selection.left_out.setdefault(path, refused[path])
        return kept

    def check_layers(self, covered: set[str]) -> None:
        for selector in self.match.layers_pattern:
            alone = dataclasses.replace(self.match, layers_pattern=(selector,))
            if all(alone.layer_of(path) is None for path in covered):
                raise PlanError(
                    f'rule {self.number}: layers_pattern "{selector}" matches nothing',
                    rule=self.rule, found=f"{_count(list(covered))}, none of them in a numbered layer of that list",
                    do="correct layers_pattern, the list that a layer's number indexes",
                )  # fmt: skip
        found = sorted({n for path in covered if (n := self.match.layer_of(path)) is not None})
        for first, last in self.match.layer_spans or ():
            if not any(first <= n and (last is None or n <= last) for n in found):
                text = f"{first}-{'' if last is None else last}" if first != last else str(first)
                raise PlanError(
                    f"rule {self.number}: layers {text} matches nothing",
                    rule=self.rule,
                    found=self._layers_found(list(covered)),
                    do="correct layers",
                )

    def check_excludes(self, covered: set[str]) -> None:
        for selector in self.match.exclude:
            matches = matcher(selector)
            hits = [path for path in self.tree.order if path and matches(path)]
            if not hits:
                raise self._matches_nothing(selector, exclude=True)
            inside = [path for path in covered if any(path.startswith(f"{hit}.") for hit in hits)]
            if inside and not covered.intersection(hits):
                raise PlanError(
                    f'rule {self.number}: exclude "{selector}" excludes nothing',
                    rule=self.rule,
                    found=f"it names {hits[0]}, whose inner modules are matched: {min(inside)}",
                    do=f'write "{selector}.*" to exclude what is inside',
                )

    def _cannot_adapt(
        self, selector: str, refused: dict[str, str], *, some_can: bool, do: str | None = None
    ) -> SiteError:
        shown = [f"{path} ({self._what(path)}): {why}" for path, why in refused.items()]
        if len(shown) > 5:
            shown[5:] = [f"... and {len(shown) - 5} more"]
        noun = "module" if any(path in self.tree.modules for path in refused) else "parameter"
        return SiteError(
            f'rule {self.number}: "{selector}" names {_count(list(refused), noun)} that cannot be adapted',
            rule=self.rule,
            found="\n".join(shown),
            do=do or ("exclude these, or name the others in full" if some_can else self._inside(selector, refused)),
        )

    def _what(self, path: str) -> str:
        module, name = self.tree.owner(path)
        kind = type(module).__name__
        return kind if name is None else f"parameter of {kind}"

    def _inside(self, selector: str, refused: dict[str, str]) -> str:
        """What to write instead of a container: what it holds."""
        if not any(path in self.tree.modules for path in refused):
            return "leave it out, or give it a rule of its own"
        inner = [p for p in self.tree.modules if any(p.startswith(f"{outer}.") for outer in refused)]
        names = dict.fromkeys(p.rpartition(".")[2] for p in inner if self._refusal(p) is None)
        owned = [p for p, (holder, _) in self.tree.parameters.items() if holder in refused and self._refusal(p) is None]
        if not names and owned and not is_pattern(selector):
            return f"name its parameters, {', '.join(list(dict.fromkeys(map(_short, owned)))[:6])}"
        if not names or is_pattern(selector):
            return "name other modules"
        return f'name what is inside, "{selector}.*" or {", ".join(list(names)[:6])}'

    def _refusal(self, path: str) -> str | None:
        module, name = self.tree.owner(path)
        if name is None:
            reason = self.method.why_not(path, module)
            return bypassed.refusal(self.tree.root, path) if reason is None and not self.method.on_model else reason
        if module is self.tree.root:
            return "the model itself owns it, and adapters lie on the modules inside"
        return self.method.parameter_refusal(path, module, name)

    def _headline(self, selector: str, entries: tuple[str, ...]) -> str:
        if len(entries) == 1 and entries is self.match.targets:
            return f"rule {self.number} matches nothing"
        place = "exclude " if entries is self.match.exclude else ""
        return f'rule {self.number}: {place}"{selector}" matches nothing'

    def _layers_found(self, hits: list[str]) -> str:
        found = sorted({n for path in hits if (n := self.match.layer_of(path)) is not None})
        if not found:
            return "none of them in a numbered layer"
        return f"in layers {found[0]} to {found[-1]}" if len(found) > 1 else f"in layer {found[0]}"

    def _matches_nothing(self, selector: str, *, exclude: bool = False) -> PlanError:
        entries = self.match.exclude if exclude else self.match.targets
        found, do = self._parameter_named(selector), "name a module"
        if selector == ALL_LINEAR and (left_out := all_linear(self.tree)[1]):
            found, do = "\n".join(f"{path}: {why}" for path, why in left_out.items()), "name the modules"
        elif found is None:
            found = self._nearest(selector, everything=exclude)
            do = "correct the name; print(model) lists the modules"
        return PlanError(self._headline(selector, entries), rule=self.rule, found=found, do=do)

    def _parameter_named(self, selector: str) -> str | None:
        name = selector.rpartition(".")[2]
        for path, module in self.tree.modules.items():
            if name in module._parameters:
                kind = type(module).__name__
                return f"{name} is a parameter of {path} ({kind}), and {self.method.kind} adapts modules"
        return None

    def _nearest(self, selector: str, *, everything: bool) -> str:
        """What there is to name: how many modules, and the names most like the selector's."""
        modules = self.tree.modules
        paths = [p for p in modules if everything or self._refusal(p) is None]
        linear = bool(paths) and all(is_linear(modules[p]) for p in paths)
        noun = "linear layer" if linear else "module" if everything else "adaptable module"
        return nearest_names(selector, paths, noun, ALL_LINEAR)


def nearest_names(selector: str, paths: list[str], noun: str = "site", *others: str) -> str:
    """How many there are, and the names among them, or the whole paths, that are most like the selector."""
    count = _count(paths, noun)
    names = Counter(path.rpartition(".")[2] for path in paths)
    numbered = {name for name in names if name.isdecimal()}
    words = [word for word in re.findall(r"\w+", selector) if len(word) > 1]
    near_names = _close(words, [*(set(names) - numbered), *others], selector)
    near_paths = difflib.get_close_matches(selector, paths, n=2, cutoff=0.75) if "." in selector else []
    shown = [f"{name} ({names[name]})" if name in names else f'"{name}"' for name in near_names]
    near_paths = [path for path in near_paths if path not in near_names]
    if near_names or near_paths:
        return f"{count}; nearest names: {', '.join([*near_paths, *shown])}"
    usual = [f"{name} ({n})" for name, n in names.most_common(8) if name not in numbered]
    return f"{count}; names: {', '.join(usual)}" if usual else count


def _close(words: list[str], names: list[str], selector: str) -> list[str]:
    """Names like the selector, or like a word of it, the last word first; case does not matter."""
    lower = {name.lower(): name for name in names}
    found: list[str] = []
    for word in dict.fromkeys([selector, *reversed(words)]):
        found += [lower[n] for n in difflib.get_close_matches(word.lower(), sorted(lower), n=3, cutoff=0.6)]
    return list(dict.fromkeys(found))[:5]


def _short(path: str) -> str:
    """The last two components of a path."""
    return ".".join(path.split(".")[-2:])


def _count(paths: list[str], noun: str = "module") -> str:
    return f"{len(paths)} {noun}{'' if len(paths) == 1 else 's'}"
