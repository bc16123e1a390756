"""The base comes back bit for bit, whatever it holds, wherever it was kept, and through copies and casts."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import safetensors.torch
import torch
import transformers
from torch import nn

import adaptc
from adaptc import IA3, Bias, LoRA, Match, Plan, Rule, TrainableTokens
from adaptc.errors import AdaptcWarning, CheckpointError, MergeError, UnsupportedError
from adaptc.runtime.weights import patch
from tests.runtime.weights import cases

pytestmark = pytest.mark.filterwarnings("ignore::adaptc.errors.NewSignatureWarning")
LORA = LoRA(r=3, targets="all-linear", init="random")


@pytest.fixture(scope="module")
def shared():
    return cases.compiled(cases.llama(), LORA)


@pytest.fixture
def model(shared):
    yield shared
    shared.adaptc.switch("a")


@pytest.mark.parametrize("keep", ["memory", "disk"])
@pytest.mark.parametrize("dtype", cases.ODD, ids=str)
def test_every_bit_of_the_base_comes_back(dtype, keep):
    base = cases.llama().to(dtype)
    cases.odd_numbers(base)
    model = cases.compiled(base, LORA)
    before, objects = cases.base_of(model), dict(model.named_parameters())
    places = {name: p.data_ptr() for name, p in objects.items()}
    model.adaptc.merge(keep=keep)
    assert len(cases.differing(model, before)) == 14, "all of the linear layers were written"
    model.adaptc.unmerge()
    assert cases.differing(model, before) == []
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == places
    assert all(p is objects[name] for name, p in model.named_parameters())


def test_the_test_sees_odd_numbers():
    model = cases.llama().to(torch.bfloat16)
    cases.odd_numbers(model)
    weight = model.model.layers[0].self_attn.q_proj.weight
    start = weight.view(-1)[:8]
    assert start.isnan().sum() == 3 and start.isinf().sum() == 2 and start[5] == 0 and start[5].signbit()
    before = cases.base_of(model)
    with torch.no_grad():
        weight.copy_(weight.float() + 0.0)
    assert cases.differing(model, before), "-0.0 + 0.0 is 0.0, and a signalling NaN becomes quiet"


def test_untouched_tensors_are_not_written(model):
    versions = {name: p._version for name, p in model.named_parameters()}
    model.adaptc.merge()
    model.adaptc.unmerge()
    moved = {name for name, p in model.named_parameters() if p._version != versions[name]}
    assert moved == {f"{site.path}.weight" for site in model.adaptc.sites}


@pytest.mark.parametrize("keep", ["memory", "disk"])
def test_after_a_cast_the_base_is_the_cast_of_the_base(keep):
    base = cases.llama()
    cases.odd_numbers(base)
    want = {name: tensor.to(torch.bfloat16) for name, tensor in cases.base_of(base).items()}
    model = cases.compiled(base, LORA)
    model.adaptc.merge(keep=keep)
    model.to(torch.bfloat16)
    state = model.state_dict()
    assert all(cases.same_bits(state[name], want[name]) for name in state if not cases.is_ours(name))
    model.adaptc.unmerge()
    changed = [n for n in cases.differing(model, want) if not n.endswith("inv_freq")]
    assert changed == []


def _saved(model):
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    return torch.load(stored, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m)), "torch.save": _saved}


@pytest.mark.parametrize("keep", ["memory", "disk"])
@pytest.mark.parametrize("how", COPIES)
def test_a_copy_is_merged_too_and_has_a_base_of_its_own(how, keep):
    base = cases.llama()
    cases.odd_numbers(base.model.layers[1])
    model = cases.compiled(base, LORA)
    before = cases.base_of(model)
    model.adaptc.merge(keep=keep)
    twin = COPIES[how](model)
    merged = cases.base_of(model)
    assert cases.differing(twin, merged) == [] and twin.adaptc.live == ("a",)
    assert twin.adaptc.metrics()["kept_bytes"] == model.adaptc.metrics()["kept_bytes"] > 0
    twin.adaptc.unmerge()
    assert cases.differing(twin, before) == []
    assert cases.differing(model, merged) == [], "the original is merged still"
    again = COPIES[how](model)
    model.adaptc.unmerge()
    assert cases.differing(model, before) == []
    assert cases.differing(again, merged) == []
    with torch.no_grad():
        next(iter(again.adaptc.adapters.merged.patch.slots)).kept.zero_()
    assert cases.differing(model, before) == []


def test_a_part_that_is_copied_gives_the_base_as_its_state(model):
    layer = model.model.layers[0]
    want = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    model.adaptc.merge()
    twin = copy.deepcopy(layer)
    for part in (layer, twin):
        state = part.state_dict()
        assert all(cases.same_bits(state[name], tensor) for name, tensor in want.items())
    assert not torch.equal(twin.self_attn.q_proj.weight, want["self_attn.q_proj.weight"])


def test_the_state_is_that_of_base_and_adapter_apart(model, tmp_path):
    want = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.adaptc.save(tmp_path / "unmerged")
    model.adaptc.merge()
    for state in (model.state_dict(), model.state_dict(keep_vars=True)):
        assert list(state) == list(want)
        assert all(cases.same_bits(state[name], tensor) for name, tensor in want.items())
    assert isinstance(model.state_dict(keep_vars=True)["lm_head.weight"], nn.Parameter)
    model.adaptc.save(tmp_path / "merged")
    model.save_pretrained(tmp_path / "pretrained")
    for name in ("merged", "pretrained"):
        for file in (tmp_path / "unmerged").iterdir():
            assert (tmp_path / name / file.name).read_bytes() == file.read_bytes(), (name, file.name)
    assert model.adaptc.adapters.merged is not None
    safetensors.torch.save_model(model, str(tmp_path / "whole.safetensors"))
    stored = safetensors.torch.load_file(tmp_path / "whole.safetensors")
    assert all(cases.same_bits(stored[name], want[name]) for name in stored)


def test_a_state_that_is_loaded_is_the_bases(model):
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    other = {n: t + 1 if n.endswith("q_proj.weight") else t for n, t in state.items()}
    model.adaptc.merge()
    model.load_state_dict(other)
    assert model.adaptc.adapters.merged is None and model.adaptc.live == ("a",)
    assert all(cases.same_bits(tensor, other[name]) for name, tensor in model.state_dict().items())
    model.load_state_dict(state)
    model.adaptc.merge()
    with pytest.raises(UnsupportedError, match="load_state_dict of a Linear: adapters are merged") as error:
        model.model.layers[0].load_state_dict(model.model.layers[0].state_dict())
    assert error.value.facts["do"] == "model.adaptc.unmerge() first"


def test_a_plain_root_module_takes_in_a_state_while_it_is_merged():
    model = cases.compiled(nn.Sequential(nn.Linear(3, 3)), LoRA(r=2, init="random", targets=["0"])).eval()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.adaptc.merge()
    model.load_state_dict(state)
    assert all(cases.same_bits(tensor, state[name]) for name, tensor in model.state_dict().items())


class Tied(nn.Module):
    """Two modules with one weight, and a third one whose parameter is another object in the same memory."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.head = nn.Linear(4, 9, bias=False)
        self.head.weight = self.embed.weight
        self.tail = nn.Linear(4, 9)
        self.tail.weight = nn.Parameter(self.embed.weight.detach())

    def forward(self, ids):
        h = self.embed(ids)
        return self.head(h) + self.tail(h)


def test_tied_weights_stay_tied_and_come_back():
    torch.manual_seed(0)
    base = Tied()
    before = cases.base_of(base)
    with pytest.raises(UnsupportedError, match=r"its weight is also head\.weight"):
        cases.compiled(copy.deepcopy(base), LoRA(r=2, init="random", targets=["embed"])).eval().adaptc.merge()
    del base.tail.weight
    base.tail.weight = base.embed.weight
    model = cases.compiled(base, TrainableTokens(indices=(2, 5), targets=["embed"])).eval()
    ids = torch.tensor([[1, 2, 5, 8]])
    want = model(ids).detach()
    report = model.adaptc.merge()
    assert model.embed.weight is model.head.weight is model.tail.weight
    torch.testing.assert_close(model(ids), want)
    assert [row.path for row in report.tensors] == ["embed.weight"], "written once"
    state = model.state_dict()
    assert all(cases.same_bits(state[name], tensor) for name, tensor in before.items())
    model.adaptc.unmerge()
    assert cases.differing(model, before) == []


def test_one_memory_under_two_parameters_is_seen_as_tied():
    with pytest.raises(UnsupportedError, match=r"tail: the adapter cannot be merged") as error:
        cases.compiled(Tied(), LoRA(r=2, init="random", targets=["tail"])).eval().adaptc.merge()
    assert "its weight is also embed.weight" in error.value.facts["found"]


def test_the_base_that_an_adapter_starts_from_is_the_unmerged_one(model):
    twin = copy.deepcopy(model)
    model.adaptc.merge()
    plan = Plan([
        Rule(Match(["q_proj"]), LoRA(r=2, init="pissa")), Rule(Match(["lm_head"]), train="full"),
        Rule(Match(["v_proj"]), LoRA(r=2, dora=True)),
    ])  # fmt: skip
    for one in (model, twin):
        torch.manual_seed(1)
        one.adaptc.add("b", plan)
    assert model.adaptc.adapters.merged is not None
    for (name, a), (_, b) in zip(model.adaptc.named_parameters("b"), twin.adaptc.named_parameters("b"), strict=True):
        assert torch.equal(a, b), name
    copied = model.lm_head.adapters["b"].copy
    with torch.no_grad():
        copied.weight.zero_()
    assert not copied.state_dict()["weight"].any(), "a copy of a module has nothing of the merge"
    model.adaptc.remove("b")


# ------------------------------------------------------------------------------------------ failures


def test_a_failure_at_any_tensor_puts_everything_back(model, monkeypatch):
    before, put = cases.base_of(model), patch.put
    y = cases.logits(model)
    for position in range(14):
        count = iter(range(100))

        def fail(target, value, count=count, position=position):
            if next(count) == position:
                target.view(-1)[:3] = 7  # half-written
                raise RuntimeError("no more memory")
            put(target, value)

        monkeypatch.setattr(patch, "put", torch.no_grad()(fail))
        with pytest.raises(MergeError, match=r"merging a failed half-way, and everything was put back") as error:
            model.adaptc.merge()
        assert error.value.facts["found"] == "RuntimeError: no more memory"
        assert cases.differing(model, before) == [] and model.adaptc.live == ("a",)
        assert model.adaptc.adapters.merged is None
    monkeypatch.setattr(patch, "put", put)
    assert torch.equal(cases.logits(model), y)
    model.adaptc.merge()
    model.adaptc.unmerge()
    assert cases.differing(model, before) == []


def test_unmerging_can_be_taken_up_where_it_was_interrupted(model, monkeypatch):
    before, put_back = cases.base_of(model), patch.put_back
    model.adaptc.merge()
    count = iter(range(100))

    def fail(target, kept):
        if next(count) == 5:
            raise KeyboardInterrupt
        put_back(target, kept)

    monkeypatch.setattr(patch, "put_back", fail)
    with pytest.raises(KeyboardInterrupt):
        model.adaptc.unmerge()
    assert model.adaptc.adapters.merged is not None
    monkeypatch.setattr(patch, "put_back", put_back)
    model.adaptc.unmerge()
    assert cases.differing(model, before) == [] and model.adaptc.live == ("a",)


def test_a_weight_that_was_replaced_or_written_is_told(model):
    before = cases.base_of(model)
    model.adaptc.merge()
    with torch.no_grad():
        model.lm_head.weight.add_(0)  # of no adapter
        model.model.layers[0].mlp.up_proj.weight.add_(1)
    with pytest.warns(AdaptcWarning, match=r"up_proj.weight was written to while adapters were merged into it"):
        model.adaptc.unmerge()
    assert cases.differing(model, before) == []
    model.adaptc.merge()
    layer = model.model.layers[0].mlp.up_proj
    merged = layer.weight
    layer.weight = nn.Parameter(torch.zeros(2, 2), requires_grad=False)
    with pytest.raises(UnsupportedError, match=r"up_proj.weight was replaced while adapters were merged into it"):
        model.adaptc.unmerge()
    layer.weight = merged
    model.adaptc.unmerge()
    assert cases.differing(model, before) == []


def test_parameters_that_a_cast_replaces_are_restored(model):
    want = {name: t.to(torch.bfloat16) for name, t in cases.base_of(model).items()}
    twin = copy.deepcopy(model)
    twin.adaptc.merge()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        twin.to(torch.bfloat16)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    twin.adaptc.unmerge()
    assert [n for n in cases.differing(twin, want) if not n.endswith("inv_freq")] == []


# ------------------------------------------------------------------------------------------ the base's files


@pytest.fixture
def from_files(tmp_path):
    base = cases.llama().to(torch.bfloat16)
    cases.odd_numbers(base)
    base.save_pretrained(tmp_path / "base", max_shard_size="8KB")
    read = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16).eval()
    assert [n for n in cases.differing(read, cases.base_of(base)) if not n.endswith("inv_freq")] == []
    return tmp_path / "base", cases.compiled(read, LORA)


def test_the_base_comes_back_from_its_own_files(from_files):
    _, model = from_files
    before = cases.base_of(model)
    model.adaptc.merge(keep=None)
    assert model.adaptc.metrics()["kept_bytes"] == 0 and len(cases.differing(model, before)) == 14
    twin = copy.deepcopy(model)
    with model.adaptc.disable_adapter():
        assert cases.differing(model, before) == []
    assert model.adaptc.adapters.merged.patch.keep is None
    model.adaptc.unmerge()
    assert cases.differing(model, before) == []
    twin.adaptc.unmerge()
    assert cases.differing(twin, before) == []


def test_without_its_files_as_they_were_nothing_is_left_to_them(from_files, model):
    directory, read = from_files
    with pytest.raises(UnsupportedError, match="could not be restored from the base's files") as error:
        model.adaptc.merge(keep=None)
    assert error.value.facts["found"] == "no safetensors file of the base has it"
    with torch.no_grad():
        read.model.layers[1].mlp.up_proj.weight[3, 3] += 1
    before = cases.base_of(read)
    with pytest.raises(UnsupportedError, match=r"layers.1.mlp.up_proj.weight could not be restored") as error:
        read.adaptc.merge(keep=None)
    assert "holds other values than the model" in error.value.facts["found"]
    assert cases.differing(read, before) == [] and read.adaptc.live == ("a",)
    read.float()
    with pytest.raises(UnsupportedError, match="could not be restored") as error:
        read.adaptc.merge(keep=None)
    assert "has it in torch.bfloat16, and the model in torch.float32" in error.value.facts["found"]


def test_a_file_that_was_changed_meanwhile_is_not_read(from_files):
    directory, model = from_files
    before = cases.base_of(model)
    model.adaptc.merge(keep=None)
    files = sorted(directory.glob("*.safetensors"))
    contents = [file.read_bytes() for file in files]
    replaced = directory / "other"
    replaced.write_bytes(contents[0])
    replaced.rename(files[0])  # another file under the name: what was mapped is as it was
    files[1].write_bytes(contents[1])  # the same file, written again
    with pytest.raises(CheckpointError, match=r"was changed while weights that it holds are merged"):
        model.adaptc.unmerge()
    assert model.adaptc.adapters.merged is not None and cases.differing(model, before)


def test_kinds_at_other_than_linear_sites_come_back():
    plan = Plan([
        Rule(Match(["0"]), LoRA(r=2, init="random")), Rule(Match(["1"]), LoRA(r=2, init="random")),
        Rule(Match(["2"]), Bias()), Rule(Match(["3"]), IA3(init="random")), Rule(Match(["4"]), train="full"),
    ])  # fmt: skip
    layers = (nn.Embedding(9, 8), nn.Conv1d(8, 8, 3, padding=1), nn.LayerNorm(8), nn.Linear(8, 8), nn.BatchNorm1d(8))
    model = nn.Sequential(*layers).eval()
    before = cases.base_of(model)
    adapted = cases.compiled(model, plan)
    ids = torch.arange(8)[None]
    want = adapted(ids).detach()
    report = adapted.adaptc.merge()
    torch.testing.assert_close(adapted(ids), want)
    assert [row.path for row in report.tensors] == [
        "0.weight", "1.weight", "2.bias", "3.bias", "3.weight", "4.bias", "4.running_mean", "4.running_var", "4.weight",
    ]  # fmt: skip
    adapted.adaptc.unmerge()
    assert cases.differing(adapted, before) == []
    assert torch.equal(adapted(ids), want)
    assert adaptc is not None
