"""A LoRA site of a joint graph together with the frozen layer's products, forward and backward."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import cast

from torch import fx

from adaptc.ir import dialect
from adaptc.ir.products import Product, frozen_product, without_views
from adaptc.ir.sites import items_of
from adaptc.ir.sums import flatten, root_of
from adaptc.torch_internals import node_value, size_hint


@dataclasses.dataclass(frozen=True)
class InputGrad:
    """dx = g W + q A + ...: ``own`` is q A, ``product`` is g W, and ``root`` the last addition of the sum of both."""

    own: fx.Node
    product: Product
    root: fx.Node

    @property
    def term(self) -> fx.Node:
        """g W as it stands in the sum."""
        return self.product.nodes[-1]


@dataclasses.dataclass(frozen=True)
class Grads:
    """``g``: the gradient of the layer's output; ``q`` = scale * (g B); the gradients of the factors; that of the input
    where something asks for it."""

    g: fx.Node
    q: fx.Node
    da: fx.Node
    db: fx.Node
    dx: InputGrad | None


@dataclasses.dataclass(frozen=True)
class Site:
    """``call``: y', h = lora_linear(x, y, A, B, scale, "r"), where y is ``product``. ``grads`` is None in a graph
    without backward."""

    call: fx.Node
    product: Product
    grads: Grads | None

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Rows (as many as at the capture), in, out, rank."""
        _, _, A, _ = self.operands
        (k, n), r = node_value(self.product.right).shape, node_value(A).shape[0]
        return size_hint(node_value(self.product.node).shape[0]), int(k), int(n), int(r)

    @property
    def operands(self) -> tuple[fx.Node, fx.Node, fx.Node, fx.Node]:
        """x, y, A, B."""
        return self.call.args[:4]  # type: ignore[return-value]

    def output(self, index: int) -> fx.Node | None:
        return _only(item for item in items_of(self.call) if item.args[1] == index)


def read(call: fx.Node) -> Site | str:
    """The site of a ``lora_linear`` node, or why it is none that can be written otherwise."""
    x, y, A, B = cast(tuple[fx.Node, ...], call.args[:4])
    if call.args[5] != "r":
        return "its scale is not at the bottleneck"
    product = frozen_product(y)
    if isinstance(product, str):
        return product
    if not product.is_plain or node_value(product.right).shape != (node_value(A).shape[1], node_value(B).shape[0]):
        return "its frozen layer's weight is cast, or of another shape than its factors"
    if without_views(product.x) is not without_views(x):
        return "it reads another value than its frozen layer (dropped, or cast)"
    if not product.is_read_once:
        return "its frozen layer's output is read by others too"
    site = Site(call, product, None)
    h = site.output(1)
    readers = [] if h is None else list(h.users)
    if not readers and not _calls(B, "lora_bottleneck_grad"):
        return site
    grads = _grads(call, product, readers)
    return grads if isinstance(grads, str) else dataclasses.replace(site, grads=grads)


#: Why a site stays whose part of the backward is not the one that its forward leads to.
_BACKWARD = "not both of its factors are trained, or its gradients are summed with those of another call"


def _grads(call: fx.Node, product: Product, readers: list[fx.Node]) -> Grads | str:
    x, _, A, B, scale = cast(tuple[fx.Node, ...], call.args[:5])
    db = _only(readers)
    if db is None or db.target is not dialect.get("lora_factor_grad").overload:
        return _BACKWARD
    g = cast(fx.Node, db.args[0])
    q = _only(n for n in _calls(B, "lora_bottleneck_grad") if n.args == (g, B, scale))
    if q is None:
        return _BACKWARD
    da = _only(n for n in _calls(q, "lora_factor_grad") if n.args[:2] == (q, x))
    own = _only(n for n in _calls(q, "lora_input_grad") if n.args == (q, A))
    if da is None or len(q.users) != 1 + (own is not None):
        return _BACKWARD
    if own is None:
        return Grads(g, q, da, db, None)
    dx = _input_grad(own, g, product)
    return dx if isinstance(dx, str) else Grads(g, q, da, db, dx)


def _input_grad(own: fx.Node, g: fx.Node, product: Product) -> InputGrad | str:
    root = root_of(own)
    for term in [] if root is own else flatten(root)[1]:
        found = frozen_product(term)
        if isinstance(found, str) or found.bias is not None or not found.is_read_once:
            continue
        # The weight the other way round: what reads g and W^T of a square W is another layer's that shares it.
        same = found.weight is product.weight and found.is_transposed != product.is_transposed and found.is_plain
        if same and without_views(found.x) is without_views(g) and node_value(root).is_contiguous():
            return InputGrad(own, found, root)
    return "its gradient of the input is not added to its frozen layer's"


def _calls(argument: object, name: str) -> list[fx.Node]:
    target = dialect.get(name).overload
    return [user for user in argument.users if user.target is target] if isinstance(argument, fx.Node) else []


def _only(nodes: Iterable[fx.Node]) -> fx.Node | None:
    found = list(nodes)
    return found[0] if len(found) == 1 else None
