"""Contexts and callbacks in which ops compute, are watched or recorded, and what is traced in them."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from adaptc.torch_internals.inductor import inductor_decompositions
from adaptc.torch_internals.values import fake_mode_of, tree_leaves


@contextlib.contextmanager
def autograd_again() -> Iterator[None]:
    """A context in which operations are recorded for differentiation, also inside an op's kernel that a dispatch
    mode called: there autograd is switched off for the thread. 2.11 to 2.15."""
    included, excluded = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradFunctionality", "ADInplaceOrView"):
        excluded = excluded.remove(getattr(torch._C.DispatchKey, key))
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        yield


def watch_calls(on_call: Callable[[Any, tuple[Any, ...], dict[str, Any], Any], None]) -> Any:
    """A context that reports every ATen call: (op, args, kwargs, output). 2.11 to 2.15."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            output = func(*args, **(kwargs or {}))
            on_call(func, args, kwargs or {}, output)
            return output

    return Watch()  # type: ignore[no-untyped-call]


def fake_inputs() -> Any:
    """A context in which tensors are made, and ops computed, without values; real ones stand for their shapes. 2.11 to
    2.15."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


def replace_calls(run: Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]) -> Any:
    """A context in which ``run(op, args, kwargs)`` is called instead of every ATen op. 2.11 to 2.15."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Replace(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return run(func, args, kwargs or {})

    return Replace()  # type: ignore[no-untyped-call]


def ambient_modes() -> Callable[[], contextlib.AbstractContextManager[None]]:
    """What a compilation reads of torch's modes, as it is now: makes a context in which it is so again. What is so
    anyway is not touched. 2.11 to 2.15."""
    from torch._functorch import config

    grad, caches, deterministic = torch.is_grad_enabled(), torch.is_autocast_cache_enabled(), _deterministic()
    casts = {device: _autocast_of(device) for device in ("cpu", "cuda")}
    attention, budget = _attention_kernels(), config.activation_memory_budget

    @contextlib.contextmanager
    def again() -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(grad))
            stack.enter_context(config.patch(activation_memory_budget=budget))
            for device, (enabled, dtype) in casts.items():
                if (enabled, dtype) != _autocast_of(device):
                    stack.enter_context(torch.autocast(device, dtype, enabled, caches))
            if deterministic != _deterministic():
                stack.enter_context(_deterministic_as(*deterministic))
            if attention != _attention_kernels():
                stack.enter_context(torch.nn.attention.sdpa_kernel(attention))
            yield

    return again


def _autocast_of(device: str) -> tuple[bool, torch.dtype]:
    return torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)


def _attention_kernels() -> list[Any]:
    from torch.nn.attention import _cur_sdpa_kernel_backends

    return list(_cur_sdpa_kernel_backends())


def _deterministic() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


@contextlib.contextmanager
def _deterministic_as(mode: bool, warn_only: bool) -> Iterator[None]:
    """torch sets Inductor's own option with its own, which may have been set by itself."""
    from torch._inductor import config

    before, inductors = _deterministic(), config.deterministic
    torch.use_deterministic_algorithms(mode, warn_only=warn_only)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        config.deterministic = inductors


@contextlib.contextmanager
def real_tensors() -> Iterator[None]:
    """A context in which ops compute, inside a compilation that traces with fake tensors. 2.11 to 2.15."""
    from torch._dispatch.python import no_python_dispatcher
    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes(), no_python_dispatcher():
        yield


def saves_through_hooks() -> bool:
    """Whether autograd's saved tensors pass through hooks now, as they do under checkpointing. 2.11 to 2.15."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def is_in_backward() -> bool:
    """Whether autograd calls this code. 2.11 to 2.15."""
    return bool(torch._C._current_graph_task_id() != -1)


def queue_after_backward(callback: Callable[[], None]) -> None:
    """Call ``callback`` when the backward that is running has ended. 2.11 to 2.15."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)


def reparametrize(module: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> Any:
    """A context in which ``module`` computes with ``tensors`` instead of its own. 2.11 to 2.15."""
    from torch.nn.utils import stateless

    return stateless._reparametrize_module(module, dict(tensors))


def trace_with_leaves(root: torch.nn.Module, functions: Sequence[Callable[..., Any]]) -> fx.Graph:
    """The graph of ``root``'s forward, in which calls of ``functions`` are single nodes.

    fx looks for them in the modules of one list only; theirs are added to it. 2.11 to 2.15.
    """
    tracer = fx.Tracer(autowrap_functions=tuple(functions))
    tracer._autowrap_search.extend(sys.modules[name] for name in {f.__module__ for f in functions})
    return tracer.trace(root)


def trace_body(run: Callable[..., Any], values: Sequence[Any]) -> fx.Graph:
    """The ATen calls that ``run`` makes on fake ``values``, in Inductor's decompositions. 2.11 to 2.15."""
    from torch.fx.experimental.proxy_tensor import make_fx

    with fake_mode_of(tree_leaves(list(values))), torch.no_grad():
        traced = make_fx(run, decomposition_table=inductor_decompositions())(*values)
    for node in list(traced.graph.nodes):
        if node.target in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            node.replace_all_uses_with(node.args[0])
            traced.graph.erase_node(node)
    traced.graph.eliminate_dead_code()
    return traced.graph


def lazy_graph_module(root: fx.GraphModule, graph: fx.Graph) -> fx.GraphModule:
    """A graph module that writes its code at first use. 2.11 to 2.15."""
    from torch.fx._lazy_graph_module import _LazyGraphModule

    return _LazyGraphModule(root, graph)
