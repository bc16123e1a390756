"""Adapters with one LoRA per expert (transformers 4) on the fused experts of transformers 5: the formula, and PEFT."""

from __future__ import annotations

import copy
import json
import math
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import adaptc
from adaptc.errors import CheckpointError, MissingKeyError, TensorShapeError, UnsupportedError
from tests.models import mixtures
from tests.plan.peft.test_moe import check_same, contents, logits, merged

#: What the layers of an expert were called, by what they are now; the second half of gate_up_proj is the second name.
NAMES = {
    "mixtral": {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)},
    "others": {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)},
}


class Old:
    """An adapter of transformers 4: the tensors of its file, its config, and the weights that it makes."""

    def __init__(self, kind: str, *, r: int = 4, alpha: float = 8, rslora: bool = False, **patterns: Any) -> None:
        self.base, self.kind = mixtures.build(kind), kind
        self.wanted = copy.deepcopy(self.base)
        self.tensors: dict[str, torch.Tensor] = {}
        self.config: dict[str, Any] = {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": r, "lora_alpha": alpha, "use_rslora": rslora,
            "target_modules": ["gate_proj", "up_proj", "down_proj"], "bias": "none", "inference_mode": True, **patterns,
        }  # fmt: skip
        self.random = torch.Generator().manual_seed(5)

    def add(self, path: str, weight: torch.Tensor, *, r: int | None = None, alpha: float | None = None) -> None:
        """LoRA of the layer that was at ``path``, whose weight is now ``weight`` (a view of a part of it)."""
        r, alpha = r or self.config["r"], self.config["lora_alpha"] if alpha is None else alpha
        A, B = (torch.randn(s, generator=self.random) * 0.3 for s in ((r, weight.shape[1]), (weight.shape[0], r)))
        self.tensors[f"base_model.model.{path}.lora_A.weight"] = A
        self.tensors[f"base_model.model.{path}.lora_B.weight"] = B
        with torch.no_grad():
            weight += alpha / (math.sqrt(r) if self.config["use_rslora"] else r) * B @ A

    def add_experts(self, skip: Any = lambda expert, name: False, of: Any = lambda expert, name: {}) -> Old:
        """Every product of every expert, in the layers that have experts."""
        names = NAMES["mixtral" if self.kind.startswith(("mi", "phi")) else "others"]
        for path, module in self.wanted.named_modules():
            if not path.endswith(".experts"):
                continue
            block = path.replace(".mlp.", ".block_sparse_moe.") if self.kind.startswith("mi") else path
            for parameter, parts in names.items():
                stack = module.get_parameter(parameter).data
                for expert in range(stack.shape[0]):
                    for name, weight in zip(parts, stack[expert].chunk(len(parts)), strict=True):
                        if not skip(expert, name):
                            self.add(f"{block}.{expert}.{name}", weight, **of(expert, name))
        return self

    def save(self, folder: Path) -> Path:
        folder.mkdir(exist_ok=True)
        save_file(self.tensors, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps(self.config))
        return folder

    def check(self, tmp_path: Path, *, like_peft: bool = True) -> nn.Module:
        """Read here it has the weights of the formula, and PEFT's outputs; written again PEFT reads it."""
        folder = self.save(tmp_path / "old")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model = adaptc.compile(copy.deepcopy(self.base), folder, backend="eager")
        found = dict(merged(self.base, model).named_parameters())
        for name, weight in self.wanted.named_parameters():
            torch.testing.assert_close(found[name], weight, rtol=1e-5, atol=1e-5, msg=name)
        want = logits(self.wanted)
        assert (want - logits(self.base)).abs().max() > 1e-2
        if like_peft:
            torch.testing.assert_close(logits(self.in_peft(folder)), want, rtol=1e-4, atol=1e-4)
        model.adaptc.save(tmp_path / "new")
        torch.testing.assert_close(logits(self.in_peft(tmp_path / "new")), want, rtol=1e-4, atol=1e-4)
        model.adaptc.load(folder)  # into the adapter that is there
        check_same(model, adaptc.compile(copy.deepcopy(self.base), tmp_path / "new", backend="eager"))
        return model

    def in_peft(self, folder: Path) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return peft.PeftModel.from_pretrained(copy.deepcopy(self.base), folder)


# qwen2_moe is not in the table by which PEFT reads configs, so that it loses these adapters.
KINDS = ("qwen3_moe", "mixtral", "minimax", "qwen2_moe", "olmoe", "deepseek_v3", "afmoe", "hunyuan_v1_moe", "phimoe")


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=[] if k in ("qwen3_moe", "mixtral") else [pytest.mark.slow]) for k in KINDS]
)
def test_every_expert_of_every_layer(kind: str, tmp_path: Path) -> None:
    old = Old(kind).add_experts()
    if kind.startswith(("mi", "phi")):
        old.config["target_modules"] = ["w1", "w2", "w3"]
    old.check(tmp_path, like_peft=kind not in ("qwen2_moe", "phimoe"))


def test_beside_attention_and_the_router(tmp_path: Path) -> None:
    old = Old("mixtral", target_modules="all-linear").add_experts()
    for path, module in old.wanted.named_modules():
        if path.endswith(("_proj", "mlp.gate")) and hasattr(module, "weight"):
            old.add(path.replace(".mlp.", ".block_sparse_moe."), module.weight.data)
    model = old.check(tmp_path)
    assert len(contents(model)) == 2 * (4 + 1 + 2)


def test_beside_the_dense_and_shared_layers_that_peft_leaves_out(tmp_path: Path) -> None:
    patterns = {"rank_pattern": {r".*shared_experts\..*": 3}, "alpha_pattern": {"0.mlp.up_proj": 2}}
    old = Old("deepseek_v3", **patterns).add_experts()
    for path, module in old.wanted.named_modules():
        if path.endswith(tuple(old.config["target_modules"])):
            rank = 3 if "shared" in path else 4
            old.add(path, module.weight.data, r=rank, alpha=2 if path.endswith("0.mlp.up_proj") else 8)
    model = old.check(tmp_path, like_peft=False)
    assert len(contents(model)) == 3 + 3 + 2


RAGGED: dict[str, tuple[dict[str, Any], Any, Any]] = {
    "ranks": (
        {"rank_pattern": {r"experts\.1\..*": 2, "up_proj": 3}},
        lambda e, n: False, lambda e, n: {"r": 2 if e == 1 else 3 if n == "up_proj" else 4},
    ),
    "scales": ({"alpha_pattern": {"2.down_proj": 3, "gate_proj": 1}}, lambda e, n: False, lambda e, n: (
        {"alpha": 3 if (e, n) == (2, "down_proj") else 1 if n == "gate_proj" else 8}
    )),
    "experts without": ({}, lambda e, n: e in (0, 2), lambda e, n: {}),
    "products without": ({"target_modules": ["up_proj"]}, lambda e, n: n != "up_proj", lambda e, n: {}),
    "down alone": ({"target_modules": ["down_proj"]}, lambda e, n: n != "down_proj", lambda e, n: {}),
    "rsLoRA": ({"rslora": True}, lambda e, n: False, lambda e, n: {}),
    "an expression": ({"target_modules": r".*experts\.[13]\.\w+"}, lambda e, n: e not in (1, 3), lambda e, n: {}),
}  # fmt: skip


@pytest.mark.parametrize("name", RAGGED)
def test_where_experts_differ(name: str, tmp_path: Path) -> None:
    options, skip, of = RAGGED[name]
    Old("qwen3_moe", **options).add_experts(skip, of).check(tmp_path, like_peft=name == "down alone")


def _without_a_factor(old: Old) -> None:
    del old.tensors[next(key for key in old.tensors if "experts.2.up_proj.lora_B" in key)]


def _with_dora(old: Old) -> None:
    old.config["use_dora"] = True
    for key in [key for key in old.tensors if "lora_B" in key]:
        old.tensors[key.replace("lora_B.weight", "lora_magnitude_vector")] = torch.ones(old.tensors[key].shape[0])


def _of_more_experts(old: Old) -> None:
    for key in [key for key in old.tensors if ".experts.3." in key]:
        old.tensors[key.replace(".3.", ".4.")] = old.tensors[key].clone()


def _of_another_rank(old: Old) -> None:
    old.config["r"] = 6


def _of_another_width(old: Old) -> None:
    old.tensors = {k: t[:, :-1].contiguous() if "lora_A" in k else t for k, t in old.tensors.items()}


def _elsewhere(old: Old) -> None:
    old.tensors = {key.replace("layers.1", "blocks.7"): tensor for key, tensor in old.tensors.items()}


@pytest.mark.parametrize(
    "change, error, words",
    [
        (_without_a_factor, MissingKeyError, r"one of the two factors of model.layers.1.mlp.experts.2.up_proj"),
        (_with_dora, UnsupportedError, r"one adapter per expert, .* no place for: .*lora_magnitude_vector"),
        (_of_more_experts, TensorShapeError, r"expert 4 of .* does not fit"),
        (_of_another_rank, TensorShapeError, r"do not have the rank that the config gives them"),
        (_of_another_width, TensorShapeError, r"expert 0 of .* does not fit"),
        (_elsewhere, CheckpointError, r"blocks.7"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(change: Any, error: type[Exception], words: str, tmp_path: Path) -> None:
    old = Old("qwen3_moe").add_experts()
    change(old)
    with pytest.raises(error, match=words):
        adaptc.compile(old.base, old.save(tmp_path), backend="eager")
    assert not hasattr(old.base, "adaptc")
