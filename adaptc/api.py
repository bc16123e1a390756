"""``adaptc.compile``."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from adaptc import torch_internals
from adaptc.capture.backend import BackendOptions
from adaptc.codegen import toolchain
from adaptc.errors import AdaptcWarning, AdapterNameError, BankError, UnsupportedError
from adaptc.handle import Handle
from adaptc.integrations import peft_model, releases, trl
from adaptc.plan.match import strings
from adaptc.runtime import processes
from adaptc.runtime.bank import Bank
from adaptc.runtime.options import CompileOptions

M = TypeVar("M", bound=nn.Module)


def compile(
    model: M,
    plan: Any = None,
    *,
    name: str = "default",
    example_inputs: Any = None,
    calibration: Any = None,
    adapter_dtype: torch.dtype | None = None,
    backend: str = "inductor",
    verify: bool | str = False,
    regional: bool | str = "auto",
    lift_no_grad: str | Sequence[str] = (),
    bank: Any = None,
    mode: str | None = None,
    fullgraph: bool = False,
    dynamic: bool | None = None,
    options: dict[str, Any] | None = None,
) -> M:
    """Adapt ``model`` by ``plan`` and compile it in place; returns the same object.

    Args:
        model: any ``nn.Module``; its parameters are frozen, its class and state_dict keys do not change.
        plan: a Plan, a method, a list of either, a dict, a PEFT config, or a path to a plan file or an adapter
            folder (whose values are loaded). None for a PEFT model: its adapters are taken over with their
            values, and its base is returned without the wrapper.
        name: the adapter's name. The same plan under a name that is there does nothing; another plan raises.
        example_inputs: keyword dict or argument tuple of one call; used by ``explain()`` before the first
            forward, and by ``warmup()``. Default: the model's ``dummy_inputs``.
        calibration: an iterable of batches (keyword dict, argument tuple or one argument), for methods whose initial
            values depend on their inputs (``LoRA(init="corda")``); run once through the base model in eval mode.
        adapter_dtype: storage of adapter parameters; default fp32 on a 16-bit base, else the base's dtype.
        backend: "inductor", "aot_eager", "eager" (runs the rewritten graph op by op) or a Dynamo backend.
        verify: check every rewrite numerically in fp64; a pass that fails is undone and reported
            (``"raise"``: raises VerifyError instead).
        regional: True captures every block that repeats (a layer of a transformer) by itself, once for all of its
            copies, and runs what is around them as it is written; False captures the whole model; "auto" captures
            blocks where there are many and nothing is lost by it. A call with a cache is captured whole in any case
            (docs/passes.md).
        lift_no_grad: modules, named as targets are. Where one of them runs under ``torch.no_grad`` inside the model's
            forward, that region records gradients. Becomes part of the plan (``passes: {lift_no_grad: [...]}``), and of
            those of adapters that are added later. The model is captured whole then.
        bank: what the adapters may be at most (``adaptc.Bank``). Within it adding, removing and switching adapters, and
            batches of several, compile nothing in calls without gradients (``torch.no_grad()`` or
            ``torch.inference_mode()``); ``plan`` may be None then, for a model that gets its adapters later.
        mode, fullgraph, dynamic, options: as in ``torch.compile``.

    Raises:
        PlanError, SiteError, CheckpointError: the plan does not fit; the model is unchanged.
        AdapterNameError: ``name`` is taken by another plan.
        BankError: the bank does not fit the model, or the plan the bank.
        UnsupportedError: arguments that do not go together.
    """
    _check_bank(bank, backend, mode, options)
    if regional not in (True, False, "auto"):
        raise ValueError(f'adaptc.compile: regional is "auto", True or False, not {regional!r}')
    if mode is not None and options is not None:
        raise ValueError("adaptc.compile: give mode or options, not both")
    _check_backend(backend, mode)
    wanted = CompileOptions(
        backend=BackendOptions(backend, mode, dict(options or {}), verify),
        fullgraph=fullgraph,
        dynamic=dynamic,
        adapter_dtype=adapter_dtype,
        example_inputs=example_inputs,
        regional=regional,
        lift_no_grad=strings(lift_no_grad, "lift_no_grad"),
        bank=bank,
    )
    releases.warn_of_untested()
    handle = getattr(model, "adaptc", None)
    if isinstance(handle, Handle):
        _compile_again(handle, plan, name, calibration, wanted)
    else:
        model = _compile_first(model, plan, name, calibration, wanted)
    return model


def _compile_first(model: M, plan: Any, name: str, calibration: Any, wanted: CompileOptions) -> M:
    """Adapt a model that was not compiled before; returns it, or the base of a PEFT model."""
    handle: Any = getattr(model, "adaptc", None)
    if handle is not None:
        raise AdapterNameError(f"{type(model).__name__} has an attribute 'adaptc' of its own", expected="a free name")
    wanted = dataclasses.replace(wanted, backend=_usable(wanted.backend, model))
    if plan is None and peft_model.is_peft_model(model):
        peft_model.check_name(model, name)
        trl.install()
        return peft_model.adopt(model, wanted)  # type: ignore[return-value]  # the base, as documented
    if plan is None and wanted.bank is None:
        raise UnsupportedError("adaptc.compile needs a plan", found=f"None for a {type(model).__name__}")
    processes.check_unwrapped(model)
    _check_not_nested(model)
    _check_materialised(model)
    handle = Handle(model, wanted)
    try:
        handle.open_bank()
        if plan is not None:
            handle.add(name, plan, calibration=calibration)
        handle.attach_to_model()
        handle.switch(name if plan is not None else None)
    except BaseException:
        handle.detach()
        raise
    trl.install()
    return model


def _check_not_nested(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if module is not model and isinstance(module.__dict__.get("adaptc"), Handle):
            raise UnsupportedError(
                f"{path} was compiled by adaptc on its own",
                expected="one compiled model, not one inside another",
                do=f"{path}.adaptc.detach() first, and name its modules in this plan",
            )


def _check_materialised(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if any(is_lazy(tensor) for tensor in (*module._parameters.values(), *module._buffers.values())):
            raise UnsupportedError(
                f"{path} ({type(module).__name__}) has no shape before its first call",
                expected="a model whose lazy layers have run, so that their weights are there to be frozen",
                do="call the model once on an input, under torch.no_grad(), before adaptc.compile",
            )


def _check_backend(name: str, mode: str | None) -> None:
    """Refuse what the first call would fail on."""
    if name not in ("inductor", "aot_eager", "eager"):
        torch_internals.lookup_backend(name)
    if mode is not None:
        torch_internals.inductor_mode_options(mode)


def _usable(options: BackendOptions, model: nn.Module) -> BackendOptions:
    """``options``, or op-by-op execution where Inductor cannot generate code for the CPU."""
    if options.name != "inductor" or not any(p.device.type == "cpu" for p in model.parameters()):
        return options
    reason = toolchain.inductor_missing()
    if reason is None:
        return options
    instead = f"Inductor cannot run here: {reason}; aot_eager runs the same rewritten graphs, op by op"
    warnings.warn(AdaptcWarning(instead), stacklevel=3)
    return BackendOptions("aot_eager", verify=options.verify, instead=instead)


def _compile_again(handle: Handle, plan: Any, name: str, calibration: Any, options: CompileOptions) -> None:
    from adaptc.files import folder

    default = CompileOptions(BackendOptions())
    for option in ("backend", "fullgraph", "dynamic", "adapter_dtype", "regional", "lift_no_grad", "bank"):
        asked, has = getattr(options, option), getattr(handle.options, option)
        if asked not in (has, getattr(default, option)):
            raise UnsupportedError(
                f"the model is compiled already, with another {option}",
                expected=has, found=asked, do="leave it out, or model.adaptc.detach() first",
            )  # fmt: skip
    wanted = folder.plan_of(plan, handle.model).lifting(handle.options.lift_no_grad)
    if name not in handle.records:
        handle.add(name, plan, calibration=calibration)
        return
    if wanted != handle.records[name].plan:
        raise AdapterNameError(
            f"an adapter named {name!r} with another plan is there already",
            expected="the same plan, or a new name",
            do=f"model.adaptc.remove({name!r}) first, or compile with name=...",
        )


def _check_bank(bank: Any, backend: str, mode: str | None, options: dict[str, Any] | None) -> None:
    if bank is None:
        return
    if not isinstance(bank, Bank):
        raise BankError(f"adaptc.compile: bank is a {type(bank).__name__}", expected="an adaptc.Bank")
    by_mode = mode in ("reduce-overhead", "max-autotune") or (options or {}).get("triton.cudagraphs")
    if by_mode or backend == "cudagraphs":
        raise UnsupportedError(
            "adaptc.compile: a bank and CUDA graphs", found=f"backend={backend!r}, mode={mode!r}, options={options!r}",
            expected="a mode without them: they would replay the adapters that there were",
            do='leave the mode out, or mode="max-autotune-no-cudagraphs"',
        )  # fmt: skip
