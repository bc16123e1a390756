"""Every private import of torch, one function per use, each with the versions its source was read on.

Importing this file never fails; using a hook that the installed torch lacks raises an error that names it.
No other file of the package may import ``torch._*`` (a test enforces it).
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib
import logging
import os
import platform
import signal
import sys
import threading
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from packaging.version import Version
from torch import fx

from adaptc.errors import AdaptcWarning, UnsupportedError

TORCH = Version(torch.__version__.split("+")[0])

#: What a graph node calls: a registered op, an op with all its overloads, an op that takes functions. These
#: types have no public name. 2.11 to 2.15.
OpOverload = torch._ops.OpOverload
OpOverloadPacket = torch._ops.OpOverloadPacket
HigherOrderOperator = torch._ops.HigherOrderOperator


def tree_leaves(tree: Any) -> list[Any]:
    """Everything in nested lists, tuples and dicts, in order. 2.11 to 2.15."""
    return torch.utils._pytree.tree_leaves(tree)


def compile_isolated(
    fn: Callable[..., Any], *, backend: Callable[..., Any], recompile_limit: int, **options: Any
) -> Callable[..., Any]:
    """``torch.compile`` with cache entries of its own: equal code elsewhere does not use up the limit.

    2.13 has arguments for it. Before, a fresh code object isolates the outermost frame, and the limit for the
    frames behind graph breaks is raised around each call. On any version a fresh code object is a frame of its
    own in Dynamo's counts. Read on 2.11 to 2.15, run on 2.13.
    """
    assert isinstance(fn, types.FunctionType)
    fresh = types.FunctionType(
        fn.__code__.replace(), fn.__globals__, fn.__name__, fn.__defaults__, fn.__closure__
    )
    if Version("2.13") <= TORCH:
        isolated: dict[str, Any] = {"recompile_limit": recompile_limit, "isolate_recompiles": True, **options}
        return torch.compile(fresh, backend=backend, **isolated)
    compiled = torch.compile(fresh, backend=backend, **options)

    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        with torch._dynamo.config.patch(recompile_limit=recompile_limit):
            return compiled(*args, **kwargs)

    return call


class _LimitCounter(logging.Filter):
    """Counts Dynamo's own messages about a recompile limit; lets every message through."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def filter(self, record: logging.LogRecord) -> bool:
        if "torch._dynamo hit config." in str(record.msg):
            self.messages.append(record.getMessage())
        return True


@contextlib.contextmanager
def watch_recompile_limit() -> Iterator[list[str]]:
    """Collects the messages of frames that hit their recompile limit inside the block.

    Dynamo then runs the frame eagerly and only logs it; there is no callback. Read on 2.11 to 2.15.
    """
    logger = logging.getLogger("torch._dynamo.convert_frame")
    counter = _LimitCounter()
    logger.addFilter(counter)
    try:
        yield counter.messages
    finally:
        logger.removeFilter(counter)


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


#: Metadata key of :func:`mark_backward`.
_BACKWARD = "adaptc_backward"
#: Metadata key of :func:`source_name`: unlike the attribute it outlives copies of the graph.
_SOURCE = "adaptc_source"


def source_name(placeholder: fx.Node) -> str | None:
    """Where Dynamo read a graph input, as Python text (``L['self']...``). 2.11 to 2.15."""
    source = getattr(placeholder, "_dynamo_source", None)
    if source is None:
        return placeholder.meta.get(_SOURCE)
    return str(getattr(source, "name", None) or source)


def keep_source_name(placeholder: fx.Node, source: str) -> None:
    """Note on a copied graph input where Dynamo read it."""
    placeholder.meta[_SOURCE] = source


def trace_with_leaves(root: torch.nn.Module, functions: Sequence[Callable[..., Any]]) -> fx.Graph:
    """The graph of ``root``'s forward, in which calls of ``functions`` are single nodes.

    fx looks for them in the modules of one list only; theirs are added to it. 2.11 to 2.15.
    """
    tracer = fx.Tracer(autowrap_functions=tuple(functions))
    tracer._autowrap_search.extend(sys.modules[name] for name in {f.__module__ for f in functions})
    return tracer.trace(root)


@contextlib.contextmanager
def autograd_again() -> Iterator[None]:
    """A context in which operations are recorded for differentiation, also inside an op's kernel that a dispatch
    mode called: there autograd is switched off for the thread. 2.11 to 2.15."""
    included, excluded = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradFunctionality", "ADInplaceOrView"):
        excluded = excluded.remove(getattr(torch._C.DispatchKey, key))
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        yield


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


def as_fake(mode: Any, value: Any) -> Any:
    """A tensor as a fake one of ``mode``, anything else as it is. 2.11 to 2.15."""
    return mode.from_tensor(value) if isinstance(value, torch.Tensor) and not is_fake(value) else value


def name_joint_inputs(joint: fx.GraphModule, sources: Sequence[str | None]) -> None:
    """Note on the inputs of AOTAutograd's graph where they came from; ``sources``: those of the captured graph.

    AOTAutograd may merge or reorder inputs, and takes a tensor subclass (a quantised weight) apart; its descriptors
    say which is which. 2.11 to 2.15.
    """
    for node in joint.graph.nodes:
        described = node.meta.get("desc") if node.op == "placeholder" else None
        inner = ""
        while (base := getattr(described, "base", None)) is not None:
            described, inner = base, f".{getattr(described, 'attr', '')}{inner}"
        index = getattr(described, "idx", None)
        if index is not None and index < len(sources):
            source = sources[index]
            node.meta[_SOURCE] = source and source + inner


def gradient_inputs(joint: fx.GraphModule) -> list[fx.Node | None] | None:
    """For each result of AOTAutograd's joint graph, the input whose gradient it is; None for outputs of the model, and
    for a tensor subclass, which has several inputs. None where nothing is known of the results. 2.11 to 2.15."""
    output = next(n for n in joint.graph.nodes if n.op == "output")
    described = output.meta.get("desc")
    results = output.args[0]
    if not isinstance(results, list | tuple) or not isinstance(described, list | tuple):
        return None
    if len(described) != len(results):
        return None
    inputs = {n.meta["desc"]: n for n in joint.graph.nodes if n.op == "placeholder" and "desc" in n.meta}
    return [inputs.get(getattr(one, "grad_of", None)) for one in described]


def keeps_inputs(joint: fx.GraphModule) -> bool:
    """Whether the backward of AOTAutograd's joint graph finds its inputs as the forward did: the forward writes to none
    of them, in the graph or, by a result that is copied, behind it. False where nothing is known. 2.11 to 2.15."""
    calls = (n.target for n in joint.graph.nodes if isinstance(n.target, OpOverload))
    output = next(n for n in joint.graph.nodes if n.op == "output")
    described, results = output.meta.get("desc"), output.args[0]
    if any(target._schema.is_mutable for target in calls) or not isinstance(described, list | tuple):
        return False
    if not isinstance(results, list | tuple) or len(results) != len(described):
        return False
    kinds = {type(one).__name__ for one, result in zip(described, results, strict=True) if result is not None}
    return kinds <= {"PlainAOTOutput", "GradAOTOutput"}


def mark_backward(joint: fx.GraphModule) -> None:
    """Note on the nodes of a joint graph that AOTAutograd leaves without a mark which half they belong to.

    It copies the bodies of ``torch.autograd.Function`` so; they stand where what is around them stands. AOTAutograd's
    own mark is left as it is. 2.11 to 2.15.
    """
    backward = False
    for node in joint.graph.nodes:
        if node.op not in ("placeholder", "output", "get_attr"):
            tag = node.meta.get("partitioner_tag")
            backward = backward if tag is None else tag == "is_backward"
            if tag is None and backward:
                node.meta[_BACKWARD] = True


def is_backward(node: fx.Node) -> bool:
    """Whether a node of a joint graph belongs to its backward half. 2.11 to 2.15."""
    return node.meta.get("partitioner_tag") == "is_backward" or _BACKWARD in node.meta


def mark_recomputed(node: fx.Node) -> None:
    """Have the partitioner compute a forward node of a joint graph again in the backward instead of saving it.

    The marks are those of selective checkpointing; a node of a checkpointed block keeps the block's number. 2.11 to
    2.15.
    """
    node.meta["recompute"] = torch.utils.checkpoint.CheckpointPolicy.MUST_RECOMPUTE
    node.meta.setdefault("ac_graph_id", 0)


def mark_drawn_once(node: fx.Node) -> None:
    """Have the backward get the very numbers that a forward node of a joint graph draws, in a checkpointed block too:
    they are saved, or where nothing may be, drawn again from a generator in the state that it had. 2.11 to 2.15."""
    from torch._functorch import config

    if config.activation_memory_budget == 0:
        return mark_recomputed(node)
    node.meta["recompute"] = torch.utils.checkpoint.CheckpointPolicy.MUST_SAVE
    node.meta.setdefault("ac_graph_id", 0)


def node_value(node: fx.Node) -> Any:
    """The fake value of a node: ``example_value`` on Dynamo's graph, ``val`` on AOTAutograd's."""
    return node.meta["val"] if "val" in node.meta else node.meta.get("example_value")


def fake_mode_of(values: Sequence[Any]) -> Any:
    """The FakeTensorMode of the first fake tensor among ``values``, or a new one. 2.11 to 2.15."""
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    for value in values:
        if isinstance(value, FakeTensor):
            return value.fake_mode
    return FakeTensorMode(allow_non_fake_inputs=True)


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
    for key, one in (("joint_custom_pre_pass", joint_pass), ("post_grad_custom_post_pass", last_pass)):
        merged[key] = graph_pass(one, patches.get(key, getattr(config, key)))
    compiled: Any = compile_fx(gm, list(inputs), config_patches=merged)
    return compiled  # type: ignore[no-any-return]


def graph_pass(own: Any, before: Any) -> Any:
    """Wrap a ``(graph) -> None`` pass with a ``uuid()`` as Inductor's CustomGraphPass. 2.11 to 2.15."""
    from torch._inductor.custom_graph_pass import CustomGraphPass

    earlier = list(before) if isinstance(before, list | tuple) else [before] if before is not None else []

    class GraphPass(CustomGraphPass):
        def __call__(self, graph: fx.Graph) -> None:
            for one in earlier:
                one(graph)
            own(graph)

        def uuid(self) -> Any:
            ids = [getattr(one, "uuid", lambda: None)() for one in earlier]
            # A neighbour without a uuid makes the whole chain uncacheable, as Inductor itself decides.
            return None if any(i is None for i in ids) else (*ids, own.uuid())

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


@functools.cache
def cpu_emulates(dtype: torch.dtype) -> bool:
    """Whether this CPU has no instructions for products of ``dtype``, so that libraries go through fp32 number by
    number. 2.11 to 2.15."""
    if dtype not in (torch.bfloat16, torch.float16):
        return False
    if dtype == torch.bfloat16 and platform.machine() in ("x86_64", "AMD64"):
        # oneDNN takes bf16 on any CPU with AVX-512, and converts it there.
        return not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    name = "_is_mkldnn_bf16_supported" if dtype == torch.bfloat16 else "_is_mkldnn_fp16_supported"
    supported = getattr(torch.ops.mkldnn, name, None)
    return supported is None or not supported()


@functools.cache
def has_avx512_bf16() -> bool:
    """Whether this CPU multiplies pairs of bf16 in 512-bit registers and has nothing better, as the tiles of AMX are,
    which libraries use. 2.11 to 2.15."""
    if platform.machine() not in ("x86_64", "AMD64") or torch.cpu._is_amx_tile_supported():
        return False
    return torch.cpu._is_avx512_bf16_supported()


def may_call_onednn() -> bool:
    """Whether :func:`onednn_linear` works here, nobody has switched oneDNN off, torch's own fp32 products go to MKL,
    and Inductor is not to choose among templates or pack weights itself. 2.11 to 2.15."""
    from torch._inductor import config

    inductors = writes_products() or config.freezing
    on = torch._C._has_mkldnn and torch._C._get_mkldnn_enabled() and torch._C.has_mkl
    return bool(on) and not inductors and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def writes_products() -> bool:
    """Whether Inductor is to choose among templates of its own for products on a GPU. 2.11 to 2.15."""
    from torch._inductor import config

    return bool(config.max_autotune or config.max_autotune_gemm)


def sums_bf16_in_fp32(device: torch.device) -> bool:
    """Whether ``torch.mm`` of matrices in bf16 gives its sums in fp32 when asked to: NVIDIA's libraries. 2.11 to
    2.15."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return not torch.cuda.is_available() or torch.cuda.get_device_capability(device) >= (8, 0)


def product_precision(device: str, dtype: torch.dtype = torch.float32) -> str:
    """In what matrix products of fp32 are computed on a kind of device: "ieee", "tf32" or "bf16"; other dtypes in
    their own. 2.11 to 2.15."""
    owner = getattr(torch.backends.cuda if device == "cuda" else torch.backends.mkldnn, "matmul", None)
    found = str(getattr(owner, "fp32_precision", "ieee")) if dtype == torch.float32 else "ieee"
    return found if found in ("tf32", "bf16") else "ieee"


def onednn_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x W^T + b of fp32 CPU matrices by oneDNN, ``weight`` (N, K) of any strides, read where it is. 2.11 to 2.15."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")  # type: ignore[no-any-return]


def cache_dir() -> str:
    """The directory of Inductor's caches, which a user may have set. 2.11 to 2.15."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir as inductors

    return inductors()


def load_cpp(source: str, *others: str) -> Any:
    """C++ code as a ``ctypes.CDLL``, compiled by Inductor's compiler with its flags and cache; None without one.
    ``others`` are tried in their order where it does not compile. 2.11 to 2.15."""
    if inductor_missing() is not None:
        return None
    from torch._inductor.codecache import CppCodeCache

    try:
        return CppCodeCache.load(source)
    except Exception as error:  # of a compiler that fails; torch raises several types
        if others:
            return load_cpp(*others)
        first = str(error).strip().split("\n")[0]
        message = f"adaptc's own C++ kernels are left out, and slower ones run: they do not compile ({first})"
        warnings.warn(AdaptcWarning(message), stacklevel=2)
        return None


def import_inductor() -> None:
    """Import what of Inductor imports itself in circles, which is no thing for two threads. 2.11 to 2.15."""
    importlib.import_module("torch._inductor.compile_fx")


def compile_cpp(source: str) -> None:
    """Compile C++ code that :func:`load_cpp` is going to be asked for, in any thread, without loading it: its ops would
    appear while others are called. What the compiler raises is raised. 2.11 to 2.15."""
    from torch._inductor.codecache import CppCodeCache

    left: list[Callable[[], None]] = []
    CppCodeCache.load_async(source, submit_fn=left.append)
    for work in left:  # not at once: it locks the file, which is locked there; who loads it waits for that
        work()


def compile_headers() -> None:
    """Compile what all of Inductor's loops on a CPU include, which it keeps, in any thread. 2.11 to 2.15."""
    from torch._inductor.codecache import CppPythonBindingsCodeCache

    # Of a loop that is never compiled itself.
    CppPythonBindingsCodeCache.load_async("#include <torch/csrc/inductor/cpp_prefix.h>", submit_fn=lambda work: None)


def probe_cpu() -> Callable[[], object]:
    """What has Inductor find out which vector instructions it may use, in any thread: it compiles and loads a program
    for each kind of them, in seconds. 2.11 to 2.15."""
    from torch._inductor import cpu_vec_isa

    _probe_at_once()
    return cpu_vec_isa.pick_vec_isa


@functools.cache
def _probe_at_once() -> None:
    """Have Inductor probe all kinds of vector instructions at the same time from now on, and once, whichever threads
    ask: probing changes what it reads. 2.11 to 2.15."""
    from torch._inductor import cpu_vec_isa

    find = cpu_vec_isa.valid_vec_isa_list
    lock = threading.Lock()
    probing: list[threading.Thread | None] = []

    @functools.wraps(find)
    def find_at_once() -> Any:
        with lock:
            if not probing:
                flags = set(cpu_vec_isa.x86_isa_checker())
                kinds = [kind for kind in cpu_vec_isa.supported_vec_isa_list if set(str(kind).split()) <= flags]
                probing.extend(in_thread(functools.partial(bool, kind)) for kind in kinds)  # which remember it
        for thread in filter(None, probing):  # who is interrupted here finds them again
            thread.join()
        with lock:
            return find()

    def forget() -> None:  # a forked process does not have the threads, of which one may hold the lock
        nonlocal lock
        lock = threading.Lock()
        probing.clear()

    find_at_once.cache_clear = find.cache_clear  # type: ignore[attr-defined]
    cpu_vec_isa.valid_vec_isa_list = find_at_once  # type: ignore[assignment]
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=forget)


def in_thread(work: Callable[[], object]) -> threading.Thread | None:
    """``work`` in a thread, in the caller's context, as Inductor's settings are part of that; None where no thread can
    be had. What it raises is dropped.

    A Ctrl-C is not for it, nor for the programs that it starts: to Inductor one that dies is an instruction that this
    CPU lacks.
    """
    context = contextvars.copy_context()

    def run() -> None:
        if hasattr(signal, "pthread_sigmask"):
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        with contextlib.suppress(BaseException):
            context.run(work)

    # Not a daemon: the interpreter waits for it, as half a file must not be left in a cache.
    thread = threading.Thread(target=run, name="adaptc-build")
    try:
        thread.start()
    except RuntimeError:
        return None
    return thread


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


def inductor_decompositions() -> dict[Any, Callable[..., Any]]:
    """The decompositions that Inductor applies while tracing the joint graph. 2.11 to 2.15."""
    from torch._inductor.decomposition import select_decomp_table

    return dict(select_decomp_table())


def reset_dynamo() -> None:
    """Forget every compiled frame of this process. Public name, listed here with its relatives."""
    torch.compiler.reset()


def reparametrize(module: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> Any:
    """A context in which ``module`` computes with ``tensors`` instead of its own. 2.11 to 2.15."""
    from torch.nn.utils import stateless

    return stateless._reparametrize_module(module, dict(tensors))


def lazy_graph_module(root: fx.GraphModule, graph: fx.Graph) -> fx.GraphModule:
    """A graph module that writes its code at first use. 2.11 to 2.15."""
    from torch.fx._lazy_graph_module import _LazyGraphModule

    return _LazyGraphModule(root, graph)


def size_hint(size: int | torch.SymInt) -> int:
    """The size that a graph was captured with, without adding a guard; 1 when only data decides it. 2.11 to 2.15."""
    if isinstance(size, int):
        return size
    return int(size.node.hint) if size.node.has_hint() else 1


def size_text(size: Any) -> str:
    """A symbolic size as its formula, in the symbols of its graph. 2.11 to 2.15."""
    return str(size.node.expr)


def storage_key(tensor: torch.Tensor) -> int:
    """Equal for tensors that share memory, fake ones and those under vmap or grad too; its own for one that has
    none (sparse). 2.11 to 2.15."""
    while is_wrapped(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    try:
        return int(tensor.untyped_storage()._cdata)
    except NotImplementedError:
        return id(tensor)


def is_wrapped(tensor: torch.Tensor) -> bool:
    """Whether a tensor stands for another under vmap, grad or jvp. 2.11 to 2.15."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(tensor))


def watch_calls(on_call: Callable[[Any, tuple[Any, ...], dict[str, Any], Any], None]) -> Any:
    """A context that reports every ATen call: (op, args, kwargs, output). 2.11 to 2.15."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            output = func(*args, **(kwargs or {}))
            on_call(func, args, kwargs or {}, output)
            return output

    return Watch()  # type: ignore[no-untyped-call]


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


def tracing_attempt() -> Any:
    """An object that stands for this attempt at capturing a frame: all parts of one graph have it in common.
    2.11 to 2.15."""
    return torch._guards.TracingContext.try_get()


def note_aot_call() -> None:
    """Count a call of AOTAutograd as its own wrapper for backends does.

    Where Dynamo cuts a graph for ``DistributedDataParallel`` it tells by this counter that the first call of a part
    is to return fake tensors. 2.11 to 2.15.
    """
    torch._dynamo.utils.counters["aot_autograd"]["total"] += 1


def sets_grad_mode(node: fx.Node) -> bool | None:
    """Whether a node of a captured graph switches gradients on or off; None when it does neither. 2.11 to 2.15."""
    return bool(node.args[0]) if node.target is torch._C._set_grad_enabled else None


def queue_after_backward(callback: Callable[[], None]) -> None:
    """Call ``callback`` when the backward that is running has ended. 2.11 to 2.15."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)


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


def replace_calls(run: Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]) -> Any:
    """A context in which ``run(op, args, kwargs)`` is called instead of every ATen op. 2.11 to 2.15."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Replace(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return run(func, args, kwargs or {})

    return Replace()  # type: ignore[no-untyped-call]


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


def is_fake(value: Any) -> bool:
    """Whether a value is a fake tensor. 2.11 to 2.15."""
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(value, FakeTensor)


def tree_map(fn: Callable[[Any], Any], tree: Any) -> Any:
    """``tree`` with every leaf replaced by ``fn(leaf)``. 2.11 to 2.15."""
    return torch.utils._pytree.tree_map(fn, tree)
