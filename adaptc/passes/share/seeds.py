"""Draw the seeds of all dropouts of a graph at once, on the CPU.

before:  %s1 = randint(2^62, (1,));  %d1 = seeded_dropout(%x, %s1, p);  %s2 = randint(2^62, (1,));  ...
after:   %s = randint(2^62, (n,));   %d1 = seeded_dropout(%x, %s[0:1], p);  %d2 = seeded_dropout(%x2, %s[1:2], p);  ...

The generator gives the numbers that it would give one by one, if nothing else draws in between. Inductor's C++ has
where a number stands in the generator's stream as a constant, so that every draw is a kernel of its own to compile.
Elsewhere it is an argument, and a seed with a place in a larger tensor would be the constant.
"""

from __future__ import annotations

import torch
from torch import fx

from adaptc.codegen.torch_internals import node_value
from adaptc.ir import dialect
from adaptc.ir.edit import Edit, Result
from adaptc.ir.sites import site_of
from adaptc.passes.contract import Context

aten = torch.ops.aten
_DRAWS = (aten.randint.default, aten.randint.low)


def share_seeds(gm: fx.GraphModule, context: Context, result: Result) -> None:
    found = [node for node in gm.graph.nodes if node.target in _DRAWS and _is_seed(node)]
    draws = [node for node in found if (node.args, node.kwargs) == (found[0].args, found[0].kwargs)]
    if len(draws) < 2:
        return
    if not context.spend():
        result.refused += [(site_of(node), "limit reached") for node in draws]
        return
    first = draws[0]
    edit = Edit(gm, site_of(first), draws, draws, at=first, record=context.record)
    *bounds, _ = first.args
    together = edit.call(first.target, *bounds, [len(draws)], **first.kwargs)
    result.applied.append(
        edit.finish(*(edit.call(aten.slice.Tensor, together, 0, i, i + 1) for i in range(len(draws))))
    )


def _is_seed(node: fx.Node) -> bool:
    """Whether a draw is the seed of dropouts on the CPU, and of nothing else."""
    value, dropout = node_value(node), dialect.get("seeded_dropout").overload
    readers = [user.target is dropout and user.args[1] is node for user in node.users]
    return value.device.type == "cpu" and tuple(value.shape) == (1,) and all(readers) and bool(readers)
