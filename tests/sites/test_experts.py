"""LoRA on the fused weights of mixtures of experts: W_e + s B_e A_e in fp64, PEFT, and what is never made."""

from __future__ import annotations

import copy
import itertools
import warnings

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import adaptc
from adaptc.errors import SiteError, UnsupportedError
from adaptc.ir.ops import grouped
from adaptc.ir.sites import site_of
from adaptc.methods.lora import experts
from adaptc.torch_internals import storage_key
from tests.models import hosts
from tests.reference import check_steps_agree, loss_of, reference_step, relative_errors, step
from tests.sites.life import check_life
from tests.sites.moe import ALONE, NAMES, alone, alone_batch, copy_to_peft, formula_step, peft_gradients, qwen3_moe

SCALE = 2.0


def lora(**options):
    return adaptc.LoRA(**{"r": 3, "alpha": 6, "init": "random", "targets": NAMES, **options})


def compiled(base, backend="aot_eager", **options):
    return adaptc.compile(copy.deepcopy(base), lora(**options), backend=backend, fullgraph=True)


def peft_twin(base, model, **options):
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=[], target_parameters=list(NAMES), **options)
    twin = peft.get_peft_model(copy.deepcopy(base), config)
    copy_to_peft(model, twin)
    return twin.train(model.training)


@pytest.mark.parametrize("backend", [pytest.param("eager", marks=pytest.mark.slow), "aot_eager"])
def test_qwen3_moe_computes_the_formula_in_one_graph(backend):
    base = qwen3_moe(num_hidden_layers=2)
    model = compiled(base, backend).train()
    for rows, length in ((2, 10), (3, 7))[: 2 if backend == "eager" else 1]:
        batch = hosts.batch("llama", rows=rows, length=length)
        want = formula_step(model, base, batch, scale=SCALE)
        assert len(want[1]) == 8
        check_steps_agree(step(model, batch), want)
    handle = model.adaptc
    assert (handle.eager_sites(), handle.idle_sites(), handle.metrics()["recompile_limits_hit"]) == ([], [], 0)
    for graph in handle.graphs:
        assert graph.break_reason is None
        assert len(graph.reports[0].result.applied) == 4 and graph.reports[0].result.refused == []


def test_a_model_of_one_shape_is_one_graph():
    model = compiled(qwen3_moe(num_hidden_layers=2)).train()
    for seed in (0, 1):
        step(model, hosts.batch("llama", seed=seed))
    assert model.adaptc.metrics()["graphs"] == 1 and model.adaptc.metrics()["recompiles"] == 0
    (graph,) = model.adaptc.graphs
    kernels = [n.target for part in graph.parts for n in part.graph.nodes if n.op == "call_function"]
    # A layer has two frozen products and two times two for the factors; the backward as many, but that the first
    # layer's rows need no gradient, and an outer product for each factor. Nothing is computed twice.
    assert kernels.count(grouped.grouped_outer) == 8
    assert kernels.count(grouped.grouped_mm) == 12 + 12 - 2
    assert {site_of(n) for p in graph.parts for n in p.graph.nodes if n.target is grouped.grouped_outer} == {
        "model.layers.0.mlp.experts", "model.layers.1.mlp.experts",
    }  # fmt: skip


@pytest.mark.parametrize("host", [pytest.param("mixtral", marks=pytest.mark.slow), "qwen3_moe"])
def test_computes_what_peft_computes(host):
    base = hosts.build("mixtral", num_hidden_layers=1) if host == "mixtral" else qwen3_moe()
    model = compiled(base).train()
    twin = peft_twin(base, model)
    batch = hosts.batch("mixtral")
    loss, got = step(model, batch)
    want = twin(**batch).loss
    want.backward()
    torch.testing.assert_close(loss, want.detach().double(), rtol=2e-6, atol=0)
    errors = relative_errors(got, peft_gradients(model, twin))
    assert len(errors) == 4 and max(errors.values()) < 1e-5


@pytest.mark.parametrize("name", ALONE)
def test_every_layout_computes_the_formula(name):
    base = alone(name)
    first = "up_proj" if name == "nemotron_h" else "gate_up_proj"
    model = compiled(base, targets=[f"experts.{first}", "experts.down_proj"]).train()
    for rows in (7, 5):
        batch = alone_batch(rows)
        plain = loss_of(base(**batch)).detach()
        want = formula_step(model, base, batch, scale=SCALE)
        assert len(want[1]) == 4 and abs(float(want[0] - plain)) > 1e-2
        check_steps_agree(step(model, batch), want, loss=2e-5)
    adapters = model.adaptc.sites[0].of("default")
    assert [a.parameter for a in adapters] == [first, "down_proj"]
    assert all(not a.lora_A.grad[1].any() and a.lora_A.grad[0].any() for a in adapters), "expert 1 had no rows"


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_whatever_the_host_computes_with(implementation):
    base = alone("gpt_oss")
    base.set_experts_implementation(implementation)
    model = compiled(base).train()
    check_steps_agree(step(model, alone_batch()), formula_step(model, base, alone_batch(), scale=SCALE), loss=2e-5)


def test_one_stack_alone_and_two_rules_with_ranks_of_their_own():
    base = alone("gpt_oss")
    model = compiled(base, targets="experts.down_proj")
    check_steps_agree(step(model, alone_batch()), formula_step(model, base, alone_batch(), scale=SCALE), loss=2e-5)
    plan = [lora(targets=NAMES[0], r=2, alpha=4), lora(targets=NAMES[1], r=5, alpha=10)]
    model = adaptc.compile(copy.deepcopy(base), plan, backend="aot_eager")
    assert [a.lora_A.shape[1] for a in model.adaptc.sites[0].of("default")] == [2, 5]
    check_steps_agree(step(model, alone_batch()), formula_step(model, base, alone_batch(), scale=SCALE), loss=2e-5)


class Made(TorchDispatchMode):
    """The largest tensor that an op makes, views of other tensors left aside."""

    def __init__(self, known):
        super().__init__()
        self.known, self.largest = {storage_key(t) for t in known}, (0, "")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and storage_key(tensor) not in self.known:
                self.largest = max(self.largest, (tensor.numel(), str(func)))
        return result


def smallest_stack(base):
    return min(p.numel() for n, p in base.named_parameters() if n.endswith(NAMES))


def test_nothing_of_the_size_of_the_weights_is_made():
    """Seen by a dispatch mode, op by op; PEFT's model and the host's own backward are what it does see."""
    base = qwen3_moe(experts=16)
    model = compiled(base).train()
    batch, limit = hosts.batch("llama", rows=1, length=6), smallest_stack(base) / 4

    def largest(one):
        with Made(one.parameters()) as made, torch.compiler.set_stance("force_eager"):
            loss_of(one(**batch)).backward()
        return made.largest

    assert 500 < largest(model)[0] < limit, largest(model)
    assert largest(peft_twin(base, model))[0] >= 4 * limit
    plain = copy.deepcopy(base)
    plain.model.embed_tokens.weight.requires_grad_(True)
    assert largest(plain)[0] >= 4 * limit


def test_nothing_of_the_size_of_the_weights_is_in_the_graphs():
    base = qwen3_moe(experts=16)
    model = compiled(base).train()
    step(model, hosts.batch("llama", rows=1, length=6))
    limit, seen = smallest_stack(base) / 4, 0
    (graph,) = model.adaptc.graphs
    for part in graph.parts:
        memory = {storage_key(n.meta["val"]) for n in part.graph.nodes if _makes(n, "placeholder")}
        for node in part.graph.nodes:
            if _makes(node, "call_function") and storage_key(node.meta["val"]) not in memory:
                seen += 1
                assert node.meta["val"].numel() < limit, node.format_node()
    assert seen > 100


def _makes(node, op):
    return node.op == op and isinstance(node.meta.get("val"), torch.Tensor)


def test_the_kernels_make_nothing_large_inside_either():
    E, K, N, S = 16, 64, 48, 12
    x, weight, grad = torch.randn(S, K), torch.randn(E, N, K), torch.randn(S, N)
    offs = torch.arange(1, E + 1, dtype=torch.int32).clamp(max=S)
    with Made([x, weight, grad]) as made:
        grouped.mm(x, weight.transpose(1, 2), offs)
        grouped.mm(grad, weight, offs)
    assert made.largest[0] == S * K < E * N * K / 4


def test_frozen_experts_get_no_gradient_and_trained_ones_would():
    x, weight = torch.randn(5, 3, dtype=torch.float64), torch.randn(2, 3, 4, dtype=torch.float64)
    offs = torch.tensor([2, 5], dtype=torch.int32)
    x.requires_grad_()
    out = grouped.grouped_mm(x, weight, offs)
    assert out.grad_fn is not None
    out.sum().backward()  # an expanded gradient, which torch's own kernel refuses
    assert weight.grad is None and x.grad is not None
    weight.requires_grad_()
    assert torch.autograd.gradcheck(grouped.grouped_mm, (x, weight, offs))
    assert torch.autograd.gradgradcheck(grouped.grouped_mm, (x, weight, offs))


def test_gradients_pass_frozen_experts_in_a_traced_backward():
    """transformers 5.19 reads the groups' sizes in the backward of its grouped product."""
    base = qwen3_moe()
    base.set_experts_implementation("grouped_mm")
    model = adaptc.compile(
        copy.deepcopy(base), adaptc.LoRA(r=2, targets=["q_proj"], init="random"), backend="aot_eager", fullgraph=True
    ).train()
    batch = hosts.batch("llama")
    base.set_experts_implementation("eager")  # torch's grouped product has no fp64
    check_steps_agree(step(model, batch), reference_step(model, base, batch), loss=2e-5)


def test_lives_as_other_sites_do():
    check_life(lambda: alone("gpt_oss"), lora(), alone_batch(), sites=1)


@pytest.mark.slow
def test_lives_as_other_sites_do_in_a_whole_model():
    check_life(lambda: hosts.build("mixtral"), lora(), hosts.batch("mixtral"), sites=2)


def test_checkpointed_blocks():
    base = qwen3_moe(use_cache=False)
    host = copy.deepcopy(base)
    host.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model = compiled(host, targets=[*NAMES, "gate.weight"]).train()
    got, want = step(model, hosts.batch("llama")), formula_step(model, base, hosts.batch("llama"), scale=SCALE)
    assert len(want[1]) == 6
    check_steps_agree(got, want)
    assert model.adaptc.eager_sites() == [] and model.adaptc.idle_sites() == []


@pytest.mark.slow
def test_sixteen_bits_and_autocast_are_as_exact_as_pefts():
    ours, theirs = [], []
    for name, seed in itertools.product(("gpt_oss", "aria"), range(2)):
        base, batch = alone(name), alone_batch(9, seed=seed)
        base.set_experts_implementation("eager")  # torch's grouped product has no bf16 of these sizes
        model = compiled(base).train()
        want = formula_step(model, base, batch, scale=SCALE)
        for host, cast in ((copy.deepcopy(base).bfloat16(), False), (base, True)):
            other = compiled(host).train()
            values = {n: v for n, v in model.state_dict().items() if ".adapters." in n}
            other.load_state_dict({**other.state_dict(), **values})
            twin = peft_twin(host, model)
            inputs = {n: t.to(host.experts.down_proj.dtype) if n == "hidden" else t for n, t in batch.items()}
            with torch.autocast("cpu", torch.bfloat16, enabled=cast):
                got = step(other, inputs)
                twin.zero_grad()
                loss_of(twin(**inputs)).backward()
            assert len(other.adaptc.graphs) == 1
            ours += relative_errors(got[1], want[1]).values()
            theirs += relative_errors(peft_gradients(other, twin), want[1]).values()
    assert len(ours) == 32 and 1e-2 < sum(ours) <= 1.1 * sum(theirs)


def test_refuses_what_it_would_get_wrong():
    def refused(**options):
        with pytest.raises(SiteError) as error:
            compiled(alone("gpt_oss"), **options)
        return str(error.value)

    assert "dropout on the input of a parameter's product does not exist here" in refused(dropout=0.1)
    assert "dora is for linear layers" in refused(dora=True)
    assert "of a GptOssExperts LoRA adapts gate_up_proj and down_proj" in refused(targets="experts.down_proj_bias")
    assert "name its parameters, experts.gate_up_proj" in refused(targets="experts")
    spread = alone("gpt_oss")
    spread.experts._is_expert_parallel = True
    with pytest.raises(SiteError, match="spread over several processes"):
        adaptc.compile(spread, lora())


def test_all_linear_says_how_to_name_them():
    model = adaptc.compile(qwen3_moe(), lora(targets="all-linear"), backend="eager")
    assert 'experts.down_proj: fused expert weights, not linear layers: name them, "experts.down_proj"' in str(
        model.adaptc.explain()
    )


def test_explain_counts_parameters():
    model = compiled(qwen3_moe())
    assert "alpha=6" in str(model.adaptc.explain()) and ": 2 parameters\n" in str(model.adaptc.explain())


def test_merged_it_is_the_same_model():
    base = alone("aria")
    model = compiled(base)
    want = loss_of(model(**alone_batch())).detach()
    merged = model.adaptc.merge_and_unload()
    assert list(merged.state_dict()) == list(base.state_dict())
    torch.testing.assert_close(loss_of(merged(**alone_batch())).detach(), want, rtol=1e-5, atol=1e-5)


@given(st.data())
def test_the_op_computes_its_formula(data):
    x, y, A, B, scale, offs = experts.sample(data.draw)
    got = experts.EXPERTS.overload(x, y, A, B, scale, offs)
    # Row by row: the expert of a row is the number of groups that end before it.
    ids = [sum(int(end) <= row for end in offs.tolist()) for row in range(x.shape[0])]
    rows = [
        (y[i].double() + scale * (B[e].double() @ (A[e].double() @ x[i].double())),
         y[i].double().abs() + scale.abs() * (B[e].double().abs() @ (A[e].double().abs() @ x[i].double().abs())))
        for i, e in enumerate(ids)
    ]  # fmt: skip
    assert got.dtype == y.dtype and got.shape == y.shape
    for i, (want, size) in enumerate(rows):
        # One rounding each of A, B, h, its scaled form, the product and the sum, and fp32 sums of at most 7 terms.
        bound = 20 * torch.finfo(y.dtype).eps * size + 1e-30
        assert bool(((got[i].double() - want).abs() <= bound).all())


@given(st.data())
def test_the_kernels_compute_their_formula_and_torchs_own_agrees(data):
    x, y, A, _, _, offs = experts.sample(data.draw)
    A = A.to(x.dtype)
    got, ids = grouped.mm(x, A.transpose(1, 2), offs), torch.bucketize(torch.arange(x.shape[0]), offs, right=True)
    want = torch.einsum("sk,srk->sr", x.double(), A.double()[ids])
    tolerance = 20 * torch.finfo(x.dtype).eps * float(want.abs().max() if want.numel() else 1) + 1e-6
    torch.testing.assert_close(got.double(), want, rtol=0, atol=tolerance)
    outer = grouped.outer(x, y, offs)
    sums = torch.stack([x[ids == e].double().T @ y[ids == e].double() for e in range(len(offs))])
    torch.testing.assert_close(outer.double(), sums, rtol=2e-2 if x.dtype is torch.bfloat16 else 1e-5, atol=0.1
                               if x.dtype is torch.bfloat16 else 1e-5)  # fmt: skip
    # Rows behind the last group.
    padded = torch.cat([x, x.new_ones(2, x.shape[1])])
    alone = grouped.mm(padded, A.transpose(1, 2), offs)[: x.shape[0]]
    torch.testing.assert_close(alone.double(), want, rtol=0, atol=tolerance)
    assert not grouped.mm(padded, A.transpose(1, 2), offs)[x.shape[0] :].any()
    aligned, wide = (torch.nn.functional.pad(t.bfloat16(), (0, 8 - t.shape[-1])).contiguous() for t in (x, A))
    weight = torch.nn.functional.pad(wide, (0, 0, 0, 8 - wide.shape[1])).transpose(1, 2)
    if x.shape[0]:
        assert grouped.is_native(aligned, weight)
        torch.testing.assert_close(
            grouped.native_mm(aligned, weight, offs), grouped.mm(aligned, weight, offs), rtol=2e-2, atol=2e-2
        )


def test_torchs_kernel_is_asked_only_for_what_it_takes():
    x, weight = torch.randn(4, 16).bfloat16(), torch.randn(2, 16, 24).bfloat16()
    assert grouped.is_native(x, weight) and grouped.is_native(x, weight.transpose(1, 2).contiguous().transpose(1, 2))
    assert not grouped.is_native(x.float(), weight.float())
    assert not grouped.is_native(x, weight[:, :, :3].contiguous())
    assert not grouped.is_native(x[:, ::2], weight[:, ::2])


@pytest.mark.parametrize(
    ("build", "batch"),
    [
        (lambda: alone("gpt_oss"), alone_batch()),
        pytest.param(qwen3_moe, hosts.batch("llama"), marks=pytest.mark.slow),
    ],
)
def test_saved_for_peft_and_read_from_it(tmp_path, build, batch):
    base = build()
    model = compiled(base, rank_pattern={"down_proj": 2}, alpha_pattern={"down_proj": 10})
    want = loss_of(model(**batch)).detach()
    model.adaptc.save(tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours")
    torch.testing.assert_close(loss_of(theirs(**batch)).detach(), want, rtol=5e-6, atol=0)
    theirs.save_pretrained(tmp_path / "theirs")
    again = adaptc.compile(copy.deepcopy(base), tmp_path / "theirs", backend="eager")
    torch.testing.assert_close(loss_of(again(**batch)).detach(), want, rtol=5e-6, atol=0)
    (rule,) = again.adaptc.records["default"].plan.rules
    assert sorted(rule.match.targets) == sorted(NAMES)
    again.adaptc.save(tmp_path / "again")
    next(m for m in theirs.modules() if hasattr(m, "set_scale") and m.parameter_name == NAMES[0][8:]).scaling[
        "default"
    ] = 0.5
    taken = adaptc.compile(theirs, backend="eager")
    assert [a.scaling for a in taken.adaptc.sites[0].of("default")] == [0.5, 5.0]
    for name in ("ours", "again"):
        found, like = _tensors(tmp_path / name), _tensors(tmp_path / "theirs")
        assert found.keys() == like.keys() and all(torch.equal(found[k], like[k]) for k in like)


def _tensors(directory):
    from safetensors.torch import load_file

    return load_file(directory / "adapter_model.safetensors")


def test_a_dropout_that_peft_would_refuse_beside_parameters_is_not_written(tmp_path):
    plan = [lora(), lora(targets="q_proj", dropout=0.1)]
    model = adaptc.compile(qwen3_moe(), plan, backend="eager")
    with pytest.raises(UnsupportedError, match="PEFT's format has one dropout for all LoRA sites"):
        model.adaptc.save(tmp_path)
