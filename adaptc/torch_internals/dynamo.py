"""How Dynamo captures a frame, and what it notes on the graph."""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import types
from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any

import torch
from packaging.version import Version
from torch import fx

from adaptc.errors import UnsupportedError
from adaptc.torch_internals.values import is_fake, node_value

TORCH = Version(torch.__version__.split("+")[0])


def compile_isolated(
    fn: Callable[..., Any],
    *,
    backend: Callable[..., Any],
    recompile_limit: int,
    unneeded: Callable[[list[tuple[str, str]]], list[bool]],
    **options: Any,
) -> Callable[..., Any]:
    """``torch.compile`` with cache entries of its own: equal code elsewhere does not use up the limit.

    ``unneeded``: of each guard, by its kind (``TYPE_MATCH``) and its source as Python text, whether the outermost frame
    does without it.

    2.13 has arguments for it. Before, a fresh code object isolates the outermost frame, and for the frames behind graph
    breaks the limit is raised around each call. On any version a fresh code object is a frame of its own in Dynamo's
    counts. Read on 2.11 to 2.15, run on 2.13.

    A frame behind a graph break may serve several modules of one class: such frames guard on hooks that are not there
    too, as torch's do not. Guards of the outermost frame are only as many as they have to be: it runs at every call.
    """
    assert isinstance(fn, types.FunctionType)
    fresh = types.FunctionType(
        fn.__code__.replace(), fn.__globals__, fn.__name__, fn.__defaults__, fn.__closure__
    )
    behind = _BehindBreaks(fresh.__code__, backend, unneeded)
    if Version("2.13") <= TORCH:
        options = {"recompile_limit": recompile_limit, "isolate_recompiles": True, **options}
    else:
        behind.expect(recompile_limit=recompile_limit)
    compiled = torch.compile(fresh, backend=behind, **options)

    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        with behind.guards():
            return compiled(*args, **kwargs)

    return call


class _BehindBreaks:
    """A backend that lets Dynamo guard on hooks that are not there, in all frames but the outermost; from that one it
    takes the guards that it does without."""

    def __init__(
        self,
        outermost: types.CodeType,
        backend: Callable[..., Any],
        unneeded: Callable[[list[tuple[str, str]]], list[bool]],
    ) -> None:
        self.outermost, self.backend, self.unneeded = outermost, backend, unneeded
        #: Dynamo's settings around each call, once there are such frames.
        self.settings: dict[str, Any] = {}
        self._now = contextlib.ExitStack()

    def expect(self, **settings: Any) -> None:
        self.settings = {"skip_nnmodule_hook_guards": False, **settings}

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        # Dynamo makes the guards of this frame when its backend has returned.
        if _frame_in_progress() is self.outermost:
            _drop_guards(self.unneeded)
        elif not self.settings:
            self.expect()
            self._now.enter_context(torch._dynamo.config.patch(self.settings))
        return self.backend(gm, inputs)  # type: ignore[no-any-return]

    def guards(self) -> Any:
        """A context for a call of the outermost frame."""
        return torch._dynamo.config.patch(self.settings) if self.settings else self._now


def _drop_guards(unneeded: Callable[[list[tuple[str, str]]], list[bool]]) -> None:
    """Take from the guards of the frame that Dynamo is compiling those that it does without. 2.11 to 2.15."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    guards = InstructionTranslator.current_tx().output.guards.inner
    every = list(guards)
    drops = unneeded([(guard.create_fn_name(), str(guard.name)) for guard in every])
    guards.difference_update(itertools.compress(every, drops))


def _frame_in_progress() -> types.CodeType:
    """The code of the frame that Dynamo is compiling. 2.11 to 2.15."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    code: types.CodeType = InstructionTranslator.current_tx().output.root_tx.f_code
    return code


class RecompileLimitWatch:
    """Collects the messages of frames that hit their recompile limit inside the block.

    Dynamo then runs the frame eagerly and only logs it; there is no callback. Read on 2.11 to 2.15.
    """

    _logger = logging.getLogger("torch._dynamo.convert_frame")

    def __enter__(self) -> list[str]:
        self.messages: list[str] = []
        self._logger.addFilter(self)
        return self.messages

    def __exit__(self, *_: object) -> None:
        self._logger.removeFilter(self)

    def filter(self, record: logging.LogRecord) -> bool:
        """Called by the logger; lets every message through."""
        if "torch._dynamo hit config." in str(record.msg):
            self.messages.append(record.getMessage())
        return True


def compile_id() -> tuple[int, int] | None:
    """(frame, compilation of that frame) of the compilation in progress; None outside one. 2.11 to 2.15."""
    current = torch._guards.CompileContext.current_compile_id()
    if current is None or current.frame_id is None or current.frame_compile_id is None:
        return None
    return current.frame_id, current.frame_compile_id


def graph_break_reason(gm: fx.GraphModule) -> str | None:
    """Why Dynamo ended this graph here, when it ended before the frame did. 2.11 to 2.15."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    if reason is None or not getattr(reason, "graph_break", False):
        return None
    where = ""
    if reason.user_stack:
        frame = reason.user_stack[-1]
        where = f" ({frame.filename}:{frame.lineno})"
    return str(reason.reason).split("\n")[0] + where


def carry_capture_metadata(source: fx.GraphModule, copy: fx.GraphModule) -> None:
    """Give a copy of Dynamo's graph what AOTAutograd looks for: parameter sources and compile id.

    Without them inputs are not known to be static and aliased inputs are not guarded. 2.11 to 2.15.
    """
    copy.meta.update(source.meta)
    for name in ("_param_name_to_source", "_backend_id"):
        if hasattr(source, name):
            setattr(copy, name, getattr(source, name))
    if hasattr(source, "compile_subgraph_reason"):
        copy.compile_subgraph_reason = source.compile_subgraph_reason
    for old, new in zip(source.graph.nodes, copy.graph.nodes, strict=True):
        if old.op == "placeholder" and hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source
            new.meta[_SOURCE] = source_name(old)


#: Metadata key of :func:`source_name`: unlike the attribute it outlives copies of the graph.
_SOURCE = "adaptc_source"


def source_name(placeholder: fx.Node) -> str | None:
    """Where Dynamo read a graph input, as Python text (``L['self']...``). 2.11 to 2.15."""
    source = getattr(placeholder, "_dynamo_source", None)
    if source is None:
        return placeholder.meta.get(_SOURCE)
    return str(getattr(source, "name", None) or source)


def keep_source_name(placeholder: fx.Node, source: str | None) -> None:
    """Note on a copied graph input where Dynamo read it."""
    placeholder.meta[_SOURCE] = source


def lookup_backend(name: str) -> Callable[..., Any]:
    """A Dynamo backend by name. 2.11 to 2.15.

    Raises:
        UnsupportedError: no such backend.
    """
    from torch._dynamo.exc import InvalidBackend

    try:
        found = torch._dynamo.lookup_backend(name)
    except InvalidBackend as error:
        known = ", ".join(torch.compiler.list_backends(exclude_tags=()))
        raise UnsupportedError(f"no compile backend named {name!r}", found=known) from error
    return found


def reset_dynamo() -> None:
    """Forget every compiled frame of this process. Public name, listed here with its relatives."""
    torch.compiler.reset()


def active_data_parallel() -> torch.nn.parallel.DistributedDataParallel | None:
    """The ``DistributedDataParallel`` module whose forward is running, or None. 2.11 to 2.15."""
    return torch.nn.parallel.DistributedDataParallel._active_ddp_module


def data_parallel_parameters(ddp: torch.nn.parallel.DistributedDataParallel) -> set[int]:
    """``id`` of every parameter that ``DistributedDataParallel`` found when it was made. 2.11 to 2.15."""
    return {id(parameter) for parameter in ddp._module_parameters}


def fake_of(values: Sequence[Any], tensor: torch.Tensor) -> torch.Tensor | None:
    """The fake tensor that stands for ``tensor`` where the fakes among ``values`` come from, if it has one.

    A backend gets real inputs, but for the parts into which Dynamo cuts a graph for ``DistributedDataParallel``: their
    inputs are fake. 2.11 to 2.15.
    """
    mode = next((value.fake_mode for value in values if is_fake(value)), None)
    return None if mode is None else mode.fake_tensor_converter._get_memo(tensor)


def traced_inputs(gm: fx.GraphModule, inputs: Sequence[Any]) -> list[Any]:
    """What a compiler that is given a captured graph with ``inputs`` traces it with: fake tensors, and sizes.

    Dynamo's own, at the graph's inputs, are as its tracing left them: writes may have changed them. 2.11 to 2.15.
    """
    context = torch._guards.TracingContext.try_get()
    mode = None if context is None else context.fake_mode
    found = []
    placeholders = (node for node in gm.graph.nodes if node.op == "placeholder")
    for node, value in zip(placeholders, inputs, strict=True):
        fake = value
        if isinstance(value, torch.Tensor) and not is_fake(value):
            known = None if mode is None else mode.fake_tensor_converter._get_memo(value)
            fake = node_value(node) if known is None else known
        found.append(fake)
    return found


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """A block that does not run while another thread compiles: what tracing notes is the process's. 2.11 to 2.15."""
    from torch._dynamo.convert_frame import compile_lock

    with compile_lock:
        yield


def tracing_attempt() -> Any:
    """An object that stands for this attempt at capturing a frame: all parts of one graph have it in common.
    2.11 to 2.15."""
    return torch._guards.TracingContext.try_get()


def is_of_data(error: Exception) -> bool:
    """Whether an error of a compiler says that a size, or another number that it needs, is only known from data. 2.11
    to 2.15."""
    from torch._dynamo.exc import exceptions_allowed_to_be_fallback

    return isinstance(error, exceptions_allowed_to_be_fallback)


def users_functions(gm: fx.GraphModule, ours: Container[Any]) -> list[str]:
    """Names of the functions that users let into a graph or its bodies by ``allow_in_graph``; not those in ``ours``."""
    graphs = (module.graph for module in gm.modules() if isinstance(module, fx.GraphModule))
    targets = dict.fromkeys(node.target for graph in graphs for node in graph.nodes)
    functions = (target for target in targets if isinstance(target, types.FunctionType) and target not in ours)
    return [f.__name__ for f in functions if f.__module__.partition(".")[0] != "torch"]


def let_frame_break() -> str:
    """Let Dynamo run the frame that is compiled as it is, and compile what it calls, when the backend raises an error
    of :func:`is_of_data`; returns where the frame's code is.

    Dynamo does so by itself unless the graph has functions of ``allow_in_graph``, of which it does not know whether
    they run outside a graph. 2.11 to 2.15.
    """
    from torch._dynamo.symbolic_convert import InstructionTranslator

    output = InstructionTranslator.current_tx().output
    output.has_user_defined_allowed_in_graph = False
    code = _frame_in_progress()
    return f"{code.co_name} ({code.co_filename}:{code.co_firstlineno})"


def note_aot_call() -> None:
    """Count a call of AOTAutograd as its own wrapper for backends does.

    Where Dynamo cuts a graph for ``DistributedDataParallel`` it tells by this counter that the first call of a part
    is to return fake tensors. 2.11 to 2.15.
    """
    torch._dynamo.utils.counters["aot_autograd"]["total"] += 1


def grad_switch(node: fx.Node) -> bool | fx.Node | None:
    """Whether a node of a captured graph switches gradients on or off; the node that it undoes, of one that ends
    ``torch.inference_mode``; None when it does neither. 2.11 to 2.15."""
    if node.target is torch._C._set_grad_enabled:
        return bool(node.args[0])
    if node.target is torch.autograd.grad_mode._enter_inference_mode:
        return not node.args[0]
    if node.target is torch.autograd.grad_mode._exit_inference_mode:
        entered = node.args[0]
        assert isinstance(entered, fx.Node)  # as Dynamo writes it
        return entered
    return None


def without_size_memory() -> Any:
    """A context in which Dynamo neither learns from the sizes it sees nor uses what it learned: a size that
    changes between two captures of one frame becomes symbolic, for the whole process. 2.11 to 2.15."""
    return torch._dynamo.config.patch(automatic_dynamic_shapes=False)


def state_across_modules() -> Any:
    """A context in which a checkpointed block may keep a value between two of its modules and drop it again.

    Dynamo refuses what it cannot repeat in the recomputation; a value that does not outlive the block is no such thing.
    2.11 to 2.15.
    """
    return torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True)


def global_module_hooks() -> dict[str, dict[int, Any]]:
    """torch's own dicts of the hooks that run for every module, by kind. 2.11 to 2.15."""
    from torch.nn.modules import module

    kinds = ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")
    return {kind: getattr(module, f"_global_{kind}") for kind in kinds}
