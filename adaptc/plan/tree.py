"""The modules and parameters of a base model by dotted path, with what is shared and tied among them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from torch import nn

from adaptc.methods.base import Adapter

_CONTAINERS = (nn.ModuleList, nn.Sequential)


class ModuleTree:
    """A snapshot of the model's modules, the root and everything inside adapters left out."""

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self.modules: dict[str, nn.Module] = dict(_walk(root, ""))
        self._paths: dict[int, list[str]] = defaultdict(list, {id(root): [""]})
        for path, module in self.modules.items():
            self._paths[id(module)].append(path)
        #: path of a parameter -> (path of the module that owns it, its name there)
        self.parameters: dict[str, tuple[str, str]] = {}
        #: every path, in model order: a module, its own parameters, what is inside it
        self.order: dict[str, int] = {}
        # parameter -> (owning module, path of the parameter), one entry per owner
        self._owners: dict[int, dict[int, str]] = defaultdict(dict)
        for path, module in self.with_root():
            self.order.setdefault(path, len(self.order))
            for name, parameter in self.own_parameters(module):
                full = f"{path}.{name}" if path else name
                self.parameters[full] = (path, name)
                self.order.setdefault(full, len(self.order))
                self._owners[id(parameter)].setdefault(id(module), full)

    def with_root(self) -> Iterator[tuple[str, nn.Module]]:
        yield "", self.root
        yield from self.modules.items()

    def module(self, path: str) -> nn.Module:
        return self.modules[path] if path else self.root

    def owner(self, path: str) -> tuple[nn.Module, str | None]:
        """The module at a path and None, or the module that owns the parameter there and its name."""
        if path in self.modules or not path:
            return self.module(path), None
        holder, name = self.parameters[path]
        return self.module(holder), name

    def same(self, path: str) -> tuple[str, ...]:
        """Every path of the module, or of the parameter of one module, at ``path``."""
        module, name = self.owner(path)
        paths = self.paths_of(module)
        return paths if name is None else tuple(f"{p}.{name}".lstrip(".") for p in paths)

    def paths_of(self, module: nn.Module) -> tuple[str, ...]:
        """Every path of one module object; more than one when the model shares it."""
        return tuple(self._paths.get(id(module), ()))

    @staticmethod
    def own_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, p) for name, p in module._parameters.items() if p is not None)

    def tied_to(self, module: nn.Module, name: str | None = None) -> tuple[str, ...]:
        """Parameters outside ``module`` that are the same object as one inside it (as ``name``, if given), by path."""
        inside = {id(module), *(id(child) for _, child in _walk(module, ""))}
        tied: list[str] = []
        for parameter in module.parameters() if name is None else [module.get_parameter(name)]:
            owners = self._owners.get(id(parameter), {})
            tied.extend(path for owner, path in owners.items() if owner not in inside)
        return tuple(dict.fromkeys(tied))


def self_and_parents(path: str) -> Iterator[str]:
    """``a.b.c``, ``a.b``, ``a``."""
    while path:
        yield path
        path = path.rpartition(".")[0]


def _walk(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """``named_modules`` in the same order, with every path of a shared module, without adapters."""
    for name, child in module._modules.items():
        if child is None or (name == "adapters" and _holds_adapters(child)):
            continue
        path = f"{prefix}.{name}" if prefix else name
        yield path, child
        yield from _walk(child, path)


def _holds_adapters(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleDict) and all(isinstance(child, Adapter) for child in module.children())


def blocks_of(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The outermost modules that a list in ``module`` holds several of, such as the layers of a transformer: (path,
    module)."""
    children = [(f"{path}.{name}".lstrip("."), child) for name, child in module.named_children() if name != "adapters"]
    classes = [type(child) for _, child in children]
    repeats = isinstance(module, _CONTAINERS) and any(classes.count(kind) > 1 for kind in classes)
    for where, child in children:
        if repeats and any(inner != "adapters" for inner, _ in child.named_children()):
            yield where, child
        else:
            yield from blocks_of(child, where)
