"""``save_pretrained`` of a compiled model, and the methods of a PEFT model on it."""

from __future__ import annotations

import copy
import pickle

import peft
import pytest
import torch
import transformers

import adaptc
from adaptc.errors import CheckpointError, ResumeError, UnsupportedError
from adaptc.files import save_pretrained as saving
from adaptc.report.explain import Explanation
from tests.models import hosts

LORA = adaptc.LoRA(r=3, alpha=6, init="random", targets="all-linear")


def compiled(host="llama", plan=LORA, dtype=torch.float32, **changes):
    base = hosts.build(host, **changes).to(dtype)
    return base, adaptc.compile(copy.deepcopy(base), plan, backend="eager")


def logits(model, host="llama"):
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # files are the subject here, not graphs
        return model.eval()(**hosts.batch(host)).logits


def same_state(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("host", ["llama", "gpt2", "bert"])
def test_the_adapter_is_written_as_peft_reads_it(tmp_path, host):
    base, model = compiled(host)
    model.save_pretrained(tmp_path)
    files = {"adapter_config.json", "adapter_model.safetensors", "adaptc_plan.json"}
    assert {path.name for path in tmp_path.iterdir()} == files
    theirs = peft.PeftModel.from_pretrained(base, tmp_path)
    torch.testing.assert_close(logits(theirs, host), logits(model, host), rtol=0, atol=1e-6)


def test_other_adapters_go_into_directories_of_their_own(tmp_path):
    _, model = compiled(num_hidden_layers=1)
    model.adaptc.add("second", adaptc.LoRA(r=2, init="random", targets=["k_proj"]))
    model.save_pretrained(tmp_path / "one")
    assert (tmp_path / "one" / "adapter_config.json").exists()
    assert (tmp_path / "one" / "second" / "adapter_config.json").exists()
    model.adaptc.switch(["default", "second"])
    model.save_pretrained(tmp_path / "both")
    assert not (tmp_path / "both" / "adapter_config.json").exists(), "neither stands for both"
    assert (tmp_path / "both" / "default" / "adapter_config.json").exists()


def folded(base, model):
    """W + s B A in fp64, rounded once, written out."""
    state = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    for site in model.adaptc.sites:
        adapter = site.adapters["default"]
        update = 2.0 * (adapter.lora_B.detach().double() @ adapter.lora_A.detach().double())  # s = 6 / 3
        name = f"{site.path}.weight"
        if type(site.module).__name__ == "Conv1D":
            update = update.T
        state[name] = (state[name].double() + update).to(state[name].dtype)
    return state


@pytest.mark.parametrize("host, dtype", [("llama", torch.float32), ("gpt2", torch.float32), ("bert", torch.bfloat16)])
def test_merged_is_the_formula_rounded_once(tmp_path, host, dtype):
    base, model = compiled(host, dtype=dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path, merge=True)
    assert same_state(model.state_dict(), before), "the live model is as it was"
    merged = type(base).from_pretrained(tmp_path, dtype=dtype)
    assert same_state(merged.state_dict(), folded(base, model))
    assert not any("adapters" in name for name in merged.state_dict())


PLANS = {
    "ia3": [
        adaptc.IA3(targets=["k_proj"], init="random"),
        adaptc.IA3(targets=["down_proj"], feedforward=True, init="random"),
    ],
    "lora-and-head": {
        "rules": [
            {"match": {"targets": ["lm_head"]}, "train": "full"},
            {"match": {"targets": ["q_proj"]}, "method": {"kind": "lora", "r": 3, "init": "random"}},
        ]
    },
}


@pytest.mark.parametrize("kind", PLANS)
def test_merged_kinds_compute_the_same(tmp_path, kind):
    base, model = compiled(plan=PLANS[kind])
    with torch.no_grad():
        for parameter in model.adaptc.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path, merge=True)
    merged = type(base).from_pretrained(tmp_path)
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-5, atol=2e-6)
    assert (logits(merged) - logits(base)).abs().max() > 1e-3


def test_merged_trained_biases(tmp_path):
    base, model = compiled("bert", adaptc.LoRA(r=3, init="random", bias="all", targets=["query"]))
    with torch.no_grad():
        for name, parameter in model.adaptc.named_parameters():
            if name.endswith(".bias"):
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path, merge=True)
    merged = type(base).from_pretrained(tmp_path)
    torch.testing.assert_close(logits(merged, "bert"), logits(model, "bert"), rtol=1e-5, atol=2e-6)
    trained = dict(model.adaptc.named_parameters())["bert.pooler.dense.adapters.default.bias"]
    assert torch.equal(merged.bert.pooler.dense.bias, trained)


def test_two_live_adapters_are_merged_together(tmp_path):
    base, model = compiled(num_hidden_layers=1)
    model.adaptc.add("second", adaptc.LoRA(r=2, init="random", targets=["k_proj"]))
    model.adaptc.switch(["default", "second"])
    model.save_pretrained(tmp_path, merge=True)
    torch.testing.assert_close(logits(type(base).from_pretrained(tmp_path)), logits(model), rtol=1e-5, atol=2e-6)


def test_a_tied_head_cannot_be_merged(tmp_path):
    _, model = compiled(plan=adaptc.LoRA(r=3, init="random", targets=["lm_head"]), tie_word_embeddings=True)
    with pytest.raises(UnsupportedError, match="lm_head: the adapter cannot be merged") as error:
        model.save_pretrained(tmp_path / "out", merge=True)
    assert "model.embed_tokens.weight" in str(error.value) and not (tmp_path / "out").exists()


def test_a_trained_constant_needs_a_bias():
    _, model = compiled(plan=adaptc.LoRA(r=3, targets=["q_proj"], lora_bias=True), num_hidden_layers=1)
    with torch.no_grad():
        model.adaptc.sites[0].adapters["default"].lora_B_bias.fill_(1.0)
    with pytest.raises(UnsupportedError, match="q_proj: the adapter cannot be merged"):
        model.adaptc.merge_and_unload()
    assert len(model.adaptc.sites) == 1


def test_merged_does_not_go_beside_an_adapter(tmp_path):
    _, model = compiled(num_hidden_layers=1)
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="would get it a second time"):
        model.save_pretrained(tmp_path, merge=True)
    assert not (tmp_path / "model.safetensors").exists()


def test_what_does_not_fit_an_adapter_is_refused(tmp_path):
    _, model = compiled(num_hidden_layers=1)
    for options in ({"push_to_hub": True}, {"variant": "fp16"}, {"safe_serialization": False}):
        with pytest.raises(UnsupportedError, match=f"no place for {next(iter(options))}"):
            model.save_pretrained(tmp_path / "out", **options)
    with pytest.raises(TypeError, match="unexpected keyword argument 'merged'"):
        model.save_pretrained(tmp_path / "out", merged=True)
    state = model.state_dict()
    name = next(n for n in state if ".adapters." in n)
    with pytest.raises(UnsupportedError, match="state_dict has other values than the model"):
        model.save_pretrained(tmp_path / "out", state_dict={**state, name: state[name] + 1})
    model.save_pretrained(tmp_path / "out", is_main_process=False)
    assert not (tmp_path / "out").exists()
    model.save_pretrained(tmp_path / "out", state_dict=state, max_shard_size="1GB")
    assert (tmp_path / "out" / "adapter_config.json").exists()


def test_a_part_of_the_model_does_not_lose_its_adapters(tmp_path):
    base, model = compiled(num_hidden_layers=1)
    with pytest.raises(UnsupportedError, match="a LlamaModel inside a compiled model would lose its adapters"):
        model.model.save_pretrained(tmp_path / "part")
    assert not (tmp_path / "part").exists()
    model.adaptc.remove("default")
    model.model.save_pretrained(tmp_path / "part")
    assert same_state(transformers.LlamaModel.from_pretrained(tmp_path / "part").state_dict(), base.model.state_dict())
    model.save_pretrained(tmp_path / "whole")
    assert same_state(type(base).from_pretrained(tmp_path / "whole").state_dict(), base.state_dict())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_save_themselves(tmp_path, copied):
    base, model = compiled(num_hidden_layers=1)
    twin = copied(model)
    with torch.no_grad():
        for parameter in twin.adaptc.parameters():
            parameter.mul_(2)
    twin.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path)
    torch.testing.assert_close(logits(theirs), logits(twin), rtol=0, atol=1e-6)
    with pytest.raises(ResumeError):
        twin.load_state_dict(saving.guard(twin), strict=False)
    twin.adaptc.detach()
    assert model.save_pretrained.adapters is model.adaptc.adapters


def test_detach_leaves_nothing_behind(tmp_path):
    base, model = compiled(num_hidden_layers=1)
    model.adaptc.detach()
    kept = [n for m in model.modules() for n in ("save_pretrained", *saving.ALIASES) if n in m.__dict__]
    assert not kept and not model._load_state_dict_pre_hooks
    model.save_pretrained(tmp_path)
    assert same_state(type(base).from_pretrained(tmp_path).state_dict(), base.state_dict())


# ------------------------------------------------------------------------------- methods of a PEFT model


def test_print_trainable_parameters(capsys):
    base, model = compiled(num_hidden_layers=1)
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=3, target_modules=[s.path for s in model.adaptc.sites]))
    theirs.print_trainable_parameters()
    want = capsys.readouterr().out
    model.print_trainable_parameters()
    model.adaptc.print_trainable_parameters()
    assert capsys.readouterr().out == 2 * want


def test_disable_adapter():
    base, model = compiled(num_hidden_layers=1)
    adapted = logits(model)
    with pytest.raises(KeyError), model.disable_adapter():
        assert model.adaptc.live == () and torch.equal(logits(model), logits(base))
        raise KeyError
    assert model.adaptc.live == ("default",) and torch.equal(logits(model), adapted)


def test_merge_and_unload():
    base, model = compiled()
    want = folded(base, model)
    merged = model.merge_and_unload()
    assert merged is model and not hasattr(model, "adaptc") and same_state(model.state_dict(), want)


class Taken(transformers.LlamaForCausalLM):
    """A model that has a method of that name itself."""

    def disable_adapter(self):
        return "its own"


def test_a_name_that_is_taken_is_left_alone():
    model = Taken(hosts.build("llama", num_hidden_layers=1).config)
    adaptc.compile(model, LORA, backend="eager")
    assert model.disable_adapter() == "its own"
    model.adaptc.detach()
    assert model.disable_adapter() == "its own"


def test_the_report_in_a_notebook():
    report = Explanation((("rules <b>", ("a & b", "  c")), ("graphs", ("none",))))
    assert report._repr_html_() == (
        "<details open><summary>rules &lt;b&gt;</summary><pre>a &amp; b\n  c</pre></details>"
        "<details open><summary>graphs</summary><pre>none</pre></details>"
    )
