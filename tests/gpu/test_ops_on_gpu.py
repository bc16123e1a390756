"""Every dialect op on an accelerator: its body, what it is lowered to, and the masks of dropout bit by bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptc import methods
from adaptc.codegen.ops import dora, registry  # noqa: F401  (ops run as in a graph)
from adaptc.ir import dialect
from adaptc.ir.ops.dropout import keep_mask
from adaptc.ir.sites import dialect_nodes
from adaptc.passes.contract import Context
from adaptc.passes.lower import lower
from tests.codegen.ops.test_lowering import graph_of
from tests.ir.formulas import FORMULAS, in_double, outputs
from tests.methods.test_dora import CANCELLED, nearly_cancelled

pytestmark = pytest.mark.gpu

methods.load_all()
#: One computes nothing but a library call of CPUs.
OPS = [name for name in dialect.names() if name != "onednn_linear"]


def on(device, args):
    return torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.to(device), list(args))


@pytest.mark.parametrize("name", OPS)
@settings(max_examples=20)
@given(data=st.data())
def test_an_op_and_what_it_is_lowered_to_are_as_close_to_fp64_as_on_a_cpu(device, name, data):
    op = dialect.get(name)
    args = op.sample(data.draw)
    there = on(device, args)
    gm, tensors = graph_of(name, there)
    while lower(gm, Context()).applied:  # to other ops, which are lowered in turn
        pass
    assert dialect_nodes(gm) == [], "no kernel of a CPU stays"
    formula = FORMULAS.get(name, op.body)  # the other ops' bodies have their formulas in the tests of their methods
    cases = zip(
        outputs(op.overload(*there)), gm(*tensors), outputs(op.body(*args)), outputs(formula(*in_double(args))),
        strict=True,
    )  # fmt: skip
    for got, lowered, here, want in cases:
        dtype = min((t.dtype for t in (*tensors, here) if t.is_floating_point()), key=lambda d: d.itemsize)
        units = 32 if dtype == torch.float64 else 8
        allowed = (here.double() - want).norm() * 1.1 + units * torch.finfo(dtype).eps * (1 + want.norm())
        for found in (got, lowered):
            assert (found.shape, found.dtype, found.device.type) == (here.shape, here.dtype, device.type)
            assert (found.cpu().double() - want).norm() <= allowed, name


@settings(max_examples=50)
@given(data=st.data())
def test_dropout_keeps_what_it_keeps_on_a_cpu(device, data):
    x, seed, p = dialect.get("seeded_dropout").sample(data.draw)
    want = dialect.get("seeded_dropout").overload(x, seed, p)
    got = dialect.get("seeded_dropout").overload(x.to(device), seed.to(device), p)
    torch.testing.assert_close(got.cpu(), want, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_generated_code_keeps_what_it_keeps_on_a_cpu(device, dtype):
    for shape in ((1,), (3, 5), (2, 7, 130), (1000, 4097)):
        x, seed = torch.randn(shape, dtype=dtype), torch.tensor([2**61 + 12345])
        compiled = torch.compile(lambda x, seed: dialect.get("seeded_dropout").body(x, seed, 0.3), dynamic=False)
        got = compiled(x.to(device), seed.to(device)).cpu()
        assert torch.equal(got != 0, keep_mask(x, seed, 0.3) & (x != 0))
        torch.testing.assert_close(got, dialect.get("seeded_dropout").body(x, seed, 0.3))


@pytest.mark.parametrize("compiled", [False, True])
def test_row_norms_of_a_bf16_weight_are_exact_to_fp32(device, compiled):
    W, A, B, scale = nearly_cancelled()
    call = torch.compile(dora.IN_BF16.run, dynamic=False) if compiled else dialect.get("dora_row_norm").overload
    got = call(*on(device, [W, A, B, scale]), False)
    assert got.dtype == torch.float32
    want = (W.double() + scale.double() * B.double() @ A.double()).norm(dim=1)
    torch.testing.assert_close(got.cpu().double(), want, rtol=CANCELLED, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["lora_linear_expand", "lora_linear_input_grads", "lora_shrink", "lora_factor_grads"])
@pytest.mark.parametrize("drops", [False, True])
def test_large_products_through_inductor(device, name, drops, dtype):
    """Two sites of one value at the sizes of a model's layer, the odd ones of no use to a tile."""
    torch.manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, device=device).to(dtype)

    M, K, N, r = 2 * 257, 520, 392, 16
    x, g, q, h = draw(M, K), draw(M, N), [draw(M, r) for _ in range(2)], draw(M, r)
    A, B, W, scale = [draw(r, K) / 8 for _ in range(2)], draw(N, r), draw(N, K) / 8, torch.tensor([0.5], device=device)
    seeds, p = ([torch.tensor([i + 7], device=device) for i in range(2)], [0.3, 0.6]) if drops else ([], [])
    args = {
        "lora_linear_expand": [x, W.t(), None, h, B],
        "lora_linear_input_grads": [[g, 2 * g], [W, W], q, A, seeds, p],
        "lora_shrink": [x, A, [scale, scale], seeds, p],
        "lora_factor_grads": [q, x, torch.float32, seeds, p],
    }[name]
    op = dialect.get(name)
    gm, tensors = graph_of(name, args)
    lower(gm, Context())
    wants = outputs(op.body(*in_double(args)))
    for got, body, want in zip(torch.compile(gm)(*tensors), outputs(op.body(*args)), wants, strict=True):
        error, own = ((t.double() - want).norm() for t in (got, body))
        assert error <= 1.1 * own + torch.finfo(dtype).eps * want.norm() / 8
