"""``adaptc.rewrite``: the passes alone, on a plain graph module.

before:  %y = fc(%x)                            a call of a module, or linear(%x, W:fc, b:fc)
after:   %y = fc(%x);  %t = lora_linear(%x, %y, A:fc, B:fc, s:fc, "r");  %y2 = %t[0]

Sites are found in the graph: calls of a module, and linear products whose weight is an attribute of the graph
module or an input that Dynamo read from a module. Joint passes need a backward and do not run here.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from adaptc import methods, torch_internals
from adaptc.errors import PlanError, SiteError, UnsupportedError
from adaptc.ir import names
from adaptc.methods.base import Adapter
from adaptc.methods.linear import is_conv1d, is_linear
from adaptc.passes.checks import validate
from adaptc.passes.contract import Context
from adaptc.passes.manager import Pipeline
from adaptc.plan import Assignment, Plan
from adaptc.plan.rules import Passes
from adaptc.runtime.fresh import with_all_biases
from adaptc.runtime.site_adapters import SiteAdapters
from adaptc.torch_internals import node_value

aten = torch.ops.aten
#: Products with a weight: function -> positions of the input and of the weight.
_PRODUCTS: dict[Any, tuple[int, int]] = {
    F.linear: (0, 1), aten.linear.default: (0, 1), torch.addmm: (1, 2), aten.addmm.default: (1, 2),
    torch.mm: (0, 1), aten.mm.default: (0, 1),
}  # fmt: skip
#: Of these, those that multiply by the transpose of the weight that they get.
_TRANSPOSING = (F.linear, aten.linear.default)
_TRANSPOSES = (aten.t.default, aten.permute.default, aten.transpose.int, torch.t)
#: Of a graph module's ``meta``: what the passes did.
_REPORTS = "adaptc_reports"
#: The name of the adapter on the graph module: ``<site>.adapters.default``.
NAME = "default"


def rewrite(
    gm: fx.GraphModule, plan: Any, example_inputs: Sequence[Any], *, verify: bool | str = False
) -> fx.GraphModule:
    """Adapt a copy of ``gm`` by ``plan`` and run the passes on it.

    Args:
        gm: a graph of torch functions, module calls or ATen ops, as ``torch.fx.symbolic_trace``, a Dynamo backend
            or ``torch.export`` give it. It is not changed; the copy shares its tensors' memory, frozen.
        plan: as for ``adaptc.compile``; ``passes`` of a plan are honoured. ``{"passes": ...}`` without rules runs these
            passes on the adapters that the graph has: with ``{"order": ["merge"]}`` they are folded into its weights.
        example_inputs: one value per placeholder: sizes and dtypes of the graph are read off them.
        verify: as for ``adaptc.compile``.

    Returns:
        A graph module with ``gm``'s inputs and outputs, whose adapters are submodules
        ``<site>.adapters.default``; ``meta["adaptc_reports"]`` holds one report per pass.

    Raises:
        PlanError, SiteError: the plan does not fit.
    """
    alone = _passes_alone(plan)
    wanted = Plan.coerce(plan) if alone is None else None
    inputs = list(example_inputs)
    copied = _frozen_copy(gm)
    sites: dict[fx.Node, str] = {}
    lifted = [] if wanted is None else _adapt(copied, wanted, inputs, sites)
    copied.recompile()
    _propagate(copied, inputs)
    options = alone if wanted is None else wanted.passes
    pipeline = (
        Pipeline.from_options()
        if options is None
        else Pipeline.from_options(skip=options.skip, order=options.order, limit=options.limit)
    )
    asked = _asked(copied, lifted)
    context = Context(sites=sites, trained=_trained(copied), asked=asked, record=bool(verify))
    result, reports = pipeline.run(copied, "dynamo", context, validate=validate.validator(verify, inputs))
    result.meta[_REPORTS] = reports
    if any(one.name == "merge" for one in pipeline.passes):
        _drop_merged(result)
    result.recompile()
    return result


def _passes_alone(plan: Any) -> Passes | None:
    """The passes of a plan that has no rules."""
    if isinstance(plan, Mapping) and plan.get("passes") and not plan.get("rules") and "match" not in plan:
        return Passes.from_dict(plan["passes"])
    return None


def _adapt(copied: fx.GraphModule, wanted: Plan, inputs: Sequence[Any], sites: dict[fx.Node, str]) -> Sequence[str]:
    """Put the plan's adapters into the graph; returns the paths of the modules whose regions are to record gradients.

    ``sites``: gets the node of every site id, with its site's path.
    """
    calls = _calls(copied, inputs)
    resolution = wanted.resolve(copied)
    assignments = with_all_biases(resolution, copied)
    _check_called(copied, assignments, calls)
    for assignment, adapter in zip(assignments, _build(assignments), strict=True):
        _install(copied, assignment, adapter, calls, sites)
    _drop_stand_ins(copied)
    return resolution.lifted


def _drop_merged(gm: fx.GraphModule) -> None:
    """Take off the adapters that the graph does not read any more."""
    for node in gm.graph.find_nodes(op="get_attr"):
        if not node.users:
            gm.graph.erase_node(node)
    read = [f"{node.target}." for node in gm.graph.nodes if node.op in ("get_attr", "call_module")]
    for path, module in list(gm.named_modules()):
        below = f"{path}.adapters.".lstrip(".")
        if "adapters" in module._modules and not any(target.startswith(below) for target in read):
            del module._modules["adapters"]


def _trained(gm: fx.GraphModule) -> dict[fx.Node, str]:
    """The nodes of tensors that an adapter trains, and the paths of their sites."""
    parameters = {name for name, parameter in gm.named_parameters() if parameter.requires_grad}
    tensors = {n: str(n.target) for n in gm.graph.nodes if n.op == "get_attr" and str(n.target) in parameters}
    # Of a site that is the root itself nothing stands before the dot.
    dotted = {n: f".{name}" for n, name in tensors.items()}
    return {n: name.partition(".adapters.")[0].lstrip(".") for n, name in dotted.items() if ".adapters." in name}


def _asked(gm: fx.GraphModule, lifted: Sequence[str]) -> dict[fx.Node, str]:
    """The nodes of tensors inside the modules ``lifted``, and the paths of these."""
    found: dict[fx.Node, str] = {}
    for node in gm.graph.nodes:
        tensor = names.model_tensor(node) if node.op in ("get_attr", "placeholder") else None
        if tensor is not None:
            around = (path for path in lifted if f"{tensor.owner}.".startswith(f"{path}." if path else ""))
            found.update((node, path) for path in around)
    return found


class _StandIn(nn.Linear):
    """What a plan sees of a linear layer of which the graph has the weight alone."""

    is_input = False


def _frozen_copy(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy with parameter objects of its own, frozen, over the same memory."""
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in gm.parameters()}
    memo.update((id(b), b) for b in gm.buffers())
    if _REPORTS in gm.meta:
        memo[id(gm.meta[_REPORTS])] = []  # of what was done to the graph that is given
    copied = copy.deepcopy(gm, memo)
    for old, new in zip(gm.graph.nodes, copied.graph.nodes, strict=True):
        if old.op == "placeholder" and (source := torch_internals.source_name(old)) is not None:
            torch_internals.keep_source_name(new, source)
    return copied


def _calls(gm: fx.GraphModule, inputs: Sequence[Any]) -> dict[str, list[tuple[fx.Node, fx.Node]]]:
    """Module path -> (input, output) of every call that the graph makes of it."""
    values = dict(zip((n for n in gm.graph.nodes if n.op == "placeholder"), inputs, strict=True))
    found: dict[str, list[tuple[fx.Node, fx.Node]]] = {}
    for node in list(gm.graph.nodes):
        if node.op == "call_module":
            x = node.args[0] if node.args else next(iter(node.kwargs.values()), None)
            if isinstance(x, fx.Node):
                found.setdefault(str(node.target), []).append((x, node))
        elif (product := _product(gm, node)) is not None:
            x, weight, tensor = product
            value = values[weight] if weight.op == "placeholder" else _attribute(gm, str(weight.target))
            _ensure_linear(gm, tensor.owner, value)
            found.setdefault(tensor.owner, []).append((x, node))
    return found


def _product(gm: fx.GraphModule, node: fx.Node) -> tuple[fx.Node, fx.Node, names.Tensor] | None:
    """(input, weight, whose it is) of a linear product with a module's weight as the module itself uses it."""
    if node.op != "call_function" or node.target not in _PRODUCTS:
        return None
    given = zip(_PRODUCTS[node.target], ("input", "weight"), strict=True)
    x, weight = (node.args[i] if i < len(node.args) else node.kwargs.get(name) for i, name in given)
    transposed = node.target in _TRANSPOSING
    while isinstance(weight, fx.Node) and weight.target in _TRANSPOSES:
        weight, transposed = weight.args[0], not transposed
    if not (isinstance(x, fx.Node) and isinstance(weight, fx.Node)):
        return None
    tensor = names.model_tensor(weight)
    if tensor is None or tensor.name != "weight":
        return None
    module = dict(gm.named_modules()).get(tensor.owner)
    # nn.Linear multiplies by its weight's transpose, Conv1D by its weight.
    stored_transposed = module is not None and is_conv1d(module)
    return None if transposed == stored_transposed else (x, weight, tensor)


def _attribute(gm: fx.GraphModule, path: str) -> Any:
    owner, _, name = path.rpartition(".")
    return getattr(gm.get_submodule(owner), name)


def _ensure_linear(gm: fx.GraphModule, path: str, weight: torch.Tensor) -> None:
    """Let the plan see a linear layer at ``path`` where the graph has only the weight of one."""
    module = gm.get_submodule(path) if path in dict(gm.named_modules()) else nn.Module()
    if is_linear(module):
        return
    outputs, inputs = weight.shape
    stand_in = _StandIn(inputs, outputs, bias=False, device="meta")
    stand_in.weight = nn.Parameter(weight.detach(), requires_grad=False)
    for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
        setattr(stand_in, name, tensor)
    stand_in.is_input = "weight" not in module._parameters
    gm.add_submodule(path, stand_in)


def _drop_stand_ins(gm: fx.GraphModule) -> None:
    """Leave only the adapters where the weights are inputs of the graph."""
    for path, module in list(gm.named_modules()):
        if isinstance(module, _StandIn) and module.is_input:
            kept = nn.Module()
            if "adapters" in module._modules:
                kept.adapters = module.adapters
            gm.add_submodule(path, kept)


def _check_called(
    gm: fx.GraphModule, assignments: Sequence[Assignment], calls: dict[str, list[tuple[fx.Node, fx.Node]]]
) -> None:
    """Every site must be called, and each of its weight's readers must be one of the calls."""
    known = {y for pairs in calls.values() for _, y in pairs}
    for assignment in assignments:
        if assignment.parameter is not None:
            raise _inside_its_forward(assignment)
        if not any(path in calls for path in assignment.paths):
            raise SiteError(
                f"{assignment.path} is not called in this graph",
                found=f"calls of {', '.join(list(calls)[:8]) or 'nothing'}",
                do="leave it out of the plan",
            )
        for reader in _weight_readers(gm, assignment.paths):
            if reader not in known:
                raise SiteError(
                    f"{assignment.path}: %{reader.name} reads its weight in a way that cannot be adapted",
                    expected="a call of the module, or a linear product with its weight",
                    found=reader.format_node(),
                    do="leave it out of the plan",
                )


def _weight_readers(gm: fx.GraphModule, paths: Sequence[str]) -> list[fx.Node]:
    readers: list[fx.Node] = []
    for node in gm.graph.nodes:
        tensor = names.model_tensor(node) if node.op in ("placeholder", "get_attr") else None
        if tensor is None or tensor.name != "weight" or tensor.owner not in paths:
            continue
        queue = list(node.users)
        while queue:
            user = queue.pop()
            if user.target in _TRANSPOSES:
                queue += user.users
            else:
                readers.append(user)
    return readers


def _inside_its_forward(assignment: Assignment) -> SiteError:
    return SiteError(
        f"{assignment.path}: {type(assignment.module).__name__} is adapted inside its forward,"
        " which a graph does not have",
        do="leave it out of the plan, or use adaptc.compile",
    )


def _build(assignments: Sequence[Assignment]) -> list[Adapter]:
    adapters = []
    for number, assignment in enumerate(assignments):
        if assignment.method.needs_covariance:
            raise PlanError(
                f"{assignment.path}: {assignment.method.kind} is to start from the covariance of its inputs",
                expected="another init: rewrite has no calibration batches",
            )
        adapter = assignment.build(dtype=None, site_id=number)
        if adapter.acts_inside:
            raise _inside_its_forward(assignment)
        adapters.append(adapter)
    for kind in dict.fromkeys(type(a.method) for a in adapters):
        kind.link([a for a in adapters if type(a.method) is kind])
    return adapters


def _install(
    gm: fx.GraphModule,
    assignment: Assignment,
    adapter: Adapter,
    calls: dict[str, list[tuple[fx.Node, fx.Node]]],
    sites: dict[fx.Node, str],
) -> None:
    """Put the adapter on the site's module and its anchor behind every call."""
    module = assignment.module
    if "adapters" not in module._modules:
        module.adapters = SiteAdapters()
    entries = module.adapters
    assert isinstance(entries, SiteAdapters)
    entry = NAME if NAME not in entries else f"{NAME}~{len(entries)}"
    entries[entry] = adapter
    for path in assignment.paths:
        for i in range(len(calls.get(path, []))):
            x, y = calls[path][i]
            if adapter.replaces_forward:
                if y.op != "call_module":
                    raise SiteError(f"{path} cannot be trained in full: the graph computes it without its module")
                y.target = f"{path}.adapters.{entry}.copy"
                continue
            calls[path][i] = (x, new := _insert_anchor(gm, path, entry, module, x, y, sites))
            for pairs in calls.values():  # what read the output reads the corrected one now
                pairs[:] = [(new if a is y else a, b) for a, b in pairs]


def _insert_anchor(
    gm: fx.GraphModule, path: str, entry: str, module: nn.Module, x: fx.Node, y: fx.Node, sites: dict[fx.Node, str]
) -> fx.Node:
    """Put the adapter's calls before ``y`` where it acts on the input, and behind it; returns the new output."""
    if module.adapters[entry].acts_before:  # type: ignore[index, union-attr]
        before = _trace_adapter(_Before(module, entry), entry)
        new_x = _copy_in(gm, before, path, {"x": x}, sites, y.prev)
        y.replace_input_with(x, new_x)
        x = new_x
    after = _trace_adapter(_After(module, entry), entry)
    existing = set(gm.graph.nodes)
    new = _copy_in(gm, after, path, {"x": x, "y": y}, sites, y)
    if new is not y:
        y.replace_all_uses_with(new, delete_user_cb=lambda user: user in existing)
    return new


def _copy_in(
    gm: fx.GraphModule, traced: fx.Graph, path: str, inputs: dict[str, fx.Node], sites: dict[fx.Node, str], at: fx.Node
) -> fx.Node:
    """Copy an adapter's traced calls behind ``at``; returns the node of the result."""
    env: dict[fx.Node, Any] = {}
    for node in traced.nodes:
        if node.op == "placeholder":
            env[node] = inputs[str(node.target)]
            continue
        if node.op == "output":
            return env[node.args[0]]  # type: ignore[no-any-return]
        with gm.graph.inserting_after(at):
            at = env[node] = gm.graph.node_copy(node, lambda n: env[n])
        if at.op == "get_attr":
            at.target = f"{path}.{str(node.target).removeprefix('module.')}"
            if str(at.target).endswith(".site_id"):
                sites[at] = path
    raise AssertionError("a traced graph has an output")


class _Before(nn.Module):
    """``x -> x'`` of one adapter, to be traced."""

    def __init__(self, module: nn.Module, entry: str) -> None:
        super().__init__()
        self.module, self.entry = module, entry

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        entries: Any = self.module.adapters
        return entries[self.entry].apply_before(self.module, x)  # type: ignore[no-any-return]


class _After(_Before):
    """``x, y -> y'`` of one adapter, to be traced."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        entries: Any = self.module.adapters
        return entries[self.entry].apply_to(self.module, x, y)  # type: ignore[no-any-return]


def _trace_adapter(site: nn.Module, entry: str) -> fx.Graph:
    """The adapter's anchor calls as a graph: anchors are leaves.

    Raises:
        UnsupportedError: what the adapter does depends on more than its tensors.
    """
    try:
        return torch_internals.trace_with_leaves(site, list(methods.anchors()))
    except (fx.proxy.TraceError, TypeError) as error:
        kind = site.module.adapters[entry].method.kind  # type: ignore[union-attr, index]
        raise UnsupportedError(
            f"adaptc.rewrite cannot read what {kind} does at a site", found=str(error), do="use adaptc.compile"
        ) from error


def _propagate(gm: fx.GraphModule, inputs: Sequence[Any]) -> None:
    """Give every node its fake value."""
    mode = torch_internals.fake_mode_of(inputs)

    class Propagate(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            n.meta.pop("val", None)
            n.meta["example_value"] = value
            return value

    fakes = [torch_internals.as_fake(mode, value) for value in inputs]
    with mode:
        Propagate(gm).run(*fakes)
    for node in gm.graph.nodes:
        if node.op == "get_attr" and isinstance(value := node_value(node), torch.Tensor):
            node.meta["example_value"] = torch_internals.as_fake(mode, value)
