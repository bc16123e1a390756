"""PEFT's ``trainable_token_indices``: rows of embeddings that are trained beside the adapters of a config."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from adaptc.errors import ConfigTypeError
from adaptc.methods.trainable_tokens import TrainableTokens
from adaptc.plan.match import Match
from adaptc.plan.peft import matching
from adaptc.plan.rules import Rule

KEY = "trainable_token_indices"


def rules_of(used: Mapping[str, Any], model: nn.Module | None) -> list[Rule]:
    """The rules that train the rows which a config names.

    Raises:
        ConfigTypeError: rows of a module that is trained as a whole, or has an adapter of its own.
    """
    named: Any = used.get(KEY)
    if not named:
        return []
    embedding = _embedding(model)
    if not isinstance(named, Mapping):
        named = {embedding or "embed_tokens": named}
    elif model is not None:
        named = _without_tied(named, embedding, model)
    for name, ids in named.items():
        for key in ("modules_to_save", "target_modules"):
            others = used.get(key) or ()
            if not isinstance(others, str) and any(matching.has_suffix(name, other) for other in others):
                raise ConfigTypeError(
                    f"{KEY} names {name}, which is in {key} too", expected="one of the two", found=str(ids)
                )
    return [Rule(Match((name,)), TrainableTokens(indices=tuple(ids))) for name, ids in named.items() if ids]


def _embedding(model: nn.Module | None) -> str | None:
    """Path of the model's input embeddings."""
    get: Any = getattr(model, "get_input_embeddings", None)
    if model is None or get is None:
        return None
    with contextlib.suppress(NotImplementedError):
        module = get()
        return next((path for path, found in matching.module_paths(model).items() if found is module), None)
    return None


def _without_tied(named: Mapping[str, Any], embedding: str | None, model: nn.Module) -> dict[str, Any]:
    """Without the modules that share the embedding's weight and are named with its ids: they follow it."""
    modules = matching.module_paths(model)
    weight = getattr(modules.get(embedding or ""), "weight", None)
    rows = (ids for name, ids in named.items() if embedding is not None and matching.has_suffix(embedding, name))
    own = next(rows, None)

    def follows(name: str, ids: Any) -> bool:
        if own is None or ids != own or (embedding is not None and matching.has_suffix(embedding, name)):
            return False
        found = [modules[path] for path in matching.suffixed([name], modules)]
        return bool(found) and all(getattr(module, "weight", None) is weight for module in found)

    return {name: ids for name, ids in named.items() if not follows(name, ids)}


def written(tokens: Mapping[str, Sequence[int]], model: nn.Module | None) -> Any:
    """The value of the key: path of a module -> ids. A list where PEFT finds the module by itself."""
    if not tokens:
        return None
    if list(tokens) == [_embedding(model)]:
        return list(next(iter(tokens.values())))
    paths: Iterable[str] = tokens if model is None else list(matching.module_paths(model))
    last = {path: path.rpartition(".")[2] for path in tokens}
    short = all(matching.saved_paths([name], paths) == [path] for path, name in last.items())
    return {last[path] if short else path: list(ids) for path, ids in tokens.items()}
