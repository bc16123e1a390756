"""Where adapters live on a model, and the hook through which they enter the captured graph."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn

from adaptc.capture.recompute import in_reentrant_checkpoint, mark
from adaptc.errors import SiteError, UnsupportedError
from adaptc.methods.base import Adapter

#: No epoch is called so: comparing with it only makes Dynamo guard on the epoch's name.
_NEVER = "never"


class SiteAdapters(nn.ModuleDict):
    """The adapters of one module, by name. ``live``: those that act, in order.

    ``live`` is plain data that hooks read: Dynamo guards on how many there are and on their tensors' shapes,
    not on which objects they are, so switching among equal ones does not recompile.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live: tuple[Adapter, ...] = ()
        #: Those of them that act inside the module's forward.
        self.inside: tuple[Adapter, ...] = ()
        #: The live adapter that stands in for the module itself, or None.
        self.standin: Adapter | None = None
        #: Changes with the set of sites. Hooks read it so that every capture, a user's own too, guards on it: Dynamo
        #: does not guard on hooks that other modules get later. Text, because it may make an input of a number.
        self.epoch = ""
        self.hook_handle: Any = None
        self.pre_hook_handle: Any = None
        #: Names of the arguments of the module's forward, in order: which of several its adapters read.
        self.arguments: tuple[str, ...] = ()
        #: Name of a tap -> the module whose input it reads.
        self.taps: dict[str, nn.Module] = {}

    def __setattr__(self, name: str, value: Any) -> None:
        # `standin` is an alias of an entry: registering it again would double its state_dict keys.
        if name == "standin":
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def __prepare_scriptable__(self) -> SiteAdapters:
        """Called by ``torch.jit.script`` on every module of what it is given."""
        raise UnsupportedError(
            "torch.jit.script cannot read a model with adapters: they act by hooks on its modules",
            do="torch.jit.trace(model, inputs), torch.export.export(model, inputs), or model.adaptc.merge_and_unload()"
            " first",
        )

    def make_live(self, adapters: Sequence[Adapter]) -> None:
        """Let ``adapters`` (entries of this dict) act, in this order."""
        self.live = tuple(a for a in adapters if not a.replaces_forward)
        self.inside = tuple(a for a in self.live if a.acts_inside)
        self.standin = next((a for a in adapters if a.replaces_forward), None)


class Taps:
    """On a module whose input adapters elsewhere read or change, in its ``__dict__``: who, and by which name."""

    KEY = "_adaptc_taps"

    def __init__(self, hook_handle: Any, arguments: tuple[str, ...]) -> None:
        self.readers: list[tuple[SiteAdapters, str]] = []
        self.hook_handle = hook_handle
        self.arguments = arguments


def entry(name: str, level: int, parameter: str | None = None) -> str:
    """The key of an adapter at a site: its name, the module's parameter that it is for, and a number for what stacked
    rules added."""
    parts = [name, *([] if parameter is None else [parameter]), *([] if level == 0 else [str(level)])]
    return "~".join(parts)


def adapter_name(entry: str) -> str:
    """The adapter's name of a key."""
    return entry.partition("~")[0]


class _CallState(threading.local):
    """What one call of the model needs; set by the prologue, read where hooks run outside a graph."""

    #: ``id`` of the site-id tensors whose hooks ran outside a graph, while somebody collects them.
    eager: set[int] | None = None
    #: How many prologues are active on this thread.
    depth: int = 0
    #: Whether blocks in the call in progress are not captured by themselves: it is captured whole, or is to be.
    whole: bool = False
    #: Of a call with gradients: which site-id tensors' adapters ran with gradients on, and which with them off.
    recorded: set[int] | None = None
    stopped: set[int] | None = None


CALL = _CallState()


def run_site(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any = ...) -> Any:
    """Forward hook of every adapted module: correct its output by the live adapters.

    A module-level function that closes over nothing, so that models deep-copy and pickle. Called without ``kwargs``
    somebody has put it on another module.
    """
    if output is ...:
        raise _moved(module)
    found = cast(SiteAdapters, module.adapters)
    live = found.live
    if found.epoch == _NEVER or len(live) == 0:
        return None
    for adapter in live:
        if adapter.acts_inside:
            continue
        x = _input_of(module, found.arguments, args, kwargs)
        if not (isinstance(output, torch.Tensor) or adapter.takes_any_output):
            raise SiteError(
                f"a {type(module).__name__} returned a {type(output).__name__}",
                expected=f"a tensor, which {adapter.method.kind} corrects", do="leave this module out of the plan",
            )  # fmt: skip
        note_eager(adapter)
        output = adapter.apply_to(module, x if adapter.tap is None else _take(module, adapter), output)
    if not torch.compiler.is_compiling():
        output = mark(output, [id(adapter) for adapter in live])
    return output


def _moved(module: nn.Module) -> UnsupportedError:
    """The error of a hook that was taken over with others by what has replaced its module."""
    kind = type(module)
    return UnsupportedError(
        f"an adapted module was replaced by a {kind.__module__}.{kind.__qualname__}, which does not have its adapters",
        expected="the module that was adapted: torch.ao.quantization replaces what it quantises and fuses",
        do="fold the adapters in first (model.adaptc.merge_and_unload()) and quantise then, or adapt the model anew",
    )


def _input_of(module: nn.Module, names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What adapters read of a call: the value of the first argument of the module's forward, as its signature has them,
    however it is called."""
    if args:
        return args[0]
    return kwargs[_name_of_input(module, names, kwargs)]


def _name_of_input(module: nn.Module, names: tuple[str, ...], kwargs: dict[str, Any]) -> str:
    """The name by which a call by keywords gives what adapters read: of the first argument in the signature that is
    given, and is a tensor where one is."""
    if len(kwargs) == 1:
        return next(iter(kwargs))
    given = [name for name in names if name in kwargs] or list(kwargs)
    for name in given:
        if isinstance(kwargs[name], torch.Tensor):
            return name
    if given:
        return given[0]
    raise SiteError(
        f"a {type(module).__name__} was called without arguments",
        expected="an input, which its adapter reads", do="leave this module out of the plan",
    )  # fmt: skip


def arguments_of(module: nn.Module) -> tuple[str, ...]:
    """Names of the arguments that a module's forward has, in order; nothing where it does not say."""
    try:
        parameters = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):
        return ()
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return tuple(parameter.name for parameter in parameters if parameter.kind in named)


def run_tap(module: nn.Module, args: tuple[Any, ...], kwargs: Any = ...) -> Any:
    """Forward pre-hook of modules whose input adapters elsewhere read: keep it for those that are live, or let them
    change what goes with their own site's output."""
    if kwargs is ...:
        raise _moved(module)
    taps = module.__dict__[Taps.KEY]
    x, changed = _input_of(module, taps.arguments, args, kwargs), kwargs
    for found, name in taps.readers:
        for adapter in found.live:
            if adapter.tap != name:
                continue
            if adapter.changes_tapped:
                changed = adapter.change_tapped(changed, found.live)
            else:
                adapter.tapped.value = x
    return None if changed is kwargs else (args, changed)


def _take(module: nn.Module, adapter: Adapter) -> torch.Tensor:
    """The input that the adapter's tap kept; it is kept no longer."""
    value = adapter.tapped.value
    adapter.tapped.value = None
    if value is None:
        raise SiteError(
            f"{adapter.method.kind} at a {type(module).__name__} reads the input of {adapter.tap}, which has not run",
            expected=f"{adapter.tap} called before the {type(module).__name__} returns, once each time",
            do="name a tap that runs first",
        )  # fmt: skip
    return value


def note_eager(adapter: Adapter) -> None:
    """Tell who collects them that an adapter runs outside a graph."""
    if not torch.compiler.is_compiling() and CALL.eager is not None:
        CALL.eager.add(id(adapter.site_id))
        note_mode([id(adapter.site_id)])


def note_mode(site_ids: Iterable[int], *, recorded: bool = True) -> None:
    """Tell who collects it whether adapters (by ``id`` of their site-id tensors) run with gradients on; ``recorded``
    False: they do not, whatever the mode is."""
    collected = CALL.recorded if recorded and torch.is_grad_enabled() else CALL.stopped
    if collected is not None and (torch.is_grad_enabled() or not in_reentrant_checkpoint()):
        collected.update(site_ids)


def run_before_site(module: nn.Module, args: tuple[Any, ...], kwargs: Any = ...) -> Any:
    """Forward pre-hook of modules with adapters that act on the input: change it by those that are live."""
    if kwargs is ...:
        raise _moved(module)
    found = cast(SiteAdapters, module.adapters)
    live = [a for a in found.live if a.acts_before]
    if len(live) == 0:
        return None
    name = None if args else _name_of_input(module, found.arguments, kwargs)
    x = args[0] if name is None else kwargs[name]
    for adapter in live:
        note_eager(adapter)
        x = adapter.apply_before(module, x)
    return ((x, *args[1:]), kwargs) if name is None else (args, {**kwargs, name: x})


def run_forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Instance ``forward`` of a module that some adapter replaces or acts inside of: as the live ones have it."""
    found = cast("SiteAdapters | None", getattr(module, "adapters", None))
    if found is None:  # detached under a wrapper of this forward, as accelerate's mixed precision sets one
        return type(module).forward(module, *args, **kwargs)
    if found.epoch != _NEVER and found.standin is not None:
        note_eager(found.standin)
        output = found.standin.replace(*args, **kwargs)
        return output if torch.compiler.is_compiling() else mark(output, [id(found.standin)])
    inside = found.inside
    if len(inside) == 0:
        return type(module).forward(module, *args, **kwargs)
    for adapter in inside:
        note_eager(adapter)
    return inside[0].run_inside(module, inside, *args, **kwargs)


class SiteForward(functools.partial[Any]):
    """What replaces a module's forward, with the signature that it had: generation and trainers ask for it."""

    @property
    def __signature__(self) -> inspect.Signature:
        module = self.args[0]
        return inspect.signature(type(module).forward.__get__(module))


def adapters_of(module: nn.Module) -> SiteAdapters | None:
    """The adapters attached to ``module``, or None."""
    found = module._modules.get("adapters")
    return found if isinstance(found, SiteAdapters) else None


def attach(path: str, module: nn.Module, name: str, adapter: Adapter) -> bool:
    """Put ``adapter`` on ``module`` under ``name`` (not live yet). True when the module got a hook or a forward for
    it: captured graphs do not guard on these.

    Raises:
        SiteError: the module has an attribute of its own called ``adapters``, or its forward is replaced already.
    """
    found = adapters_of(module)
    if found is None:
        check_attachable(path, module)
        found = SiteAdapters()
        found.train(module.training)
        found.arguments = arguments_of(module)
        module.adapters = found
    adapter.train(module.training)
    found[name] = adapter
    changed = False
    if (adapter.replaces_forward or adapter.acts_inside) and "forward" not in module.__dict__:
        module.forward = SiteForward(run_forward, module)
        changed = True
    if adapter.replaces_forward:
        return changed
    # What acts inside gets the hook too: torch's fused encoder layer reads weights without calling the modules that
    # own them, unless one of these has a hook.
    # Before hooks of the user on the output, and after theirs on the input: they see what they would see of a
    # wrapped layer.
    if found.hook_handle is None:
        found.hook_handle = module.register_forward_hook(run_site, prepend=True, with_kwargs=True)
        changed = True
    if adapter.acts_before and found.pre_hook_handle is None:
        found.pre_hook_handle = module.register_forward_pre_hook(run_before_site, with_kwargs=True)
        changed = True
    return changed


def find_tap(path: str, tap: str, modules: Mapping[str, nn.Module]) -> nn.Module:
    """The module called ``tap`` that is nearest to the site ``path``: below it, or below what encloses it.

    Raises:
        SiteError: there is none.
    """
    around = path
    while True:
        found = modules.get(f"{around}.{tap}" if around else tap)
        if found is not None:
            return found
        if not around:
            near = [name for name, _ in modules[path.rpartition(".")[0]].named_children() if name != "adapters"]
            raise SiteError(
                f"{path}: no module {tap!r} to read from, at the site or around it",
                found=f"beside it: {', '.join(near)}", do="say tap=, the module whose input is read",
            )  # fmt: skip
        around = around.rpartition(".")[0]


def add_tap(module: nn.Module, name: str, tapped: nn.Module) -> bool:
    """Let the adapters of ``module`` whose tap is ``name`` read the input of ``tapped``. True when it is a new tap."""
    found = adapters_of(module)
    assert found is not None  # attached before
    if name in found.taps:
        return False
    taps = tapped.__dict__.get(Taps.KEY)
    if taps is None:
        # Before hooks of the user and before adapters on the tapped module: what its caller passed is read.
        taps = Taps(tapped.register_forward_pre_hook(run_tap, prepend=True, with_kwargs=True), arguments_of(tapped))
        tapped.__dict__[Taps.KEY] = taps
    taps.readers.append((found, name))
    found.taps[name] = tapped
    return True


def _remove_unused_taps(found: SiteAdapters) -> None:
    """Stop reading for adapters that are gone."""
    for name in [n for n in found.taps if not any(a.tap == n for a in found.values())]:
        tapped = found.taps.pop(name)
        taps = tapped.__dict__[Taps.KEY]
        taps.readers = [reader for reader in taps.readers if reader[0] is not found or reader[1] != name]
        if not taps.readers:
            taps.hook_handle.remove()
            del tapped.__dict__[Taps.KEY]


def check_attachable(path: str, module: nn.Module, *, own_forward: bool = False) -> None:
    """Raise SiteError when adapters cannot be put on ``module``; ``own_forward``: one that needs its forward."""
    if adapters_of(module) is None and hasattr(module, "adapters"):
        raise SiteError(
            f"{path} ({type(module).__name__}) already has an attribute named 'adapters'",
            expected="a free name: adapters are stored there",
            do="leave this module out of the plan, or rename the attribute",
        )
    own = module.__dict__.get("forward")
    if own_forward and own is not None and getattr(own, "func", None) is not run_forward:
        raise SiteError(
            f"{path} ({type(module).__name__}) has a forward set on the instance, so it cannot be replaced",
            do="train it through another rule, or remove the instance's forward first",
        )


def remove(module: nn.Module, name: str) -> None:
    """Take the adapter ``name`` off ``module``; the last one leaves no trace."""
    found = adapters_of(module)
    if found is None or name not in found:
        return
    del found[name]
    found.live = tuple(a for a in found.live if any(a is b for b in found.values()))
    found.inside = tuple(a for a in found.live if a.acts_inside)
    if found.standin is not None and not any(found.standin is b for b in found.values()):
        found.standin = None
    if not any(a.replaces_forward or a.acts_inside for a in found.values()):
        own = module.__dict__.get("forward")
        if getattr(own, "func", None) is run_forward:
            del module.__dict__["forward"]
    if found.hook_handle is not None and all(a.replaces_forward for a in found.values()):
        found.hook_handle.remove()
        found.hook_handle = None
    if found.pre_hook_handle is not None and not any(a.acts_before for a in found.values()):
        found.pre_hook_handle.remove()
        found.pre_hook_handle = None
    _remove_unused_taps(found)
    if len(found) == 0:
        del module._modules["adapters"]


def strip(module: nn.Module) -> None:
    """Take every adapter off ``module`` and what is inside it."""
    for inner in list(module.modules()):
        found = adapters_of(inner)
        for name in list(found or ()):
            remove(inner, name)
