"""Where the nodes of a graph come from, and what a node that stands for others knows of theirs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx

#: What a checkpoint does with a node's value.
OF_CHECKPOINTS = ("recompute", "ac_graph_id")
#: What a new node takes over from the node it stands before: where it comes from, and on a joint graph whether it
#: belongs to the forward or the backward, and to which checkpoint: a product that does not is saved.
INHERITED = (
    "nn_module_stack", "fwd_nn_module_stack", "stack_trace", "seq_nr", "source_fn_stack",
    "partitioner_tag", "autograd_backward", *OF_CHECKPOINTS,
)  # fmt: skip
#: The key at which a node keeps the origins of those that it stands for.
_KEY = "adaptc_origins"


@dataclasses.dataclass(frozen=True)
class Origin:
    """What a node that is gone was in its graph, for one that is to take its place later.

    ``meta``: where it came from, whose it was, and what a checkpoint does with it. ``before``: the name of the node in
    front of which it stood, if that is left.
    """

    meta: Mapping[str, Any]
    before: str | None = None


def origin_of(node: fx.Node) -> Origin:
    return Origin({key: node.meta[key] for key in (*INHERITED, "custom") if key in node.meta})


def checkpoint_marks(node: fx.Node) -> dict[str, Any]:
    """What a checkpoint does with a node's value; empty for a node outside of one."""
    return {key: node.meta[key] for key in OF_CHECKPOINTS if key in node.meta}


def keep_origins(node: fx.Node, origins: Sequence[Origin]) -> None:
    """Have ``node`` remember what it stands for. A checkpoint does with it what it did with that."""
    node.meta[_KEY] = tuple(origins)
    for origin in origins:
        node.meta.update({key: origin.meta[key] for key in OF_CHECKPOINTS if key in origin.meta})


def origins(node: fx.Node) -> tuple[Origin, ...]:
    """What :func:`keep_origins` left at ``node``."""
    found: tuple[Origin, ...] = node.meta.get(_KEY, ())
    return found
