"""What ``"all-linear"`` selects: every linear layer, but no output head and no MoE router.

PEFT leaves out ``get_output_embeddings()``, and the classifier only when told the task. Here a head is
recognised with or without a task, a head's inner layers belong to it (RoBERTa's ``classifier.dense``), a
weight tied to an embedding makes a head of any module, and each module that is left out is named.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from adaptc.methods.linear import is_linear
from adaptc.plan.tree import ModuleTree, self_and_parents

LANGUAGE_HEADS = frozenset({"lm_head", "lm_heads"})
#: Heads by name, where they hang directly on the model.
HEAD_NAMES = LANGUAGE_HEADS | {
    "classification_head",
    "classifier",
    "cls",
    "embed_out",
    "head",
    "heads",
    "logits_proj",
    "pre_classifier",
    "qa_outputs",
    "score",
}
ROUTER = "MoE router"
FUSED = "fused expert weights, not linear layers"


def all_linear(tree: ModuleTree) -> tuple[list[str], dict[str, str]]:
    """The paths that ``"all-linear"`` selects, and the paths it leaves out with the reason of each."""
    routers = dict.fromkeys(_routers(tree), ROUTER)
    apart = {**dict(_heads(tree)), **routers}
    taken: list[str] = []
    left_out: dict[str, str] = {}
    for path, module in tree.modules.items():
        if is_linear(module):
            reason = next((apart[p] for p in self_and_parents(path) if p in apart), None)
            reason = reason or _tied_to_embedding(tree, module)
            if reason is None:
                taken.append(path)
            else:
                left_out[path] = reason
        elif path in routers and any(True for _ in tree.own_parameters(module)):
            left_out[path] = ROUTER
        elif path.endswith("experts"):
            fused = [name for name, p in tree.own_parameters(module) if p.dim() > 2]
            left_out.update({f"{path}.{name}": f'{FUSED}: name them, "experts.{name}"' for name in fused})
    return taken, left_out


def _heads(tree: ModuleTree) -> Iterator[tuple[str, str]]:
    """The heads' paths with a reason each: by the models' own word, else by name on the outermost model."""
    models = {p: m for p, m in tree.with_root() if callable(getattr(m, "get_output_embeddings", None))}
    for path, module in {"": tree.root, **models}.items():
        inside_another = path and any(p in models for p in [*self_and_parents(path), ""] if p != path)
        names = LANGUAGE_HEADS if inside_another else HEAD_NAMES
        for name in names.intersection(module._modules):
            yield f"{path}.{name}" if path else name, f'output head: it is named "{name}"'
    for module in models.values():
        head = _output_embeddings(module)
        if isinstance(head, nn.Module):
            for path in tree.paths_of(head):
                yield path, "output head: the model's output embeddings"


def _output_embeddings(model: nn.Module) -> object:
    try:
        return model.get_output_embeddings()  # type: ignore[operator]
    except NotImplementedError:  # transformers' way to say that a backbone has none
        return None


def _routers(tree: ModuleTree) -> Iterator[str]:
    """``mlp.router``, any class named as a router, and ``gate`` beside ``experts`` (never ``gate_proj``)."""
    for path, module in tree.modules.items():
        parent, _, name = path.rpartition(".")
        is_gate = name == "gate" and "experts" in tree.module(parent)._modules
        if is_gate or name in ("router", "router_gate") or "Router" in type(module).__name__:
            yield path


def _tied_to_embedding(tree: ModuleTree, module: nn.Module) -> str | None:
    for other in tree.tied_to(module):
        if isinstance(tree.module(other.rpartition(".")[0]), nn.Embedding):
            return f"output head: its weight is tied to {other}"
    return None
