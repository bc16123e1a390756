"""A whole model of sentence-transformers: what it writes is complete, and is read without adaptc."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import huggingface_hub
import pytest
import sentence_transformers as st
import tokenizers
import torch
import transformers
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer import modules as st_modules

import adaptc
from adaptc.errors import CheckpointError, ResumeError, UnsupportedError
from adaptc.integrations import AdapterTrainerMixin
from tests.models import hosts

TEXTS = ["w3 w4 w5", "w6 w7"]
PAIRS = [("w3 w4", "w5 w6 w7"), ("w8", "w9 w3")]
LORA = adaptc.LoRA(r=3, alpha=6, targets=["query", "value"], init="random")
#: What every folder of such a model has besides weights.
LAYOUT = {
    "config_sentence_transformers.json", "modules.json", "sentence_bert_config.json", "tokenizer.json",
    "tokenizer_config.json",
}  # fmt: skip


def options(**changes):
    return {
        "vocab_size": hosts.VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
        "num_attention_heads": 4, "pad_token_id": 0, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
        **changes,
    }  # fmt: skip


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Class name -> folder of a tiny BERT of this class, with a tokenizer."""
    words = {"[PAD]": 0, "[UNK]": 1, "[MASK]": 2, **{f"w{i}": i for i in range(3, hosts.VOCAB)}}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]", mask_token="[MASK]"
    )
    found = {}
    for name in ("BertModel", "BertForSequenceClassification", "BertForMaskedLM"):
        found[name] = tmp_path_factory.mktemp(name)
        with hosts.seeded(4):
            config = transformers.BertConfig(**options(num_labels=1))
            getattr(transformers, name)(config).save_pretrained(found[name])
        tokenizer.save_pretrained(found[name])
    return found


def sentence_model(bases, *more):
    transformer = st_modules.Transformer(str(bases["BertModel"]))
    return st.SentenceTransformer(modules=[transformer, st_modules.Pooling(32), *more], device="cpu")


def compiled(model, plan=LORA, **choices):
    with hosts.seeded(7):
        return adaptc.compile(model, plan, **{"backend": "eager", **choices})


def encoded(model, *, captured=False):
    """Embeddings of the texts; by default without capture, which is not the point of most tests here."""
    with torch.compiler.set_stance("default" if captured else "force_eager"):
        return torch.as_tensor(model.encode(TEXTS))


def files(folder):
    return {path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file()}


def test_the_folder_is_complete_and_holds_the_adapter(bases, tmp_path):
    model = sentence_model(bases)
    plain = encoded(model)
    want = encoded(compiled(model), captured=True)
    assert model.adaptc.graphs and model.adaptc.eager_sites() == []
    model.save_pretrained(str(tmp_path))
    assert files(tmp_path) >= LAYOUT | {"1_Pooling/config.json", "adapter_config.json", "adapter_model.safetensors"}
    assert not any(Path(name).name == "model.safetensors" for name in files(tmp_path))
    config, parts = (json.loads((tmp_path / name).read_text()) for name in ("adapter_config.json", "modules.json"))
    assert config["base_model_name_or_path"] == str(bases["BertModel"])
    assert all(part["type"].startswith("sentence_transformers.") for part in parts)  # read without adaptc
    torch.testing.assert_close(encoded(st.SentenceTransformer(str(tmp_path), device="cpu")), want, rtol=0, atol=1e-6)
    assert not torch.allclose(want, plain, atol=1e-3)
    # The encoder's folder is an adapter of the encoder too.
    again = compiled(transformers.AutoModel.from_pretrained(bases["BertModel"]), tmp_path)
    ids = model.tokenize(TEXTS)
    torch.testing.assert_close(
        again(input_ids=ids["input_ids"], attention_mask=ids["attention_mask"]).last_hidden_state,
        model[0](dict(ids))["token_embeddings"], rtol=0, atol=1e-6,
    )  # fmt: skip


def test_what_is_pushed_is_what_is_saved(bases, tmp_path, monkeypatch):
    model = compiled(sentence_model(bases))
    want, pushed = encoded(model), {}

    def upload_folder(self, *, folder_path, **_):
        pushed["files"] = files(folder_path)
        pushed["found"] = encoded(st.SentenceTransformer(folder_path, device="cpu"))
        return type("Info", (), {"commit_url": "there"})()

    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    for name in ("create_repo", "create_branch", "whoami"):
        monkeypatch.setattr(huggingface_hub.HfApi, name, lambda self, **_: type("Url", (), {"repo_id": "me/it"})())
    model.push_to_hub("me/it", replace_model_card=True)
    model.save(str(tmp_path))
    assert pushed["files"] == files(tmp_path)
    torch.testing.assert_close(pushed["found"], want, rtol=0, atol=1e-6)


def test_other_modules_write_their_weights_with_the_adapters_in_them(bases, tmp_path):
    with hosts.seeded(5):
        dense, full = st_modules.Dense(32, 24), st_modules.Dense(24, 8)
    model = sentence_model(bases, dense, full)
    plan = adaptc.Plan.from_dict(
        {
            "rules": [
                {"match": {"targets": ["query", "2.linear"]}, "method": {"kind": "lora", "r": 2, "init": "random"}},
                {"match": {"targets": ["3.linear"]}, "train": "full"},
            ]
        }
    )
    compiled(model, plan)
    with torch.no_grad():
        model[3].linear.adapters["default"].copy.weight.add_(0.3)
    want = encoded(model)
    model.save_pretrained(str(tmp_path))
    keys = set(torch.nn.Module.state_dict(st_modules.Dense(32, 24)))
    assert "adapter_model.safetensors" in files(tmp_path)
    read = st.SentenceTransformer(str(tmp_path), device="cpu")
    assert set(read[2].state_dict()) == keys
    torch.testing.assert_close(encoded(read), want, rtol=0, atol=1e-6)
    torch.testing.assert_close(encoded(model), want, rtol=0, atol=0)  # the model in memory is as it was
    assert any(".adapters." in name for name in model.state_dict())


@pytest.mark.parametrize("base", ["BertForSequenceClassification", "BertModel"])
def test_a_cross_encoder_keeps_its_head(bases, tmp_path, base):
    """A head that the base's files do not have was drawn when it was loaded: an adapter alone would lose it."""
    with hosts.seeded(6):
        model = st.CrossEncoder(str(bases[base]), num_labels=1, device="cpu")
    with torch.compiler.set_stance("force_eager"):
        want = torch.as_tensor(compiled(model).predict(PAIRS))
    model.save_pretrained(str(tmp_path))
    assert ("adapter_model.safetensors" in files(tmp_path)) == (base != "BertModel")
    with hosts.seeded(8):
        read = st.CrossEncoder(str(tmp_path), device="cpu")
    torch.testing.assert_close(torch.as_tensor(read.predict(PAIRS)), want, rtol=0, atol=1e-6)


def test_a_sparse_encoder_is_read_back(bases, tmp_path):
    model = st.SparseEncoder(str(bases["BertForMaskedLM"]), device="cpu")
    with torch.compiler.set_stance("force_eager"):
        want = compiled(model).encode(TEXTS).to_dense()
    model.save_pretrained(str(tmp_path))
    read = st.SparseEncoder(str(tmp_path), device="cpu").encode(TEXTS).to_dense()
    torch.testing.assert_close(read, want, rtol=0, atol=1e-5)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("method", "adapter"),
    [
        (adaptc.IA3(targets=["value"]), True),
        slow(adaptc.LoRA(r=2, lora_bias=True, bias="lora_only", targets=["query"], init="random"), True),
        slow(adaptc.VeRA(r=4, targets=["query", "value"]), False),
        slow(adaptc.LoRA(r=2, dora=True, targets=["query"], init="random"), False),
        (adaptc.SSF(targets=["query"]), False),
    ],
    ids=["ia3", "biases", "vera", "dora", "ssf"],
)
def test_kinds(bases, tmp_path, method, adapter):
    """As an adapter where transformers reads the kind from PEFT's files, else folded into the weights."""
    model = compiled(sentence_model(bases), method)
    with hosts.seeded(9), torch.no_grad():
        for parameter in model.adaptc.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    want = encoded(model)
    model.save_pretrained(str(tmp_path))
    assert ("adapter_model.safetensors" in files(tmp_path)) == adapter
    torch.testing.assert_close(encoded(st.SentenceTransformer(str(tmp_path), device="cpu")), want, rtol=0, atol=1e-5)


def test_what_can_be_written_in_neither_way_is_refused_before_anything_is_written(bases, tmp_path):
    model = compiled(sentence_model(bases), adaptc.Bottleneck(r=2, targets=["output.dense"]))
    with pytest.raises(UnsupportedError, match=r"model\.adaptc\.save"):
        model.save_pretrained(str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_weights_that_are_trained_in_the_encoder_are_written(bases, tmp_path):
    model = compiled(sentence_model(bases))
    norm = model[0].model.embeddings.LayerNorm.weight
    norm.requires_grad_(True).data.mul_(1.5)
    want = encoded(model)
    model.save_pretrained(str(tmp_path))
    torch.testing.assert_close(encoded(st.SentenceTransformer(str(tmp_path), device="cpu")), want, rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore::adaptc.errors.NewSignatureWarning")
def test_merged_on_demand_several_live_and_none(bases, tmp_path):
    model = sentence_model(bases)
    plain = encoded(model)
    want = encoded(compiled(model))
    model.save_pretrained(str(tmp_path / "merged"), merge=True)
    assert "model.safetensors" in files(tmp_path / "merged")
    both = encoded(compiled_second(model))
    model.save_pretrained(str(tmp_path / "both"))
    assert {"adaptc/default/adapter_config.json", "adaptc/second/adapter_config.json"} <= files(tmp_path / "both")
    with model.adaptc.disable_adapter():
        model.save_pretrained(str(tmp_path / "none"))
    for name, expected in (("merged", want), ("both", both), ("none", plain)):
        found = encoded(st.SentenceTransformer(str(tmp_path / name), device="cpu"))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    model.adaptc.switch("default")
    model.save_pretrained(str(tmp_path / "adapter"))
    with pytest.raises(CheckpointError, match="a second time"):
        model.save_pretrained(str(tmp_path / "adapter"), merge=True)
    model.adaptc.detach()
    assert not {"save", "save_pretrained"} & model.__dict__.keys()


def compiled_second(model):
    with hosts.seeded(8):
        model.adaptc.add("second", adaptc.LoRA(r=2, targets=["key"], init="random"))
    model.adaptc.switch(["default", "second"])
    return model


# ------------------------------------------------------------------------------------------- its trainer


class MyTrainer(AdapterTrainerMixin, st.SentenceTransformerTrainer):
    """The trainer with the mixin."""


def train(model, directory, kind=st.SentenceTransformerTrainer, *, resume=None, **changes):
    rows = [
        {"a": f"w{i} w{i + 1}", "b": f"w{i + 2}", "label": float(i % 3) / 2} for i in range(10, 22)
    ]
    arguments = {
        "output_dir": str(directory), "max_steps": 4, "per_device_train_batch_size": 3, "learning_rate": 0.05,
        "save_strategy": "steps", "save_steps": 2, "report_to": [], "use_cpu": True, "disable_tqdm": True,
        "dataloader_pin_memory": False, "seed": 11, "logging_steps": 1,
    }  # fmt: skip
    trainer = kind(
        model=model, args=st.SentenceTransformerTrainingArguments(**{**arguments, **changes}),
        train_dataset=datasets.Dataset.from_list(rows), loss=losses.CosineSimilarityLoss(model),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.slow
def test_its_trainer_trains_saves_and_resumes(bases, tmp_path):
    def fresh():
        return compiled(sentence_model(bases), adaptc.LoRA(r=3, alpha=6, dropout=0.2, targets=["query", "value"]))

    model = fresh()
    started = {name: p.detach().clone() for name, p in model.adaptc.named_parameters()}
    trainer = train(model, tmp_path / "a")
    assert all(not torch.equal(p, started[name]) for name, p in model.adaptc.named_parameters())
    trainer.save_model(str(tmp_path / "out"))
    want = encoded(model)
    for folder in (tmp_path / "out", tmp_path / "a" / "checkpoint-4"):
        torch.testing.assert_close(encoded(st.SentenceTransformer(str(folder), device="cpu")), want, rtol=0, atol=1e-6)
    assert files(tmp_path / "out") >= LAYOUT and not any(name.startswith("adaptc/") for name in files(tmp_path / "out"))

    checkpoint = str(tmp_path / "a" / "checkpoint-2")
    resumed = fresh()
    train(resumed, tmp_path / "b", MyTrainer, resume=checkpoint)
    mine, theirs = dict(resumed.adaptc.named_parameters()), dict(model.adaptc.named_parameters())
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)

    plain = fresh()
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    with pytest.raises(ResumeError, match="AdapterTrainerMixin"):
        train(plain, tmp_path / "c", resume=checkpoint)
    assert all(torch.equal(before[name], value) for name, value in plain.state_dict().items())
