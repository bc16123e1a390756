"""Regional compilation: a block that repeats is captured once for all its copies.

The model's own forward then runs as it is written, and each block as captured: adapters and weights are inputs of the
graph, so that one serves all layers. Sixteen layers compile in the time of one, and a step takes what it took, because
no rewrite reaches across blocks. The other way, ``torch.compiler.nested_compile_region`` within one graph, gave wrong
gradients under Inductor (torch 2.13).

A call that fills or reads a cache is captured whole: each layer's place in the cache is a constant of its code.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from adaptc.runtime.attach import adapters_of
from adaptc.runtime.prologue import Prologue

if TYPE_CHECKING:
    from adaptc.runtime.handle import Handle

#: "auto" captures blocks from this many on, if there are this many of a kind: below it compiling them all is as fast.
MANY = 8
ALIKE = 4

#: Arguments by which blocks are given a cache.
_CACHES = ("past_key_values", "past_key_value", "layer_past", "cache_params", "cache")
_CONTAINERS = (nn.ModuleList, nn.Sequential)


class BlockPrologue(Prologue):
    """The call of one block; ``entry`` names the blocks that are captured with it."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or has_cache(args, kwargs):
            return self.owner._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]
        return self.handle.captures.block(self.entry)(self.owner, *args, **kwargs)


def run_block(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The frame that is captured: its block is an argument, so that its tensors are inputs of the graph."""
    return block._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]


def arm(handle: Handle) -> dict[str, str]:
    """Let the blocks of the model be captured by themselves, where that is asked for or pays.

    Returns what is captured together, by the path of the block; nothing where the model is captured whole.
    """
    wanted = _wanted(handle)
    for path, module in handle.model.named_modules():
        present = module.__dict__.get(Prologue.KEY)
        if isinstance(present, BlockPrologue) and present.entry != wanted.get(path):
            present.disarm()
        if path in wanted and Prologue.KEY not in module.__dict__:
            BlockPrologue(handle, module, wanted[path])
    return wanted


def has_cache(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call is given a cache to read or to fill."""
    return any(kwargs.get(name) is not None for name in _CACHES) or any(hasattr(a, "get_seq_length") for a in args)


def makes_cache(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call of the whole model gives its blocks a cache: its own, or one that the model makes."""
    if has_cache(args, kwargs):
        return True
    asked = kwargs.get("use_cache")
    if asked is not None:
        return bool(asked)
    config = getattr(model, "config", None)
    get = getattr(config, "get_text_config", None)
    text = get() if callable(get) else config
    if getattr(text, "is_decoder", True) is False and not getattr(config, "is_encoder_decoder", False):
        return False  # encoders have the flag, and no cache
    checkpointed = model.training and any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
    return bool(getattr(text, "use_cache", False)) and not checkpointed


def _wanted(handle: Handle) -> dict[str, str]:
    asked = handle.options.regional
    if asked is False:
        return {}
    blocks = dict(_blocks("", handle.model))
    kinds: dict[tuple[object, ...], str] = {}
    for path, block in blocks.items():
        kinds.setdefault(_kind(path, block), f"{path.rpartition('.')[0]}: {type(block).__name__} {len(kinds)}")
    wanted = {path: kinds[_kind(path, block)] for path, block in blocks.items()}
    return wanted if asked is True or _pays(handle, blocks, len(kinds)) else {}


def _blocks(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The outermost modules that a list holds several of: (path, module)."""
    children = [(f"{path}.{name}".lstrip("."), child) for name, child in module.named_children() if name != "adapters"]
    classes = [type(child) for _, child in children]
    repeats = isinstance(module, _CONTAINERS) and any(classes.count(kind) > 1 for kind in classes)
    for where, child in children:
        if repeats and any(inner != "adapters" for inner, _ in child.named_children()):
            yield where, child
        else:
            yield from _blocks(where, child)


def _kind(path: str, block: nn.Module) -> tuple[object, ...]:
    """Equal for blocks that one graph is likely to serve: of one list, with one class and the same weights' shapes."""
    tensors = [*block.named_parameters(), *block.named_buffers()]
    shapes = [(name, tuple(t.shape), t.dtype) for name, t in tensors if ".adapters." not in f".{name}"]
    return path.rpartition(".")[0], type(block), tuple(shapes)


def _pays(handle: Handle, blocks: Mapping[str, nn.Module], kinds: int) -> bool:
    """Whether capturing by block is faster to compile, and nothing is lost by it."""
    if len(blocks) < max(MANY, ALIKE * kinds) or handle.options.fullgraph or handle.options.backend.mode is not None:
        return False
    if handle.adapters.has_taps or any(_is_hooked(block) for block in blocks.values()):
        return False
    return all(any(f"{site.path}.".startswith(f"{path}.") for path in blocks) for site in handle.sites)


def _is_hooked(block: nn.Module) -> bool:
    """Whether others than we act on the block's call: hooks, as sharding sets them, or a compilation of its own."""
    ours = adapters_of(block) is not None
    hooks = (block._forward_hooks, block._forward_pre_hooks, block._backward_hooks, block._backward_pre_hooks)
    compiled = block.__dict__.get("_compiled_call_impl")
    return ours or any(hooks) or not (compiled is None or isinstance(compiled, BlockPrologue))


__all__ = ["arm", "has_cache", "makes_cache", "run_block"]
