"""Captured graphs to run passes on, and passes that are wrong on purpose."""

from __future__ import annotations

import copy
import operator

import torch
from torch import nn

import adaptc
from adaptc.ir.edit import Edit, Result, Rewrite, copy_graph_module
from adaptc.ir.ops import lora  # noqa: F401  (registers the dialect op)
from adaptc.ir.sites import lora_nodes, site_of
from adaptc.passes.contract import Context, Contract, Pass
from adaptc.passes.manager import Pipeline, get
from adaptc.torch_internals import carry_capture_metadata


class Square(nn.Module):
    """Two linear layers with K = N: shapes say nothing about which operand is which."""

    def __init__(self, size: int = 6) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(size, size), nn.Linear(size, size)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def adapted(*, dtype=torch.float32, size=6, seed=0, verify=False, **options):
    """(untouched base, adapted copy) with r = K = N, so that A and B have one shape."""
    torch.manual_seed(seed)
    base = Square(size).to(dtype)
    options = {"r": size, "alpha": 3 * size, "init": "random", "targets": "all-linear", **options}
    plan = adaptc.LoRA(**options)
    return base, adaptc.compile(copy.deepcopy(base), plan, backend="aot_eager", verify=verify)


def capture(model, *args, **kwargs):
    """What Dynamo captures of an adapted model: (graph module, real inputs, placeholder -> site path)."""
    found = []

    def backend(gm, inputs):
        ours = copy_graph_module(gm)
        carry_capture_metadata(gm, ours)
        found.append((ours, list(inputs)))
        return gm

    torch.compiler.reset()
    # Beside the model's own prologue, which would compile it.
    torch.compile(lambda *a, **k: model._call_impl(*a, **k), backend=backend)(*args, **kwargs)
    ((gm, inputs),) = found
    paths = {id(a.site_id): site.path for site in model.adaptc.sites for a in site.adapters.values()}
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    sites = {p: paths[id(v)] for p, v in zip(placeholders, inputs, strict=True) if id(v) in paths}
    return gm, inputs, sites


def wrong(name, run, *, numerics="reassociates", level="dynamo"):
    return Pass(name, run, Contract(level=level, numerics=numerics))


def around(one, *, order=("insert", "canonicalise", "lower"), after="insert"):
    """The default pipeline with ``one`` right after the pass ``after``."""
    passes = []
    for name in order:
        passes.append(get(name))
        passes += [one] if name == after else []
    return Pipeline(passes)


def replace_adapters(rewrite):
    """A pass that replaces every ``lora_linear`` and its output by what ``rewrite(edit, node)`` returns."""

    def run(gm, context: Context) -> Result:
        result = Result()
        for node in lora_nodes(gm):
            outputs = [u for u in node.users if u.target is operator.getitem]
            edit = Edit(gm, site_of(node), [node, *outputs], outputs, at=node, record=context.record)
            result.applied.append(edit.finish(*([rewrite(edit, node)] * len(outputs))))
        gm.recompile()
        return result

    return run


def again(edit, node, **changes):
    """The same call with some operands changed; returns its first output."""
    names = ("x", "y", "A", "B", "scale", "scale_at")
    operands = {**dict(zip(names, node.args, strict=True)), **changes}
    return edit.item(edit.call(node.target, *operands.values()), 0)


def swap_factors(edit, node):
    return again(edit, node, A=node.args[3], B=node.args[2])


def drop_scale(edit, node):
    return again(edit, node, scale=edit.call(torch.ones_like, node.args[4]))


def compute_in_fp32(edit, node):
    """The right value, in another dtype."""
    return edit.call("to", again(edit, node), torch.float32)


class StaleGradient(torch.autograd.Function):
    """Identity whose backward belongs to an older forward, 2 x."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


def stale_gradient(edit, node):
    return edit.call(StaleGradient.apply, again(edit, node))


def make_strided(edit, node):
    """The right values, laid out column by column."""
    return edit.call("transpose", edit.call("contiguous", edit.call("transpose", again(edit, node), -1, -2)), -1, -2)


def lose_precision(edit, node):
    """The right formula, with x rounded on the way."""
    return again(edit, node, x=edit.call("float", edit.call("bfloat16", node.args[0])))


def claim_nothing_done(gm, context: Context) -> Result:
    return Result(applied=[Rewrite(site_of(n), (), (), owner=gm) for n in lora_nodes(gm)])


def change_more_than_claimed(gm, context: Context) -> Result:
    """One honest rewrite, and another node's operand changed on the side."""
    first, second = lora_nodes(gm)
    result = replace_one(gm, context, first)
    second.args = (*second.args[:4], first_scale(gm), second.args[5])
    gm.recompile()
    return result


def change_silently(gm, context: Context) -> Result:
    _, second = lora_nodes(gm)
    second.args = (*second.args[:4], first_scale(gm), second.args[5])
    gm.recompile()
    return Result()


def change_after_recording(gm, context: Context) -> Result:
    """An honest rewrite whose new node is changed once its cut-out is on record."""
    result = replace_one(gm, context, lora_nodes(gm)[1])
    second = lora_nodes(gm)[1]
    second.args = (*second.args[:4], first_scale(gm), second.args[5])
    gm.recompile()
    return result


def first_scale(gm):
    return lora_nodes(gm)[0].args[4]


def replace_one(gm, context: Context, node) -> Result:
    outputs = list(node.users)
    edit = Edit(gm, site_of(node), [node, *outputs], outputs, at=node, record=context.record)
    return Result(applied=[edit.finish(*([again(edit, node)] * len(outputs)))])


#: name -> (pass, dtype of the model, a piece of the error)
WRONG = {
    "swap_factors": (replace_adapters(swap_factors), torch.float32, "as before the pass, in fp64"),
    "drop_scale": (replace_adapters(drop_scale), torch.float32, "as before the pass, in fp64"),
    "compute_in_fp32": (replace_adapters(compute_in_fp32), torch.bfloat16, "found     f32[4, 6] on cpu"),
    "stale_gradient": (replace_adapters(stale_gradient), torch.float32, "the gradient of A:first as before the pass"),
    "make_strided": (replace_adapters(make_strided), torch.float32, "stride (1, 4)"),
    "lose_precision": (replace_adapters(lose_precision), torch.float32, "twice the error before the pass"),
    "claim_nothing_done": (claim_nothing_done, torch.float32, "the graph is the same as before"),
    "change_more_than_claimed": (change_more_than_claimed, torch.float32, "but for replaced values"),
    "change_after_recording": (change_after_recording, torch.float32, "as its rewrite recorded it"),
    "change_silently": (change_silently, torch.float32, "but for replaced values"),
}
