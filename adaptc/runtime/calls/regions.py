"""Regional compilation: a block that repeats is captured once for all its copies.

The model's own forward then runs as it is written, and each block as captured: adapters and weights are inputs of the
graph, so that one serves all layers, and no rewrite reaches across blocks. The other way,
``torch.compiler.nested_compile_region`` within one graph, gave wrong gradients under Inductor (torch 2.13).

Some calls are captured whole: those that give a block a cache (each layer's place in it is a constant of its code), or
that ask for hidden states (which hooks record that transformers sets later). Most can be told before. Where only a
block can see it, that call goes on to its end with the blocks that are left run op by op, and calls of its kind are
captured whole from the next one on: a model whose forward counts, draws or writes does so once a call. A model with a
region that ``lift_no_grad`` is to lift, or whose blocks are no copies of each other, is captured whole at every call.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from adaptc.capture.call import CALL
from adaptc.plan.tree import blocks_of
from adaptc.runtime.calls.alike import values_read
from adaptc.runtime.calls.prologue import Prologue
from adaptc.runtime.calls.state import Calls
from adaptc.transformers_names import LAYER_CACHES, cache_argument, given_cache

#: "auto" captures blocks from this many on, if there are this many of a kind: below it compiling them all is as fast.
MANY = 6
ALIKE = 3


class BlockPrologue(Prologue):
    """The call of one block; ``entry`` names the blocks that are captured with it."""

    #: Whether the block ran op by op when the model last called it, without being captured with the whole model.
    op_by_op = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.owner._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]
        if CALL.depth > 0:
            if not CALL.whole and has_cache(args, kwargs):
                CALL.whole = True
            self.op_by_op = whole = CALL.whole
        else:  # computed again for a backward: as it ran in the forward
            with self.calls.as_differentiated():
                return self._run(self.op_by_op or self.calls.last_was_whole, args, kwargs)
        return self._run(whole, args, kwargs)

    def _run(self, whole: bool, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if whole:
            return self.owner._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]
        return self.calls.block(self.entry)(self.owner, *args, **kwargs)


def run_block(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The frame that is captured: its block is an argument, so that its tensors are inputs of the graph."""
    return block._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]


def arm(calls: Calls) -> dict[str, str]:
    """Let the blocks of the model be captured by themselves, where that is asked for or pays.

    Returns what is captured together, by the path of the block; nothing where the model is captured whole.
    """
    model, armed = calls.adapters.model, {}
    disarm(model)
    for path, name in _wanted(calls).items():
        block = model.get_submodule(path)
        if not isinstance(block.__dict__.get(Prologue.KEY), Prologue):
            BlockPrologue(calls, block, name)
            armed[path] = name
    return armed


def disarm(model: nn.Module) -> None:
    """Let no block be captured by itself."""
    for module in model.modules():
        present = module.__dict__.get(Prologue.KEY)
        if isinstance(present, BlockPrologue):
            present.disarm()


def has_cache(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call is given a cache to read or to fill."""
    return given_cache(kwargs) is not None or any(hasattr(a, "get_seq_length") for a in args)


def caching_stacks(model: nn.Module, paths: Iterable[str]) -> list[nn.Module]:
    """The modules that hold the lists of the blocks at ``paths``, if they may make a cache for these themselves."""
    owners = dict.fromkeys(path.rpartition(".")[0].rpartition(".")[0] for path in paths)
    stacks = [model.get_submodule(owner) for owner in owners]
    caching = [stack for stack in stacks if hasattr(getattr(stack, "config", None), "use_cache")]
    return [s for s in caching if cache_argument(inspect.signature(type(s).forward).parameters) is not None]


def _makes_cache(stack: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether ``stack``, if it is one of transformers, makes a cache in a call of the model with ``kwargs``."""
    config = stack.config
    if not config.use_cache:
        return False
    # State-space models need none in training, and checkpointed layers drop theirs.
    if stack.training and (getattr(stack, "gradient_checkpointing", False) or hasattr(config, "state_size")):
        return False
    if "is_decoder" in vars(stack):
        return bool(stack.is_decoder)
    if not hasattr(stack, "base_model_prefix"):  # part of a class that exists as an encoder too, which makes it
        return kwargs.get("labels") is None and bool(getattr(config, "is_decoder", False))
    # A loss of an encoder and a decoder needs none, and most classes make none then.
    return kwargs.get("labels") is None or not getattr(config, "is_encoder_decoder", False)


def wants_whole(
    model: nn.Module, stacks: Sequence[nn.Module], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> bool:
    """Whether a call of the model says by its arguments, or by configs, that it is to be captured whole."""
    asked = kwargs.get("use_cache")
    if asked or has_cache(args, kwargs) or (asked is None and any(_makes_cache(stack, kwargs) for stack in stacks)):
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


def _wanted(calls: Calls) -> dict[str, str]:
    asked = calls.options.regional
    if asked is False or calls.epoch.lifts or (asked == "auto" and calls.copies_differ):
        return {}
    blocks = dict(blocks_of(calls.adapters.model))
    kinds: dict[tuple[object, ...], str] = {}
    wanted = {
        path: kinds.setdefault(_kind(path, block), f"{path.rpartition('.')[0]}: {type(block).__name__} {len(kinds)}")
        for path, block in blocks.items()
    }
    return wanted if asked is True or _pays(calls, blocks, wanted) else {}


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


def copies(model: nn.Module, names: Mapping[str, str], name: str) -> tuple[dict[str, nn.Module], int]:
    """The blocks called ``name`` by their path, and for how many kinds of them Dynamo would make a graph each."""
    blocks = {path: model.get_submodule(path) for path, other in names.items() if other == name}
    return blocks, len(set(values_read(blocks, LAYER_CACHES).values()))


def _pays(calls: Calls, blocks: Mapping[str, nn.Module], names: Mapping[str, str]) -> bool:
    """Whether capturing by block is faster to compile, and nothing is lost by it."""
    if len(blocks) < MANY or calls.options.fullgraph or calls.options.backend.mode is not None:
        return False
    if calls.adapters.has_taps or any(_is_hooked(block) for block in blocks.values()):
        return False
    # A forward of an instance is a constant of its code: every layer would be compiled.
    if any("forward" in inner.__dict__ for block in blocks.values() for inner in block.modules()):
        return False
    if len(blocks) < ALIKE * sum(copies(calls.adapters.model, names, name)[1] for name in set(names.values())):
        return False
    outside = [s for s in calls.adapters.sites if not any(f"{s.path}.".startswith(f"{path}.") for path in blocks)]
    # A head that is trained in full is an ordinary layer: nothing of it would be rewritten.
    return all(adapter.replaces_forward for site in outside for adapter in site.adapters.values())


def _is_hooked(block: nn.Module) -> bool:
    """Whether others than we act on the block's call: hooks, as sharding sets them, or a compilation of its own."""
    compiled = block.__dict__.get("_compiled_call_impl")
    return any(_hooks(block)) or not (compiled is None or isinstance(compiled, BlockPrologue))
