"""The contenders: the same Llama, adapter values and backward, computed in different ways."""

from __future__ import annotations

import copy
import dataclasses
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from bench.errors import BenchError
from bench.settings import Case, Settings

#: Spread of lora_B. Non-zero, so that every adapter gradient is non-zero; with A as initialised and
#: alpha / r = 2 the update is about a seventh of the frozen weight.
B_STD = 0.02


@dataclasses.dataclass
class Contender:
    """A model ready to train, its inputs, and the adapter parameters by ``<site>.<factor>``."""

    name: str
    model: Callable[..., Any]
    embeds: torch.Tensor
    labels: torch.Tensor
    adapter: dict[str, nn.Parameter]
    compiled: bool
    #: What the contender itself counts, where it does; shown beside Dynamo's own counts.
    own_counts: Callable[[], Mapping[str, Any]] | None = None

    def clear(self) -> None:
        """Drop the gradients of the last step."""
        self.embeds.grad = None
        for parameter in self.adapter.values():
            parameter.grad = None

    def forward(self) -> torch.Tensor:
        """The loss. Everything else that the model returns is dropped at once."""
        loss = self.model(inputs_embeds=self.embeds, labels=self.labels).loss
        assert isinstance(loss, torch.Tensor)
        return loss

    def step(self) -> torch.Tensor:
        """Drop the gradients, forward with the loss, backward. No optimizer: it is the same for all."""
        self.clear()
        loss = self.forward()
        torch.autograd.backward(loss)
        return loss.detach()


@dataclasses.dataclass(frozen=True)
class Base:
    """The frozen base in one dtype, and the batch; every contender gets copies of its own."""

    model: nn.Module
    embeds: torch.Tensor
    labels: torch.Tensor

    def to(self, dtype: torch.dtype) -> Base:
        """The same values in another dtype."""
        return Base(copy.deepcopy(self.model).to(dtype), self.embeds.to(dtype), self.labels)

    def fresh_model(self) -> nn.Module:
        return copy.deepcopy(self.model)

    def fresh_embeds(self) -> torch.Tensor:
        return self.embeds.clone().requires_grad_(True)


def build_base(settings: Settings, case: Case) -> Base:
    """A Llama with random weights, drawn in fp32 from the seed on the device and rounded to the case's dtype."""
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = settings.hidden // settings.head_dim
    config = LlamaConfig(
        hidden_size=settings.hidden,
        intermediate_size=settings.intermediate,
        num_hidden_layers=settings.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=settings.vocab,
        max_position_embeddings=max(settings.tokens, 512),
        use_cache=False,
    )
    torch.manual_seed(settings.seed)
    shape = (settings.batch, settings.tokens)
    with torch.device(settings.device):
        model = LlamaForCausalLM(config)
        embeds = torch.randn(*shape, settings.hidden) * config.initializer_range
        labels = torch.randint(settings.vocab, shape)
    model.train().requires_grad_(False)
    if settings.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    plain: nn.Module = model
    return Base(plain.to(case.torch_dtype), embeds.to(case.torch_dtype), labels)


def fill_adapter(adapter: Mapping[str, nn.Parameter], seed: int) -> None:
    """Give every factor values that depend on its name and the seed only, so equal in all contenders."""
    for name, parameter in adapter.items():
        generator = torch.Generator().manual_seed(seed * 2**32 + zlib.crc32(name.encode()))
        if name.endswith("lora_A"):
            bound = parameter.shape[1] ** -0.5  # PEFT's initial values: Kaiming-uniform with a = sqrt(5)
            values = (torch.rand(parameter.shape, generator=generator) * 2 - 1) * bound
        elif name.endswith("lora_B"):
            values = torch.randn(parameter.shape, generator=generator) * B_STD
        elif name.endswith("lora_magnitude"):  # started as the weight's row norms, which all contenders share
            stretch = 1 + 0.2 * torch.rand(parameter.shape, generator=generator)
            values = parameter.detach() * stretch.to(parameter.device)
        else:
            raise BenchError(f"unknown adapter parameter {name!r}: neither lora_A nor lora_B nor lora_magnitude")
        with torch.no_grad():
            parameter.copy_(values)


def build_floor(base: Base, settings: Settings, case: Case) -> Contender:
    """The frozen base under torch.compile: forward, and backward to the inputs only."""
    model = torch.compile(base.fresh_model(), backend=settings.backend)
    return Contender("floor", model, base.fresh_embeds(), base.labels, {}, compiled=True)


def peft_model(base: Base, settings: Settings, case: Case) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """The base wrapped by PEFT with the bench's LoRA, and the adapter parameters by ``<site>.<factor>``."""
    import peft

    options: dict[str, Any] = {"r": settings.rank, "lora_alpha": settings.alpha, "lora_dropout": case.dropout}
    config = peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", use_dora=settings.dora, **options)
    inner: Any = base.fresh_model()
    model: nn.Module = peft.get_peft_model(inner, config).train()
    prefix, suffix = "base_model.model.", ".default.weight"
    adapter = {
        name.removeprefix(prefix).removesuffix(suffix).replace("lora_magnitude_vector", "lora_magnitude"): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    fill_adapter(adapter, settings.seed)
    return model, adapter


def build_peft_eager(base: Base, settings: Settings, case: Case) -> Contender:
    """PEFT as it is."""
    model, adapter = peft_model(base, settings, case)
    return Contender("peft-eager", model, base.fresh_embeds(), base.labels, adapter, compiled=False)


def build_peft_compile(base: Base, settings: Settings, case: Case) -> Contender:
    """``torch.compile(peft_model)``."""
    model, adapter = peft_model(base, settings, case)
    compiled = torch.compile(model, backend=settings.backend)
    return Contender("peft-compile", compiled, base.fresh_embeds(), base.labels, adapter, compiled=True)


def build_peft_regional(base: Base, settings: Settings, case: Case) -> Contender:
    """PEFT, its repeated blocks compiled by accelerate; the model around them is compiled as well there."""
    from accelerate.utils import compile_regions

    model, adapter = peft_model(base, settings, case)
    compiled = compile_regions(model, backend=settings.backend)
    # It copies the modules' attributes: the parameters are those of the model it was given.
    return Contender("peft-regional", compiled, base.fresh_embeds(), base.labels, adapter, compiled=True)


def build_peft_backend(base: Base, settings: Settings, case: Case) -> Contender:
    """``torch.compile(peft_model, backend="adaptc")``, which lowers through Inductor."""
    if settings.backend != "inductor":
        raise BenchError(f"adaptc-backend lowers through inductor, and --backend is {settings.backend}")
    model, adapter = peft_model(base, settings, case)
    compiled = torch.compile(model, backend="adaptc")
    return Contender("adaptc-backend", compiled, base.fresh_embeds(), base.labels, adapter, compiled=True)


def build_adaptc_regional(base: Base, settings: Settings, case: Case) -> Contender:
    """``adaptc.compile(..., regional=True)``: the repeated block is compiled once."""
    return dataclasses.replace(build_adaptc(base, settings, case, regional=True), name="adaptc-regional")


def build_adaptc(base: Base, settings: Settings, case: Case, *, regional: bool = False) -> Contender:
    """``adaptc.compile`` with the same LoRA on the same layers, the model captured whole."""
    import adaptc

    lora = adaptc.LoRA(
        r=settings.rank, alpha=settings.alpha, dropout=case.dropout, dora=settings.dora, targets="all-linear"
    )
    plan = adaptc.Plan([lora])
    model: Any = adaptc.compile(base.fresh_model(), plan, backend=settings.backend, regional=regional)
    adapter = {
        name.replace(".adapters.default.", "."): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    fill_adapter(adapter, settings.seed)
    counts = model.adaptc.metrics
    return Contender("adaptc", model, base.fresh_embeds(), base.labels, adapter, True, own_counts=counts)


BUILDERS: dict[str, Callable[[Base, Settings, Case], Contender]] = {
    "floor": build_floor,
    "peft-eager": build_peft_eager,
    "peft-compile": build_peft_compile,
    "peft-regional": build_peft_regional,
    "adaptc": build_adaptc,
    "adaptc-regional": build_adaptc_regional,
    "adaptc-backend": build_peft_backend,
}
#: Those that a run compares unless it is told otherwise.
USUAL = ("floor", "peft-eager", "peft-compile", "adaptc")
