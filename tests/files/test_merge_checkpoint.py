"""Files merged into files: what is written is what a model in memory writes, bit for bit, or nothing is."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import peft
import pytest
import safetensors
import safetensors.torch
import torch
import transformers
from torch import nn

import adaptc
from adaptc import IA3, SSF, Bias, Bottleneck, LoRA, Match, Plan, Prompt, Rule, TrainableTokens
from adaptc.errors import (
    AdaptcError,
    AdaptcWarning,
    CheckpointError,
    CheckpointNotFoundError,
    MissingKeyError,
    PickleRefusedError,
    TensorShapeError,
    TruncatedFileError,
    UnexpectedKeyError,
    UnsafePathError,
    UnsupportedError,
)
from adaptc.files import merge_checkpoint as merging_files
from adaptc.files.base_names import Group
from tests.models import hosts
from tests.runtime.weights import cases
from tests.sites import moe as mixtures

pytestmark = pytest.mark.filterwarnings("ignore::adaptc.errors.NewSignatureWarning")
ALL = "all-linear"
SMALL = LoRA(r=2, targets=["q_proj", "down_proj"], init="random")


def tied():
    return cases.llama(tie_word_embeddings=True)


def gpt2():
    return hosts.build("gpt2")


def mixtral():
    return hosts.build("mixtral", num_hidden_layers=1)


def joined():
    """Its files have q, k, v and a gate in one matrix."""
    if not hasattr(transformers, "HrmTextConfig"):
        pytest.skip("this transformers has no such model")
    config = transformers.HrmTextConfig(
        vocab_size=hosts.VOCAB, hidden_size=16, intermediate_size=24, num_attention_heads=4, num_key_value_heads=4,
        head_dim=4, num_layers_per_stack=1,
    )  # fmt: skip
    with hosts.seeded(0):
        return transformers.HrmTextForCausalLM(config)


def head(module, plan=SMALL):
    return Plan([plan, Rule(Match([module]), train="full")])


KINDS = {
    "llama": (cases.llama, LoRA(r=3, targets=ALL, init="random", rslora=True)),
    "llama dora": (cases.llama, LoRA(r=3, targets=ALL, init="random", dora=True)),
    "llama pissa": (cases.llama, LoRA(r=3, targets=["q_proj"], init="pissa")),
    "llama ia3": (cases.llama, IA3(targets=["k_proj", "v_proj"], init="random")),
    "llama head": (cases.llama, head("lm_head")),
    "llama embedding": (cases.llama, LoRA(r=2, targets=["embed_tokens"], init="random")),
    "tied": (tied, LoRA(r=3, targets=ALL, init="random")),
    "tied tokens": (tied, TrainableTokens(indices=(3, 5), targets=["embed_tokens"])),
    "gpt2": (gpt2, LoRA(r=2, targets=["c_attn", "c_fc"], init="random")),
    "moe": (cases.moe, LoRA(r=2, targets=(*mixtures.NAMES, "q_proj"), init="random")),
    "moe one": (cases.moe, LoRA(r=2, targets=["experts.down_proj"], init="random")),
    "mixtral": (mixtral, LoRA(r=2, targets=(*mixtures.NAMES, "q_proj"), init="random")),
    "joined": (joined, LoRA(r=2, targets=["q_proj", "up_proj", "o_proj"], init="random")),
    "vit": (cases.vit, LoRA(r=2, targets=ALL, init="random", bias="lora_only")),
    "vit ssf": (cases.vit, SSF(targets=ALL)),
    "vit bias": (cases.vit, Bias(targets=["layernorm_before", "q_proj"])),
    "vit convolution": (cases.vit, LoRA(r=2, targets=["projection"], init="random")),
    "vit head": (cases.vit, head("classifier", LoRA(r=2, targets=["q_proj"], init="random"))),
}


def tensors(directory):
    return {k: t for file in sorted(Path(directory).glob("*.safetensors"))
            for k, t in safetensors.torch.load_file(file).items()}  # fmt: skip


def listing(directory):
    return sorted(p.relative_to(directory).as_posix() for p in Path(directory).rglob("*") if p.is_file())


def trained(model_class, folder, plan, into):
    """Write the adapter of ``plan`` on the base in ``folder``, with values."""
    cases.compiled(model_class.from_pretrained(folder), plan).adaptc.save(into)


def in_memory(model_class, base, adapter, into, **options):
    """What the model in memory writes."""
    model = adaptc.compile(model_class.from_pretrained(base, **options), adapter, backend="eager").eval()
    model.adaptc.merge()
    model.save_pretrained(into, merge=True)
    return tensors(into)


def made(tmp_path, build=cases.llama, plan=SMALL, dtype=torch.float32, **saving):
    """(base, adapter, class of the model): folders."""
    model = build().to(dtype)
    model.save_pretrained(tmp_path / "base", **saving)
    trained(type(model), tmp_path / "base", plan, tmp_path / "adapter")
    return tmp_path / "base", tmp_path / "adapter", type(model)


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert [name for name in one if not cases.same_bits(one[name], other[name])] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_files_are_those_that_the_merged_model_writes(kind, dtype, tmp_path):
    base, adapter, model_class = made(tmp_path, *KINDS[kind], dtype)
    before = tensors(base)
    report = adaptc.merge_checkpoint(base, adapter, tmp_path / "out")
    now = tensors(tmp_path / "out")
    assert_same(now, in_memory(model_class, base, adapter, tmp_path / "want"))
    assert_same(tensors(base), before)
    changed = [name for name in now if not cases.same_bits(now[name], before[name])]
    assert changed and report.tensors
    assert len(report.tensors) >= len([name for name in changed if ".experts." not in name])
    assert listing(tmp_path / "out") == listing(base), "nothing else, and no folder beside it"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base", "out", "want"]
    for name in (n for n in listing(base) if not n.endswith(".safetensors")):
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()
    assert header(base / "model.safetensors") == header(tmp_path / "out/model.safetensors")


@pytest.mark.parametrize("build, name", [
    (cases.moe, "model.layers.0.mlp.experts.3.down_proj.weight"),
    (joined, "model.L_module.layers.0.attn.gqkv_proj.weight"),
    (cases.vit, "vit.encoder.layer.0.attention.attention.query.weight"),
], ids=["moe", "joined", "vit"])  # fmt: skip
def test_files_have_other_tensors_than_the_model(build, name, tmp_path):
    """So that the test above is about them."""
    model = build()
    model.save_pretrained(tmp_path)
    assert name in tensors(tmp_path) and name not in model.state_dict()


def test_what_is_not_adapted_keeps_every_bit(tmp_path):
    base, adapter, model_class = made(tmp_path, dtype=torch.bfloat16)
    model = model_class.from_pretrained(base)
    cases.odd_numbers(model)
    odd = {name: t for name, t in model.state_dict().items() if "q_proj" not in name and "down_proj" not in name}
    edit_tensors(base, lambda t: t.update(odd))
    adaptc.merge_checkpoint(base, adapter, tmp_path / "out")
    now = tensors(tmp_path / "out")
    assert all(cases.same_bits(now[name], t) for name, t in odd.items())
    assert any(t.isnan().any() for t in odd.values())
    assert_same(now, in_memory(model_class, base, adapter, tmp_path / "want"))


def header(file):
    raw = Path(file).read_bytes()
    return raw[: 8 + int.from_bytes(raw[:8], "little")]


def test_the_errors_are_those_that_merge_reports(tmp_path):
    base, adapter, model_class = made(tmp_path, dtype=torch.bfloat16)
    report = adaptc.merge_checkpoint(base, adapter, tmp_path / "out")
    model = adaptc.compile(model_class.from_pretrained(base), adapter, backend="eager").eval()
    assert report.tensors == model.adaptc.merge().tensors and report.path == tmp_path / "out"
    assert report.tensors[0].path in str(report) and report.left_out == ()


def test_the_shards_stay(tmp_path):
    base, adapter, model_class = made(tmp_path, cases.moe, KINDS["moe"][1], torch.bfloat16, max_shard_size="3KB")
    shards = sorted(p.name for p in base.glob("*.safetensors"))
    assert len(shards) > 2
    adaptc.merge_checkpoint(base, adapter, tmp_path / "out")
    assert listing(tmp_path / "out") == listing(base)
    index = "model.safetensors.index.json"
    assert (tmp_path / "out" / index).read_bytes() == (base / index).read_bytes()
    for shard in shards:
        assert header(base / shard) == header(tmp_path / "out" / shard)
    assert_same(tensors(tmp_path / "out"), in_memory(model_class, base, adapter, tmp_path / "want"))


def renamed(base, rename):
    file = base / "model.safetensors"
    found = {rename(name): tensor for name, tensor in safetensors.torch.load_file(file).items()}
    safetensors.torch.save_file(found, file, metadata={"format": "pt", "from": "elsewhere"})


@pytest.mark.parametrize("build, prefix, plan", [
    (cases.llama, "model.", SMALL), (gpt2, "transformer.", KINDS["gpt2"][1]),
    (tied, "model.", KINDS["tied tokens"][1]),
], ids=["llama", "gpt2", "tied"])  # fmt: skip
def test_a_backbone_that_was_saved_alone_has_its_own_names(build, prefix, plan, tmp_path):
    base, adapter, model_class = made(tmp_path, build, plan)
    renamed(base, lambda name: name.removeprefix(prefix))
    adaptc.merge_checkpoint(base, adapter, tmp_path / "out")
    want = in_memory(model_class, base, adapter, tmp_path / "want")
    assert_same(tensors(tmp_path / "out"), {name.removeprefix(prefix): tensor for name, tensor in want.items()})
    with safetensors.safe_open(tmp_path / "out/model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "from": "elsewhere"}


def test_a_backbone_that_was_saved_in_a_model_with_a_head_has_its_names_too(tmp_path):
    base, _, _ = made(tmp_path)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaModel"]}))
    shutil.rmtree(tmp_path / "adapter")
    trained(transformers.LlamaModel, base, SMALL, tmp_path / "adapter")
    adaptc.merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out")
    want = in_memory(transformers.LlamaModel, base, tmp_path / "adapter", tmp_path / "want")
    now = tensors(tmp_path / "out")
    assert cases.same_bits(now.pop("lm_head.weight"), tensors(base)["lm_head.weight"])
    assert_same({name.removeprefix("model."): tensor for name, tensor in now.items()}, want)


def test_old_names_of_norms_are_kept(tmp_path):
    base, adapter, model_class = made(tmp_path, lambda: hosts.build("bert"), LoRA(r=2, targets=ALL, init="random"))

    def old(name):
        return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")

    shutil.rmtree(adapter)
    renamed(base, old)
    trained(model_class, base, Bias(targets=["LayerNorm", "query"]), adapter)
    adaptc.merge_checkpoint(base, adapter, tmp_path / "out")
    want = in_memory(model_class, base, adapter, tmp_path / "want")
    now, before = tensors(tmp_path / "out"), tensors(base)
    assert now.keys() == before.keys()
    assert_same(now, {name: want[name] for name in want if name in now} | {old(name): want[name] for name in want
                                                                           if old(name) != name})  # fmt: skip
    assert any("beta" in name and not cases.same_bits(now[name], before[name]) for name in now)


# ------------------------------------------------------------------------------------------ vocabularies


@pytest.mark.parametrize("build", [cases.llama, tied])
def test_embeddings_that_came_with_the_adapter_are_merged(build, tmp_path):
    base, adapter, model_class = made(tmp_path, build)
    model = cases.compiled(model_class.from_pretrained(base), SMALL)
    with torch.no_grad():
        model.model.embed_tokens.weight[[3, 7]] = 0.5
    model.adaptc.save(adapter, save_embedding_layers=True)
    report = adaptc.merge_checkpoint(base, adapter, tmp_path / "out")
    assert_same(tensors(tmp_path / "out"), in_memory(model_class, base, adapter, tmp_path / "want"))
    assert {"model.embed_tokens.weight", "lm_head.weight"} & {row.path for row in report.tensors}


@pytest.mark.parametrize("sharded", [False, True], ids=["one", "sharded"])
@pytest.mark.parametrize("build", [cases.llama, tied])
def test_a_vocabulary_that_grew_grows_in_the_files(build, sharded, tmp_path):
    base, adapter, model_class = made(tmp_path, build, **({"max_shard_size": "8KB"} if sharded else {}))
    model = model_class.from_pretrained(base)
    model.resize_token_embeddings(hosts.VOCAB + 3)
    model = cases.compiled(model, SMALL)
    model.adaptc.save(adapter)
    model.adaptc.merge()
    model.save_pretrained(tmp_path / "want", merge=True)
    adaptc.merge_checkpoint(base, adapter, tmp_path / "out")
    assert_same(tensors(tmp_path / "out"), tensors(tmp_path / "want"))
    read = model_class.from_pretrained(tmp_path / "out")
    assert read.config.vocab_size == hosts.VOCAB + 3 == len(read.model.embed_tokens.weight)
    before, now = (json.loads((d / "config.json").read_text()) for d in (base, tmp_path / "out"))
    assert {k for k in now if now[k] != before.get(k)} == {"vocab_size"} and now.keys() == before.keys()
    if sharded:
        index, grown = (json.loads((d / "model.safetensors.index.json").read_text()) for d in (base, tmp_path / "out"))
        assert grown["weight_map"] == index["weight_map"]
        assert grown["metadata"]["total_size"] == sum(t.nbytes for t in tensors(tmp_path / "out").values())


def test_new_rows_without_values_are_refused(tmp_path):
    base, adapter, model_class = made(tmp_path)
    model = model_class.from_pretrained(base)
    model.resize_token_embeddings(hosts.VOCAB + 3)
    cases.compiled(model, SMALL).adaptc.save(adapter)
    file = adapter / "adapter_model.safetensors"
    kept = {n: t for n, t in safetensors.torch.load_file(file).items() if "lm_head" not in n}
    assert any("embed_tokens" in name for name in kept)
    safetensors.torch.save_file(kept, file)
    refused(MissingKeyError, "no values for the new rows of lm_head.weight", base, adapter, tmp_path / "out")


def test_embeddings_of_a_save_that_was_interrupted_are_those_that_count(tmp_path):
    """The new files of the adapter are aside, where reading finds them; the old ones have no embeddings."""
    base, adapter, model_class = made(tmp_path)
    model = cases.compiled(model_class.from_pretrained(base), SMALL)
    with torch.no_grad():
        model.model.embed_tokens.weight[[3, 7]] = 0.5
    model.adaptc.save(adapter / "new", save_embedding_layers=True)
    (adapter / "new").rename(adapter / ".adaptc-commit")
    adaptc.merge_checkpoint(base, adapter, tmp_path / "out")
    now = tensors(tmp_path / "out")
    assert_same(now, in_memory(model_class, base, adapter, tmp_path / "want"))
    assert (now["model.embed_tokens.weight"][[3, 7]] == 0.5).all()


# ------------------------------------------------------------------------------------------ PEFT's files


def test_an_adapter_of_peft_with_a_trained_head(tmp_path):
    base, adapter, model_class = made(tmp_path)
    shutil.rmtree(adapter)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], modules_to_save=["lm_head"], use_rslora=True)
    wrapped = peft.get_peft_model(model_class.from_pretrained(base), config)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter) / 8)
    wrapped.save_pretrained(adapter)
    adaptc.merge_checkpoint(base, adapter, tmp_path / "out")
    assert_same(tensors(tmp_path / "out"), in_memory(model_class, base, adapter, tmp_path / "want"))
    by_peft = wrapped.merge_and_unload().state_dict()
    for name, tensor in tensors(tmp_path / "out").items():
        torch.testing.assert_close(tensor, by_peft[name])


def test_a_head_that_the_bases_class_does_not_have_is_refused(tmp_path):
    base, adapter, _ = made(tmp_path)
    shutil.rmtree(adapter)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS")
    model = transformers.LlamaForSequenceClassification.from_pretrained(base)
    peft.get_peft_model(model, config).save_pretrained(adapter)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AdaptcWarning)
        assert "score" in str(refused(AdaptcError, None, base, adapter, tmp_path / "out"))


def test_the_callers_modes_of_torch_do_not_matter(tmp_path):
    base, adapter, model_class = made(tmp_path, cases.moe, KINDS["moe"][1])
    with torch.inference_mode(), torch.device("meta"):
        adaptc.merge_checkpoint(base, adapter, tmp_path / "out")
    assert_same(tensors(tmp_path / "out"), in_memory(model_class, base, adapter, tmp_path / "want"))


# ------------------------------------------------------------------------------------------ dtypes


@pytest.mark.filterwarnings("ignore:.*the same weights in another dtype")
def test_a_wider_dtype_is_that_of_a_base_that_was_read_in_it(tmp_path):
    base, adapter, model_class = made(tmp_path, cases.moe, KINDS["moe"][1], torch.bfloat16, max_shard_size="3KB")
    adaptc.merge_checkpoint(base, adapter, tmp_path / "out", dtype=torch.float32)
    model = adaptc.compile(model_class.from_pretrained(base, dtype=torch.float32), adapter, backend="eager",
                           adapter_dtype=torch.float32)  # fmt: skip
    model.eval().save_pretrained(tmp_path / "want", merge=True)
    assert_same(tensors(tmp_path / "out"), tensors(tmp_path / "want"))
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "float32"
    assert model_class.from_pretrained(tmp_path / "out").dtype == torch.float32
    index, now = (json.loads((d / "model.safetensors.index.json").read_text()) for d in (base, tmp_path / "out"))
    assert now["metadata"]["total_size"] == 2 * index["metadata"]["total_size"]
    assert now["weight_map"] == index["weight_map"]


@pytest.mark.filterwarnings("ignore:.*the same weights in another dtype")
def test_a_narrower_dtype_is_rounded_once(tmp_path):
    base, adapter, model_class = made(tmp_path)
    adaptc.merge_checkpoint(base, adapter, tmp_path / "out", dtype=torch.bfloat16)
    wide = model_class.from_pretrained(base, dtype=torch.float64)
    exact = adaptc.compile(wide, adapter, adapter_dtype=torch.float32, backend="eager").eval()
    exact.adaptc.merge()
    exact.save_pretrained(tmp_path / "exact", merge=True)
    want = {name: tensor.to(torch.bfloat16) for name, tensor in tensors(tmp_path / "exact").items()}
    now = tensors(tmp_path / "out")
    assert now.keys() == want.keys() and all(torch.equal(now[n], want[n]) for n in now)
    with pytest.raises(UnsupportedError, match="in this dtype"):
        adaptc.merge_checkpoint(base, adapter, tmp_path / "other", dtype=torch.int8)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_what_lies_just_over_the_middle_of_two_numbers_is_not_rounded_twice(dtype, tmp_path):
    """1 + 2^-8 + 2^-30 is nearer to 1 + 2^-7 than to 1; by way of fp32 it would become 1."""
    model = cases.llama().to(torch.float32 if dtype else torch.bfloat16)
    weight = "model.layers.0.self_attn.q_proj.weight"
    with torch.no_grad():
        model.get_parameter(weight).fill_(1)
    model.save_pretrained(tmp_path / "base")
    model = cases.compiled(model, LoRA(r=2, alpha=2, targets=["layers.0.self_attn.q_proj"]))
    adapter = model.adaptc.sites[0].adapters["a"]
    with torch.no_grad():
        adapter.lora_A.copy_(torch.tensor([[2.0**-8], [2.0**-30]]).expand_as(adapter.lora_A))
        adapter.lora_B.fill_(1)
    model.adaptc.save(tmp_path / "adapter")
    adaptc.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", dtype=dtype)
    assert (tensors(tmp_path / "out")[weight].double() == 1 + 2.0**-7).all()


# ------------------------------------------------------------------------------------------ other files


def test_everything_else_is_copied_and_other_formats_of_the_weights_are_not(tmp_path):
    base, adapter, _ = made(tmp_path)
    for name in ("tokenizer.json", "deep/er/notes.txt", "1_Pooling/config.json", ".gitattributes"):
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_text(name)
    others = ("pytorch_model.bin", "original/consolidated.00.pth", "onnx/model.onnx", "model.fp16.safetensors",
              "pytorch_model.bin.index.json")  # fmt: skip
    for name in (*others, ".git/config"):
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_bytes(b"weights")
    with pytest.warns(AdaptcWarning, match="not copied") as told:
        report = adaptc.merge_checkpoint(base, adapter, tmp_path / "out")
    assert sorted(report.left_out) == sorted(others) and all(name in str(told[0].message) for name in others)
    missing = set(listing(base)) - set(listing(tmp_path / "out"))
    assert missing == {*others, ".git/config"}


def test_modules_beside_the_model_keep_their_weights(tmp_path):
    base, adapter, _ = made(tmp_path)
    (base / "modules.json").write_text(json.dumps([{"path": "", "type": "T"}, {"path": "2_Dense", "type": "D"}]))
    (base / "2_Dense").mkdir()
    (base / "2_Dense/model.safetensors").write_bytes(b"of another module")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adaptc.merge_checkpoint(base, adapter, tmp_path / "out")
    assert (tmp_path / "out/2_Dense/model.safetensors").read_bytes() == b"of another module"


def test_the_links_of_a_hub_cache_are_followed(tmp_path):
    base, adapter, model_class = made(tmp_path)
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshots/1").mkdir(parents=True)
    for number, file in enumerate(sorted(base.iterdir())):
        file.rename(tmp_path / f"blobs/{number}")
        (tmp_path / "snapshots/1" / file.name).symlink_to(tmp_path / f"blobs/{number}")
    snapshot = tmp_path / "snapshots/1"
    adaptc.merge_checkpoint(snapshot, adapter, tmp_path / "out")
    assert not any(p.is_symlink() for p in (tmp_path / "out").iterdir())
    assert_same(tensors(tmp_path / "out"), in_memory(model_class, snapshot, adapter, tmp_path / "want"))


# ------------------------------------------------------------------------------------------ refused


def refused(error, match, base, adapter, out):  # match: None for any
    """The call raises, and leaves nothing behind."""
    beside = sorted(p.name for p in out.parent.iterdir())
    with pytest.raises(error, match=match) as caught:
        adaptc.merge_checkpoint(base, adapter, out)
    assert sorted(p.name for p in out.parent.iterdir()) == beside
    return caught.value


def edit_config(base, **changes):
    file = base / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def edit_tensors(folder, edit, name="model.safetensors"):
    found = safetensors.torch.load_file(folder / name)
    edit(found)
    safetensors.torch.save_file(found, folder / name, metadata={"format": "pt"})


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
FAULTS = {
    "quantised": (
        lambda b, a: edit_config(b, quantization_config={"quant_method": "gptq"}), UnsupportedError, "quantised"),
    "no class": (lambda b, a: edit_config(b, architectures=None), UnsupportedError, "what class"),
    "own class": (lambda b, a: edit_config(b, architectures=["TheirModel"]), UnsupportedError, "what class"),
    "other config": (lambda b, a: edit_config(b, intermediate_size=25), TensorShapeError, "does not fit config.json"),
    "weights of another name": (
        lambda b, a: edit_config(b, transformers_weights="other.safetensors"), UnsupportedError, "of its own"),
    "an adapter in it": (lambda b, a: shutil.copy(a / "adapter_config.json", b), CheckpointError, "holds an adapter"),
    "pickle": (lambda b, a: (b / "model.safetensors").rename(b / "pytorch_model.bin"), PickleRefusedError, "pickle"),
    "no weights": (lambda b, a: (b / "model.safetensors").unlink(), CheckpointNotFoundError, "no model.safetensors"),
    "no config": (lambda b, a: (b / "config.json").unlink(), CheckpointNotFoundError, "no config.json"),
    "broken config": (lambda b, a: (b / "config.json").write_text("{"), CheckpointError, "not legal JSON"),
    "cut": (lambda b, a: truncate(b / "model.safetensors"), TruncatedFileError, "ends inside"),
    "an adapted weight is missing": (
        lambda b, a: edit_tensors(b, lambda t: t.pop("model.layers.0.self_attn.q_proj.weight")),
        MissingKeyError, "has no model.layers.0.self_attn.q_proj.weight"),
    "one tensor of the adapter is missing": (
        lambda b, a: edit_tensors(a, lambda t: t.pop(Q), "adapter_model.safetensors"), MissingKeyError, "lora_A"),
    "one tensor of the adapter is too many": (
        lambda b, a: edit_tensors(a, lambda t: t.update({Q.replace("q_proj", "o_proj"): t[Q].clone()}),
                                  "adapter_model.safetensors"), UnexpectedKeyError, "o_proj"),
    "no adapter": (lambda b, a: shutil.rmtree(a), CheckpointNotFoundError, "adapter"),
}  # fmt: skip


def truncate(file):
    file.write_bytes(file.read_bytes()[:-4])


@pytest.mark.parametrize("fault", FAULTS)
def test_what_does_not_fit_is_refused_and_nothing_is_left(fault, tmp_path):
    spoil, error, match = FAULTS[fault]
    base, adapter, _ = made(tmp_path)
    spoil(base, adapter)
    refused(error, match, base, adapter, tmp_path / "out")


@pytest.mark.parametrize("plan, match", [
    (Bottleneck(targets=["down_proj"]), "bottleneck"), (Prompt(num_virtual_tokens=2), "prompt"),
    (LoRA(r=2, targets=["lm_head"], init="random"), "its weight is also model.embed_tokens.weight"),
], ids=["bottleneck", "prompt", "tied head"])  # fmt: skip
def test_what_merge_refuses_is_refused_for_its_reason(plan, match, tmp_path):
    base, adapter, model_class = made(tmp_path, tied, plan)
    error = refused(UnsupportedError, "cannot be merged", base, adapter, tmp_path / "out")
    assert match in str(error)
    model = adaptc.compile(model_class.from_pretrained(base), adapter, backend="eager").eval()
    with pytest.raises(UnsupportedError) as caught:
        model.adaptc.merge()
    assert str(caught.value) == str(error)


def test_another_base_of_the_same_shapes_is_told(tmp_path):
    base, adapter, _ = made(tmp_path)
    edit_tensors(base, lambda t: t["model.layers.0.self_attn.q_proj.weight"].add_(1))
    with pytest.warns(AdaptcWarning, match="other values at 1 of"):
        adaptc.merge_checkpoint(base, adapter, tmp_path / "out")


@pytest.mark.parametrize("equal", [True, False])
def test_a_tied_weight_that_the_file_has_twice(equal, tmp_path):
    """Where both are equal both are written; else transformers does not tie them, and neither is it here."""
    base, adapter, model_class = made(tmp_path, tied)
    name = "model.embed_tokens.weight"
    edit_tensors(base, lambda t: t.update({"lm_head.weight": t[name].clone() + (not equal)}))
    shutil.rmtree(adapter)
    trained(model_class, base, KINDS["tied tokens"][1], adapter)
    adaptc.merge_checkpoint(base, adapter, tmp_path / "out")
    now, want = tensors(tmp_path / "out"), in_memory(model_class, base, adapter, tmp_path / "want")
    assert now.keys() == {*want, "lm_head.weight"}
    assert_same({name: now[name] for name in want}, want)
    assert cases.same_bits(now["lm_head.weight"], now[name]) == equal


def test_one_tensor_under_two_names_is_refused(tmp_path):
    base, adapter, _ = made(tmp_path)
    name = "layers.0.self_attn.q_proj.weight"
    edit_tensors(base, lambda t: t.update({name: t[f"model.{name}"].clone()}))
    refused(CheckpointError, "has two tensors for", base, adapter, tmp_path / "out")


def test_an_index_that_leaves_its_folder_or_lies_is_refused(tmp_path):
    base, adapter, _ = made(tmp_path, max_shard_size="8KB")
    file = base / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    shard = next(iter(index["weight_map"].values()))
    for target, error, match in (("../base/" + shard, UnsafePathError, "outside"),
                                 ("gone.safetensors", CheckpointNotFoundError, "no gone")):  # fmt: skip
        file.write_text(json.dumps({**index, "weight_map": {**index["weight_map"], "lm_head.weight": target}}))
        refused(error, match, base, adapter, tmp_path / "out")
    file.write_text(json.dumps({**index, "weight_map": {**index["weight_map"], "more.weight": shard}}))
    refused(MissingKeyError, "more.weight", base, adapter, tmp_path / "out")


def test_a_directory_that_is_not_free_is_refused(tmp_path):
    base, adapter, _ = made(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for out, match in ((tmp_path / "full", "there already"), (tmp_path / "file", "there already"), (base, "is inside"),
                       (base / "merged", "is inside"), (adapter / "merged", "is inside")):  # fmt: skip
        refused(CheckpointError, match, base, adapter, out)
    assert (tmp_path / "full/mine.txt").read_text() == "mine" == (tmp_path / "file").read_text()
    (tmp_path / "empty").mkdir()
    adaptc.merge_checkpoint(base, adapter, tmp_path / "empty")
    adaptc.merge_checkpoint(base, adapter, tmp_path / "new/and/deep")
    assert listing(tmp_path / "empty") == listing(tmp_path / "new/and/deep") == listing(base)


@pytest.mark.parametrize("at", [0, 2])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_half_way_leaves_nothing(error, at, tmp_path, monkeypatch):
    base, adapter, _ = made(tmp_path)
    before, count = {p.name: p.read_bytes() for p in base.iterdir()}, iter(range(99))

    def fails(*arguments):
        if next(count) == at:
            raise error("now")
        return original(*arguments)

    original = merging_files.error_of
    monkeypatch.setattr(merging_files, "error_of", fails)
    refused(error, "now", base, adapter, tmp_path / "out")
    assert {p.name: p.read_bytes() for p in base.iterdir()} == before


def test_everything_is_on_the_disk_before_the_folder_is_there(tmp_path, monkeypatch):
    base, adapter, _ = made(tmp_path, max_shard_size="8KB")
    synced, sync, rename = set(), os.fsync, os.rename

    def noted(number):
        synced.add(os.fstat(number).st_ino)
        sync(number)

    def checked(source, target):
        left = [p.name for p in (source, *source.rglob("*")) if p.stat().st_ino not in synced]
        assert left == [] and not target.exists()
        rename(source, target)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(os, "rename", checked)
    adaptc.merge_checkpoint(base, adapter, tmp_path / "out")
    assert tmp_path.stat().st_ino in synced and (tmp_path / "out").is_dir()


def test_no_room_is_told_before_anything_is_computed(tmp_path, monkeypatch):
    base, adapter, _ = made(tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("adaptc.files.mapped.reserve", full)
    monkeypatch.setattr(merging_files.merging, "exact_values", None)
    refused(CheckpointError, "no room", base, adapter, tmp_path / "out")


def test_weights_that_are_made_by_arithmetic_are_not_unmade():
    class Sums:
        def add_tensor(self, path, name, pattern, tensor):
            self.tensor = tensor

        def convert(self, path, model, config):
            return {path: self.tensor * 2}

    group = Group(nn.Module(), Sums(), "w", [("w", "w")])
    group.model.config = None
    with pytest.raises(CheckpointError, match="by more than moving"):
        group.unmake("w", torch.zeros(3), {"w": torch.zeros(3)})


# ------------------------------------------------------------------------------------------ memory

BOUND = """
    import sys
    from pathlib import Path
    import adaptc
    root = Path(sys.argv[1])

    def most():
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])

    adaptc.merge_checkpoint(root / "small", root / "small-adapter", root / "small-out")  # what is imported and cached
    Path("/proc/self/clear_refs").write_text("5")  # the most from here on
    before = most()
    adaptc.merge_checkpoint(root / "large", root / "large-adapter", root / "large-out")
    print(most() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere mapped pages are not let go")
def test_memory_is_bounded_by_one_weight_not_by_the_base(tmp_path):
    for name, layers, width in (("small", 1, 64), ("large", 40, 512)):
        model = hosts.llama(hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers)
        model.save_pretrained(tmp_path / name, max_shard_size="100MB")
        trained(type(model), tmp_path / name, SMALL, tmp_path / f"{name}-adapter")
    whole = sum(t.nbytes for t in tensors(tmp_path / "large").values())
    weight = 2 * 512 * 512 * 4
    run = [sys.executable, "-c", textwrap.dedent(BOUND), str(tmp_path)]
    grown = int(subprocess.run(run, check=True, capture_output=True, text=True).stdout)
    assert whole > 350e6 and grown < 40 * weight < whole / 4, (grown, weight, whole)
