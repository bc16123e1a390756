"""Regional compilation: a block that repeats is captured once for all its copies.

The model's own forward then runs as it is written, and each block as captured: adapters and weights are inputs of the
graph, so that one serves all layers, and no rewrite reaches across blocks. The other way,
``torch.compiler.nested_compile_region`` within one graph, gave wrong gradients under Inductor (torch 2.13).

Some calls are captured whole: those that give a block a cache (each layer's place in it is a constant of its code), or
that ask for hidden states (which hooks record that transformers sets later). What only a block can see is told by
``CaptureWhole``. A model with a region that ``lift_no_grad`` is to lift is captured whole at every call.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from adaptc.runtime.attach import CALL
from adaptc.runtime.prologue import Prologue
from adaptc.transformers_names import given_cache

if TYPE_CHECKING:
    from adaptc.runtime.handle import Handle

#: "auto" captures blocks from this many on, if there are this many of a kind: below it compiling them all is as fast.
MANY = 6
ALIKE = 3

_CONTAINERS = (nn.ModuleList, nn.Sequential)


class CaptureWhole(BaseException):
    """Raised by a block, past what the model itself catches: the call in progress is to be captured whole."""


class BlockPrologue(Prologue):
    """The call of one block; ``entry`` names the blocks that are captured with it."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Outside of a call of the model it is computed again for a backward: as it ran in the forward.
        whole = CALL.whole if CALL.depth > 0 else self.handle.captures.last_was_whole
        if torch.compiler.is_compiling() or whole:
            return self.owner._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]
        if CALL.depth > 0 and has_cache(args, kwargs):
            raise CaptureWhole
        return self.handle.captures.block(self.entry)(self.owner, *args, **kwargs)


def run_block(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The frame that is captured: its block is an argument, so that its tensors are inputs of the graph."""
    return block._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]


def arm(handle: Handle) -> dict[str, str]:
    """Let the blocks of the model be captured by themselves, where that is asked for or pays.

    Returns what is captured together, by the path of the block; nothing where the model is captured whole.
    """
    for module in handle.model.modules():
        present = module.__dict__.get(Prologue.KEY)
        if isinstance(present, BlockPrologue):
            present.disarm()
    armed = {}
    for path, name in _wanted(handle).items():
        block = handle.model.get_submodule(path)
        if not isinstance(block.__dict__.get(Prologue.KEY), Prologue):
            BlockPrologue(handle, block, name)
            armed[path] = name
    return armed


def has_cache(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call is given a cache to read or to fill."""
    return given_cache(kwargs) is not None or any(hasattr(a, "get_seq_length") for a in args)


def wants_whole(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call of the model says by its arguments, or the model's config, that it is to be captured whole."""
    if has_cache(args, kwargs) or kwargs.get("use_cache"):
        return True
    config = getattr(model, "config", None)
    return any(
        bool(_setting(config, name) if kwargs.get(name) is None else kwargs[name])
        for name in ("output_hidden_states", "output_attentions")
    )


def kind_of_call(model: nn.Module, kwargs: Mapping[str, Any]) -> tuple[object, ...]:
    """Equal for calls of which all are captured whole when one was found to need it."""
    asked = kwargs.get("use_cache"), _setting(getattr(model, "config", None), "use_cache")
    return *asked, model.training, torch.is_grad_enabled()


def _setting(config: object, name: str) -> Any:
    """``config.name`` or None. From its ``__dict__`` where it is there: transformers' own way takes microseconds."""
    own = getattr(config, "__dict__", {})
    return own[name] if name in own else getattr(config, name, None)


def _wanted(handle: Handle) -> dict[str, str]:
    asked = handle.options.regional
    if asked is False or handle.captures.lifts:
        return {}
    blocks = dict(_blocks("", handle.model))
    kinds: dict[tuple[object, ...], str] = {}
    wanted = {
        path: kinds.setdefault(_kind(path, block), f"{path.rpartition('.')[0]}: {type(block).__name__} {len(kinds)}")
        for path, block in blocks.items()
    }
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
    """Equal for blocks that one graph may serve: of one list and class, with weights of the same shapes, and with hooks
    and replaced forwards at the same places. Dynamo does not guard on a hook that is not there."""
    tensors = [*block.named_parameters(), *block.named_buffers()]
    shapes = [(name, tuple(t.shape), t.dtype) for name, t in tensors if ".adapters." not in f".{name}"]
    acted = [
        (name, "forward" in module.__dict__, *map(len, _hooks(module)))
        for name, module in block.named_modules()
        if "forward" in module.__dict__ or any(_hooks(module))
    ]
    return path.rpartition(".")[0], type(block), tuple(shapes), tuple(acted)


def _hooks(module: nn.Module) -> tuple[Mapping[int, Any], ...]:
    return (
        module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks,
    )  # fmt: skip


def _pays(handle: Handle, blocks: Mapping[str, nn.Module], kinds: int) -> bool:
    """Whether capturing by block is faster to compile, and nothing is lost by it."""
    if len(blocks) < max(MANY, ALIKE * kinds) or handle.options.fullgraph or handle.options.backend.mode is not None:
        return False
    if handle.adapters.has_taps or any(_is_hooked(block) for block in blocks.values()):
        return False
    # A forward of an instance is a constant of its code: every layer would be compiled.
    if any("forward" in inner.__dict__ for block in blocks.values() for inner in block.modules()):
        return False
    outside = [s for s in handle.sites if not any(f"{s.path}.".startswith(f"{path}.") for path in blocks)]
    # A head that is trained in full is an ordinary layer: nothing of it would be rewritten.
    return all(adapter.replaces_forward for site in outside for adapter in site.adapters.values())


def _is_hooked(block: nn.Module) -> bool:
    """Whether others than we act on the block's call: hooks, as sharding sets them, or a compilation of its own."""
    compiled = block.__dict__.get("_compiled_call_impl")
    return any(_hooks(block)) or not (compiled is None or isinstance(compiled, BlockPrologue))


__all__ = ["CaptureWhole", "arm", "kind_of_call", "run_block", "wants_whole"]
