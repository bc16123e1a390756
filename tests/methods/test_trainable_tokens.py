"""Rows of embeddings that are trained: the formula, PEFT's values and files, heads that are tied."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import adaptc
from adaptc import LoRA, Plan, TrainableTokens
from adaptc.errors import ConfigTypeError, PlanError, SiteError, UnsupportedError
from adaptc.methods.trainable_tokens import ROWS
from tests.models import hosts

IDS = torch.tensor([[3, 5, 9, 7, 5]])


def base(*, tied: bool = True) -> Any:
    return hosts.build("llama", tie_word_embeddings=tied).double()


def compiled(model: Any, plan: Any) -> Any:
    return adaptc.compile(model, plan, backend="eager").eval()


def theirs(named: Any, *, tied: bool) -> Any:
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, trainable_token_indices=named)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(base(tied=tied), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "trainable_tokens" in name:
                parameter.add_(torch.randn_like(parameter))
    return model


def step(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    logits = model(input_ids=IDS).logits
    (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
    named = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return logits.detach(), {n: g for n, g in named.items() if "trainable_tokens_delta" in n}


CASES = [
    pytest.param([5, 3], True, id="tied"),
    pytest.param({"embed_tokens": [5, 3], "lm_head": [7]}, True, id="tied, other ids in the head"),
    pytest.param([5, 3], False, id="untied", marks=pytest.mark.slow),
    pytest.param({"embed_tokens": [5, 3]}, True, id="tied, by name", marks=pytest.mark.slow),
    pytest.param({"embed_tokens": [5, 3], "lm_head": [5, 3]}, True, id="tied, both named", marks=pytest.mark.slow),
    pytest.param({"embed_tokens": [5, 3], "lm_head": [5, 3]}, False, id="untied, both", marks=pytest.mark.slow),
    pytest.param({"lm_head": [9]}, True, id="tied, only the head", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("named", "tied"), CASES)
def test_values_gradients_and_files_are_pefts(named: Any, tied: bool, tmp_path: Path) -> None:
    twin = theirs(named, tied=tied)
    twin.save_pretrained(tmp_path / "peft")
    want, gradients = step(twin)
    model = compiled(base(tied=tied), tmp_path / "peft")
    got, ours = step(model)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    assert len(ours) == len(gradients) > 0
    for name, gradient in ours.items():
        (key,) = [k for k in gradients if name.partition(".adapters.")[0] in k]
        torch.testing.assert_close(gradient, gradients[key], rtol=1e-10, atol=1e-10)
        assert gradient.any()
    model.adaptc.save(tmp_path / "same")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "same" / name).read_bytes() == (tmp_path / "peft" / name).read_bytes()
    model.adaptc.records["default"].config = None  # written anew
    model.adaptc.save(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(base(tied=tied), tmp_path / "ours").eval()
    torch.testing.assert_close(again(input_ids=IDS).logits, want, rtol=1e-12, atol=1e-12)
    taken = adaptc.compile(twin, backend="eager").eval()
    torch.testing.assert_close(taken(input_ids=IDS).logits, want, rtol=1e-12, atol=1e-12)
    if not (tied and isinstance(named, dict) and named.get("embed_tokens") != named.get("lm_head", [5, 3])):
        merged = copy.deepcopy(model).adaptc.merge_and_unload()
        torch.testing.assert_close(merged(input_ids=IDS).logits, want, rtol=1e-10, atol=1e-10)
    else:
        with pytest.raises(UnsupportedError, match="its weight is also"):
            model.adaptc.merge_and_unload()


def test_a_plan_of_ones_own_starts_as_the_base_and_keeps_its_bias(tmp_path: Path) -> None:
    """The formula on a tied layer with a bias, which PEFT leaves out, in the lowered graph."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(12, 4, padding_idx=2), nn.Linear(4, 12)
            self.head.weight = self.embed.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(torch.tanh(self.embed(ids)))  # type: ignore[no-any-return]

    net, ids = Net().double(), torch.tensor([[1, 2, 7, 3]])
    plain = copy.deepcopy(net)
    model = adaptc.compile(net, TrainableTokens(indices=[7, 2], targets="embed"), backend="aot_eager")
    assert [site.path for site in model.adaptc.sites] == ["embed", "head"]
    assert torch.equal(model(ids), plain(ids))
    (values,) = model.adaptc.parameters()
    values.data.add_(torch.randn_like(values))
    leaf = values.detach().clone().requires_grad_()
    W = plain.embed.weight.detach().index_copy(0, torch.tensor([7, 2]), leaf)
    want = nn.functional.linear(torch.tanh(nn.functional.embedding(ids, W, padding_idx=2)), W, plain.head.bias)
    got = model(ids)
    torch.testing.assert_close(got, want)
    got.square().sum().backward()
    want.square().sum().backward()
    torch.testing.assert_close(values.grad, leaf.grad)
    assert len(model.adaptc.graphs) == 1 and model.adaptc.graphs[0].sites == ["embed", "head"]
    twin = copy.deepcopy(model)
    twin.adaptc.sites[0].adapters["default"].trainable_tokens_delta.data.zero_()
    assert not torch.equal(twin(ids), got) and torch.equal(model(ids), got)
    model.adaptc.add("other", TrainableTokens(indices=[4, 7], targets="embed"))
    with pytest.raises(SiteError, match="embed: two adapters have values of their own for token 7"):
        model.adaptc.switch(["default", "other"])
    model.adaptc.save(tmp_path)  # in adaptc's own format: there is no other adapter
    torch.testing.assert_close(adaptc.compile(copy.deepcopy(plain), tmp_path, backend="eager")(ids), want)
    assert torch.equal(model.adaptc.detach()(ids), plain(ids))


def test_what_is_illegal_is_named() -> None:
    for indices in ((), (-1,), (1, 1), ("a",)):
        with pytest.raises(PlanError, match="TrainableTokens: indices is not legal"):
            TrainableTokens(indices=indices, targets="embed_tokens")
    with pytest.raises(SiteError, match=f"it has {hosts.VOCAB} rows, and token {hosts.VOCAB} is to be trained"):
        Plan(TrainableTokens(indices=[hosts.VOCAB], targets="embed_tokens")).resolve(base())
    with pytest.raises(SiteError, match="is no embedding"):
        Plan(TrainableTokens(indices=[1], targets="norm")).resolve(base())
    for key in ("target_modules", "modules_to_save"):
        config = {"peft_type": "LORA", "target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [1]}}
        config[key] = ["embed_tokens"]
        with pytest.raises(ConfigTypeError, match=f"names embed_tokens, which is in {key} too"):
            Plan.from_peft(config)
    plan = Plan.from_peft({"peft_type": "LORA", "target_modules": ["q_proj"], "trainable_token_indices": [5, 3]})
    assert plan == Plan([TrainableTokens(indices=[5, 3], targets="embed_tokens"), LoRA(targets="q_proj")])


@given(data=st.data())
def test_the_op_and_its_gradient(data: st.DataObject) -> None:
    weight, index, values = ROWS.sample(data.draw)
    want = weight.clone()
    for i, row in zip(index.tolist(), values, strict=True):
        want[i] = row.to(weight.dtype)
    values.requires_grad_()
    got = torch.ops.adaptc.trained_rows(weight, index, values)
    assert torch.equal(got, want)
    seed = torch.ones_like(got).cumsum(0)
    got.backward(seed)
    assert torch.equal(values.grad, seed[index].to(values.dtype))
