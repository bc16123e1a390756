"""The rules of a plan and their sites, as PEFT's ``adapter_config.json``."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn, Protocol

from torch import nn

from adaptc.errors import UnsupportedError
from adaptc.methods.base import Method
from adaptc.methods.codec import Codec, Sites, codec_of
from adaptc.methods.linear import is_conv1d
from adaptc.plan.match import ALL_LINEAR, Match, is_pattern, matcher
from adaptc.plan.peft import matching, moe
from adaptc.plan.peft import tokens as peft_tokens
from adaptc.plan.peft.options import check_config
from adaptc.plan.peft.reading import exactly, means
from adaptc.plan.rules import Rule


def comparable(method: Method) -> Method:
    """What must agree between two adapters' methods: not how they were initialised, nor dropout, nor what they say of
    the model, which has been compared with it."""
    codec = codec_of(method.kind)
    method = method if codec is None else codec.stored(method)
    left_out = ("init", "dropout", *method.of_model)
    names: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(method) if f.name in left_out}
    return dataclasses.replace(method, **names)


class Assignment(Protocol):
    """What is done at one site."""

    @property
    def path(self) -> str: ...
    @property
    def module(self) -> nn.Module: ...
    @property
    def method(self) -> Method | None: ...
    @property
    def parameter(self) -> str | None: ...


#: What PEFT has beside the adapter: ``modules_to_save``, ``bias``, ``trainable_token_indices``.
_FULL, _BIAS, _TOKENS = "full", "bias", "trainable_tokens"


@dataclasses.dataclass(frozen=True)
class _Sites:
    """The assignments of a plan, sorted into what a PEFT config has room for."""

    codec: Codec
    adapted: dict[str, Method]
    modules: dict[str, nn.Module]
    full: list[str]
    #: Those of ``adapted`` that are parameters.
    parameters: list[str]
    #: Path of an embedding -> the ids whose rows are trained.
    tokens: dict[str, Sequence[int]]
    #: Names of modules stay as they are, though PEFT would replace some (``peft_moe``).
    literal: bool = False

    @property
    def wanted(self) -> list[str]:
        """Those of ``adapted`` that are modules."""
        return [path for path in self.adapted if path not in self.parameters]


def rules_to_config(
    rules: Sequence[Rule],
    assignments: Iterable[Assignment],
    *,
    base_model_name: str | None = None,
    task_type: str | None = None,
    original: Mapping[str, Any] | None = None,
    model: nn.Module | None = None,
) -> dict[str, Any]:
    """The config with which PEFT builds exactly the sites of ``assignments``.

    Args:
        rules: of the plan that the user wrote; its own names are kept where they mean the same to PEFT.
        assignments: objects with ``path``, ``module``, ``method`` (kind "full" or None for a module that is
            trained as a whole) and ``parameter`` (its name where the path is that of a parameter of the module).
        base_model_name: ``base_model_name_or_path``; None takes it from ``original``.
        task_type: PEFT's task. PEFT trains the classifier of a classification task always, so the task is
            left out (with ``auto_mapping`` in its place) when the plan does not train it.
        original: the config the adapter was loaded with. While it still means ``rules`` and the sites, it is
            returned as it is; else the keys without influence are taken over.
        model: the host. With it short names are used where they select the right modules and no others;
            without it every site is written with its full path.

    Raises:
        UnsupportedError: names what PEFT cannot express.
    """
    sites = _named_for_peft(_sort_sites(assignments), model)
    if original is not None and _is_right_for(original, rules, sites, model):
        return dict(original)
    keys = sites.codec.keys()
    carried = {key: original[key] for key, o in keys.items() if original and o.carried and key in original}
    config = {**{key: option.default for key, option in keys.items()}, **carried}
    config["peft_type"] = sites.codec.peft_type
    config["inference_mode"] = True
    config["modules_to_save"] = _names_to_save(sites, model)
    if not sites.codec.on_model:
        config.update(_targets_of(sites, rules, config, model))
        # PEFT refuses it beside parameters, and corrects it where it is missing.
        transposed = [is_conv1d(sites.modules[path]) for path in sites.wanted]
        config["fan_in_fan_out"] = bool(transposed) and all(transposed) and not sites.parameters
    if sites.parameters:
        paths = [] if model is None else matching.parameter_paths(model)
        config["target_parameters"] = matching.shortest_names(sites.parameters, paths)
    config.update(_values_of(sites, rules, config, original))
    if sites.tokens:
        config[peft_tokens.KEY] = peft_tokens.written(sites.tokens, model)
    if base_model_name is not None:
        config["base_model_name_or_path"] = base_model_name
    if task_type is None and original is not None:
        task_type = original.get("task_type")
    if sites.codec.on_model:
        task = task_type or _task_of(model)
        # For a classifier PEFT reads its head from the file; without one it is a model like any other.
        config["task_type"] = task if _task_fits(task, sites, model) else "FEATURE_EXTRACTION"
        return config
    config["task_type"] = task_type if _task_fits(task_type, sites, model) else None
    if config["task_type"] is not None:
        config["auto_mapping"] = None
    elif model is not None:
        names = {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}
        config["auto_mapping"] = names
    return config


def _is_right_for(config: Mapping[str, Any], rules: Sequence[Rule], sites: _Sites, model: nn.Module | None) -> bool:
    """Whether a config that was read still gives the sites, here and in PEFT."""
    if not means(config, rules, model) or not _same_values(config, sites):
        return False
    if model is None or sites.codec.on_model or sites.literal or not moe.table_of(model):
        return True
    return moe.selects(config, matching.module_paths(model), model) == set(sites.wanted)


def _same_values(config: Mapping[str, Any], sites: _Sites) -> bool:
    """Whether the config still gives the methods of the sites: a scale can be changed by hand."""
    parts = sites.codec.rules(check_config(config, loading=True)[1])
    return all(
        any(
            comparable(part.method.at(path)) == comparable(method)
            for part in [p for p in parts if p.holds(path)][:1]
        )
        for path, method in sites.adapted.items()
    )


def _sort_sites(assignments: Iterable[Assignment]) -> _Sites:
    """The sites by what PEFT does there.

    Raises:
        UnsupportedError: PEFT's format has no place for them.
    """
    adapted: dict[str, Method] = {}
    modules: dict[str, nn.Module] = {}
    full: list[str] = []
    tokens: list[Assignment] = []
    assignments = list(assignments)
    codec = codec_of_sites(assignments)
    parameters = [a.path for a in assignments if a.parameter is not None]
    owners = {path: path.rpartition(".")[0] for path in parameters}
    for assignment in assignments:
        method, path = assignment.method, assignment.path
        if path in owners.values():
            raise UnsupportedError(
                f"PEFT's format has no place for an adapter of {path} beside one of its parameters",
                do="save them as two adapters",
            )
        if method is not None and method.kind == _TOKENS:
            tokens.append(assignment)
            continue
        modules[path] = assignment.module
        if method is None or method.kind == _FULL:
            full.append(path)
        elif method.kind != _BIAS:
            adapted[path] = method.at(path)
    if codec is None:
        _raise_no_place(adapted)
    adapted = {path: codec.stored(method) for path, method in adapted.items()}
    loose = [path for path in modules if path not in adapted and path not in full]
    if loose and any(getattr(method, "bias", "none") != "all" for method in adapted.values()):
        raise UnsupportedError(
            f"PEFT's format cannot say which biases are trained, only those of all modules: {loose[0]}",
            expected='LoRA(bias="all")', do='use bias="lora_only" or "all", or save with another format',
        )  # fmt: skip
    return _Sites(codec, adapted, modules, full, parameters, _tokens_of(tokens, codec))


def _tokens_of(assignments: Sequence[Assignment], codec: Codec) -> dict[str, Sequence[int]]:
    """Without the modules that follow the embedding that they are tied to.

    Raises:
        UnsupportedError: PEFT has no place for them beside this kind.
    """
    if assignments and peft_tokens.KEY not in codec.options:
        raise UnsupportedError(
            f"PEFT's format has no place for trained tokens beside {codec.label}", found=assignments[0].path,
            do="save them as two adapters",
        )  # fmt: skip
    of_embeddings = {
        (id(a.module.weight), a.method) for a in assignments if isinstance(a.module, nn.Embedding)
    }
    return {
        a.path: getattr(a.method, "indices", ())
        for a in assignments
        if isinstance(a.module, nn.Embedding) or (id(a.module.weight), a.method) not in of_embeddings
    }


def _named_for_peft(sites: _Sites, model: nn.Module | None) -> _Sites:
    """The sites with layers whose names PEFT would replace written as parameters."""
    renamed = moe.weights_of(sites.adapted, sites.modules, sites.parameters, model)
    if not renamed:
        return dataclasses.replace(sites, literal=renamed is None)
    adapted = moe.without_dropout(sites.adapted, renamed)
    modules = {renamed.get(path, path): module for path, module in sites.modules.items()}
    return dataclasses.replace(
        sites, adapted=adapted, modules=modules, parameters=[*sites.parameters, *renamed.values()]
    )


def _values_of(
    sites: _Sites, rules: Sequence[Rule], config: Mapping[str, Any], original: Mapping[str, Any] | None
) -> dict[str, Any]:
    codec = sites.codec
    written = [rule.method for rule in rules if rule.method is not None and rule.method.kind == codec.kind]
    stored = [codec.stored(method) for method in written]
    found = Sites(codec.label, codec.options, sites.adapted, stored, config, original)
    return {**found.values(), **(codec.write(found) if codec.write is not None else {})}


def codec_of_sites(assignments: Iterable[Assignment]) -> Codec | None:
    """The row of the one kind that the sites have, beside fully trained modules and biases; else None.

    Raises:
        UnsupportedError: two methods on one module, which no adapter file has a place for.
    """
    kinds: set[str] = set()
    paths: set[str] = set()
    for assignment in assignments:
        if assignment.method is not None and assignment.method.kind == _TOKENS:
            continue
        if assignment.path in paths:
            raise UnsupportedError(
                f"PEFT's format has no place for two methods on one module: {assignment.path}",
                do="save them as two adapters",
            )
        paths.add(assignment.path)
        if assignment.method is not None and assignment.method.kind not in (_FULL, _BIAS):
            kinds.add(assignment.method.kind)
    return codec_of(kinds.pop()) if len(kinds) == 1 else None


def _raise_no_place(adapted: Mapping[str, Method]) -> NoReturn:
    """Say why no row of PEFT's format fits the sites."""
    kinds: dict[str, str] = {}
    for path, method in adapted.items():
        kinds.setdefault(method.kind, path)
    if not kinds:
        raise UnsupportedError("PEFT's format needs at least one adapted site", found="none in this adapter")
    for kind, path in kinds.items():
        if codec_of(kind) is None:
            raise UnsupportedError(
                f"PEFT's format has no place for {kind} at {path}",
                do="model.adaptc.save writes adaptc's own format",
            )
    raise UnsupportedError(
        "PEFT's format has no place for two kinds in one adapter",
        found=", ".join(f"{kind} at {path}" for kind, path in kinds.items()),
        do="save them as two adapters, or with model.adaptc.save, which writes adaptc's own format",
    )


def _names_to_save(sites: _Sites, model: nn.Module | None) -> list[str] | None:
    if not sites.full:
        return None
    paths = list(sites.modules) if model is None else list(matching.module_paths(model))
    names = sorted({path.rpartition(".")[2] for path in sites.full})
    for candidate in (names, sorted(sites.full)):
        if model is None and candidate is names:
            continue
        if set(matching.saved_paths(candidate, paths)) == set(sites.full):
            return candidate
    wrong = sorted(set(matching.saved_paths(sites.full, paths)) - set(sites.full))
    raise UnsupportedError(
        "PEFT's format cannot name the fully trained modules: it takes any path that ends in a name",
        expected=", ".join(sites.full), found=f"{', '.join(wrong)} too",
    )  # fmt: skip


def _targets_of(
    sites: _Sites, rules: Sequence[Rule], config: Mapping[str, Any], model: nn.Module | None
) -> dict[str, Any]:
    """The shortest selection that means exactly the adapted sites, by PEFT's rules."""
    wanted = set(sites.wanted)
    if not wanted:
        return {"target_modules": []}
    known = [path for path in sites.modules if path not in sites.parameters]
    paths = known if model is None else list(matching.module_paths(model))
    for candidate in _candidates(
        sorted(wanted), rules, sites.codec.kind, named=model is not None, partly=bool(sites.parameters)
    ):
        # A kind of PEFT's that cannot exclude modules, or choose layers, has no such key.
        if any(value and key not in config for key, value in candidate.items()):
            continue
        chosen = {key: value for key, value in candidate.items() if key in config}
        if moe.selects({**config, **chosen}, paths, None if sites.literal else model) == wanted:
            return chosen
    inside = sorted(wanted - set(matching.target_paths({**config, "target_modules": ".*"}, paths)))
    raise UnsupportedError(
        f"PEFT's format cannot express these {sites.codec.label} sites beside the fully trained modules",
        found=", ".join(inside) or "sites that are not modules of the model",
        do="PEFT never puts an adapter inside a module that it trains as a whole",
    )


def _candidates(
    wanted: list[str], rules: Sequence[Rule], kind: str, *, named: bool, partly: bool
) -> Iterator[dict[str, Any]]:
    """Selections to try, the most readable first; the last one is exact whatever the names are.

    ``partly``: there are rules, or entries of one, that mean parameters.
    """
    if named:
        matches = [rule.match for rule in rules if rule.method and rule.method.kind == kind]
        if partly:
            matches = [fitting for match in matches if (fitting := _fitting(match, wanted)) is not None]
        if len(matches) == 1:
            yield from _as_written(matches[0])
        last = sorted({path.rpartition(".")[2] for path in wanted})
        yield {"target_modules": last}
        layers = sorted({int(n) for path in wanted for n in re.findall(r"^.*?\.[^.]*\.(\d+)\.", path)})
        if layers:
            yield {"target_modules": last, "layers_to_transform": layers}
    yield {"target_modules": wanted}
    yield {"target_modules": exactly(wanted)}


def _fitting(match: Match, paths: Sequence[str]) -> Match | None:
    """The match with those of its targets that fit one of ``paths``; None without any."""
    targets = tuple(t for t in match.targets if t == ALL_LINEAR or any(map(matcher(t), paths)))
    return dataclasses.replace(match, targets=targets) if targets else None


def _as_written(match: Match) -> Iterator[dict[str, Any]]:
    """The plan's own match in PEFT's words, when it has words for it."""
    spans = match.layer_spans
    targets, exclude = _written(match.targets), _written(match.exclude)
    if targets is None or (match.exclude and exclude is None):
        return
    config: dict[str, Any] = {"target_modules": targets, "exclude_modules": exclude}
    if spans is not None:
        if isinstance(targets, str) or any(last is None for _, last in spans):
            return
        config["layers_to_transform"] = [n for first, last in spans for n in range(first, (last or 0) + 1)]
        config["layers_pattern"] = [name for name in match.layers_pattern if not is_pattern(name)] or None
    yield config


def _written(selectors: Sequence[str]) -> list[str] | str | None:
    if len(selectors) == 1 and selectors[0].startswith("re:"):
        return selectors[0].removeprefix("re:")
    return sorted(selectors) if selectors and not any(map(is_pattern, selectors)) else None


#: What the name of a model's class ends in -> PEFT's task.
_TASKS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


def _task_of(model: nn.Module | None) -> str | None:
    """PEFT's task for a model; PEFT gives the model its prompts by it, so a config of such a kind must say it."""
    name = type(model).__name__
    found = next((task for end, task in _TASKS.items() if name.endswith(end)), None)
    if found is not None or model is None:
        return found
    can_generate = getattr(model, "can_generate", None)
    if not (callable(can_generate) and can_generate()):
        return "FEATURE_EXTRACTION"
    return "SEQ_2_SEQ_LM" if getattr(model.config, "is_encoder_decoder", False) else "CAUSAL_LM"


def _task_fits(task_type: str | None, sites: _Sites, model: nn.Module | None) -> bool:
    """Whether PEFT, wrapping a model for this task, would train no module that the adapter does not hold."""
    names = matching.classifier_names(task_type)
    if model is None:
        return not names or bool(sites.full)
    return set(matching.saved_paths(names, matching.module_paths(model))) <= set(sites.full)
