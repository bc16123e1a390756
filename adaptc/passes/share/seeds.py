"""Draw the seeds of all dropouts of a graph once: on the CPU all of them together, and in no checkpoint again.

before:  %s1 = randint(2^62, (1,));  %d1 = seeded_dropout(%x, %s1, p);  %s2 = randint(2^62, (1,));  ...
after:   %s = randint(2^62, (n,));   %d1 = seeded_dropout(%x, %s[0:1], p);  %d2 = seeded_dropout(%x2, %s[1:2], p);  ...

The generator gives the numbers that it would give one by one, if nothing else draws in between. Inductor's C++ has
where a number stands in the generator's stream as a constant, so that every draw is a kernel of its own to compile.
Elsewhere it is an argument, and a seed with a place in a larger tensor would be the constant.

Seeds are saved, whatever else is computed again. A checkpoint would draw them again: the state of a generator is
larger, and on a GPU AOTAutograd draws what is drawn again from generators of its own, which ``torch.manual_seed`` does
not reach. The partitioner, asked to save less, would draw other ones.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from adaptc.ir import dialect
from adaptc.ir.edit import Edit
from adaptc.ir.origin import checkpoint_marks
from adaptc.ir.sites import site_of
from adaptc.passes.contract import Context
from adaptc.passes.walk import Match, Together
from adaptc.torch_internals import mark_drawn_once, node_value

aten = torch.ops.aten
_DRAWS = (aten.randint.default, aten.randint.low)
_SAME = (aten.detach.default, aten.alias.default)


def share_seeds(gm: fx.GraphModule, context: Context) -> Iterator[Together]:
    seeds = [node for node in gm.graph.nodes if node.target in _DRAWS and _is_seed(node)]
    for node in seeds:
        if not checkpoint_marks(node):
            mark_drawn_once(node)
    found = [node for node in seeds if node_value(node).device.type == "cpu"]
    draws = [node for node in found if (node.args, node.kwargs) == (found[0].args, found[0].kwargs)]
    together = draws if len(draws) > 1 else []
    alone = [[node] for node in seeds if node not in together and _detached(node)]
    for group in ([together] if together else []) + alone:
        yield Together([site_of(node) for node in group], [_draw(group)])


def _draw(draws: list[fx.Node]) -> Match:
    """One draw for all of ``draws``, of which the backward needs what is saved."""
    first = draws[0]
    old = sorted({node for draw in draws for node in (draw, *_detached(draw))})

    def write(edit: Edit) -> list[fx.Node]:
        *bounds, _ = first.args
        drawn = edit.call(first.target, *bounds, [len(draws)], **first.kwargs)
        mark_drawn_once(drawn)
        new: dict[fx.Node, fx.Node] = {}
        for i, draw in enumerate(draws):
            seed = drawn if len(draws) == 1 else edit.call(aten.slice.Tensor, drawn, 0, i, i + 1)
            mark_drawn_once(seed)
            new |= dict.fromkeys((draw, *_detached(draw)), seed)
        return [new[node] for node in old]

    return Match(first, write, old, old)


def _is_seed(node: fx.Node) -> bool:
    """Whether a draw is the seed of dropouts, and of nothing else."""
    dropout = dialect.get("seeded_dropout").overload
    same = (node, *_detached(node))
    readers = [user for source in same for user in source.users if user not in same]
    reads = [user.target is dropout and user.args[1] in same for user in readers]
    return tuple(node_value(node).shape) == (1,) and all(reads) and bool(reads)


def _detached(node: fx.Node) -> list[fx.Node]:
    """What the dropouts of a checkpoint save of a seed: the same number."""
    found = [user for user in node.users if user.target in _SAME]
    return found + [further for one in found for further in _detached(one)]
