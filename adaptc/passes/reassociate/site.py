"""A LoRA site of a joint graph together with the frozen layer's products, forward and backward."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterable
from typing import cast

from torch import fx

from adaptc.codegen.torch_internals import node_value
from adaptc.ir import dialect
from adaptc.ir.products import Product, frozen_product, without_views
from adaptc.ir.sums import flatten, root_of


@dataclasses.dataclass(frozen=True)
class InputGrad:
    """dx = g W + q A + ...: ``own`` is q A, ``base`` the product g W, ``term`` its view in the sum that ends at
    ``root``."""

    own: fx.Node
    base: fx.Node
    term: fx.Node
    root: fx.Node


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
    """``call``: y', h = lora_linear(x, y, A, B, scale, "r"), where y is ``base``, the node of ``product``, as seen
    through views. ``grads`` is None in a graph without backward."""

    call: fx.Node
    base: fx.Node
    product: Product
    grads: Grads | None

    @property
    def shape(self) -> tuple[int | object, int, int, int]:
        """Rows, in, out, rank."""
        _, _, A, B = self.operands
        return node_value(self.base).shape[0], node_value(A).shape[1], *node_value(B).shape

    @property
    def operands(self) -> tuple[fx.Node, fx.Node, fx.Node, fx.Node]:
        """x, y, A, B."""
        return self.call.args[:4]  # type: ignore[return-value]

    def output(self, index: int) -> fx.Node | None:
        return _only(user for user in self.call.users if user.target is operator.getitem and user.args[1] == index)


def read(call: fx.Node) -> Site | str:
    """The site of a ``lora_linear`` node, or why it is none that can be written otherwise."""
    x, y = cast(tuple[fx.Node, fx.Node], call.args[:2])
    if call.args[5] != "r":
        return "its scale is trained"
    base = without_views(y)
    product = frozen_product(base)
    if product is None:
        return "its frozen layer is no product with a dense weight"
    if without_views(product.x) is not without_views(x):
        return "it does not read what its frozen layer reads (dropout)"
    if any(len(node.users) > 1 for node in (base, y)):
        return "its frozen layer's output is read by others too"
    site = Site(call, base, product, None)
    h = site.output(1)
    readers = [] if h is None else list(h.users)
    if not readers and not _calls(call.args[3], "lora_bottleneck_grad"):
        return site
    grads = _grads(call, product, readers)
    return grads if isinstance(grads, str) else dataclasses.replace(site, grads=grads)


def _grads(call: fx.Node, product: Product, readers: list[fx.Node]) -> Grads | str:
    x, _, A, B, scale = cast(tuple[fx.Node, ...], call.args[:5])
    dB = _only(readers)
    if dB is None or dB.target is not dialect.get("lora_factor_grad").overload:
        return "not both of its factors are trained"
    g = cast(fx.Node, dB.args[0])
    q = _only(n for n in _calls(B, "lora_bottleneck_grad") if n.args == (g, B, scale))
    if q is None:
        return "not both of its factors are trained"
    dA = _only(n for n in _calls(q, "lora_factor_grad") if n.args[:2] == (q, x))
    own = _only(n for n in _calls(q, "lora_input_grad") if n.args == (q, A))
    if dA is None or len(q.users) != 1 + (own is not None):
        return "not both of its factors are trained"
    if own is None:
        return Grads(g, q, dA, dB, None)
    root = root_of(own)
    terms = [] if root is own else flatten(root)[1]
    for term in terms:
        base = without_views(term)
        found = frozen_product(base)
        if found is not None and found.weight is product.weight and without_views(found.x) is without_views(g):
            alone = all(len(node.users) == 1 for node in (base, term))
            if alone and node_value(root).is_contiguous():
                return Grads(g, q, dA, dB, InputGrad(own, base, term, root))
    return "its gradient of the input is not added to its frozen layer's alone"


def _calls(argument: object, name: str) -> list[fx.Node]:
    target = dialect.get(name).overload
    return [user for user in argument.users if user.target is target] if isinstance(argument, fx.Node) else []


def _only(nodes: Iterable[fx.Node]) -> fx.Node | None:
    found = list(nodes)
    return found[0] if len(found) == 1 else None
