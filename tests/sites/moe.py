"""Mixtures of experts with fused weights, real classes of transformers, and LoRA on them written out in fp64."""

from __future__ import annotations

import copy
import importlib.util
import itertools
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.aria.modeling_aria import AriaExperts
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

from tests.models import hosts
from tests.reference import as_double, loss_of

NAMES = ("experts.gate_up_proj", "experts.down_proj")


def qwen3_moe(experts: int = 4, **changes: Any) -> nn.Module:
    options = {
        "vocab_size": hosts.VOCAB, "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 48,
        "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "num_experts": experts, "num_experts_per_tok": 2, "norm_topk_prob": True, "max_position_embeddings": 128,
    }  # fmt: skip
    with hosts.seeded(0):
        model = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**{**options, **changes}))
        for router in (m for n, m in model.named_modules() if n.endswith("mlp.gate")):
            nn.init.normal_(router.weight)  # zeros at first: every token to the same experts
    return model


class Alone(nn.Module):
    """One experts module, called as its block calls it."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return self.experts(hidden, ids, weights)

    def set_experts_implementation(self, name: str) -> None:
        self.experts.config._experts_implementation = name


def _gpt_oss() -> nn.Module:
    options = {"hidden_size": 12, "intermediate_size": 8, "num_local_experts": 4}
    return GptOssExperts(transformers.GptOssConfig(**options))


def _aria() -> nn.Module:
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    options = {"hidden_size": 12, "intermediate_size": 8, "moe_num_experts": 4, **heads}
    return AriaExperts(transformers.AriaTextConfig(**options))


def _nemotron() -> nn.Module:
    options = {"hidden_size": 12, "moe_intermediate_size": 8, "n_routed_experts": 4}
    return NemotronHExperts(transformers.NemotronHConfig(**options))


def _muse_spark() -> nn.Module:
    from transformers.models.muse_spark.configuration_muse_spark import MuseSparkTextConfig
    from transformers.models.muse_spark.modeling_muse_spark import MuseSparkExperts

    return MuseSparkExperts(MuseSparkTextConfig(num_local_experts=4, moe_hidden_size=12, moe_intermediate_size=8))


#: Transposed with biases and an interleaved gate; transposed; without a gate; with a norm behind the experts, which no
#: class has in transformers 5.19.
ALONE = {"gpt_oss": _gpt_oss, "aria": _aria, "nemotron_h": _nemotron}
if importlib.util.find_spec("transformers.models.muse_spark"):
    ALONE["muse_spark"] = _muse_spark


def alone(name: str) -> nn.Module:
    with hosts.seeded(3):
        host = Alone(ALONE[name]())
        for parameter in host.parameters():
            nn.init.normal_(parameter, std=0.5)
    host.set_experts_implementation("grouped_mm")
    return host


def alone_batch(rows: int = 7, *, seed: int = 0) -> dict[str, torch.Tensor]:
    """Expert 1 gets nothing; ids of one row are all different."""
    with hosts.seeded(seed):
        ids = torch.stack([torch.tensor([0, 2, 3])[torch.randperm(3)[:2]] for _ in range(rows)])
        return {"hidden": torch.randn(rows, 12), "ids": ids, "weights": torch.rand(rows, 2)}


def leaves_of(model: nn.Module, dtype: torch.dtype = torch.float64) -> dict[str, dict[str, torch.Tensor]]:
    """Path of a parameter -> {"A": ..., "B": ...}, copies of the adapter's values to be differentiated."""
    found = {}
    for site in model.adaptc.sites:
        for adapter in site.of("default"):
            values = {"A": adapter.lora_A, "B": adapter.lora_B}
            path = f"{site.path}.{adapter.parameter}"
            found[path] = {n: v.detach().to(dtype, copy=True).requires_grad_() for n, v in values.items()}
    return found


def formula_step(model: nn.Module, base: nn.Module, batch: Any, *, scale: float) -> tuple[torch.Tensor, dict[str, Any]]:
    """Loss and gradients, by the names in ``model``, of ``base`` in fp64 with W_e + s B_e A_e for every expert e."""
    host = copy.deepcopy(base).double().requires_grad_(False).train(model.training)
    if hasattr(host, "set_experts_implementation"):
        host.set_experts_implementation("eager")  # torch's grouped product has no fp64
    leaves, changed = leaves_of(model), {}
    for path, factors in leaves.items():
        weight, holder = host.get_parameter(path), host.get_submodule(path.rpartition(".")[0])
        A, B = factors["A"], factors["B"]
        if weight.dim() == 2:
            update = B @ A
        else:
            layers = [B[e] @ A[e] for e in range(weight.shape[0])]
            update = torch.stack([u.T if getattr(holder, "is_transposed", False) else u for u in layers])
        changed[path] = weight + scale * update
    loss = loss_of(torch.func.functional_call(host, changed, kwargs=as_double(batch)))
    loss.backward()
    found = {}
    for path, factors in leaves.items():
        holder, _, name = path.rpartition(".")
        found.update({f"{holder}.adapters.default~{name}.lora_{n}": v.grad for n, v in factors.items()})
    return loss.detach(), found


def peft_layers(model: nn.Module, twin: nn.Module) -> Iterator[tuple[str, Any, Any]]:
    """(name of our parameters without its last letter, our adapter, PEFT's layer) of every adapted parameter."""
    wrappers = [(n, m) for n, m in twin.named_modules() if type(m).__name__ == "ParamWrapper"]
    for site in model.adaptc.sites:
        for entry, adapter in site.adapters.items():
            (layer,) = (
                m for n, m in wrappers
                if n.replace(".base_layer", "").endswith(f".{site.path}") and m.parameter_name == adapter.parameter
            )  # fmt: skip
            yield f"{site.path}.adapters.{entry}.lora_", adapter, layer


def copy_to_peft(model: nn.Module, twin: nn.Module) -> None:
    """The adapter's values into a PEFT model, row by row and column by column as PEFT numbers them."""
    for _, adapter, layer in peft_layers(model, twin):
        A, B = stacked(adapter.lora_A.detach()), stacked(adapter.lora_B.detach())
        (E, r, _), flat_A, flat_B = A.shape, layer.lora_A["default"].weight, layer.lora_B["default"].weight
        with torch.no_grad():
            for e, i in itertools.product(range(E), range(r)):
                flat_A[e * r + i] = A[e, i]
                flat_B[:, i * E + e] = B[e, :, i]


def peft_gradients(model: nn.Module, twin: nn.Module) -> dict[str, torch.Tensor]:
    """PEFT's gradients by the names and in the layout of ours."""
    found = {}
    for name, adapter, layer in peft_layers(model, twin):
        flat_A, flat_B = (f["default"].weight.grad.double() for f in (layer.lora_A, layer.lora_B))
        A, B = (torch.zeros_like(t, dtype=torch.float64) for t in (adapter.lora_A, adapter.lora_B))
        E, r, _ = stacked(A).shape
        for e, i in itertools.product(range(E), range(r)):
            stacked(A)[e, i] = flat_A[e * r + i]
            stacked(B)[e, :, i] = flat_B[:, i * E + e]
        found.update({f"{name}A": A, f"{name}B": B})
    return found


def stacked(factor: torch.Tensor) -> torch.Tensor:
    """A matrix as a stack of one."""
    return factor if factor.dim() == 3 else factor[None]
