"""Initial values of LoRA's factors that are read off the frozen weight W (N, K).

    pissa, pissa_niter_<k>   A = sqrt(S_r / s) V_r^T, B = U_r sqrt(S_r / s)      (Meng et al. 2024, equation 2)
    olora                    A = R[:r], B = Q[:, :r] of W = Q R                  (Büyükakyüz 2024, algorithm 1)
    corda                    as pissa, of W C instead of W; C: covariance of the inputs (Yang et al. 2024, section 3)
    orthogonal               random with B A = 0

The first three start with B A != 0 and train s (B A - B0 A0) on top of W. PEFT subtracts s B0 A0 from W instead. adaptc
leaves W as it is and computes the same function with a frozen copy of the initial pair, as a correction of rank 2r,

    s (B A - B0 A0) = s [B - B0, B0] [A; A - A0]

so other adapters, ``switch(None)``, a tied or 16-bit weight and ``detach()`` see the weight that they always saw. In
this form nothing cancels: the differences are taken in the factors' own dtype before any rounding to 16 bits, and at
the start the correction is zero to the bit, where a residual W - s B0 A0 is rounded to W's dtype.
"""

from __future__ import annotations

import math
import re

import torch

from adaptc.errors import SiteError

#: What ``LoRA.init`` may be, apart from ``pissa_niter_<k>``.
INITS = ("default", "gaussian", "random", "orthogonal", "pissa", "olora", "corda")
#: Damping of CorDA's covariance, and how far its product with its inverse may be from the identity.
DAMPING, INVERSE_ERROR = 0.01, 0.05

Factors = tuple[torch.Tensor, torch.Tensor]


def is_init(text: str) -> bool:
    """Whether ``LoRA.init`` may be ``text``."""
    return text in INITS or re.fullmatch(r"pissa_niter_[1-9]\d*", text) is not None


def reads_weight(init: str) -> bool:
    """Whether the initial factors come from the weight, and are a part of it that is trained."""
    return init.startswith("pissa") or init in ("olora", "corda")


def refusal(init: str, r: int, weight: torch.Tensor) -> str | None:
    """Why a weight has no initial factors of rank r, or None when it has."""
    if not reads_weight(init):
        return None
    if type(weight) not in (torch.nn.Parameter, torch.Tensor) or weight.layout != torch.strided:
        return f'init "{init}" decomposes the weight, and this one is no plain dense tensor ({type(weight).__name__})'
    if r > min(weight.shape):
        return f'init "{init}" of rank {r} needs as many singular values, and the weight is {tuple(weight.shape)}'
    return None


@torch.no_grad()
def from_weight(init: str, weight: torch.Tensor, r: int, scaling: float) -> Factors:
    """A (r, K) and B (N, r) for ``weight`` (N, K), by "pissa", "pissa_niter_<k>" or "olora"; in fp32 or fp64.

    ``pissa_niter_<k>`` draws random numbers.
    """
    W = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    if init == "olora":
        Q, R = torch.linalg.qr(W)
        return R[:r].contiguous(), Q[:, :r].contiguous()
    if init == "pissa":
        U, S, Vt = torch.linalg.svd(W, full_matrices=False)
        return _split(U[:, :r], S[:r], Vt[:r], scaling)
    U, S, V = torch.svd_lowrank(W, r, niter=int(init.rpartition("_")[2]))
    return _split(U, S, V.t(), scaling)


@torch.no_grad()
def from_covariance(
    weight: torch.Tensor, covariance: torch.Tensor, r: int, scaling: float, *, method: str, path: str
) -> Factors:
    """CorDA's A (r, K) and B (N, r): the SVD of ``weight`` times the damped ``covariance`` (K, K), split by it again.

    Args:
        method: "ipm" takes the first r directions (the task's), "kpm" the last (knowledge is kept).
        path: of the site, for errors.

    Raises:
        SiteError: the covariance is not finite, or cannot be inverted at any damping.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    W, C = weight.detach().to(dtype), covariance.to(dtype)
    damped, inverse = _damped(C, path)
    U, S, Vt = torch.linalg.svd(W @ damped, full_matrices=False)
    chosen = slice(None, r) if method == "ipm" else slice(S.shape[0] - r, None)
    return _split(U[:, chosen], S[chosen], (Vt @ inverse)[chosen], scaling)


def orthogonal(r: int, inputs: int, outputs: int) -> Factors:
    """Random A (r, K) and B (N, r) with B A = 0, as PEFT draws them; ``r`` is even."""
    Q, _ = torch.linalg.qr(torch.randn(r, r))
    A = torch.randn(inputs, r // 2).mm(Q[0::2]).t() / 10
    B = torch.randn(r // 2, outputs).t().mm(Q[1::2]) / 10
    return A.contiguous(), B.contiguous()


def _split(U: torch.Tensor, S: torch.Tensor, Vt: torch.Tensor, scaling: float) -> Factors:
    """U S Vt / scaling as B A, each factor with the root of the singular values."""
    root = (S / scaling).sqrt()
    return root[:, None] * Vt, U * root


def _damped(C: torch.Tensor, path: str) -> Factors:
    """C + d * mean(diag C) * I and its inverse; d is doubled until the inverse is one."""
    damping, level = DAMPING, C.diagonal().mean()
    eye = torch.eye(C.shape[0], dtype=C.dtype, device=C.device)
    while math.isfinite(float(level)) and float(level) > 0 and math.isfinite(damping):
        damped = C + damping * level * eye
        inverse, singular = torch.linalg.inv_ex(damped)
        if int(singular) == 0 and float(torch.dist(damped @ inverse, eye)) < INVERSE_ERROR:
            return damped, inverse
        damping *= 2
    raise SiteError(
        f"{path}: the covariance of its calibration inputs cannot be inverted",
        expected="inputs that are finite and not zero everywhere", found=f"mean square {float(level):g}",
        do="calibrate with other batches, or leave this module out",
    )  # fmt: skip
