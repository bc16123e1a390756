"""LoRA on parameters that a module's own forward reads: W + s B A in fp64, PEFT, and how the graph reads it."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3MultiModalProjector
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts
from transformers.models.omdet_turbo.modeling_omdet_turbo import OmDetTurboLanguageBackbone
from transformers.models.wav2vec2.modeling_wav2vec2 import AMSoftmaxLoss

import adaptc
from adaptc.errors import PlanError, SiteError
from adaptc.ir import dialect
from adaptc.torch_internals import node_value, storage_key
from tests.models import hosts
from tests.reference import check_steps_agree, loss_of, relative_errors, step
from tests.sites.life import check_life
from tests.sites.moe import copy_to_peft, formula_step, peft_gradients, qwen3_moe

SCALE = 2.0


def lora(**options):
    return adaptc.LoRA(**{"r": 3, "alpha": 6, "init": "random", **options})


class Alone(nn.Module):
    """One module of a model, called by keyword."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, **inputs):
        return self.inner(*inputs.values())


def host_of(module, std=0.3):
    with hosts.seeded(5):
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=std)
    return Alone(module)


def gemma3():
    """torch.matmul(x, P), P (K, N)."""
    config = transformers.Gemma3Config(
        vision_config={"hidden_size": 24, "image_size": 32, "patch_size": 8, "layer_norm_eps": 1e-6},
        text_config={"hidden_size": 20, "num_attention_heads": 2, "num_key_value_heads": 2}, mm_tokens_per_image=4,
    )  # fmt: skip
    return host_of(Gemma3MultiModalProjector(config)), {"vision_outputs": torch.randn(2, 16, 24)}


def omdet():
    """x @ P, P (K, N)."""
    text = {
        "model_type": "clip_text_model", "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1,
        "num_attention_heads": 2, "vocab_size": 50, "max_position_embeddings": 16,
    }  # fmt: skip
    config = transformers.OmDetTurboConfig(text_config=text, text_projection_in_dim=16, text_projection_out_dim=12)
    ids = torch.randint(3, 49, (2, 6))
    return host_of(OmDetTurboLanguageBackbone(config)), {"ids": ids, "mask": None, "encode_type": "class"}


def amsoftmax():
    """The weight's columns are divided by their lengths: no linear product of it."""
    labels = torch.tensor([1, 4, 0])
    return host_of(AMSoftmaxLoss(12, 7)), {"hidden_states": torch.randn(3, 12), "labels": labels}


def llama4():
    """Stacks (E, K, N) in torch.bmm, of a class that does not say that it is transposed."""
    config = transformers.Llama4TextConfig(hidden_size=12, intermediate_size=10, num_local_experts=3)
    return host_of(Llama4TextExperts(config)), {"hidden_states": torch.randn(9, 12)}


#: Host -> (what builds it, the parameters, why they are read as a whole or None).
HOSTS = {
    "gemma3": (gemma3, ["mm_input_projection_weight"], None),
    "omdet": (omdet, ["inner.text_projection"], None),
    "amsoftmax": (amsoftmax, ["weight"], "normalize reads it"),
    "llama4": (llama4, ["inner.gate_up_proj", "inner.down_proj"], "it is a stack of 3 matrices"),
}


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", HOSTS)
def test_computes_the_formula_and_what_peft_computes(name, backend):
    with hosts.seeded(7):
        base, batch = HOSTS[name][0]()
    names, reason = HOSTS[name][1:]
    model = adaptc.compile(copy.deepcopy(base), lora(targets=names), backend=backend, fullgraph=True).train()
    want = formula_step(model, base, batch, scale=SCALE)
    assert len(want[1]) == 2 * len(names)
    got = step(model, batch)
    check_steps_agree(got, want, loss=1e-5)
    twin = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(r=3, lora_alpha=6, target_modules=[], target_parameters=names)
    )
    copy_to_peft(model, twin)
    loss = loss_of(twin.base_model.model(**batch))
    loss.backward()
    torch.testing.assert_close(got[0], loss.detach().double(), rtol=1e-5, atol=1e-5)
    assert max(relative_errors(got[1], peft_gradients(model, twin)).values()) < 2e-5
    (graph,) = model.adaptc.graphs
    sums = ops_of(graph.graph_module("canonicalise")).count("lora_weight")
    products = ops_of(graph.graph_module("canonicalise")).count("lora_linear")
    assert (sums, products) == ((0, 1) if reason is None else (len(names), 0))
    assert (f"the weight stays W + s B A: {reason}" in str(model.adaptc.explain())) == (reason is not None)
    assert (model.adaptc.metrics()["eager_sites"], model.adaptc.idle_sites()) == (0, [])


def ops_of(gm):
    return [op.name for n in gm.graph.nodes if (op := dialect.of_target(n.target)) is not None]


def test_routers_are_read_as_linear_products():
    base = qwen3_moe(num_hidden_layers=2)
    model = adaptc.compile(copy.deepcopy(base), lora(targets="gate.weight"), backend="aot_eager").train()
    batch = hosts.batch("llama")
    check_steps_agree(step(model, batch), formula_step(model, base, batch, scale=SCALE))
    (graph,) = model.adaptc.graphs
    assert ops_of(graph.graph_module("canonicalise")).count("lora_linear") == 2
    # No gradient of the weight's shape (experts, hidden) is made.
    nodes = [n for n in graph.parts[1].graph.nodes if isinstance(n.meta.get("val"), torch.Tensor)]
    given = {storage_key(n.meta["val"]) for n in nodes if n.op == "placeholder"}
    made = [n.meta["val"] for n in nodes if n.op == "call_function" and storage_key(n.meta["val"]) not in given]
    shapes = {tuple(value.shape) for value in made}
    assert (3, 64) in shapes and not {(4, 64), (64, 4)} & shapes


class Reads(nn.Module):
    """A weight P (N, K) read in the way that the test says."""

    def __init__(self, read, N=6, K=10):
        super().__init__()
        self.P = nn.Parameter(torch.randn(N, K))
        self.bias = nn.Parameter(torch.randn(N))
        self.read = read

    def forward(self, x):
        return self.read(x, self.P, self.bias)


LINEAR = {
    "linear": lambda x, P, b: F.linear(x, P, b),
    "by keyword": lambda x, P, b: F.linear(input=x, weight=P),
    "matmul of t": lambda x, P, b: x @ P.t() + b,
    "T": lambda x, P, b: torch.matmul(x, P.T),
    "mT": lambda x, P, b: x.matmul(P.mT),
    "transpose": lambda x, P, b: x @ P.transpose(0, 1),
    "permute": lambda x, P, b: x @ P.permute(1, 0).contiguous(),
    "cast": lambda x, P, b: F.linear(x.double(), P.double()).float(),
    "twice": lambda x, P, b: F.linear(x, P) + F.linear(x * 2, P),
    "einsum": lambda x, P, b: torch.einsum("bsk,nk->bsn", x, P),
    "turned": lambda x, P, b: F.linear(x[..., :6], P.t()),
    "columns": lambda x, P, b: x[..., :6] @ P,
    "other names of it": lambda x, P, b: x @ P.H + x @ P.mH + x @ P.swapdims(0, 1) + x @ P.transpose(dim0=1, dim1=0),
    "op of torch 2.14": lambda x, P, b: x @ torch.ops.aten.mT(P),
    "addmm": lambda x, P, b: torch.addmm(b, x.reshape(-1, 10), P.t()).view(2, 4, 6),
    "inner": lambda x, P, b: torch.inner(x, P),
    "einsum of columns": lambda x, P, b: torch.einsum("...n,nk->...k", x[..., :6], P),
}
OTHER = {
    "transposed twice": (lambda x, P, b: x @ P.t().transpose(0, 1).t(), None),
    "on the left": (lambda x, P, b: P @ x.mT, "matmul reads it"),
    "normalised": (lambda x, P, b: F.linear(x, F.normalize(P)), "normalize reads it"),
    "elementwise": (lambda x, P, b: F.linear(x, P) + P.sum(), "sum reads it"),
    "scaled": (lambda x, P, b: torch.addmm(b, x[0], P.t(), alpha=2), "addmm reads it"),
    "on the left of einsum": (lambda x, P, b: torch.einsum("nk,bsk->bsn", P, x), "einsum reads it"),
    "two contracted": (lambda x, P, b: torch.einsum("bsk,nk->bs", x, P), "einsum reads it"),
    "batched einsum": (lambda x, P, b: torch.einsum("nsk,nk->ns", x[:, :, :].repeat(3, 1, 1), P), "einsum reads it"),
    "of itself": (lambda x, P, b: F.linear(P, P) + x.sum(), "linear reads it"),
    "written between": (lambda x, P, b: F.linear(x.mul(1).add_(1), P), "add_ may write to memory before the product"),
}


def check_reading(read, reason):
    with hosts.seeded(1):
        base = Alone(Reads(read))
    model = adaptc.compile(copy.deepcopy(base), lora(targets="inner.P"), backend="aot_eager", verify="raise").train()
    batch = {"x": torch.randn(2, 4, 10)}
    check_steps_agree(step(model, batch), formula_step(model, base, batch, scale=SCALE), loss=1e-5)
    (graph,) = model.adaptc.graphs
    left = ops_of(graph.graph_module("canonicalise"))
    assert ("lora_weight" in left) == (reason is not None) and ("lora_linear" in left) == (reason is None)
    assert reason is None or reason in str(model.adaptc.explain())


@pytest.mark.parametrize("read", LINEAR)
def test_linear_products_become_low_rank(read):
    check_reading(LINEAR[read], None)


@pytest.mark.parametrize("read", OTHER)
def test_other_reads_keep_the_sum_and_say_why(read):
    check_reading(*OTHER[read])


def test_several_adapters_of_one_parameter():
    with hosts.seeded(1):
        base = Alone(Reads(LINEAR["linear"]))
    model = adaptc.compile(copy.deepcopy(base), lora(targets="inner.P"), backend="aot_eager")
    model.adaptc.add("other", lora(targets="inner.P", r=2))
    model.adaptc.switch(["default", "other"])
    x = torch.randn(2, 4, 10)
    total = sum(a.delta() for a in model.adaptc.sites[0].adapters.values())
    want = F.linear(x.double(), base.inner.P.double() + total, base.inner.bias.double())
    torch.testing.assert_close(model(x=x).double(), want, rtol=1e-5, atol=1e-5)
    graph = model.adaptc.graphs[-1]
    # One node for both: they read the same x.
    assert ops_of(graph.graph_module("canonicalise")) == ["lora_linear"]


def under_autocast(x, P, b):
    with torch.autocast("cpu", torch.bfloat16):
        return F.linear(x, P, b)


@pytest.mark.parametrize("read", [LINEAR["linear"], under_autocast])
def test_autocast_goes_on_acting_on_the_frozen_product(read):
    with hosts.seeded(1):
        base = Alone(Reads(read))
    model = adaptc.compile(copy.deepcopy(base), lora(targets="inner.P"), backend="aot_eager")
    batch = {"x": torch.randn(2, 40, 10)}
    plain = copy.deepcopy(base)
    plain.inner.read = LINEAR["linear"]
    want = formula_step(model, plain, batch, scale=SCALE)
    with torch.autocast("cpu", torch.bfloat16, enabled=read is not under_autocast):
        out = model(**batch)
        assert out.dtype == torch.bfloat16
        got = step(model, batch)
    errors = relative_errors(got[1], want[1])
    assert 1e-5 < max(errors.values()) < 2e-2
    (graph,) = model.adaptc.graphs
    after = graph.graph_module("canonicalise")
    assert "lora_linear" in ops_of(after)
    assert [node_value(n).dtype for n in after.graph.nodes if n.target is F.linear] == [torch.bfloat16]


def test_lives_as_other_sites_do():
    def build():
        with hosts.seeded(7):
            return gemma3()[0]

    check_life(build, lora(targets="mm_input_projection_weight"), {"vision_outputs": torch.randn(2, 16, 24)}, sites=1)


def test_files_of_peft_both_ways(tmp_path):
    base, batch = qwen3_moe(), hosts.batch("llama")
    plan = [lora(targets=["q_proj"], layers="0"), lora(targets=["gate.weight", "experts.down_proj"])]
    model = adaptc.compile(copy.deepcopy(base), plan, backend="eager")
    want = loss_of(model(**batch)).detach()
    model.adaptc.save(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours")
    config = theirs.peft_config["default"]
    assert sorted(config.target_parameters) == ["experts.down_proj", "gate.weight"]
    assert (config.target_modules, config.layers_to_transform) == ({"q_proj"}, [0])
    torch.testing.assert_close(loss_of(theirs(**batch)).detach(), want, rtol=2e-6, atol=0)
    theirs.save_pretrained(tmp_path / "theirs")
    again = adaptc.compile(copy.deepcopy(base), tmp_path / "theirs", backend="eager")
    torch.testing.assert_close(loss_of(again(**batch)).detach(), want, rtol=2e-6, atol=0)
    assert len(again.adaptc.sites) == 3


def test_a_name_means_modules_where_it_has_some():
    base = qwen3_moe(mlp_only_layers=[1], num_hidden_layers=2)
    resolution = adaptc.Plan(lora(targets="down_proj")).resolve(base)
    assert [s.path for s in resolution.sites] == ["model.layers.1.mlp.down_proj"]
    assert resolution.left_out == [
        ("model.layers.0.mlp.experts.down_proj",
         'a parameter, and "down_proj" means modules here: name it "experts.down_proj"')
    ]  # fmt: skip
    both = adaptc.Plan(lora(targets=["down_proj", "experts.down_proj"])).resolve(base)
    assert [(s.path, s.parameter) for s in both.sites] == [
        ("model.layers.0.mlp.experts.down_proj", "down_proj"), ("model.layers.1.mlp.down_proj", None),
    ]  # fmt: skip
    assert both.left_out == []


def test_selectors_of_parameters():
    base = qwen3_moe(num_hidden_layers=2)

    def chosen(**options):
        return [s.path.removeprefix("model.layers.") for s in adaptc.Plan(lora(**options)).resolve(base).sites]

    assert chosen(targets="re:.*experts.(gate_up|down)_proj", layers="1") == [
        "1.mlp.experts.gate_up_proj", "1.mlp.experts.down_proj",
    ]  # fmt: skip
    assert chosen(targets="*experts*", exclude="layers.0.*") == chosen(targets="experts.*_proj", layers="1-")
    assert chosen(targets="gate.weight") == ["0.mlp.gate.weight", "1.mlp.gate.weight"]


def test_refuses_what_it_would_get_wrong():
    def refused(targets, model=None, **options):
        with pytest.raises((SiteError, PlanError)) as error:
            adaptc.Plan(lora(targets=targets, **options)).resolve(model or qwen3_moe())
        return str(error.value)

    assert "it has 1 dimensions" in refused("input_layernorm.weight")
    assert "names 1 parameter that cannot be adapted" in refused("gate.weight", dropout=0.1)
    assert "(parameter of Qwen3MoeTopKRouter): dropout" in refused("gate.weight", dropout=0.1)
    xclip = nn.ParameterList([nn.Parameter(torch.randn(3, 4))])
    assert "ParameterList has no forward" in refused("held.0", nn.ModuleDict({"held": xclip}))
    own = Reads(LINEAR["linear"])
    assert "the model itself owns it" in refused("P", own)
    attention = nn.Sequential(nn.MultiheadAttention(4, 2))
    assert "reads it without calling the module" in refused("out_proj.weight", attention)
    low = Alone(Reads(LINEAR["linear"]))
    low.inner.P.data = low.inner.P.data.to(torch.float8_e4m3fn)
    assert "it is torch.float8_e4m3fn" in refused("inner.P", low)
    with pytest.raises(PlanError, match=r"gate_up_proj is a parameter of .* and ia3 adapts modules"):
        adaptc.Plan(adaptc.IA3(targets="gate_up_proj")).resolve(qwen3_moe())


def test_a_module_that_is_called_without_arguments():
    """A table of positions or queries: there is no input to read, only the parameter."""

    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.randn(5, 6))

        def forward(self):
            return self.table

    class Host(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = Table(), nn.Linear(6, 3)

        def forward(self, x):
            return self.head(x + self.table())

    with hosts.seeded(0):
        base, x = Host(), torch.randn(2, 5, 6)
    model = adaptc.compile(copy.deepcopy(base), lora(targets=["table.table"]), backend="aot_eager")
    adapter = model.table.adapters["default~table"]
    A, B = (p.detach().clone().requires_grad_() for p in (adapter.lora_A, adapter.lora_B))
    want = base.head(x + base.table.table + SCALE * B @ A)
    want.sum().backward()
    got = model(x)
    got.sum().backward()
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(adapter.lora_A.grad, A.grad)
    torch.testing.assert_close(adapter.lora_B.grad, B.grad)
