"""LoRA by rows on a CPU: the kernels against the formula in fp64, at sizes with whole and cut tiles."""

from __future__ import annotations

import pytest
import torch

from adaptc.codegen.ops import lora_rows


def case(dtype, factors, ids, ranks=(1, 3), K=5, N=4):
    generator = torch.Generator().manual_seed(0)

    def tensor(*shape, dtype):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    x, y = tensor(len(ids), K, dtype=dtype), tensor(len(ids), N, dtype=dtype)
    A = [torch.nn.Parameter(tensor(r, K, dtype=factors)) for r in ranks]
    B = [torch.nn.Parameter(tensor(N, r, dtype=factors)) for r in ranks]
    return x, y, A, B, [torch.tensor([0.5 + i], dtype=torch.float64) for i in range(len(ranks))], torch.tensor(ids)


def formula(x, y, A, B, scale, ids, numbers):
    """y' in fp64, with h rounded to the dtype of x as the op does."""
    out = y.double()
    for a, b, s, number in zip(A, B, scale, numbers, strict=True):
        h = (s.double() * (x.double() @ a.detach().to(x.dtype).double().T)).to(x.dtype).double()
        out = torch.where((ids == number)[:, None], y.double() + h @ b.detach().to(x.dtype).double().T, out)
    return out


class TestRunOpByOp:
    @pytest.mark.parametrize("factors", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_any_dtypes(self, dtype, factors):
        x, y, A, B, scale, ids = case(dtype, factors, [7, 2, 9, 2, 7, 7])
        got = lora_rows.run(x, y, A, B, scale, ids, [2, 7])
        assert (got.dtype, got.shape, got.requires_grad) == (dtype, y.shape, False)
        assert torch.equal(got[2], y[2])
        want, tolerance = formula(x, y, A, B, scale, ids, [2, 7]), 30 * torch.finfo(dtype).eps
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)

    def test_sequences_strides_and_a_wider_input(self):
        x, y, A, B, scale, ids = case(torch.bfloat16, torch.float32, [1, 0, 5, 1, 1, 0])
        want = lora_rows.run(x, y, A, B, scale, ids, [0, 1])
        wide = torch.zeros(3, 2, 10, dtype=torch.float32)[..., ::2]
        wide.copy_(x.view(3, 2, 5))
        turned = y.t().contiguous().t().view(3, 2, 4)
        got = lora_rows.run(wide, turned, A, B, scale, ids.view(3, 2), (0, 1))
        assert got.is_contiguous() and torch.equal(got.view(6, 4), want)

    @pytest.mark.parametrize("rows, adapters", [(0, 2), (4, 0)])
    def test_nothing_to_do(self, rows, adapters):
        x, y, A, B, scale, ids = case(torch.float32, torch.float32, [0] * rows)
        got = lora_rows.run(x, y, A[:adapters], B[:adapters], scale[:adapters], ids, [0, 1][:adapters])
        assert torch.equal(got, y) and (not rows or got.data_ptr() != y.data_ptr())
