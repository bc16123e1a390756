"""Fold adapters into the weights of the linear products that they correct, in a graph that has the weights.

before:  %y = linear(%x, W:fc, b:fc);  %t = lora_linear(%x, %y, A:fc, B:fc, s:fc, "n");  %y2 = %t[0]
after:   %y2 = linear(%x, merged_weight:fc, merged_bias:fc)

What stands between the product's input and the corrected output is computed in fp64 for zero and for the unit vectors,

    b' = y2(0)        column k of W' = y2(e_k) - b'

and rounded once. Whatever is affine is folded so: LoRA, DoRA, (IA)^3 before and behind the layer, VeRA, SSF, Hydra,
biases, and several of them at one layer. Refused: other ops in between, dropout that is at work, an output that is read
before it is corrected, and weights or factors that are inputs of the graph. No part of any default order: it makes the
adapters constants.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn

from adaptc.ir import dialect
from adaptc.ir.edit import Edit, Result, extract
from adaptc.ir.names import op_name
from adaptc.ir.sites import dropout_of, is_cast, is_inserted, site_of
from adaptc.methods.linear import features, is_conv1d, is_linear
from adaptc.passes.contract import Context, Contract
from adaptc.passes.walk import Match, Refusal, everywhere
from adaptc.torch_internals import as_fake, fake_mode_of, node_value

CONTRACT = Contract(level="dynamo", numerics="approximate")

#: Dialect ops that are affine in their first two operands, or in the first.
_AFFINE = ("lora_linear", "dora_linear", "dora_row_norm", "ia3_scale", "vera_linear", "ssf_affine", "hydra_heads")
_SUMS = (operator.add, operator.sub, torch.add, torch.sub)
_PRODUCTS = (operator.mul, torch.mul)
_LINEAR = (F.linear, torch.ops.aten.linear.default)
#: Rows of the identity that go through a layer at a time.
_ROWS = 1024


class _Place(NamedTuple):
    """One adapted product.

    ``x``: the input of what is folded; ``product``: the base's own; ``nodes``: what is folded, in graph order, the
    product too; ``result``: the one that others read; ``path``: the module whose weight it is.
    """

    x: fx.Node
    product: fx.Node
    nodes: list[fx.Node]
    result: fx.Node
    path: str


def merge(gm: fx.GraphModule, context: Context) -> Result:
    return everywhere(gm, (_merge,), context)


def _merge(gm: fx.GraphModule, context: Context) -> Iterator[Match | Refusal]:
    for product in [node for node in gm.graph.nodes if _weight_of(gm, node) is not None]:
        found = _place(gm, product)
        if isinstance(found, _Place):
            yield Match(found.result, _Write(gm, found), found.nodes, [found.result], found.path)
        elif found is not None:
            yield found


def _place(gm: fx.GraphModule, product: fx.Node) -> _Place | Refusal | None:
    """What is to be folded into a product's weight; None where nothing corrects it."""
    constants = _constants(gm)
    x, before = _input_of(product), []
    while _is_ours(x):
        sources = [n for n in x.all_input_nodes if n not in constants and not _is_dtype(n)]
        if len(sources) != 1:
            break
        before.append(x)
        x = sources[0]
    reached, behind = {x, product, *before}, {product}
    for node in gm.graph.nodes:
        reads = {n for n in node.all_input_nodes if n not in constants}
        if _is_ours(node) and reads and reads <= reached:
            reached.add(node)
            if reads & behind:
                behind.add(node)
    # Of what reads the input alone, that counts which ends in this product's correction.
    inside = {node for node in reached - {x} if node in behind or _feeds(node, behind)}
    own = [node for node in inside if _is_ours(node)]
    if not own:
        return None
    path = _weight_of(gm, product) or ""
    site = next((s for node in own if (s := site_of(node)) != "(unknown site)"), path)
    ends = [node for node in inside if any(user not in inside for user in node.users)]
    if reason := _refusal(gm, inside, constants, ends):
        return Refusal(site, reason)
    needed = [n for n in constants if n.users and all(user in inside or user in constants for user in n.users)]
    fed = [n for n in needed if _feeds(n, inside)]
    nodes = [node for node in gm.graph.nodes if node in inside or node in fed]
    return _Place(x, product, nodes, ends[0], path)


def _feeds(node: fx.Node, inside: set[fx.Node]) -> bool:
    return any(user in inside or _feeds(user, inside) for user in node.users)


def _refusal(
    gm: fx.GraphModule, inside: set[fx.Node], constants: set[fx.Node], ends: Sequence[fx.Node]
) -> str | None:
    """Why the nodes ``inside`` are not one affine layer with the values of its own."""
    for node in gm.graph.nodes:
        if node not in inside:
            continue
        dropout = dropout_of(node)
        if dropout is not None and dropout[1] > 0 and dropout[2]:
            return "its dropout is at work: the graph is one of training"
        if not _is_affine(node, constants):
            return f"{op_name(node)} is not affine in the layer's input, or reads an input of the graph"
    if len(ends) != 1:
        return "the layer's output is read before it is corrected"
    return None


def _is_affine(node: fx.Node, constants: set[fx.Node]) -> bool:
    varying = [n for n in node.all_input_nodes if n not in constants]
    op = dialect.of_target(node.target) if callable(node.target) else None
    if op is not None:
        return op.name in _AFFINE and len(varying) <= 2
    if node.target in _PRODUCTS:
        return len(varying) <= 1
    return (
        node.target in _SUMS or node.target is operator.getitem or node.target in _LINEAR
        or node.op == "call_module" or _is_passed_over(node)
    )  # fmt: skip


def _is_passed_over(node: fx.Node) -> bool:
    """Whether a node is nothing in fp64 and in eval mode."""
    casts = is_cast(node) or _is_dtype(node) or (node.target == "to" and _is_dtype(node.args[1]))
    return casts or dropout_of(node) is not None


def _is_ours(node: fx.Node) -> bool:
    """Whether a node computes for an adapter: a pass wrote it, it is one of the ops, or it reads a tensor of one."""
    if node.op not in ("call_function", "call_method"):
        return False
    op = dialect.of_target(node.target) if callable(node.target) else None
    if is_inserted(node) or op is not None or any(_is_of_adapter(n) for n in node.all_input_nodes):
        return True
    if _is_dtype(node):
        return any(user.target == "to" and _is_ours(user) for user in node.users)
    # What takes a result out of a tuple, or casts one to a dtype that the adapter asks for.
    above = node.args[0] if node.args else None
    passes_on = node.target is operator.getitem or (node.target == "to" and _is_dtype(node.args[1]))
    return passes_on and isinstance(above, fx.Node) and _is_ours(above)


def _is_of_adapter(node: fx.Node) -> bool:
    return node.op == "get_attr" and ".adapters." in f".{node.target}"


def _is_dtype(node: object) -> bool:
    return isinstance(node, fx.Node) and node.target is getattr and node.args[1] == "dtype"


def _constants(gm: fx.GraphModule) -> set[fx.Node]:
    """The graph's own tensors, and what is computed from them alone by adapters."""
    found: set[fx.Node] = set()
    for node in gm.graph.nodes:
        own = node.op == "get_attr" and isinstance(node_value(node), torch.Tensor)
        if own or (_is_ours(node) and all(n in found for n in node.all_input_nodes)):
            found.add(node)
    return found


def _input_of(product: fx.Node) -> fx.Node:
    found = product.args[0] if product.args else next(iter(product.kwargs.values()))
    assert isinstance(found, fx.Node)
    return found


def _weight_of(gm: fx.GraphModule, node: fx.Node) -> str | None:
    """The path of the module that a node multiplies by the weight of; None for what is no such product."""
    if node.op == "call_module":
        return str(node.target) if is_linear(gm.get_submodule(str(node.target))) else None
    if node.op != "call_function" or node.target not in _LINEAR or is_inserted(node) or len(node.args) < 2:
        return None
    weight = node.args[1]
    if isinstance(weight, fx.Node) and weight.op == "get_attr" and ".adapters." not in f".{weight.target}":
        return str(weight.target).rpartition(".")[0]
    return None


class _Write:
    """Computes the folded weight and writes the product with it."""

    def __init__(self, gm: fx.GraphModule, place: _Place) -> None:
        self.gm, self.place = gm, place

    def __call__(self, edit: Edit) -> fx.Node:
        place = self.place
        old = node_value(place.result)
        weight, bias = _folded(self.gm, place)
        like = _own_weight(self.gm, place.product)
        has_bias = _has_bias(self.gm, place.product) or bool(bias.any())
        operands = [self._attribute(edit, "merged_weight", weight.to(like.dtype))]
        if has_bias:
            operands.append(self._attribute(edit, "merged_bias", bias.to(like.dtype)))
        new = edit.cast(edit.call(F.linear, place.x, *operands), old.dtype)
        for node in edit.new_nodes:  # they are the base's own from here on
            node.meta["custom"] = {k: v for k, v in (node.meta.get("custom") or {}).items() if k != "adaptc"}
        return new

    def _attribute(self, edit: Edit, name: str, value: torch.Tensor) -> fx.Node:
        """A node of a new parameter beside the weight."""
        owner = self.gm.get_submodule(self.place.path)
        taken = [n for n in owner._parameters if n == name or re_number(n, name) is not None]
        name = name if not taken else f"{name}_{len(taken)}"
        owner.register_parameter(name, nn.Parameter(value.contiguous(), requires_grad=False))
        with self.gm.graph.inserting_before(edit.position):
            node = self.gm.graph.get_attr(f"{self.place.path}.{name}".lstrip("."))
        parameter = owner.get_parameter(name)
        node.meta["example_value"] = as_fake(fake_mode_of([node_value(self.place.x)]), parameter)
        edit.new_nodes.append(node)
        return node


def re_number(name: str, stem: str) -> int | None:
    """The number behind ``stem_`` of a name."""
    rest = name.removeprefix(f"{stem}_")
    return int(rest) if rest != name and rest.isdecimal() else None


def _own_weight(gm: fx.GraphModule, product: fx.Node) -> torch.Tensor:
    weight: Any = gm.get_submodule(_weight_of(gm, product) or "").weight
    assert isinstance(weight, torch.Tensor)
    return weight


def _has_bias(gm: fx.GraphModule, product: fx.Node) -> bool:
    if product.op == "call_module":
        return getattr(gm.get_submodule(str(product.target)), "bias", None) is not None
    return (product.args[2] if len(product.args) > 2 else product.kwargs.get("bias")) is not None


def _folded(gm: fx.GraphModule, place: _Place) -> tuple[torch.Tensor, torch.Tensor]:
    """W' (N, K) and b' (N,) in fp64."""
    attributes = {n for node in place.nodes for n in node.all_input_nodes if n.op == "get_attr"}
    nodes = [node for node in gm.graph.nodes if node in attributes or node in place.nodes]
    body = _InFp64(extract(gm, nodes, [place.x], [place.result]))
    weight = _own_weight(gm, place.product)
    module = gm.get_submodule(place.path)
    inputs = features(module)[0] if is_linear(module) else weight.shape[1]
    points = torch.eye(inputs, dtype=torch.float64, device=weight.device)
    with torch.no_grad():
        bias = body.run(torch.zeros_like(points[:1]))[0][0]
        columns = [body.run(rows)[0] - bias for rows in torch.split(points, _ROWS)]
    return torch.cat(columns).mT, bias


class _InFp64(fx.Interpreter):
    """Runs what is folded in fp64: casts and dropout that does nothing are passed over."""

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().get_attr(target, args, kwargs)
        return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        module: Any = self.fetch_attr(target)
        weight = module.weight.double().mT if is_conv1d(module) else module.weight.double()
        x = args[0] if args else next(iter(kwargs.values()))
        return F.linear(x, weight, None if module.bias is None else module.bias.double())

    def run_node(self, n: fx.Node) -> Any:
        if _is_passed_over(n):
            return self.env[n.all_input_nodes[0]]
        return super().run_node(n)


__all__ = ["CONTRACT", "merge"]
