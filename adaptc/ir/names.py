"""Short, stable names for what a graph holds: module paths, inputs, ops, dtypes."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import torch
from torch import fx

from adaptc.torch_internals import OpOverload, source_name

#: What the formulas call a module's tensors.
_ROLES = {"weight": "W", "bias": "b", "lora_A": "A", "lora_B": "B", "scale": "s", "site_id": "id"}
_DTYPES = {"float": "f", "bfloat": "bf", "int": "i", "uint": "u", "complex": "c"}
_SIZE = re.compile(r"^(.*)\.size\(\)\[(\d+)\]$")


def op_name(node: fx.Node) -> str:
    """A node's op in short: ``linear``, ``lora_linear``, ``view``."""
    target = node.target
    if isinstance(target, str):
        return target
    if isinstance(target, OpOverload):
        return target._schema.name.partition("::")[2]
    return str(getattr(target, "__name__", None) or type(target).__name__)


def dtype_text(dtype: torch.dtype) -> str:
    """``bf16``, ``f32``, ``i64``, ``bool``, ``f8_e4m3fn``."""
    name = str(dtype).removeprefix("torch.")
    found = re.fullmatch(r"([a-z]+)(\d+)(.*)", name)
    return f"{_DTYPES.get(found[1], found[1])}{found[2]}{found[3]}" if found else name


def module_path(raw: str) -> str:
    """A path as ``named_modules`` writes it, from Dynamo's Python text for it.

    ``L['function'].__self__._modules['layers']._modules['0'].fc`` is ``layers.0.fc``. Behind a graph break the
    frame's own module is the start: ``L['self'].fc`` is ``fc``, and ``L['args'][0].fc`` too, in a frame of a decorator.
    A forward that was replaced holds its module as its first argument: ``L['self'].fc.forward.args[0]`` is ``fc``.
    A repeated call's ``@1`` is dropped.
    """
    text = re.sub(r"^L\['args'\]\[0\](?=$|\.|@)", "", raw)
    text = re.sub(r"^[LG]\['[^']*'\]", "", text)
    text = re.sub(r"\.forward\.args\[0\]", "", text)
    text = re.sub(r"\.__dict__\['_(modules|parameters|buffers)'\]\[", "[", text)
    text = re.sub(r"\.__\w+__(\[\d+\])?(\.cell_contents)?", "", text)
    text = re.sub(r"\._(modules|parameters|buffers)\[", "[", text)
    text = re.sub(r"\[['\"]?([^'\"\]]+)['\"]?\]", r".\1", text)
    return re.sub(r"@\d+", "", text).strip(".")


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A parameter or buffer of the model: of module ``owner``; ``which`` tells several adapters apart."""

    owner: str
    name: str
    which: str = ""

    def text(self, section: str) -> str:
        """``W:q_proj``, seen from the module ``section``."""
        role = _ROLES.get(self.name, self.name)
        if self.owner == section:
            return role + self.which
        inside = self.owner.removeprefix(f"{section}.") if section else self.owner
        return f"{role}:{inside}{self.which}"


def model_tensor(node: fx.Node) -> Tensor | None:
    """The model's tensor that an input or attribute node stands for; None for anything else."""
    if node.op == "get_attr":
        owner, _, name = str(node.target).rpartition(".")
        if found := re.fullmatch(r"(?:(.*)\.)?adapters\.([^.]+)", owner):
            return Tensor(found[1] or "", name, "" if found[2] == "default" else f"[{found[2]}]")
        return Tensor(owner, name)
    source = source_name(node) if node.op == "placeholder" else None
    if source is None or not re.search(r"\._(parameters|buffers)\['[^']+'\]$", source):
        return None
    owner, _, name = module_path(source).rpartition(".")
    if found := re.fullmatch(r"(?:(.*)\.)?adapters\.live\.(\d+)", owner):
        # The first live adapter is what there usually is: no number.
        return Tensor(found[1] or "", name, "" if found[2] == "0" else f"[{found[2]}]")
    if found := re.fullmatch(r"(?:(.*)\.)?adapters\.standin\.copy(\..*)?", owner):
        return Tensor(f"{found[1] or ''}{found[2] or ''}", name, "[trained copy]")
    return Tensor(owner, name)


def input_name(node: fx.Node) -> str:
    """The name of a graph input that is not a tensor of the model: its argument's name where it has one."""
    source = source_name(node)
    if source is None:
        return node.name
    inner = re.sub(r"^L\['(?:args|kwargs)'\]", "", source)
    text = module_path(inner) or re.sub(r"^[LG]\['([^']*)'\]$", r"\1", inner)
    return f"arg{text}" if text.isdecimal() else re.sub(r"[^\w.]", "_", text) or node.name


def size_source(node: fx.Node) -> tuple[str, int] | None:
    """(input, dimension) of a graph input that is a size of another input."""
    found = _SIZE.match(source_name(node) or "")
    if found is None:
        return None
    stem = re.sub(r"^L\['(?:args|kwargs)'\]", "", found[1])
    text = module_path(stem) or re.sub(r"^[LG]\['([^']*)'\]$", r"\1", stem)
    return (f"arg{text}" if text.isdecimal() else text), int(found[2])


def module_of(node: fx.Node) -> tuple[str, Any] | None:
    """(path, class) of the innermost module whose forward made the node (or whose backward, in a joint graph)."""
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack")
    if stack:
        raw, kind = list(stack.values())[-1]
        return module_path(raw), kind
    site = (node.meta.get("custom") or {}).get("adaptc")
    return None if site is None else (str(site), torch.nn.Linear)


def is_leaf(kind: Any) -> bool:
    """Whether a module's nodes are shown under its parent: torch's own layers and transformers' Conv1D."""
    name = f"{getattr(kind, '__module__', '')}.{getattr(kind, '__qualname__', kind)}"
    if name.endswith(".Conv1D"):
        return True
    containers = ("container.", "transformer.", "activation.MultiheadAttention")
    return name.startswith("torch.nn.modules.") and not name.removeprefix("torch.nn.modules.").startswith(containers)
