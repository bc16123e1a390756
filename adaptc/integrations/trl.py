"""TRL's trainers on a compiled model, which they treat as they treat a PEFT model.

A trainer that compares with a reference (DPO, KTO, GRPO, RLOO) asks ``accelerate.utils.is_peft_model`` whether the
model has adapters. If not, it loads the base a second time, from the name in the model's config, as the reference. If
so, it adds an adapter "ref" with the values that the adapter has then, and makes it live to compute the reference.
``is_peft_model`` looks at the model's class, which compiling does not change: therefore it is replaced by a function
that says yes to compiled models too when one of these trainers asks (:func:`install`), and a compiled model of which
one has asked gets the attributes of a PEFT model that they then use (:func:`speak_peft`).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import nn

from adaptc.errors import AdaptcWarning, NewSignatureWarning, UnsupportedError
from adaptc.files.save_pretrained import OnModel
from adaptc.handle import Handle
from adaptc.runtime.adapters import ACTIVE
from adaptc.runtime.site_adapters import adapters_of

_ASKED = "is_peft_model"
#: The modules of TRL that treat a compiled model rightly when they take it for a PEFT model.
_ASKERS = {
    f"trl.{name}"
    for name in (
        "trainer.base_trainer", "trainer.dpo_trainer", "trainer.grpo_trainer", "trainer.kto_trainer",
        "trainer.reward_trainer", "trainer.rloo_trainer", "trainer.sft_trainer", "generation.vllm_generation",
    )
}  # fmt: skip
#: One that unwraps a PEFT model by its class's own structure, and reads the weight of the head as the others do.
_DISTILLATION = "trl.trainer.distillation_trainer"
#: Marks the function that :func:`install` puts in the place of accelerate's.
_OURS = "_adaptc_knows_compiled_models"
#: The name that TRL takes its reference to be a copy of.
_COPIED = "default"


def install() -> None:
    """Let TRL know a compiled model's adapters, where TRL is installed; called by ``adaptc.compile``.

    ``accelerate.utils.is_peft_model`` is replaced, and in those of TRL's modules that have imported it already. For a
    model that is not compiled by adaptc, and for whoever else asks, it answers what accelerate's does.
    """
    if "transformers" not in sys.modules or importlib.util.find_spec("trl") is None:
        return
    utils: Any = importlib.import_module("accelerate.utils")
    if not hasattr(utils.is_peft_model, _OURS):
        utils.is_peft_model = _knowing(utils.is_peft_model, utils.extract_model_from_parallel)
    plain = utils.is_peft_model.__wrapped__
    for name, module in list(sys.modules.items()):
        if name.startswith("trl.") and getattr(module, "__dict__", {}).get(_ASKED) is plain:
            setattr(module, _ASKED, utils.is_peft_model)


def _knowing(plain: Callable[[Any], bool], unwrap: Callable[[Any], Any]) -> Callable[[Any], bool]:
    @functools.wraps(plain)
    def is_peft_model(model: Any) -> bool:
        asker = sys._getframe(1).f_globals.get("__name__")
        if plain(model) or asker not in _ASKERS | {_DISTILLATION}:
            return plain(model)
        handle = getattr(unwrap(model), "adaptc", None)
        if not isinstance(handle, Handle) or not handle.records:
            return False
        if asker == _DISTILLATION:
            _check_reached(handle)
            return False
        speak_peft(handle)
        return True

    setattr(is_peft_model, _OURS, True)
    return is_peft_model


def speak_peft(handle: Handle) -> None:
    """Give a compiled model the attributes of a PEFT model that TRL uses. They go when it is detached."""
    attributes = handle.model.__dict__
    if isinstance(attributes.get("peft_config"), Configs):
        return
    for name, kind in _ATTRIBUTES.items():
        attributes[name] = kind(handle)
    attributes[ACTIVE] = handle.live[0] if len(handle.live) == 1 else list(handle.live)


class AdapterConfig:
    """What ``model.peft_config`` has of an adapter: it stands for the adapter itself when it is given back."""

    is_prompt_learning = False
    target_parameters = None

    def __init__(self, name: str, plan: Any) -> None:
        self.name, self.plan = name, plan

    def to_dict(self) -> dict[str, Any]:
        return dict(self.plan.to_dict())


class OnHandle(OnModel):
    def __init__(self, handle: Handle) -> None:
        self.handle = handle


class Configs(OnHandle, Mapping[str, AdapterConfig]):
    """``model.peft_config``: adapter name -> its config. "default" is there always: the live adapter."""

    def __getitem__(self, name: str) -> AdapterConfig:
        records = self.handle.records
        if name == _COPIED and name not in records and self.handle.live:
            name = self.handle.live[0]
        return AdapterConfig(name, records[name].plan)

    def __iter__(self) -> Iterator[str]:
        return iter(self.handle.records)

    def __len__(self) -> int:
        return len(self.handle.records)


class SetAdapter(OnHandle):
    """``model.set_adapter``: make one adapter live, or several; what is trained stays as it is."""

    def __call__(self, adapter_name: str | list[str]) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NewSignatureWarning)
            self.handle.switch(adapter_name)


class AddAdapter(OnHandle):
    """``model.add_adapter(name, model.peft_config[other])``: a frozen copy of the live adapter, to compare with."""

    def __call__(self, adapter_name: Any, config: Any = None, *args: Any, **options: Any) -> None:
        """Anything else is for the method of the model's class.

        Raises:
            UnsupportedError: not one adapter is live, or an adapter that is not live is the one that TRL would copy.
            AdapterNameError: the model has an adapter of this name.
        """
        handle, model = self.handle, self.handle.model
        if not isinstance(config, AdapterConfig):
            given = (adapter_name, *(() if config is None else (config,)), *args)
            type(model).add_adapter(model, *given, **options)  # type: ignore[attr-defined]
            return
        live = handle.live
        if len(live) != 1 or (_COPIED in handle.records and live != (_COPIED,)):
            raise UnsupportedError(
                "TRL compares with a copy of the adapter that it trains, as it is at the start",
                expected=f"one live adapter, and none but it named {_COPIED!r}",
                found=f"live: {', '.join(live) or 'none'}; adapters: {', '.join(handle.records)}",
                do="model.adaptc.switch(name), or model.adaptc.remove(name), before the trainer is made",
            )
        if adapter_name in handle.records and handle.records[adapter_name].reference:
            handle.remove(adapter_name)  # of a trainer before this one
        handle.adapters.copy_frozen(live[0], adapter_name)
        _warn_of_trained_base(handle)


def _warn_of_trained_base(handle: Handle) -> None:
    ours = {name for name, _ in handle.named_parameters()}
    trained = [name for name, p in handle.model.named_parameters() if p.requires_grad and name not in ours]
    if trained:
        more = f" and {len(trained) - 3} more" if len(trained) > 3 else ""
        warnings.warn(
            AdaptcWarning(
                f"the reference is the base with the adapter's start, and the base is trained too: it moves with"
                f" {', '.join(trained[:3])}{more} (freeze them, or have the plan train them: train: full)"
            ),
            stacklevel=4,
        )


def _check_reached(handle: Handle) -> None:
    """Raise where TRL's own forward, which calls the backbone and multiplies by the head's weight, passes by adapters.

    Raises:
        UnsupportedError: names the site.
    """
    model: Any = handle.model
    head = _head(model)
    for site in handle.sites:
        adapters = list(site.adapters.values())
        if site.module is model or (site.module is head and not all(a.replaces_forward for a in adapters)):
            kinds = ", ".join(sorted({a.method.kind for a in adapters}))
            raise UnsupportedError(
                f"{site.path or type(model).__name__}: TRL multiplies by the weight of the head without calling it, and"
                " calls the backbone without the model's own forward",
                expected="adapters in the backbone", found=f"{kinds} there, which would be lost",
                do="leave it out of the plan",
            )  # fmt: skip


def _head(model: Any) -> nn.Module | None:
    get = getattr(type(model), "get_output_embeddings", None)
    head = get(model) if callable(get) else None
    return head if isinstance(head, nn.Module) else None


class Head(OnHandle):
    """``model.get_output_embeddings()``, whose weight TRL reads: the copy that acts, where the plan trains the head."""

    def __init__(self, handle: Handle) -> None:
        super().__init__(handle)
        self.model = handle.model

    def __call__(self) -> nn.Module | None:
        head = _head(self.model)
        found = None if head is None else adapters_of(head)
        if found is None or found.standin is None:
            return head
        return cast(nn.Module, found.standin.copy)


class BaseModel(OnHandle):
    """``model.get_base_model()``, which TRL calls to give the base a forward of its own: the model itself, in which the
    adapters are."""

    def __call__(self) -> nn.Module:
        """Raises:
        UnsupportedError: an adapter that this forward would pass by.
        """
        _check_reached(self.handle)
        return self.handle.model


class Merge(OnHandle):
    """``model.merge_adapter()``: TRL then hands the model's parameters to vLLM, and takes the adapters out again."""

    def __call__(self, *_: Any, **__: Any) -> None:
        """Raises:
        UnsupportedError: an adapter that weights cannot express, or a sharded model.
        """
        self.handle.unmerge()  # what an interrupted hand-over left has older values
        try:
            with torch.no_grad():  # between steps, in training mode
                self.handle.merge()
        except UnsupportedError as error:
            raise UnsupportedError(
                "generation by vLLM reads the adapters from the model's weights, into which they cannot be merged",
                found=error, do="use_vllm=False: the compiled model generates by itself",
            ) from error  # fmt: skip


class Unmerge(OnHandle):
    """``model.unmerge_adapter()``: the base's own weights again, bit for bit."""

    def __call__(self) -> None:
        self.handle.unmerge()


class AdapterPart(OnModel, str):
    """``model.prefix``: TRL passes over the parameters that have it in their names."""


def _adapter_part(handle: Handle) -> AdapterPart:
    return AdapterPart(".adapters.")


_ATTRIBUTES: dict[str, Callable[[Handle], OnModel]] = {
    "peft_config": Configs,
    "set_adapter": SetAdapter,
    "add_adapter": AddAdapter,
    "get_base_model": BaseModel,
    "get_output_embeddings": Head,
    "merge_adapter": Merge,
    "unmerge_adapter": Unmerge,
    "prefix": _adapter_part,
}
