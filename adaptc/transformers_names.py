"""Names of transformers that differ between its releases, read here and nowhere else.

What a model calls its cache: the cache of an attention was ``past_key_values`` and that of a state space model
``cache_params``; from 5.24 on both are ``cache``, as arguments and in outputs. The old names are still taken there as
keywords, with a warning, and classes of users keep the name that they were written with. So names are read from the
class or the output at hand, never from the release.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

#: What a model calls its cache, in its arguments and in its output.
_CACHES = ("cache", "past_key_values", "cache_params")
#: What layers and attentions call the cache that a model gives them.
LAYER_CACHES = (*_CACHES, "past_key_value", "layer_past")

#: What ``use_experts_implementation`` puts on a class of fused experts, and the grouped forward reads.
EXPERTS_MARKS = ("has_gate", "has_bias", "is_transposed", "_is_expert_parallel", "_apply_gate")
#: The op by which the grouped forward multiplies where torch's kernel does not, of this schema in every release:
#: (Tensor input, Tensor weight, Tensor offs) -> Tensor.
GROUPED_MM = "grouped_mm_fallback"
#: The op that is its gradient. Releases without it (up to 5.19) read the groups' sizes while the backward is traced.
GROUPED_MM_GRADIENT = "grouped_mm_fallback_backward"


@contextlib.contextmanager
def experts_by_shape(modules: Iterable[Any]) -> Iterator[None]:
    """A block in which fused experts compute in a way that runs without values: their loop reads which experts have
    tokens, and torch's grouped product knows bf16 only there."""
    name = "_experts_implementation"
    configs = {id(c): c for m in modules if hasattr(m, "has_gate") and hasattr(c := getattr(m, "config", None), name)}
    before = [(config, getattr(config, name)) for config in configs.values()]
    for config in configs.values():
        setattr(config, name, "batched_mm")
    try:
        yield
    finally:
        for config, value in before:
            setattr(config, name, value)


def has_post_expert_norm(experts: object) -> bool:
    """Whether fused experts are followed by a norm; no class has one before 5.20."""
    return bool(getattr(experts, "has_post_expert_norm", False))


def cache_argument(names: Collection[str]) -> str | None:
    """What the cache is called among ``names``, the parameters of a forward; None: it takes no cache."""
    return next((name for name in _CACHES if name in names), None)


def attention_cache_argument(signature: inspect.Signature) -> str | None:
    """What a forward calls a cache that keeps keys and values as transformers' ``Cache`` does; None: it takes none.

    ``cache`` is also what XLM and Flaubert call a dict of their own, in every release.
    """
    names = (name for name in ("cache", "past_key_values") if name in signature.parameters)
    return next((name for name in names if "dict" not in str(signature.parameters[name].annotation)), None)


def rename_cache(given: dict[str, Any], name: str | None) -> None:
    """Call the cache among ``given``, the arguments of a call by name, ``name``, as the forward that gets them does.

    As in transformers, a cache under the forward's own name goes before one under an older name.
    """
    if name is None:
        return
    for old in _CACHES:
        if old != name and old in given:
            cache = given.pop(old)
            given.setdefault(name, cache)


def cache_in_output(output: Mapping[str, Any]) -> tuple[str, Any] | None:
    """(name, cache) of a model's output; None: it has none. Asking an output by a name that is old there would warn."""
    return next(((name, value) for name, value in output.items() if name in _CACHES), None)


def given_cache(kwargs: Mapping[str, Any]) -> Any:
    """The cache among the keyword arguments of a model's or a layer's call, or None."""
    return next((kwargs[name] for name in LAYER_CACHES if kwargs.get(name) is not None), None)
