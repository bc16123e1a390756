"""Read a weight's update as a low-rank product, where the weight is only read by linear products.

before:  %w = lora_weight(%W, %A, %B, %s);  %y = linear(%x, %w, %b)
after:   %y0 = linear(%x, %W, %b);  %t = lora_linear(%x, %y0, %A, %B, %s, "n");  %y = %t[0]

Of y = x W the factors change places: x (B A) = (x B) A. Transposes and casts between the two are repeated on the frozen
weight. Reassociates; neither the sum nor the gradient of the whole weight is made any more, which is worth it in
training at any number of rows (a rank-r gradient instead of one of the weight's size).

Refused, so that the weight stays W + s B A: when anything else reads it, by name; when something between the sum and
the product writes to memory. Casts that autocast makes for the product are written out.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from adaptc.ir.edit import Edit
from adaptc.ir.effects import barrier
from adaptc.ir.names import op_name
from adaptc.ir.sites import LORA_LINEAR, calls_of, site_of
from adaptc.passes.walk import Match, Together, each
from adaptc.torch_internals import node_value

_MATMULS = (torch.matmul, torch.mm, operator.matmul, "matmul", "mm", "__matmul__")
_INNER = (torch.inner, "inner")
#: Attributes, which torch 2.14 captures as calls of an op of that name, and calls that transpose a matrix.
_TRANSPOSED = ("T", "mT", "H", "mH")
_TRANSPOSES = (*_TRANSPOSED, "t", "adjoint", "numpy_T", "matrix_H")
_SWAPS = ("transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "permute")
_CASTS = ("to", "type", "float", "half", "bfloat16", "double")
_NO_OPS = ("contiguous",)


# The last first: of several adapters each reads the sum of those before it.
@each(lambda gm: reversed(calls_of(gm, "lora_weight")))
def read_low_rank(weight: fx.Node) -> Together | str:
    reads = list(_reads(weight, [weight], False))
    products = [read for read in reads if isinstance(read, _Read)]
    if reason := _why_not(weight, reads, products):
        return f"the weight stays W + s B A: {reason}"
    site = site_of(weight)
    return Together([site], [Match(r.product, partial(_write, r), [*r.chain, r.product], site=site) for r in products])


def _why_not(weight: fx.Node, reads: list[_Read | str], products: list[_Read]) -> str | None:
    if (shape := node_value(weight).shape)[:-2]:
        return f"it is a stack of {shape[0]} matrices"
    if not reads:
        return "nothing reads it"
    others = (read for read in reads if isinstance(read, str))
    writes = (barrier(weight, read.product, modes=False) for read in products)
    return next(others, None) or next((f"{why} before the product" for why in writes if why), None)


@dataclasses.dataclass(frozen=True)
class _Read:
    """One linear product of a weight: y = x W^T, or y = x W where ``columns``; ``chain``: the weight, what is done to
    it, without the product."""

    chain: tuple[fx.Node, ...]
    product: fx.Node
    x: fx.Node
    columns: bool


def _reads(node: fx.Node, chain: list[fx.Node], transposed: bool) -> Iterator[_Read | str]:
    """What reads the last of ``chain``, which is W or, ``transposed``, W^T: products, or a text that says what else."""
    for user in node.users:
        if (turns := _turns(user, node)) is not None:
            yield from _reads(user, [*chain, user], transposed != turns)
            continue
        found = _product(user, node)
        if found is None:
            yield f"{op_name(user) if user.op != 'output' else 'the caller'} reads it"
        else:
            x, columns = found
            yield _Read(tuple(chain), user, x, columns != transposed)


def _turns(user: fx.Node, node: fx.Node) -> bool | None:
    """Whether ``user`` is ``node`` transposed (True), or in another dtype or layout (False); None: it is neither."""
    if not user.args or user.args[0] is not node or list(user.all_input_nodes) != [node]:
        return None
    name = op_name(user)
    rest: list[Any] = list(user.args[1:])
    if name == "getattr":
        return True if rest[0] in _TRANSPOSED else None
    if name in _TRANSPOSES:
        return True
    if name in _SWAPS:
        rest += user.kwargs.values()
        dims = list(rest[0]) if len(rest) == 1 and isinstance(rest[0], tuple | list) else rest
        if len(dims) != 2 or not all(isinstance(d, int) for d in dims):
            return None
        first, second = (d % 2 for d in dims)
        return (first, second) == (1, 0) if name == "permute" else first != second
    if name in _CASTS:
        return False if node_value(user).is_floating_point() else None
    return False if name in _NO_OPS else None


def _product(user: fx.Node, weight: fx.Node) -> tuple[fx.Node, bool] | None:
    """x of a product with ``weight``, and whether it is x W and not x W^T."""
    args = dict(enumerate(user.args))
    if user.target is F.linear:
        x, w = args.get(0, user.kwargs.get("input")), args.get(1, user.kwargs.get("weight"))
        bias = args.get(2, user.kwargs.get("bias"))
        fits = w is weight and isinstance(x, fx.Node) and x is not weight and bias is not weight
        return (x, False) if fits and isinstance(x, fx.Node) else None
    if user.target in _MATMULS and len(args) == 2 and not user.kwargs:
        x = args[0]
        return (x, True) if args[1] is weight and isinstance(x, fx.Node) and x is not weight else None
    if user.target in _INNER and len(args) == 2 and not user.kwargs:
        x = args[0]
        return (x, False) if args[1] is weight and isinstance(x, fx.Node) and x is not weight else None
    if user.target is torch.addmm and len(args) == 3 and not user.kwargs:
        bias, x, w = args[0], args[1], args[2]
        fits = w is weight and isinstance(x, fx.Node) and x is not weight and bias is not weight
        return (x, True) if fits and isinstance(x, fx.Node) else None
    if user.target is torch.einsum:
        return _einsum(user, weight)
    return None


def _einsum(user: fx.Node, weight: fx.Node) -> tuple[fx.Node, bool] | None:
    """``...k,nk->...n`` and ``...k,kn->...n``, whatever the letters."""
    if len(user.args) != 3 or not isinstance(user.args[0], str):
        return None
    equation, x, w = user.args
    sides = equation.replace(" ", "").replace("...", ".").split("->")  # type: ignore[union-attr]
    terms = sides[0].split(",")
    if len(sides) != 2 or len(terms) != 2 or len(terms[1]) != 2 or not terms[0]:
        return None
    if w is not weight or not isinstance(x, fx.Node) or x is weight:
        return None
    (*rows, k), (first, second) = list(terms[0]), list(terms[1])
    n = second if first == k else first
    if {first, second} != {k, n} or n in rows or len({*rows, k, n}) != len(rows) + 2:
        return None
    return (x, first == k) if sides[1] == "".join([*rows, n]) else None


def _write(read: _Read, edit: Edit) -> fx.Node:
    weight, *between = read.chain
    frozen, A, B, scale = weight.args
    product = read.product

    def frozen_part(node: fx.Node, like: fx.Node) -> fx.Node:
        """``node`` as a part of the frozen model, which is where ``like`` belongs."""
        node.meta["custom"] = dict(like.meta.get("custom") or {})
        return node

    def in_dtype(node: fx.Node) -> fx.Node:
        """An operand in the product's dtype: the casts that autocast makes, written out."""
        value = node_value(node)
        if not isinstance(value, torch.Tensor) or value.dtype == dtype:
            return node
        return frozen_part(edit.call("to", node, dtype), product)

    dtype = node_value(product).dtype
    last, base = weight, frozen
    for node in between:
        args, kwargs = _replaced(node, {last: base})
        last, base = node, frozen_part(edit.call(node.target, *args, **kwargs), node)
    operands = {n: in_dtype(base if n is last else n) for n in product.all_input_nodes}  # type: ignore[arg-type]
    args, kwargs = _replaced(product, operands)
    y = frozen_part(edit.call(product.target, *args, **kwargs), product)
    if read.columns:
        A, B = edit.call("t", B), edit.call("t", A)
    return edit.item(edit.call(LORA_LINEAR(), operands[read.x], y, A, B, scale, "n"), 0)


def _replaced(node: fx.Node, new: Mapping[fx.Node, Any]) -> tuple[Any, Any]:
    """A node's arguments with others in the place of some nodes."""
    return fx.map_arg((node.args, node.kwargs), lambda n: new.get(n, n))
