"""Taking over a model that PEFT has wrapped: its plan, its adapters' values, and what is trained."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

from torch import nn

from adaptc.errors import AdaptcError, AdapterNameError, UnsupportedError
from adaptc.files import peft_keys
from adaptc.handle import Handle
from adaptc.plan import Plan
from adaptc.plan.files import read_peft_config
from adaptc.plan.peft.reading import config_to_rules
from adaptc.runtime.names import adapter_directory, check_adapter_name
from adaptc.runtime.options import CompileOptions


class Wrapper(NamedTuple):
    """A module that PEFT put in the place ``parent.name`` (module path ``path``) of ``plain``."""

    parent: nn.Module
    name: str
    path: str
    layer: Any
    plain: nn.Module


def is_peft_model(model: nn.Module) -> bool:
    """Whether PEFT wraps ``model``; PEFT is not imported to find out."""
    names = ("PeftModel", "PeftMixedModel")
    return any(t.__name__ in names and t.__module__.startswith("peft.") for t in type(model).__mro__)


def adopt(model: nn.Module, options: CompileOptions) -> nn.Module:
    """Compile the base of a PEFT model with every adapter that it has; returns the base, without the wrapper.

    Names, values, scales, the active adapters and ``requires_grad`` are PEFT's; the base's weights stay as they are.

    Raises:
        AdaptcError: an adapter of a kind, with an option, in a state (merged) or under a name that adaptc does not
            have. The PEFT model is as it was then.
    """
    peft_model = cast(Any, model)
    configs = {name: read_peft_config(config) for name, config in peft_model.peft_config.items()}
    for name, config in configs.items():
        check_adapter_name(name)
        Plan(config_to_rules(config, loading=True))
    base: nn.Module = peft_model.get_base_model()
    wrappers = list(_wrappers(base))
    live = _live(peft_model, wrappers)
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    handle = Handle(base, options)
    with tempfile.TemporaryDirectory() as directory:
        # As adapter folders, so that all that is checked and converted when one is loaded is here too.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            peft_model.save_pretrained(directory, save_embedding_layers=False)
        for wrapper in wrappers:
            wrapper.parent._modules[wrapper.name] = wrapper.plain
        try:
            handle.open_bank()
            for name in configs:
                handle.add(name, adapter_directory(directory, name))
        except AdaptcError:
            for name in list(handle.records):
                handle.adapters.remove(name)
            handle.adapters.close_bank()
            for wrapper in wrappers:
                wrapper.parent._modules[wrapper.name] = wrapper.layer
            raise
    base.__dict__.pop("peft_config", None)  # PEFT leaves it there, and would take the base for wrapped
    for wrapper in wrappers:
        _take_scales(handle, wrapper)
    handle.attach_to_model()
    _take_requires_grad(handle, trained, live)
    handle.switch(live)
    return base


def _wrappers(base: nn.Module) -> Iterator[Wrapper]:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    for path, parent in base.named_modules():
        if isinstance(parent, kinds):
            continue
        for name, layer in parent._modules.items():
            if isinstance(layer, kinds):
                plain = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer.original_module
                yield Wrapper(parent, name, f"{path}.{name}".lstrip("."), layer, plain)


def _live(model: Any, wrappers: list[Wrapper]) -> tuple[str, ...]:
    """The adapters that act now: PEFT's active ones, or none while they are disabled."""
    for wrapper in wrappers:
        if merged := [name for layer in _layers(wrapper) for name in getattr(layer, "merged_adapters", None) or ()]:
            raise UnsupportedError(
                f"{wrapper.path}: PEFT has merged {', '.join(merged)} into the base weight",
                expected="a PEFT model with nothing merged", do="model.unmerge_adapter() first",
            )  # fmt: skip
    disabled = {bool(getattr(wrapper.layer, "disable_adapters", False)) for wrapper in wrappers}
    if len(disabled) > 1:
        raise UnsupportedError(
            "PEFT's adapters are disabled in a part of the model only", do="enable all of them, or disable all"
        )
    return () if True in disabled else tuple(model.active_adapters)


def _take_scales(handle: Handle, wrapper: Wrapper) -> None:
    """PEFT's scale of a layer can have been changed since it was made (``set_scale``)."""
    site = next((s for s in handle.sites if s.module is wrapper.plain), None)
    if site is None:
        return
    for layer in _layers(wrapper):
        scales = getattr(layer, "scaling", None)
        for name, scale in scales.items() if isinstance(scales, dict) else ():
            for adapter in site.of(name):
                # A layer that PEFT's config could only name by its weight is a layer here.
                same = getattr(layer, "parameter_name", None) in (adapter.parameter, adapter.parameter or "weight")
                if same and getattr(adapter, "scaling", scale) != scale:
                    adapter.scaling = scale


def _layers(wrapper: Wrapper) -> Iterator[Any]:
    """The layers between a wrapper and its plain module: one for each adapted parameter, else one."""
    layer = wrapper.layer
    while layer is not wrapper.plain and layer is not None:
        yield layer
        layer = getattr(layer, "base_layer", None) if hasattr(layer, "parameter_name") else None


def _take_requires_grad(handle: Handle, trained: dict[str, bool], live: tuple[str, ...]) -> None:
    """Train what PEFT trained: adapter tensors, and base parameters that were made trainable by hand."""
    taken = set()
    for name in handle.records:
        flags = {_plain_key(key, name): flag for key, flag in trained.items()}
        adapters = {path: adapter for site in handle.sites for path, adapter in site.parts(name)}
        keys = {tensor.data_ptr(): key for key, tensor in peft_keys.encode(adapters).items()}
        # Prompts are no part of the wrapped model: PEFT has them, or an encoder of them, beside it.
        beside = {id(p) for adapter in adapters.values() if adapter.method.on_model for p in adapter.parameters()}
        for parameter in handle.parameters(name):
            key = keys.get(parameter.data_ptr())
            taken.add(key)
            trains = True if key is None or id(parameter) in beside else flags.get(key, False)
            parameter.requires_grad_(trains and name in live)
    ours = {name for name, _ in handle.named_parameters()}
    flags = {peft_keys.plain_name(key): flag for key, flag in trained.items()}
    adapted = {peft_keys.plain_name(str(key)) for key in taken}
    on_model = any(a.method.on_model for site in handle.sites for a in site.adapters.values())
    for name, parameter in handle.model.named_parameters():
        key = f"base_model.{name}" if on_model else f"base_model.model.{name}"
        if name not in ours and key not in adapted:
            parameter.requires_grad_(flags.get(key, False))


def _plain_key(key: str, adapter: str) -> str:
    """PEFT's parameter name as it stands in a file: without the adapter's name."""
    parts = key.replace(f".modules_to_save.{adapter}.", ".").split(".")
    plain = ".".join(part for i, part in enumerate(parts) if part != adapter or i < len(parts) - 2)
    # Of a magnitude PEFT's file has the name of the module that holds it.
    return plain.removesuffix(".weight") if plain.endswith(".lora_magnitude_vector.weight") else plain


def check_name(model: nn.Module, name: str) -> None:
    """Raise when ``adaptc.compile``'s ``name`` is given and is no adapter of the PEFT model."""
    known = cast(Any, model).peft_config
    if name != "default" and name not in known:
        raise AdapterNameError(
            f"the PEFT model has no adapter named {name!r}", found=", ".join(known),
            do="leave name= out: the adapters keep PEFT's names",
        )  # fmt: skip
