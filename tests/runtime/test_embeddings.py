"""Embeddings that came with an adapter: PEFT's values, and the base's own rows whenever the adapter is not live."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
import transformers

import adaptc
from adaptc import errors
from tests.models import hosts

pytestmark = pytest.mark.filterwarnings("ignore::adaptc.errors.NewSignatureWarning", "ignore::UserWarning:peft")
GROWN = 6
IDS = torch.tensor([[3, hosts.VOCAB + 1, 9, hosts.VOCAB + 4, 5]])


def base(seed: int = 0, *, tied: bool = False, vocabulary: int = hosts.VOCAB + GROWN) -> Any:
    """Equal models but for the rows that the vocabulary was extended by."""
    model = hosts.build("llama", tie_word_embeddings=tied).double()
    with hosts.seeded(seed):
        model.resize_token_embeddings(vocabulary, mean_resizing=False)
    return model.eval()


def folder_of(path: Path, seed: int = 1, *, tied: bool = False, **options: Any) -> tuple[Path, torch.Tensor]:
    """A folder that PEFT wrote with the embeddings, and the outputs of the model that it is of."""
    config = peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj"], "init_lora_weights": False, **options})
    with hosts.seeded(seed), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(base(seed, tied=tied), config).eval()
        model.save_pretrained(path, save_embedding_layers=True)
    return path, outputs(model)


@torch.no_grad()
def outputs(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits  # type: ignore[no-any-return]


def compiled(model: Any, plan: Any, **options: Any) -> Any:
    return adaptc.compile(model, plan, backend="eager", **options).eval()


def same(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


CASES = [
    pytest.param(["q_proj"], False, id="attention", marks=pytest.mark.slow),
    pytest.param(["q_proj", "embed_tokens", "lm_head"], True, id="tied, with adapters"),
    pytest.param(["q_proj"], True, id="tied", marks=pytest.mark.slow),
    pytest.param(["q_proj", "embed_tokens"], False, id="an adapter of the embeddings", marks=pytest.mark.slow),
    pytest.param(["q_proj", "lm_head"], True, id="an adapter of the tied head", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("targets", "tied"), CASES)
def test_outputs_are_pefts_and_files_are_read_by_both(targets: list[str], tied: bool, tmp_path: Path) -> None:
    folder, _ = folder_of(tmp_path / "peft", tied=tied, target_modules=targets)
    want = outputs(peft.PeftModel.from_pretrained(base(2, tied=tied), folder).eval())
    host = base(2, tied=tied)
    before = {name: tensor.clone() for name, tensor in host.state_dict().items()}
    model = compiled(host, folder)
    same(outputs(model), want)
    model.adaptc.save(tmp_path / "ours")
    name = "adapter_model.safetensors"
    written, read = (safetensors.torch.load_file(path / name) for path in (tmp_path / "ours", folder))
    # PEFT leaves out the layer that has no adapter where the other one has.
    assert written.keys() >= read.keys() and all(torch.equal(written[key], read[key]) for key in read)
    same(outputs(compiled(base(3, tied=tied), tmp_path / "ours")), want)
    same(outputs(peft.PeftModel.from_pretrained(base(4, tied=tied), tmp_path / "ours").eval()), want)
    with model.adaptc.disable_adapter():
        same(outputs(model), outputs(base(2, tied=tied)))
    same(outputs(model), want)
    model.adaptc.detach()
    assert host.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in host.state_dict().items())


def test_two_adapters_have_their_rows_by_turns(tmp_path: Path) -> None:
    (first, want_first), (second, want_second) = (folder_of(tmp_path / str(n), n) for n in (1, 2))
    host = base(3)
    own = host.get_input_embeddings().weight.clone()
    model = compiled(host, first, name="first")
    model.adaptc.add("second", second)
    model.adaptc.add("head", {"rules": [{"match": {"targets": ["lm_head"]}, "train": "full"}]})
    copied = model.adaptc.adapters.record("head").sites[0]
    assert copied[0] == "lm_head"
    for name, want in (("second", want_second), ("first", want_first), ("second", want_second)):
        model.adaptc.switch(name)
        same(outputs(model), want)
        assert model.adaptc.metrics()["recompiles"] == 0
    twin = copy.deepcopy(model)
    same(outputs(twin), want_second)
    twin.adaptc.switch("first")
    same(outputs(twin), want_first)
    same(outputs(model), want_second)
    with pytest.raises(errors.SiteError, match=r"'first' and 'second' have other values for row 99 of lm_head.weight"):
        model.adaptc.switch(["first", "second"])
    same(outputs(model), want_second)
    # What copies the head means the base's own, whoever is live.
    full = next(site for site in model.adaptc.sites if site.path == "lm_head").adapters["head"]
    assert torch.equal(full.copy.weight, base(3).lm_head.weight)
    model.adaptc.load(first, "second")
    same(outputs(model), want_first)
    model.adaptc.switch(["first", "second"])  # equal rows are no obstacle
    model.adaptc.remove("second")
    same(outputs(model), want_first)
    model.adaptc.switch(None)
    assert torch.equal(host.get_input_embeddings().weight, own)


def test_merging_keeps_the_rows(tmp_path: Path) -> None:
    folder, want = folder_of(tmp_path / "peft")
    compiled(base(2), folder).save_pretrained(tmp_path / "merged", merge=True)
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float64)
    same(outputs(again), want)
    same(outputs(compiled(base(2), folder).adaptc.merge_and_unload()), want)


def test_rows_follow_the_dtype_of_the_model(tmp_path: Path) -> None:
    """Both ways: into a base of another dtype, and back to its own rows after a cast while the adapter was live."""
    folder, want = folder_of(tmp_path / "peft")
    model = compiled(base(2).float(), folder)
    torch.testing.assert_close(outputs(model).double(), want, rtol=1e-4, atol=1e-5)
    model.to(torch.bfloat16)
    model.adaptc.detach()
    for name, tensor in base(2).bfloat16().state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_what_does_not_fit_changes_nothing(tmp_path: Path) -> None:
    folder, _ = folder_of(tmp_path / "peft")
    small = base(2, vocabulary=hosts.VOCAB)
    with pytest.raises(errors.TensorShapeError, match=r"embeddings of another size[^$]*resize_token_embeddings\(105\)"):
        compiled(small, folder)
    assert not hasattr(small, "adaptc")
    untied, _ = folder_of(tmp_path / "untied", tied=False)
    with pytest.raises(errors.UnexpectedKeyError, match="which are one tied weight"):
        compiled(base(2, tied=True), untied)


def test_a_changed_vocabulary_is_saved_by_itself(tmp_path: Path) -> None:
    """As in PEFT: where the base's own files say another size; ``save_embedding_layers`` says otherwise."""
    base(vocabulary=hosts.VOCAB).save_pretrained(tmp_path / "base")
    host = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float64)
    host.resize_token_embeddings(hosts.VOCAB + GROWN, mean_resizing=False)
    model = compiled(host, adaptc.LoRA(r=4, targets="q_proj", init="random"))
    want = outputs(model)
    model.adaptc.save(tmp_path / "auto")
    same(outputs(peft.PeftModel.from_pretrained(base(2), tmp_path / "auto").eval()), want)
    same(outputs(compiled(base(3), tmp_path / "auto")), want)
    model.adaptc.save(tmp_path / "without", save_embedding_layers=False)
    held = [
        {key for key in safetensors.torch.load_file(tmp_path / n / "adapter_model.safetensors") if "lora" not in key}
        for n in ("without", "auto")
    ]
    assert held == [set(), {"base_model.model.lm_head.weight", "base_model.model.model.embed_tokens.weight"}]


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
def test_a_live_model_of_peft_is_taken_over(tmp_path: Path) -> None:
    folder, want = folder_of(tmp_path / "peft")
    wrapped = peft.PeftModel.from_pretrained(base(2), folder).eval()
    model = adaptc.compile(wrapped, backend="eager").eval()
    same(outputs(model), want)
    model.adaptc.save(tmp_path / "ours", save_embedding_layers=True)
    same(outputs(peft.PeftModel.from_pretrained(base(3), tmp_path / "ours").eval()), want)
    assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["target_modules"] == ["q_proj"]
