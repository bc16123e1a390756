"""Inductor's passes, options and scheduler."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx

from adaptc.errors import UnsupportedError
from adaptc.torch_internals.values import node_value

#: Inductor's option for passes on the joint graph.
_JOINT = "joint_custom_pre_pass"


def compile_with_inductor(
    gm: fx.GraphModule, inputs: Sequence[Any], patches: Mapping[str, Any], joint_pass: Any, last_pass: Any
) -> Callable[..., Any]:
    """Compile with Inductor, running ``joint_pass`` on the joint graph before partitioning and ``last_pass`` on the
    forward's and the backward's graph at the end of Inductor's own passes. 2.11 to 2.15.

    A pass already set in Inductor's config runs first.
    """
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx

    merged = dict(patches)
    for key, one in ((_JOINT, joint_pass), ("post_grad_custom_post_pass", last_pass)):
        merged[key] = graph_pass(one, patches.get(key, getattr(config, key)))
    compiled: Any = compile_fx(gm, list(inputs), config_patches=merged)
    return compiled  # type: ignore[no-any-return]


class _SeenEnough(Exception):  # noqa: N818 - it is no error
    """Ends a compilation of which only the joint graph is wanted."""


def show_joint_graph(
    gm: fx.GraphModule, inputs: Sequence[Any], patches: Mapping[str, Any], joint_pass: Callable[[fx.Graph], None]
) -> None:
    """Call ``joint_pass`` with the graphs that :func:`compile_with_inductor` gives it, and compile nothing. ``inputs``:
    fake tensors and sizes. 2.11 to 2.15."""
    from torch._functorch import config as functorch_config
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx

    ended = False

    def end(*_: Any, **__: Any) -> Any:
        nonlocal ended
        ended = True
        raise _SeenEnough

    merged = {**patches, _JOINT: graph_pass(joint_pass, patches.get(_JOINT, getattr(config, _JOINT)))}
    try:
        with functorch_config.patch(enable_autograd_cache=False, enable_remote_autograd_cache=False):
            compile_fx(gm, list(inputs), inner_compile=end, config_patches=merged)
    except Exception:
        if not ended:
            raise


def runs_joint_passes(patches: Mapping[str, Any]) -> bool:
    """Whether Inductor is to run passes on joint graphs at all. 2.11 to 2.15."""
    from torch._inductor import config

    return bool(patches.get("use_joint_graph_passes", config.use_joint_graph_passes))


def graph_pass(own: Any, before: Any) -> Any:
    """Wrap a ``(graph) -> None`` pass with a ``uuid()``, None where its result is not to be kept in a cache, as
    Inductor's CustomGraphPass. 2.11 to 2.15."""
    from torch._inductor.custom_graph_pass import CustomGraphPass

    earlier = list(before) if isinstance(before, list | tuple) else [before] if before is not None else []

    class GraphPass(CustomGraphPass):
        def __call__(self, graph: fx.Graph) -> None:
            for one in earlier:
                one(graph)
            own(graph)

        def uuid(self) -> Any:
            ids = [getattr(one, "uuid", lambda: None)() for one in (*earlier, own)]
            # A neighbour without a uuid makes the whole chain uncacheable, as Inductor itself decides.
            return None if any(i is None for i in ids) else tuple(ids)

    return GraphPass()


def inductor_mode_options(mode: str | None) -> dict[str, Any]:
    """What ``torch.compile(mode=...)`` sets in Inductor's config. 2.11 to 2.15.

    Raises:
        UnsupportedError: no such mode.
    """
    if mode in (None, "default"):
        return {}
    from torch._inductor import list_mode_options

    known = ["default", *list_mode_options()]
    if mode not in known:
        raise UnsupportedError(f"no compile mode named {mode!r}", found=", ".join(dict.fromkeys(known)))
    return dict(list_mode_options(mode))


def inductor_missing() -> str | None:
    """Why Inductor cannot generate CPU code here, or None: it needs a C++ compiler. 2.11 to 2.15."""
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler

        get_cpp_compiler()
    except Exception as error:  # torch raises several types here, some of them generated
        return f"{type(error).__name__}: {error}".split("\n")[0]
    return None


def inductor_decompositions() -> dict[Any, Callable[..., Any]]:
    """The decompositions that Inductor applies while tracing the joint graph. 2.11 to 2.15."""
    from torch._inductor.decomposition import select_decomp_table

    return dict(select_decomp_table())


def writes_products() -> bool:
    """Whether Inductor is to choose among templates of its own for products on a GPU. 2.11 to 2.15."""
    from torch._inductor import config

    return bool(config.max_autotune or config.max_autotune_gemm)


def demand_layouts(node: fx.Node) -> None:
    """Have Inductor give ``node``, of an op that is not its own, arguments with the strides of their fake tensors: it
    asks nothing for nodes that a pass made, and lays out what a loop writes as it likes. 2.11 to 2.15."""
    node.meta["eager_input_vals"] = fx.node.map_arg((node.args, node.kwargs), node_value)


@functools.cache
def order_reads_after_writes() -> None:
    """Have Inductor's scheduler run a loop behind the write in place whose result it reads, from now on.

    It knows such a read by another name of the buffer. Where it computes a loop's sizes again, to run it together with
    one of another shape, 2.13 forgets that name, and may put the loop before the write. 2.11 to 2.15.
    """
    from torch._inductor.scheduler import SchedulerNode

    recompute = SchedulerNode.recompute_size_and_body

    @functools.wraps(recompute)
    def recompute_in_order(self: Any, *args: Any, **kwargs: Any) -> None:
        recompute(self, *args, **kwargs)
        self.set_read_writes(self.read_writes.rename(self.mutation_renames))

    SchedulerNode.recompute_size_and_body = recompute_in_order  # type: ignore[method-assign]


def cache_dir() -> str:
    """The directory of Inductor's caches, which a user may have set. 2.11 to 2.15."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir as inductors

    return inductors()
