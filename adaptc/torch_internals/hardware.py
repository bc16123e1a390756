"""What a device computes itself, and in which precision and library."""

from __future__ import annotations

import functools
import platform

import torch

from adaptc.torch_internals.inductor import writes_products


@functools.cache
def cpu_emulates(dtype: torch.dtype) -> bool:
    """Whether this CPU has no instructions for products of ``dtype``, so that libraries go through fp32 number by
    number. 2.11 to 2.15."""
    if dtype not in (torch.bfloat16, torch.float16):
        return False
    if dtype == torch.bfloat16 and platform.machine() in ("x86_64", "AMD64"):
        # oneDNN takes bf16 on any CPU with AVX-512, and converts it there.
        return not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    name = "_is_mkldnn_bf16_supported" if dtype == torch.bfloat16 else "_is_mkldnn_fp16_supported"
    supported = getattr(torch.ops.mkldnn, name, None)
    return supported is None or not supported()


@functools.cache
def has_avx512_bf16() -> bool:
    """Whether this CPU multiplies pairs of bf16 in 512-bit registers and has nothing better, as the tiles of AMX are,
    which libraries use. 2.11 to 2.15."""
    if platform.machine() not in ("x86_64", "AMD64") or torch.cpu._is_amx_tile_supported():
        return False
    return torch.cpu._is_avx512_bf16_supported()


def may_call_onednn() -> bool:
    """Whether :func:`onednn_linear` works here, nobody has switched oneDNN off, torch's own fp32 products go to MKL,
    and Inductor is not to choose among templates or pack weights itself. 2.11 to 2.15."""
    from torch._inductor import config

    inductors = writes_products() or config.freezing
    on = torch._C._has_mkldnn and torch._C._get_mkldnn_enabled() and torch._C.has_mkl
    return bool(on) and not inductors and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def sums_bf16_in_fp32(device: torch.device) -> bool:
    """Whether ``torch.mm`` of matrices in bf16 gives its sums in fp32 when asked to: NVIDIA's libraries. 2.11 to
    2.15."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return not torch.cuda.is_available() or torch.cuda.get_device_capability(device) >= (8, 0)


def product_precision(device: str, dtype: torch.dtype = torch.float32) -> str:
    """In what matrix products of fp32 are computed on a kind of device: "ieee", "tf32" or "bf16"; other dtypes in
    their own. 2.11 to 2.15."""
    owner = getattr(torch.backends.cuda if device == "cuda" else torch.backends.mkldnn, "matmul", None)
    found = str(getattr(owner, "fp32_precision", "ieee")) if dtype == torch.float32 else "ieee"
    return found if found in ("tf32", "bf16") else "ieee"


def onednn_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x W^T + b of fp32 CPU matrices by oneDNN, ``weight`` (N, K) of any strides, read where it is. 2.11 to 2.15."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")  # type: ignore[no-any-return]
