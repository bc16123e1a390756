"""The hooks by which adapters enter the captured graph."""

from __future__ import annotations

import functools
import inspect
from typing import Any, cast

import torch
from torch import nn

from adaptc.capture import slots
from adaptc.capture.call import CALL, note_mode
from adaptc.capture.recompute import mark
from adaptc.errors import SiteError, UnsupportedError
from adaptc.methods.base import Adapter
from adaptc.methods.rows import Rows
from adaptc.runtime.site_adapters import SiteAdapters, Taps

#: No epoch is called so: comparing with it only makes Dynamo guard on the epoch's name.
_NEVER = "never"


def run_site(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any = ...) -> Any:
    """Forward hook of every adapted module: correct its output by the live adapters.

    A module-level function that closes over nothing, so that models deep-copy and pickle. Called without ``kwargs``
    somebody has put it on another module.
    """
    if output is ...:
        raise _moved(module)
    found = cast(SiteAdapters, module.adapters)
    if found.epoch == _NEVER:
        return None
    if CALL.probe is not None:
        CALL.probe(found, False, (_input_of(module, found.arguments, args, kwargs), output))
        return None
    if _is_slot(found):
        _note_slot(found)
        if not found.returns_its_own:
            output = output.clone()
        slots.CORRECT(cast(torch.Tensor, found.slot), _input_of(module, found.arguments, args, kwargs), output)
        return output
    return corrected(module, found, args, kwargs, output)


def corrected(
    module: nn.Module, found: SiteAdapters, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> Any:
    """What the adapters of a module make of its output; None where they leave it as it is."""
    if CALL.rows is not None and found.rows.around is not None:
        return _run_site_by_rows(module, found, args, kwargs, output)
    live = found.live
    if len(live) == 0:
        return None
    for adapter in live:
        if adapter.acts_inside:
            continue
        x = _input_of(module, found.arguments, args, kwargs)
        _check_output(module, adapter, output)
        note_eager(adapter)
        output = adapter.apply_to(module, x if adapter.tap is None else _take(module, adapter), output)
    if not torch.compiler.is_compiling():
        output = mark(output, [id(adapter) for adapter in live])
    return output


def _run_site_by_rows(
    module: nn.Module, found: SiteAdapters, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> Any:
    """As :func:`run_site`, where each row of the batch has the adapters of its group."""
    groups, rows = found.rows.around, rows_of(found)
    assert groups is not None and rows is not None  # asked by run_site
    joined = _together(groups)
    if len(joined) > 0:
        members = [groups[number][0] for number in joined]
        for adapter in members:
            _check_output(module, adapter, output)
            note_eager(adapter)
        x = _input_of(module, found.arguments, args, kwargs)
        output = members[0].apply_rows(module, members, joined, rows, x, output)
    for number, adapters in enumerate(groups):
        for adapter in adapters if number not in joined else ():
            x = _input_of(module, found.arguments, args, kwargs)
            _check_output(module, adapter, output)
            note_eager(adapter)
            x = rows.only(number, x if adapter.tap is None else _take(module, adapter))
            output = rows.put(number, adapter.apply_to(module, x, rows.only(number, output)), output)
    if not torch.compiler.is_compiling():
        output = mark(output, _acting(found))
    return output


def _together(groups: tuple[tuple[Adapter, ...], ...]) -> list[int]:
    """The numbers of adapters that act by one op on all their rows."""
    key, joined = None, []
    for number, group in enumerate(groups):
        own = group[0].together() if len(group) == 1 else None
        if own is not None and (key is None or own == key):
            key = own
            joined.append(number)
    return joined


def rows_of(found: SiteAdapters) -> Rows | None:
    """Which adapter of the batch each row of the call in progress has; None where the model is in none."""
    return None if CALL.rows is None or found.rows.around is None else Rows(CALL.rows, found.is_flat)


def _acting(found: SiteAdapters) -> list[int]:
    """Numbers that name what acts at a module in a batch, and on which of its rows."""
    groups = (*(found.rows.around or ()), *(found.rows.inside or ()))
    return [CALL.assignment or 0, *(id(adapter) for group in groups for adapter in group)]


def _check_output(module: nn.Module, adapter: Adapter, output: Any) -> None:
    if not (isinstance(output, torch.Tensor) or adapter.takes_any_output):
        raise SiteError(
            f"a {type(module).__name__} returned a {type(output).__name__}",
            expected=f"a tensor, which {adapter.method.kind} corrects", do="leave this module out of the plan",
        )  # fmt: skip


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
        for live in _acting_together(found, x):
            for adapter in live:
                if adapter.tap != name:
                    continue
                if adapter.changes_tapped:
                    changed = adapter.change_tapped(changed, live)
                else:
                    adapter.tapped.value = x
    return None if changed is kwargs else (args, changed)


def _acting_together(found: SiteAdapters, x: Any) -> tuple[tuple[Adapter, ...], ...]:
    """The adapters of a module that act on the same rows, for all such. Those that change a call of another module do
    so alike (``check_rows_together``): it has to be changed once."""
    if CALL.rows is None or found.rows.around is None:
        return (found.live,)
    if CALL.probe is not None:
        CALL.probe(found, False, (x,))
        return ()
    inside = found.rows.inside or ()
    return (*found.rows.around, *inside[:1])


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
    """Tell who collects them that an adapter runs outside a graph, and not in a slot of one."""
    if not torch.compiler.is_compiling() and CALL.eager is not None and CALL.in_slots == "":
        CALL.eager.add(id(adapter.site_id))
        note_mode([id(adapter.site_id)])


def _is_slot(found: SiteAdapters) -> bool:
    """Whether the call in progress has a slot for what acts at a module, which may be another model's.

    In a region that records gradients, which a forward may have in a call without, adapters act by their parameters.
    """
    return CALL.in_slots != "" and CALL.in_slots == found.bank and not torch.is_grad_enabled()


def _note_slot(found: SiteAdapters) -> None:
    """As :func:`note_eager`, of a module in a bank."""
    if not torch.compiler.is_compiling() and CALL.eager is not None:
        CALL.eager.add(id(found.slot))


def run_before_site(module: nn.Module, args: tuple[Any, ...], kwargs: Any = ...) -> Any:
    """Forward pre-hook of modules with adapters that act on the input: change it by those that are live."""
    if kwargs is ...:
        raise _moved(module)
    found = cast(SiteAdapters, module.adapters)
    if CALL.probe is not None:
        return None
    name = None if args else _name_of_input(module, found.arguments, kwargs)
    x = args[0] if name is None else kwargs[name]
    if _is_slot(found):
        changed = slots.CHANGE_INPUT(cast(torch.Tensor, found.slot), x)
    else:
        changed = changed_input(module, found, x)
    if changed is x:
        return None
    return ((changed, *args[1:]), kwargs) if name is None else (args, {**kwargs, name: changed})


def changed_input(module: nn.Module, found: SiteAdapters, x: Any) -> Any:
    """What the adapters of a module make of its input; ``x`` itself where they leave it as it is."""
    rows = rows_of(found)
    groups = (found.live,) if rows is None else cast("tuple[tuple[Adapter, ...], ...]", found.rows.around)
    acting = [[a for a in group if a.acts_before] for group in groups]
    for number, group in enumerate(acting):
        for adapter in group:
            note_eager(adapter)
            if rows is None:
                x = adapter.apply_before(module, x)
            else:
                x = rows.put(number, adapter.apply_before(module, rows.only(number, x)), x)
    return x


def run_forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Instance ``forward`` of a module that some adapter replaces or acts inside of: as the live ones have it."""
    found = cast("SiteAdapters | None", getattr(module, "adapters", None))
    if found is None:  # detached under a wrapper of this forward, as accelerate's mixed precision sets one
        return type(module).forward(module, *args, **kwargs)
    rows = rows_of(found)
    if rows is not None:
        return _run_forward_by_rows(module, found, rows, args, kwargs)
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


def _run_forward_by_rows(
    module: nn.Module, found: SiteAdapters, rows: Rows, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """As :func:`run_forward`, where each row of the batch has the adapters of its group."""
    groups = found.rows.inside
    if CALL.probe is not None:
        CALL.probe(found, True, [v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)][:1])
        return type(module).forward(module, *args, **kwargs)
    if groups is None or found.epoch == _NEVER:
        return type(module).forward(module, *args, **kwargs)
    acting = [adapter for group in groups for adapter in group]
    for adapter in acting:
        note_eager(adapter)
    first = found.rows.base if len(acting) == 0 else acting[0]
    assert first is not None  # or there would be no groups
    if all(type(adapter) is type(first) for adapter in acting):
        output = first.run_rows(module, groups, rows, *args, **kwargs)
    else:
        output = Adapter.run_rows(first, module, groups, rows, *args, **kwargs)
    return output if torch.compiler.is_compiling() else mark(output, _acting(found))


#: The hooks that adaptc puts on modules.
OURS = frozenset({run_site, run_tap, run_before_site})


class SiteForward(functools.partial[Any]):
    """What replaces a module's forward, with the signature that it had: generation and trainers ask for it."""

    @property
    def __signature__(self) -> inspect.Signature:
        module = self.args[0]
        return inspect.signature(type(module).forward.__get__(module))
