"""Training steps on an accelerator through Inductor, against the same plan op by op on a CPU in fp64."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
import transformers
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache

import adaptc
from adaptc.passes.accumulate import memory
from tests.methods.in_fp64 import randomise
from tests.models import hosts
from tests.reference import (
    check_all_rewritten,
    check_steps_agree,
    factors_of,
    reference_model,
    reference_step,
    relative_errors,
    step,
)

pytestmark = pytest.mark.gpu
LORA = {"r": 3, "alpha": 6, "init": "random", "targets": "all-linear"}


@pytest.fixture(autouse=True)
def counted():
    counters.clear()


def lora(**options):
    return adaptc.LoRA(**{**LORA, **options})


def moved(batch, device):
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}


def on_cpu(found):
    return found[0].cpu(), {name: g.cpu() for name, g in found[1].items()}


def gpu_step(model, batch, device):
    return on_cpu(step(model, moved(batch, device)))


def exact_step(model, base, plan, batch):
    """The same plan with the same values in fp64, the graph's ops one by one on a CPU."""
    here = adaptc.compile(copy.deepcopy(base).double(), plan, backend="eager")
    values = dict(model.named_parameters())
    with torch.no_grad():
        for name, p in here.named_parameters():
            if p.requires_grad:
                p.copy_(values[name])
    return step(here.train(model.training), batch)


@pytest.mark.parametrize("host", sorted(hosts.HOSTS))
def test_lora_on_every_host_is_the_formula(device, host):
    base = hosts.short(host, train=True)
    if host == "mixtral":  # transformers' grouped products of fp32 cannot be captured on a GPU
        base.set_experts_implementation("batched_mm")
    model = adaptc.compile(copy.deepcopy(base).to(device), lora(), backend="inductor")
    batch = hosts.batch(host)
    got = gpu_step(model, batch, device)
    check_steps_agree(got, reference_step(model.cpu(), base, batch), loss=2e-5, gradient=1e-4)
    assert model.adaptc.eager_sites() == [] and model.adaptc.idle_sites() == []


PLANS = {
    "dora": lambda: lora(dora=True),
    "rslora": lambda: lora(rslora=True),
    "ia3": lambda: adaptc.Plan([
        adaptc.IA3(targets=["k_proj", "v_proj"]), adaptc.IA3(targets=["down_proj"], feedforward=True)
    ]),
    "vera": lambda: adaptc.VeRA(r=4, targets=["q_proj", "v_proj"]),
    "hydra": lambda: adaptc.Hydra(r=3, targets=["q_proj", "down_proj"]),
    "ssf": lambda: adaptc.SSF(targets=["q_proj", "up_proj"]),
    "bottleneck": lambda: adaptc.Bottleneck(r=4, targets=["mlp"], features=64, init="random"),
    "adaptformer": lambda: adaptc.AdaptFormer(
        targets=["mlp"], tap="post_attention_layernorm", r=4, dropout=0.0, init="random"
    ),
    "prefix": lambda: adaptc.Prefix(num_virtual_tokens=3),
    "prompt": lambda: adaptc.Prompt(num_virtual_tokens=3),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANS)
def test_methods(device, name):
    base, batch = hosts.short("llama", train=True), hosts.batch("llama")
    model = adaptc.compile(copy.deepcopy(base).to(device), PLANS[name](), backend="inductor")
    randomise(model.cpu(), size=0.1)
    got = gpu_step(model.to(device), batch, device)
    want = exact_step(model.cpu(), base, PLANS[name](), batch)
    assert abs(got[0] / want[0] - 1) < 2e-5
    scale = max(float(g.norm()) for g in want[1].values())
    assert got[1].keys() == want[1].keys() and scale > 0
    for parameter, g in got[1].items():
        assert float((g - want[1][parameter]).norm()) < 2e-4 * (want[1][parameter].norm() + 1e-3 * scale), parameter


@pytest.mark.parametrize("dora", [False, True])
def test_a_bf16_base_loses_no_more_than_peft(device, dora):
    """Gradients against fp64; PEFT computes beside a base in bf16 in fp32, so a little more than it loses is fair."""
    base, batch = hosts.short("llama", train=True), hosts.batch("llama", rows=4)
    base = base.to(torch.bfloat16)
    model = adaptc.compile(copy.deepcopy(base).to(device), lora(dora=dora), backend="inductor")
    assert all(p.dtype == torch.float32 for p in model.adaptc.parameters())
    got = gpu_step(model, batch, device)[1]
    want = exact_step(model.cpu(), base, lora(dora=dora), batch)[1]
    config = peft.LoraConfig(r=3, lora_alpha=6, use_dora=dora, target_modules="all-linear")
    other = peft.get_peft_model(copy.deepcopy(base), config)
    values = dict(model.named_parameters())

    def ours(name):
        short = name.removeprefix("base_model.model.").replace("lora_magnitude_vector.default.weight", "M")
        path, _, factor = short.replace(".default.weight", "").rpartition(".")
        return f"{path}.adapters.default.{'lora_magnitude' if factor == 'M' else factor}"

    with torch.no_grad():
        for name, p in other.named_parameters():
            if p.requires_grad:
                p.copy_(values[ours(name)])
    found = gpu_step(other.to(device), batch, device)[1]
    error = relative_errors(got, want)
    theirs = relative_errors({ours(name): g for name, g in found.items()}, want)
    total, peft_total = (torch.tensor(list(e.values())).norm() for e in (error, theirs))
    assert total < 2 * peft_total and total < 0.2


def test_dropout_repeats_with_the_seed_and_draws_new_masks(device):
    base, batch = hosts.short("llama", train=True), hosts.batch("llama")
    model = adaptc.compile(copy.deepcopy(base).to(device), lora(dropout=0.3), backend="inductor")
    steps = []
    for seed in (1, None, 1):
        if seed is not None:
            torch.manual_seed(seed)
        steps.append(gpu_step(model, batch, device))
    assert steps[0][0] == steps[2][0] != steps[1][0]
    for name, g in steps[0][1].items():
        assert torch.equal(g, steps[2][1][name]) and not torch.equal(g, steps[1][1][name]), name
    check_all_rewritten(model, 7)
    assert len(model.adaptc.graphs) == 1


def test_checkpointing_with_dropout_is_bit_equal(device):
    base, batch, found = hosts.build("llama", train=True, use_cache=False), hosts.batch("llama"), []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = adaptc.compile(copy.deepcopy(base).to(device), lora(dropout=0.1), backend="aot_eager")
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        torch.manual_seed(3)
        found.append(gpu_step(model, batch, device))
    (loss, plain), (again, recomputed) = found
    assert loss == again and all(torch.equal(g, recomputed[name]) for name, g in plain.items())


@pytest.mark.parametrize("regional", [False, True])
def test_deep_models_whole_and_by_block(device, regional):
    base, batch = hosts.build("llama", train=True, num_hidden_layers=3, use_cache=False), hosts.batch("llama")
    model = adaptc.compile(copy.deepcopy(base).to(device), lora(), backend="inductor", regional=regional)
    got = gpu_step(model, batch, device)
    check_steps_agree(got, reference_step(model.cpu(), base, batch), loss=2e-5, gradient=1e-4)


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_sums_in_place(device, mode, monkeypatch):
    """At any size, as otherwise where the copy of a product takes longer than a call."""
    monkeypatch.setattr(memory, "_WORTH_A_CALL", 0)
    base, batch = hosts.short("llama", train=True), hosts.batch("llama")
    with fresh_cache():  # the constant is in no key
        model = adaptc.compile(copy.deepcopy(base).to(device), lora(), mode=mode)
        for _ in range(3):
            torch.compiler.cudagraph_mark_step_begin()
            got = gpu_step(model, batch, device)
    assert counters["inductor"]["cudagraph_skips"] == 0
    (graph,) = model.adaptc.graphs
    assert graph.in_place >= 7, "the corrected output of every site"
    check_steps_agree(got, reference_step(model.cpu(), base, batch), loss=2e-5, gradient=1e-4)


def test_cuda_graphs(device):
    base, batch = hosts.short("llama", train=True), hosts.batch("llama")
    model = adaptc.compile(copy.deepcopy(base).to(device), lora(), mode="reduce-overhead")
    steps = []
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        steps.append(gpu_step(model, batch, device))
    assert counters["inductor"]["cudagraph_skips"] == 0
    want = reference_step(model.cpu(), base, batch)
    for got in steps:
        check_steps_agree(got, want, loss=2e-5, gradient=1e-4)


def test_cuda_graphs_draw_new_masks(device):
    base, batch = hosts.short("llama", train=True), hosts.batch("llama")
    model = adaptc.compile(copy.deepcopy(base).to(device), lora(dropout=0.3), mode="reduce-overhead")
    losses = []
    for _ in range(6):
        torch.compiler.cudagraph_mark_step_begin()
        losses.append(float(gpu_step(model, batch, device)[0]))
    assert len(set(losses)) == len(losses) and counters["inductor"]["cudagraph_skips"] == 0


def test_autocast(device):
    base, batch = hosts.short("llama", train=True), hosts.batch("llama")
    model = adaptc.compile(copy.deepcopy(base).to(device), lora(), backend="inductor")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        got = gpu_step(model, batch, device)
    want = reference_step(model.cpu(), base, batch)
    assert max(relative_errors(got[1], want[1]).values()) < 0.1


def test_deterministic_algorithms(device, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    base, batch = hosts.short("llama", train=True), hosts.batch("llama")
    torch.use_deterministic_algorithms(True)
    try:
        model = adaptc.compile(copy.deepcopy(base).to(device), lora(dropout=0.1), backend="inductor")
        torch.manual_seed(0)
        first = gpu_step(model, batch, device)
        torch.manual_seed(0)
        again = gpu_step(model, batch, device)
    finally:
        torch.use_deterministic_algorithms(False)
    assert first[0] == again[0] and all(torch.equal(g, again[1][n]) for n, g in first[1].items())


def test_fused_experts(device):
    config = transformers.Qwen3MoeConfig(
        vocab_size=hosts.VOCAB, hidden_size=64, intermediate_size=96, moe_intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    with hosts.seeded(0):
        base = transformers.Qwen3MoeForCausalLM(config)
        torch.nn.init.normal_(base.model.layers[0].mlp.gate.weight)
    base, batch = base.train().to(torch.bfloat16), hosts.batch("llama", rows=4)
    plan = lora(targets=["experts.gate_up_proj", "experts.down_proj", "q_proj", "v_proj"])
    model = adaptc.compile(copy.deepcopy(base).to(device), plan, backend="inductor")
    got = gpu_step(model, batch, device)
    assert len(model.adaptc.graphs) == 1 and model.adaptc.eager_sites() == []
    want = exact_step(model.cpu(), base, plan, batch)
    # A router in bf16 may send a token elsewhere.
    assert abs(got[0] / want[0] - 1) < 0.02
    assert max(relative_errors(got[1], want[1]).values()) < 0.5


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_bare_backend_recognises_peft(device, dropout):
    config = peft.LoraConfig(
        r=3, lora_alpha=6, target_modules="all-linear", init_lora_weights=False, lora_dropout=dropout
    )
    base, batch = hosts.short("llama", train=True), hosts.batch("llama")
    model = peft.get_peft_model(base, config).to(device).train()
    compiled = torch.compile(model, backend="adaptc")

    def run(call, batch):
        model.zero_grad()
        loss = call(**moved(batch, device)).loss
        loss.backward()
        return on_cpu((loss.detach().double(), {
            n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None
        }))  # fmt: skip

    if dropout:
        torch.manual_seed(1)
        first = run(compiled, batch)[0]
        torch.manual_seed(1)
        assert run(compiled, batch)[0] == first != run(compiled, batch)[0]
    else:
        check_steps_agree(run(compiled, batch), run(model, batch), loss=2e-5, gradient=1e-4)


def test_generation_with_a_cache(device):
    base, ids = hosts.short("llama"), hosts.batch("llama", rows=2)["input_ids"][:1]  # the second is padded
    model = adaptc.compile(copy.deepcopy(base).to(device), lora(), backend="inductor")
    got = model.generate(input_ids=ids.to(device), max_new_tokens=6, do_sample=False)
    reference, tokens = reference_model(base, factors_of(model.cpu())).eval(), ids
    for _ in range(6):
        tokens = torch.cat([tokens, reference(input_ids=tokens).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(got.cpu(), tokens)
