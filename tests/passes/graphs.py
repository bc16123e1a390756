"""Captured graphs written by hand, small enough for hundreds of examples, and what they should compute."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from adaptc.ir.edit import Result, infer_value
from adaptc.ir.sites import LORA_LINEAR
from adaptc.passes.contract import Context
from adaptc.passes.manager import op_counts
from adaptc.passes.walk import walk
from adaptc.torch_internals import fake_mode_of
from tests.ir.formulas import assert_within, rounding_bound

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Graph:
    """Builds a graph as Dynamo writes it (torch functions, fake values), with real inputs to run it on."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.inputs: list[torch.Tensor] = []
        self._mode = fake_mode_of(())

    def input(self, name: str, tensor: torch.Tensor) -> fx.Node:
        node = self.graph.placeholder(name)
        node.meta["example_value"] = self._mode.from_tensor(tensor)
        self.inputs.append(tensor)
        return node

    def call(self, target: Any, *args: Any, site: str | None = None, **kwargs: Any) -> fx.Node:
        op = "call_method" if isinstance(target, str) else "call_function"
        node = self.graph.create_node(op, target, args, kwargs)
        node.meta["example_value"] = infer_value(node)
        if site is not None:
            node.meta["custom"] = {"adaptc": site}
        return node

    def lora(self, x, y, A, B, scale, scale_at="n", *, site="fc") -> fx.Node:
        """An adapter's corrected output."""
        node = self.call(LORA_LINEAR(), x, y, A, B, scale, scale_at, site=site)
        return self.call(operator.getitem, node, 0, site=site)

    def module(self, *outputs: fx.Node) -> fx.GraphModule:
        self.graph.output(outputs)
        gm = fx.GraphModule({}, self.graph)
        gm.graph.lint()
        return gm


def tensors(*, batch=(4,), k=5, n=3, ranks=(2,), dtype=torch.float32, factors=None, trained=True, grad_x=True):
    """name -> x, y, and A, B, s of each adapter (numbered from 1); the factors are trained, K != N, B is not 0."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape, dtype=dtype, grad=False):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(grad)

    found = {"x": draw(*batch, k, grad=grad_x), "y": draw(*batch, n, grad=grad_x)}
    for i, r in enumerate(ranks, start=1):
        found[f"A{i}"] = draw(r, k, dtype=factors or dtype, grad=trained)
        found[f"B{i}"] = draw(n, r, dtype=factors or dtype, grad=trained)
        found[f"s{i}"] = torch.tensor([0.5 + i], dtype=torch.float64)
    return found


def ops(gm: fx.GraphModule) -> dict[str, int]:
    return {name: count for name, count in op_counts(gm).items() if name != "getitem"}


def run_rewrite(rewrite, gm: fx.GraphModule, context: Context | None = None):
    """Run one rewrite of a pass as the pass does."""
    result = Result()
    walk(gm, rewrite, context or Context(), result)
    gm.recompile()
    gm.graph.lint()
    return result


def run(gm: fx.GraphModule, inputs: list[torch.Tensor], g: torch.Tensor):
    """The first output, and the gradient of <output, g> to every input that requires one, by input name."""
    leaves = [t.detach().requires_grad_(t.requires_grad) for t in inputs]
    out = gm(*leaves)[0]
    names = [str(node.target) for node in gm.graph.nodes if node.op == "placeholder"]
    wanted = {name: leaf for name, leaf in zip(names, leaves, strict=True) if leaf.requires_grad}
    if not wanted:
        return out, {}
    return out, dict(zip(wanted, torch.autograd.grad(out, list(wanted.values()), g, allow_unused=True), strict=True))


def adapters_formula(values: dict[str, torch.Tensor], g: torch.Tensor):
    """y' = y + sum_i s_i (x A_i^T) B_i^T, and the gradients of <y', g>, written out.

    dx = sum_i s_i (g B_i) A_i;  dy = g;  dA_i = s_i (g B_i)^T x;  dB_i = s_i g^T (x A_i^T).
    """
    x, out, grads = values["x"], values["y"], {"x": 0, "y": g}
    for i in range(1, sum(name.startswith("A") for name in values) + 1):
        A, B, s = values[f"A{i}"], values[f"B{i}"], values[f"s{i}"]
        h = torch.einsum("...k,rk->...r", x, A)
        q = s * torch.einsum("...n,nr->...r", g, B)
        out = out + s * torch.einsum("...r,nr->...n", h, B)
        grads["x"] = grads["x"] + torch.einsum("...r,rk->...k", q, A)
        grads[f"A{i}"] = torch.einsum("...r,...k->rk", q, x)
        grads[f"B{i}"] = s * torch.einsum("...n,...r->nr", g, h)
    return out, grads


def check_adapters(gm: fx.GraphModule, values: dict[str, torch.Tensor], inputs: list[torch.Tensor] | None = None):
    """The graph's output and every gradient against the formula in fp64, to the rounding of x's dtype."""
    dtype = values["x"].dtype
    generator = torch.Generator().manual_seed(1)
    g = torch.randn(values["y"].shape, generator=generator, dtype=torch.float64).to(dtype)
    out, grads = run(gm, list(values.values()) if inputs is None else inputs, g)
    doubled = {name: t.detach().double() for name, t in values.items()}
    want, want_grads = adapters_formula(doubled, g.double())
    size, size_grads = adapters_formula({name: t.abs() for name, t in doubled.items()}, g.double().abs())
    args = [*values.values(), g]
    assert out.dtype == dtype
    assert_within(out, want, rounding_bound(size, args, dtype), "output")
    assert grads.keys() == {name for name, t in values.items() if t.requires_grad}
    for name, got in grads.items():
        assert got.dtype == values[name].dtype
        assert_within(got, want_grads[name], rounding_bound(size_grads[name], args, dtype), f"gradient of {name}")
