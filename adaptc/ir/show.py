"""The one text form of a graph: for reading, errors and golden tests.

    model.layers.0.self_attn
      %linear, _ = lora_linear(%h, %y, A:q_proj, B:q_proj, s:q_proj, scale_at="r")    bf16[2, 8, 64], bf16[2, 8, 4]
      %linear_1 = linear(%h, W:v_proj)                                                bf16[2, 8, 16]   not adapted

One section per module in the order of execution. The model's tensors are named by role and module, seen from
the section (``W`` weight, ``b`` bias, ``A``, ``B`` factors, ``s`` scale, ``id`` site); ``@`` marks the
call's inputs. Outputs of a node that returns several are named on its line; ``_`` is one that nobody reads.
Nothing in the text depends on addresses
or on a run: symbolic sizes are numbered in order of appearance. Bodies of higher-order ops are indented.
"""

from __future__ import annotations

import collections
import operator
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from adaptc.ir import dialect, names
from adaptc.ir.edit import nested
from adaptc.ir.sites import is_anchor, is_inserted
from adaptc.torch_internals import OpOverload, gradient_inputs, is_backward, node_value, size_text

#: Column of the types; a fixed one keeps unchanged lines equal when others change.
_TYPES_AT = 88
_LINEAR = (torch.nn.functional.linear, torch.addmm)
_ROOT = "(root)"


def graph_text(gm: fx.GraphModule) -> str:
    """The graph of ``gm`` with its nested bodies."""
    return "\n".join(_Printer(gm).lines())


def excerpt(gm: fx.GraphModule, node: fx.Node, around: int = 10) -> str:
    """``node`` (of ``gm`` or of a body inside it), marked, with ``around`` nodes either side."""
    owner = next((m for m in gm.modules() if isinstance(m, fx.GraphModule) and node.graph is m.graph), gm)
    printer = _Printer(owner)
    shown = [n for n in owner.graph.nodes if n is node or not printer.is_silent(n)]
    if node not in shown:
        return f"> {printer.node_line(node, '')}\n  (no longer in the graph)"
    at = shown.index(node)
    lines = []
    for other in shown[max(0, at - around) : at + around + 1]:
        lines.append(("> " if other is node else "  ") + printer.node_line(other, printer.section(other)))
    return "\n".join(lines)


def type_text(value: Any) -> str:
    """``bf16[2, 128, 4096]``; several outputs separated by commas; empty when the value is not known."""
    return _Symbols().type_text(value)


class _Symbols:
    """Symbolic sizes, renamed in order of appearance: torch numbers them differently from run to run."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}
        self._counts: collections.Counter[str] = collections.Counter()

    def text(self, size: Any) -> str:
        return str(size) if isinstance(size, int) else self.rename(size_text(size))

    def rename(self, formula: str) -> str:
        return re.sub(r"\b([a-z]{1,2})\d+\b", lambda found: self._renamed(found[0], found[1]), formula)

    def _renamed(self, symbol: str, family: str) -> str:
        if symbol not in self._names:
            self._names[symbol] = f"{family}{self._counts[family]}"
            self._counts[family] += 1
        return self._names[symbol]

    def type_text(self, value: Any) -> str:
        if isinstance(value, torch.Tensor):
            sizes = ", ".join(self.text(size) for size in value.shape)
            return f"{names.dtype_text(value.dtype)}[{sizes}]"
        if isinstance(value, list | tuple):
            return ", ".join(self.type_text(item) or "none" for item in value)
        if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
            return self.text(value)
        return ""


class _Printer:
    """Prints one graph; ``outer`` gives the names of a body's inputs where it is called."""

    def __init__(
        self, gm: fx.GraphModule, symbols: _Symbols | None = None, outer: Mapping[fx.Node, Any] | None = None
    ) -> None:
        self.gm = gm
        self.symbols = symbols or _Symbols()
        self.outer = dict(outer or {})
        self.bodies = {call: (body, operands) for call, body, operands in nested(gm)}
        self.unpacked = {node: items for node in gm.graph.nodes if (items := _unpacked(node))}
        self.folded = {item for items in self.unpacked.values() for item in items.values()}
        self.sections = _sections(gm)
        self.results = _results(gm, self.unpacked)
        self.has_sites = any(_is_adapter(node) for node in gm.graph.nodes)

    def section(self, node: fx.Node) -> str:
        return self.sections.get(node, "")

    def is_silent(self, node: fx.Node) -> bool:
        """Nodes without a line of their own: the model's tensors, unpacked outputs, bodies."""
        return node in self.folded or node.op == "get_attr" or self.tensor(node) is not None

    def tensor(self, node: fx.Node) -> names.Tensor | None:
        found = self.outer.get(node)
        return found if isinstance(found, names.Tensor) else None if found else names.model_tensor(node)

    def lines(self, indent: str = "") -> list[str]:
        shown: list[str] = [] if self.outer else self._inputs()
        heading = None
        for node in self.gm.graph.nodes:
            if node.op == "placeholder" or self.is_silent(node):
                continue
            section = self.section(node)
            title = _heading(section, node)
            if title != heading and node.op != "output":
                shown.append(indent + title)
                heading = title
            shown.append(indent + "  " + self.node_line(node, section))
            if node in self.bodies:
                shown += self._body_lines(node, section, indent + "    ")
        return shown

    def _inputs(self) -> list[str]:
        lines, tensors = [], 0
        for node in self.gm.graph.nodes:
            if self.tensor(node) is not None:
                tensors += node not in self.bodies and not self._is_body(node)
            elif node.op == "placeholder":
                size = names.size_source(node)
                note = "" if size is None else f"size {size[1]} of @{size[0]}"
                lines.append(_columns(f"  {self.name(node, '')}", note or self.symbols.type_text(node_value(node))))
        if tensors:
            lines.append(f"  and {tensors} parameters and buffers of the model")
        return ["inputs", *lines] if lines else []

    def _is_body(self, node: fx.Node) -> bool:
        return node.op == "get_attr" and isinstance(getattr(self.gm, str(node.target), None), fx.GraphModule)

    def _body_lines(self, node: fx.Node, section: str, indent: str) -> list[str]:
        body, operands = self.bodies[node]
        outer = {inside: self.tensor(o) or self.name(o, section) for inside, o in operands.items()}
        return _Printer(body, self.symbols, {**outer, **self._unbound(body, outer)}).lines(indent)

    @staticmethod
    def _unbound(body: fx.GraphModule, bound: Mapping[fx.Node, Any]) -> dict[fx.Node, str]:
        return {n: f"%{n.name}" for n in body.graph.nodes if n.op == "placeholder" and n not in bound}

    def name(self, node: fx.Node, section: str) -> str:
        """How a node is written where it is read, in a line of ``section``."""
        if node in self.outer:
            found = self.outer[node]
            return found.text(section) if isinstance(found, names.Tensor) else str(found)
        if self._is_body(node):
            return str(node.target)
        if tensor := names.model_tensor(node):
            return tensor.text(section)
        if node in self.results:
            return "%" + self.results[node].text(section)
        if node.op == "placeholder":
            if isinstance(value := node_value(node), torch.SymInt):
                return self.symbols.text(value)
            return f"@{names.input_name(node)}"
        return f"%{self.symbols.rename(node.name) if node.name in self.symbols._names else _short(node)}"

    def node_line(self, node: fx.Node, section: str) -> str:
        if node.op == "output":
            return self._return_line(node)
        if node.op in ("placeholder", "get_attr"):
            return _columns(self.name(node, section), self.symbols.type_text(node_value(node)))
        left = self.name(node, section)
        if items := self.unpacked.get(node):
            value = node_value(node)
            count = len(value) if isinstance(value, list | tuple) else max(items) + 1
            left = ", ".join(self.name(items[i], section) if i in items else "_" for i in range(count))
        right = self.symbols.type_text(node_value(node))
        if self.has_sites and node.target in _LINEAR and not any(_is_adapter(u) for u in node.users):
            right += "   not adapted"
        return _columns(f"{left} = {names.op_name(node)}({self._arguments(node, section)})", right)

    def _arguments(self, node: fx.Node, section: str) -> str:
        keywords: dict[str, Any] = {}
        positional = list(node.args)
        if dialect.of_target(node.target) is not None:
            # Tensors by position and constants by name, as the dialect's ops are documented.
            assert isinstance(node.target, OpOverload)
            schema = [argument.name for argument in node.target._schema.arguments]
            constants = zip(schema, positional, strict=False)
            keywords = {n: a for n, a in constants if not isinstance(a, fx.Node) and a not in ([], ())}
            positional = [a for a in positional if isinstance(a, fx.Node)]
        parts = [self._value(a, section) for a in positional]
        parts += [f"{k}={self._value(a, section)}" for k, a in {**keywords, **node.kwargs}.items()]
        return ", ".join(parts)

    def _value(self, value: Any, section: str) -> str:
        if isinstance(value, fx.Node):
            return self.name(value, section)
        if isinstance(value, list | tuple):
            return f"[{', '.join(self._value(item, section) for item in value)}]"
        if isinstance(value, dict):
            return "{" + ", ".join(f"{k}: {self._value(item, section)}" for k, item in value.items()) + "}"
        if isinstance(value, slice):
            parts = [value.start, value.stop] + ([] if value.step is None else [value.step])
            return ":".join("" if part is None else self._value(part, section) for part in parts)
        if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
            return self.symbols.text(value)
        return _constant(value)

    def _return_line(self, node: fx.Node) -> str:
        results = node.args[0] if isinstance(node.args[0], list | tuple) else [node.args[0]]
        inputs = [n for n in self.gm.graph.nodes if n.op == "placeholder"]
        backward = [n for n in inputs if n.name.startswith("tangents")]
        gradients = gradient_inputs(self.gm) if backward else None
        parts: list[str] = []
        for position, value in enumerate(results):
            text = self._value(value, "")
            of = gradients[position] if gradients else None
            if of is not None and value is not None:
                text = f"grad {self.name(of, '')} = {text}"
            parts.append(text)
        return f"return {', '.join(_without_runs(parts, 'None'))}"


def _unpacked(node: fx.Node) -> dict[int, fx.Node]:
    """Output index -> the node that takes it, when nothing else is done with the node's tuple."""
    if not isinstance(node_value(node), list | tuple) or not node.users:
        return {}
    items = {}
    for user in node.users:
        if user.target is not operator.getitem or not isinstance(user.args[1], int) or user.args[1] in items:
            return {}
        items[user.args[1]] = user
    return items


def _results(gm: fx.GraphModule, unpacked: Mapping[fx.Node, dict[int, fx.Node]]) -> dict[fx.Node, names.Tensor]:
    """The nodes that hold a site's corrected output, called ``y`` of the site.

    Such a node is new after every pass that touches the site; what reads it should look the same.
    """
    found: dict[fx.Node, names.Tensor] = {}
    seen: collections.Counter[str] = collections.Counter()
    for node in gm.graph.nodes:
        result = node if is_anchor(node) else None
        if (op := dialect.of_target(node.target)) is not None:
            # Of an op that returns a list the first is one site's bottleneck or gradient.
            is_tuple = len(op.overload._schema.returns) > 1 and not is_backward(node)
            is_output = op.name in ("lora_expand", "lora_linear_expand")
            result = unpacked.get(node, {}).get(0) if is_tuple else node if is_output else None
        module = names.module_of(node)
        if result is None or module is None:
            continue
        path = module[0]
        seen[path] += 1
        found[result] = names.Tensor(path, "y", "" if seen[path] == 1 else f"#{seen[path]}")
    return found


def _sections(gm: fx.GraphModule) -> dict[fx.Node, str]:
    """The module whose section each node stands in."""
    found: dict[fx.Node, str] = {}
    current = ""
    for node in gm.graph.nodes:
        module = names.module_of(node)
        if module is not None:
            path, kind = module
            current = path.rpartition(".")[0] if names.is_leaf(kind) else path
        elif not is_backward(node) and node_value(node) is not None:
            current = ""
        # A switch of a mode, or a gradient that is summed, has no module of its own: it stays where it was.
        found[node] = current
    return found


def _heading(section: str, node: fx.Node) -> str:
    return (section or _ROOT) + (" (backward)" if is_backward(node) else "")


def _is_adapter(node: fx.Node) -> bool:
    return is_inserted(node) or is_anchor(node)


def _short(node: fx.Node) -> str:
    """``lora_linear_4`` for ``lora_linear_default_4``: the overload says nothing."""
    return node.name if dialect.of_target(node.target) is None else node.name.replace("_default", "", 1)


def _constant(value: Any) -> str:
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, torch.dtype):
        return names.dtype_text(value)
    if value is Ellipsis:
        return "..."
    if isinstance(value, torch.device | torch.layout | torch.memory_format):
        return str(value).removeprefix("torch.")
    if isinstance(value, int) and value == 2**63 - 1:
        return "end"
    if value is None or isinstance(value, bool | int | float | complex):
        return repr(value)
    name = getattr(value, "__name__", None)
    return str(name) if name else re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def _columns(left: str, right: str) -> str:
    return f"{left:<{_TYPES_AT}}  {right}".rstrip()


def _without_runs(parts: list[str], repeated: str) -> list[str]:
    short: list[str] = []
    count = 0
    for part in [*parts, ""]:
        if part == repeated:
            count += 1
            continue
        if count:
            short.append(repeated if count == 1 else f"{repeated} x {count}")
            count = 0
        short.append(part)
    return short[:-1]
