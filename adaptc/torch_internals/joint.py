"""AOTAutograd's joint graph: where its inputs and results come from, and what the partitioner is told."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from adaptc.torch_internals.dynamo import keep_source_name
from adaptc.torch_internals.values import OpOverload, fake_mode_of, node_value

#: Metadata key of :func:`mark_backward`.
_BACKWARD = "adaptc_backward"


def name_joint_inputs(joint: fx.GraphModule, sources: Sequence[str | None]) -> None:
    """Note on the inputs of AOTAutograd's graph where they came from; ``sources``: those of the captured graph.

    AOTAutograd may merge or reorder inputs, and takes a tensor subclass (a quantised weight) apart; its descriptors
    say which is which. 2.11 to 2.15.
    """
    for node in joint.graph.nodes:
        described = node.meta.get("desc") if node.op == "placeholder" else None
        inner = ""
        while (base := getattr(described, "base", None)) is not None:
            described, inner = base, f".{getattr(described, 'attr', '')}{inner}"
        index = getattr(described, "idx", None)
        if index is not None and index < len(sources):
            source = sources[index]
            keep_source_name(node, source and source + inner)


def gradient_inputs(joint: fx.GraphModule) -> list[fx.Node | None] | None:
    """For each result of AOTAutograd's joint graph, the input whose gradient it is; None for outputs of the model, and
    for a tensor subclass, which has several inputs. None where nothing is known of the results. 2.11 to 2.15."""
    output = next(n for n in joint.graph.nodes if n.op == "output")
    described = output.meta.get("desc")
    results = output.args[0]
    if not isinstance(results, list | tuple) or not isinstance(described, list | tuple):
        return None
    if len(described) != len(results):
        return None
    inputs = {n.meta["desc"]: n for n in joint.graph.nodes if n.op == "placeholder" and "desc" in n.meta}
    return [inputs.get(getattr(one, "grad_of", None)) for one in described]


def forward_outputs(joint: fx.GraphModule) -> int:
    """How many of the results of AOTAutograd's joint graph are the forward's: they are the first ones. 2.11 to 2.15."""
    output = next(n for n in joint.graph.nodes if n.op == "output")
    results, described = output.args[0], output.meta.get("desc")
    if isinstance(described, list | tuple) and len(described) == len(results):
        return next((i for i, one in enumerate(described) if _is_of_backward(one)), len(results))
    inputs = [n for n in joint.graph.nodes if n.op == "placeholder" and not n.name.startswith("tangents")]
    return len(results) - len(inputs)


def _is_of_backward(described: Any) -> bool:
    """Whether a result is a gradient, or nothing in the place of one, a part of a tensor subclass's, or a token."""
    while (base := getattr(described, "base", None)) is not None:
        described = base
    return described is None or type(described).__name__ in ("GradAOTOutput", "BackwardTokenAOTOutput")


def cut(joint: fx.GraphModule) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Forward and backward, as AOTAutograd's min-cut partitioner would cut a joint graph, which it changes. Asks no
    other process. 2.11 to 2.15."""
    from functorch.compile import min_cut_rematerialization_partition
    from torch._functorch import config

    values = [node_value(n) for n in joint.graph.nodes if n.op == "placeholder"]
    # The fake mode is for states of generators that it may add.
    with fake_mode_of(values), config.patch(_sync_decision_cross_ranks=False):
        parts = min_cut_rematerialization_partition(joint, None, num_fwd_outputs=forward_outputs(joint))
    return parts  # type: ignore[no-any-return]


def keeps_inputs(joint: fx.GraphModule) -> bool:
    """Whether the backward of AOTAutograd's joint graph finds its inputs as the forward did: the forward writes to none
    of them, in the graph or, by a result that is copied, behind it. False where nothing is known. 2.11 to 2.15."""
    calls = (n.target for n in joint.graph.nodes if isinstance(n.target, OpOverload))
    output = next(n for n in joint.graph.nodes if n.op == "output")
    described, results = output.meta.get("desc"), output.args[0]
    if any(target._schema.is_mutable for target in calls) or not isinstance(described, list | tuple):
        return False
    if not isinstance(results, list | tuple) or len(results) != len(described):
        return False
    kinds = {type(one).__name__ for one, result in zip(described, results, strict=True) if result is not None}
    return kinds <= {"PlainAOTOutput", "GradAOTOutput"}


def mark_backward(joint: fx.GraphModule) -> None:
    """Note on the nodes of a joint graph that AOTAutograd leaves without a mark which half they belong to.

    It copies the bodies of ``torch.autograd.Function`` so; they stand where what is around them stands. AOTAutograd's
    own mark is left as it is. 2.11 to 2.15.
    """
    backward = False
    for node in joint.graph.nodes:
        if node.op not in ("placeholder", "output", "get_attr"):
            tag = node.meta.get("partitioner_tag")
            backward = backward if tag is None else tag == "is_backward"
            if tag is None and backward:
                node.meta[_BACKWARD] = True


def is_backward(node: fx.Node) -> bool:
    """Whether a node of a joint graph belongs to its backward half. 2.11 to 2.15."""
    return node.meta.get("partitioner_tag") == "is_backward" or _BACKWARD in node.meta


def mark_recomputed(node: fx.Node) -> None:
    """Have the partitioner compute a forward node of a joint graph again in the backward instead of saving it.

    The marks are those of selective checkpointing; a node of a checkpointed block keeps the block's number. 2.11 to
    2.15.
    """
    node.meta["recompute"] = torch.utils.checkpoint.CheckpointPolicy.MUST_RECOMPUTE
    node.meta.setdefault("ac_graph_id", 0)


def mark_drawn_once(node: fx.Node) -> None:
    """Have the backward get the very numbers that a forward node of a joint graph draws, in a checkpointed block too:
    they are saved, or where nothing may be, drawn again from a generator in the state that it had. 2.11 to 2.15."""
    from torch._functorch import config

    if config.activation_memory_budget == 0:
        return mark_recomputed(node)
    node.meta["recompute"] = torch.utils.checkpoint.CheckpointPolicy.MUST_SAVE
    node.meta.setdefault("ac_graph_id", 0)
