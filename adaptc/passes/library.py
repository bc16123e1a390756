"""Call the library that is faster for a product with a weight, in fp32 on a CPU.

before:  %y = addmm(b, %x, permute(W));                %dx = mm(%dy, W)
after:   %y = adaptc.onednn_linear(%x, W, b);          %dx = adaptc.onednn_linear(%dy, permute(W), None)

torch calls MKL there, whose kernels for other makers' processors are slower ones. Both ways are timed once for each
shape on the host, with as many rows as the graph was captured with, to the next power of two (fewer where one product
would take long). oneDNN reads the weight where it is, as MKL does: no packed copy is kept.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import fx

from adaptc import torch_internals
from adaptc.codegen import choices
from adaptc.codegen.choices import Choice
from adaptc.ir.edit import Edit, Result
from adaptc.ir.names import module_of
from adaptc.ir.products import Product, frozen_product
from adaptc.ir.sites import is_inserted
from adaptc.passes.contract import Context, Contract
from adaptc.passes.walk import Match, everywhere
from adaptc.torch_internals import node_value, size_hint

CONTRACT = Contract(level="joint", numerics="reassociates")

aten = torch.ops.aten
#: Multiplications below which a product is not worth asking for: some tenths of a millisecond.
WORTH = 1 << 25
#: Those of the largest product that is timed, about a tenth of a second: a product of more rows is asked for with as
#: many as come to this. And elements of the largest weight that is made for it.
MOST, LARGEST = 1 << 33, 1 << 27


def library(gm: fx.GraphModule, context: Context) -> Result:
    return everywhere(gm, (_library,), context)


def _library(gm: fx.GraphModule, context: Context) -> Iterator[Match]:
    for node in list(gm.graph.nodes):
        product = _candidate(node)
        if product is None or (choice := _ask(product)) is None:
            continue
        context.choices.append(choice)
        if choice.chosen != choice.usual:
            layer = module_of(node)
            site = "(unknown layer)" if layer is None else layer[0]
            yield Match(node, functools.partial(_write, product), site=site)


def _write(product: Product, edit: Edit) -> fx.Node:
    edit.of_base = True
    weight = edit.call(aten.permute.default, product.right, [1, 0])
    return edit.op("onednn_linear", product.x, weight, product.bias)


def _candidate(node: fx.Node) -> Product | None:
    """The product that a node is, if it is one of the base model that oneDNN could make."""
    if is_inserted(node) or node.target not in (aten.mm.default, aten.addmm.default):
        return None
    product = frozen_product(node)
    if isinstance(product, str) or not product.is_plain or not torch_internals.may_call_onednn():
        return None
    values = [node_value(n) for n in (product.x, product.right, product.bias) if n is not None]
    if any(v.shape != values[1].shape[1:] for v in values[2:]):
        return None
    return product if all(v.dtype == torch.float32 and v.device.type == "cpu" for v in values) else None


def _ask(product: Product) -> Choice | None:
    rows = size_hint(node_value(product.x).shape[0])
    k, n = (int(size) for size in node_value(product.right).shape)
    if rows * k * n < WORTH or k * n > LARGEST:
        return None
    m = min(choices.bucket(rows), max(128, choices.bucket(MOST // (k * n))))
    transposed = node_value(product.right).stride(1) == 1  # as to W's own rows
    kind = f"{' transposed' if transposed else ''}{', bias' if product.bias else ''}"
    question = f"product {m} x {k} x {n}{kind}, float32"

    def make() -> choices.Ways:
        ones = functools.partial(torch.ones, dtype=torch.float32, device="cpu")
        x, bias = ones(m, k), None if product.bias is None else ones(n)
        weight = ones(k, n).t() if transposed else ones(n, k)
        usual = torch.mm if bias is None else functools.partial(torch.addmm, bias)
        into = ones(m, n)
        # What is behind the ops of compiled code, which call them without Python.
        onednn = functools.partial(torch_internals.onednn_linear, x, weight, bias)
        return {"MKL": lambda: usual(x, weight.t(), out=into), "oneDNN": onednn}

    return choices.choose(question, make)
