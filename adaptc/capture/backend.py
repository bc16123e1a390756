"""The Dynamo backend: rewrite each captured graph, then hand it to the compiler the user chose."""

from __future__ import annotations

import dataclasses
import functools
import operator
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from functorch.compile import aot_module_simplified, make_boxed_func, min_cut_rematerialization_partition
from torch import fx

from adaptc import methods, torch_internals
from adaptc.capture.adapter_inputs import AdapterTensors, positions
from adaptc.capture.call import CALL, note_mode
from adaptc.capture.graphs import CapturedGraph
from adaptc.capture.recompute import mark
from adaptc.codegen import choices
from adaptc.codegen.cpp import build
from adaptc.errors import UnsupportedError, VerifyError
from adaptc.ir.edit import copy_graph_module
from adaptc.ir.ops.grouped import give_fallback_a_gradient
from adaptc.ir.stopped import Walk
from adaptc.passes.checks import validate
from adaptc.passes.contract import Context
from adaptc.passes.lift_no_grad import lifted
from adaptc.passes.manager import Pipeline

#: Backends whose joint forward+backward graph the passes can reach.
JOINT_BACKENDS = ("inductor", "aot_eager")
#: Of a graph whose compiled code was made before.
FROM_CACHE = "compiled code from the cache: the joint passes ran when it was made"


@dataclasses.dataclass(frozen=True)
class BackendOptions:
    """How captured graphs are lowered: a Dynamo backend name, Inductor's mode and options, and checks."""

    name: str = "inductor"
    mode: str | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    verify: bool | str = False
    #: Why ``name`` is not the backend that was asked for, when it is not.
    instead: str | None = None


def prepare(options: BackendOptions, parameters: Iterable[torch.Tensor]) -> None:
    """Begin, beside the tracing of a training step, with what its compiled code is going to need. Not with a mode or
    options, which may change how that is compiled."""
    if options.name == "inductor" and options.mode in (None, "default") and not options.options:
        build.begin(parameters)


class AdapterBackend:
    """One per capture epoch. Keeps the graphs it saw and which sites ran through them.

    Args:
        adapter_tensors: gives the adapters' tensors as they are when a graph is captured.
    """

    def __init__(
        self, pipeline: Pipeline, options: BackendOptions, adapter_tensors: Callable[[], AdapterTensors]
    ) -> None:
        self.pipeline = pipeline
        self.options = options
        self.adapter_tensors = adapter_tensors
        self.graphs: list[CapturedGraph] = []
        #: ``id`` of the site-id tensors that compiled graphs were called with.
        self.ran: set[int] = set()
        #: Where the code of a frame is that runs as it is -> the op for which it cannot be compiled.
        self.uncompiled: dict[str, str] = {}
        #: Compilation -> the attempt at it that its graphs are from.
        self._attempts: dict[tuple[int, int], weakref.ref[Any]] = {}

    def __call__(self, captured: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        give_fallback_a_gradient()
        # Dynamo reads its own graph again after this call returns: work on a copy.
        gm = copy_graph_module(captured)
        torch_internals.carry_capture_metadata(captured, gm)
        compile_id = torch_internals.compile_id()
        self._forget_other_attempts(compile_id)
        graph = CapturedGraph(
            index=len(self.graphs),
            compile_id=compile_id,
            break_reason=torch_internals.graph_break_reason(captured),
            training=torch.is_grad_enabled(),
            pipeline=str(self.pipeline),
        )
        earlier = list(self.graphs)
        self.graphs.append(graph)
        start = graph.keep_stage("captured", gm)
        placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
        tensors = self.adapter_tensors()
        site_ids = positions(inputs, tensors.site_ids)
        sites = {placeholders[i]: path for i, path in site_ids.items()}
        trained, asked = (
            {placeholders[i]: path for i, path in positions(inputs, owned).items()} if graph.training else {}
            for owned in (tensors.trained, tensors.asked)
        )
        walk = Walk()
        walk.visit(gm, trained, {})
        graph.sites = sorted(sites.values())
        graph.is_recompile = any(_same_frame(graph, one) and _same_sites(graph, one, tensors) for one in earlier)
        graph.input_sources = [torch_internals.source_name(n) for n in placeholders]
        # What passes compute to know a value is not part of the step, of which a checkpoint counts what is saved.
        with torch.autograd.graph.saved_tensors_hooks(_same, _same):
            gm, reports = self.pipeline.run(
                gm,
                "dynamo",
                Context(
                    sites=sites,
                    trained=trained,
                    asked=asked,
                    own=tensors.own,
                    record=bool(self.options.verify),
                ),
                start=start,
                on_stage=graph.keep_stage,
                validate=validate.validator(self.options.verify, inputs),
            )
        graph.keep_reports(reports)
        graph.stopped = walk.stopped - lifted(reports)
        try:
            compiled = self._lower(gm, inputs, graph)
        except Exception as error:
            self._let_break(captured, graph, error)
            raise
        stopped = [i for i, path in site_ids.items() if path in graph.stopped]
        return _note_sites(compiled, list(site_ids), stopped, self.ran, graph.ran)

    def _let_break(self, captured: fx.GraphModule, graph: CapturedGraph, error: Exception) -> None:
        """Do as torch.compile does with ``h[mask] = values``, whose gradient has a size that only data say: the frame
        runs as it is, and what it calls is compiled."""
        if not torch_internals.is_of_data(error):
            return
        if others := torch_internals.users_functions(captured, methods.anchors()):
            raise UnsupportedError(
                f"a frame with {', '.join(others)} cannot be compiled: a size in its backward is only known from data",
                found=str(error), do="leave out its torch.compiler.allow_in_graph, or use torch.where for the mask",
            ) from error  # fmt: skip
        self.graphs.remove(graph)
        self.uncompiled[torch_internals.let_frame_break()] = str(error)

    def _forget_other_attempts(self, compile_id: tuple[int, int] | None) -> None:
        """Dynamo starts a capture over when it learns something on the way: the first try is not run.

        One attempt gives several graphs where Dynamo cuts them for ``DistributedDataParallel``.
        """
        attempt = torch_internals.tracing_attempt()
        if compile_id is None or attempt is None:
            return
        known = self._attempts.get(compile_id)
        if known is None or known() is not attempt:
            self.graphs = [g for g in self.graphs if g.compile_id != compile_id]
            self._attempts[compile_id] = weakref.ref(attempt)

    def _lower(self, gm: fx.GraphModule, inputs: Sequence[Any], graph: CapturedGraph) -> Callable[..., Any]:
        name = self.options.name
        graph.modes = torch_internals.ambient_modes()
        if name == "eager":
            return gm
        joint = JointStage(self.pipeline, self.options, graph)
        if name == "inductor":
            patches = {**torch_internals.inductor_mode_options(self.options.mode), **self.options.options}
            compiled = torch_internals.compile_with_inductor(gm, inputs, patches, joint, LastStage(joint))
            if not torch_internals.runs_joint_passes(patches):
                graph.notes.append("Inductor is not to run passes on joint graphs: none ran")
            elif not graph.saw_joint:
                graph.notes.append(FROM_CACHE)
                # A report does not keep a batch alive.
                fakes = torch_internals.traced_inputs(gm, inputs)
                graph.run_joint_passes = functools.partial(joint.run_again, gm, fakes, patches, choices.table())
            return compiled
        if name == "aot_eager":
            return compile_aot_eager(gm, inputs, joint)
        graph.notes.append(f"backend {name!r} hides the joint graph: joint passes did not run")
        return torch_internals.lookup_backend(name)(gm, list(inputs))  # type: ignore[no-any-return]


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _same_frame(graph: CapturedGraph, earlier: CapturedGraph) -> bool:
    # Models of one class share frames, and so Dynamo's count of their compilations: only our own graphs count here.
    if graph.compile_id is None or earlier.compile_id is None:
        return False
    return graph.compile_id[0] == earlier.compile_id[0] and graph.compile_id != earlier.compile_id


def _same_sites(graph: CapturedGraph, earlier: CapturedGraph, tensors: AdapterTensors) -> bool:
    """Whether a frame is compiled once more for sites that ran through its earlier graph, or with or without any. A
    frame that layers share may have several graphs from the start: the first block's, whose input needs no gradient."""
    paths = {id(tensor): path for tensor, path in tensors.site_ids}
    ran = {*earlier.sites, *(paths[i] for i in earlier.ran if i in paths)}
    return not (ran and graph.sites) or not ran.isdisjoint(graph.sites)


def _note_sites(
    compiled: Callable[..., Any], positions: Sequence[int], stopped: Sequence[int], *collected: set[int]
) -> Callable[..., Any]:
    """``compiled``, telling which site-id tensors it is called with, by their ``positions`` among the inputs; those at
    ``stopped`` run without gradients inside."""
    if not positions:
        return compiled
    recorded = [i for i in positions if i not in stopped]
    last: list[int] = []

    def call(*args: Any) -> Any:
        if torch_internals.is_fake(args[positions[0]]):
            return compiled(*args)  # a part of a cut graph, asked for its outputs while the next part is compiled
        ids = [id(args[i]) for i in positions]
        if ids != last:
            last[:] = ids
            for ran in collected:
                ran.update(ids)
        if stopped:
            note_mode([id(args[i]) for i in recorded])
            note_mode([id(args[i]) for i in stopped], recorded=False)
        else:
            note_mode(ids)
        return mark(compiled(*args), ids if CALL.assignment is None else [*ids, CALL.assignment])

    return call


class JointStage:
    """The joint passes as one function on a graph, with the cache key that they need."""

    def __init__(self, pipeline: Pipeline, options: BackendOptions, graph: CapturedGraph) -> None:
        self.pipeline, self.options, self.graph = pipeline, options, graph

    def __call__(self, graph: fx.Graph) -> None:
        gm = _owner(graph)
        torch_internals.name_joint_inputs(gm, self.graph.input_sources)
        torch_internals.mark_backward(gm)
        start = self.graph.keep_stage("joint", gm)
        context = Context(record=bool(self.options.verify))
        with build.hold():
            rewritten, reports = self.pipeline.run(
                gm,
                "joint",
                context,
                start=start,
                on_stage=self.graph.keep_stage,
                validate=validate.validator(self.options.verify, None),
            )
        if rewritten is not gm:
            # A rolled-back pass leaves a copy; the caller holds `graph`, so its nodes are replaced.
            gm.graph = rewritten.graph
        self.graph.keep_reports(reports, context.choices)

    def run_again(
        self, gm: fx.GraphModule, fakes: Sequence[Any], patches: Mapping[str, Any], table: choices.Table
    ) -> None:
        """Do for a report what was done when the code that the cache had was made: choices are read from ``table``, and
        nothing is timed."""
        with self.graph.modes(), choices.known_only(table) as unknown:
            try:
                torch_internals.show_joint_graph(gm, fakes, patches, self)
            except Exception as error:  # whatever it is: the compiled code is right without a report on it
                self.graph.drop_joint_stages()
                self.graph.notes.append(f"they cannot be shown: {type(error).__name__}: {error}".splitlines()[0])
        if unknown:
            self.graph.notes.append(f"what it chose is no longer on file for: {'; '.join(dict.fromkeys(unknown))}")

    def uuid(self) -> str | None:
        """None with ``verify``: code from a cache would not have been checked."""
        return None if self.options.verify else self.pipeline.uuid()


class LastStage:
    """What is done on the graphs that Inductor lowers, with its cache key."""

    def __init__(self, joint: JointStage) -> None:
        self.joint = joint

    def __call__(self, graph: fx.Graph) -> None:
        torch_internals.order_reads_after_writes()
        _, reports = self.joint.pipeline.run(_owner(graph), "final", Context())
        self.joint.graph.in_place += sum(len(report.result.applied) for report in reports)

    def uuid(self) -> str | None:
        return self.joint.uuid()


def _owner(graph: fx.Graph) -> fx.GraphModule:
    if graph.owning_module is None:
        raise VerifyError("a graph without its module cannot be rewritten")
    return graph.owning_module


def compile_aot_eager(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    joint: JointStage,
    decompositions: Mapping[Any, Callable[..., Any]] | None = None,
) -> Callable[..., Any]:
    """AOTAutograd with the joint passes and the min-cut partitioner; the graphs run op by op."""

    def partition(joint_gm: fx.GraphModule, joint_inputs: Any, **kwargs: Any) -> Any:
        joint(joint_gm.graph)
        parts = min_cut_rematerialization_partition(joint_gm, joint_inputs, **kwargs)
        joint.graph.keep_parts(*parts)
        return parts

    def infer(forward: fx.GraphModule, example_inputs: Any) -> Any:
        joint(forward.graph)
        return _run_forward(forward, example_inputs)

    torch_internals.note_aot_call()
    return aot_module_simplified(  # type: ignore[no-any-return]
        gm,
        inputs,
        fw_compiler=_run_forward,
        bw_compiler=_run_as_it_is,
        inference_compiler=infer,
        decompositions=None if decompositions is None else dict(decompositions),
        partition_fn=partition,
        keep_inference_input_mutations=True,
    )


def _run_forward(gm: fx.GraphModule, example_inputs: Any) -> Any:
    """``gm`` as it is, but for results that became views when ops were lowered: AOTAutograd takes them for new memory,
    and autograd refuses writes to a view that its caller did not make."""
    output = gm.graph.output_node()
    views = dict.fromkeys(node for node in output.all_input_nodes if _is_view(node))
    for node in views:
        with gm.graph.inserting_after(node):
            own = gm.graph.call_function(torch.ops.aten.clone.default, (node,))
        own.meta = dict(node.meta)
        node.replace_all_uses_with(own, delete_user_cb=lambda user: user is output)
    if views:
        gm.recompile()
    return make_boxed_func(gm)


def _is_view(node: fx.Node) -> bool:
    """Whether a node is a view of memory that the graph makes."""
    root = node
    while root.target is operator.getitem or (
        isinstance(root.target, torch_internals.OpOverload) and root.target.is_view
    ):
        root = root.all_input_nodes[0]
    return root is not node and root.op != "placeholder"


def _run_as_it_is(gm: fx.GraphModule, example_inputs: Any) -> Any:
    return make_boxed_func(gm)
