"""Translation validation: does each rewritten cut-out compute what the nodes it replaced computed?

Before and after run on the same boundary values. In fp64, with dtype constants raised, the two must agree to
rounding: results, and on captured graphs the gradients of every boundary tensor that requires one (joint graphs
contain their backward as nodes). In the dtypes that really run, results must have one shape, dtype, strides and
device, and what the rewrite computes may not be further from the fp64 reference than what it replaces, by more
than a factor of two and a few units of rounding.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from adaptc.errors import VerifyError
from adaptc.ir.edit import Result, Rewrite
from adaptc.ir.names import model_tensor
from adaptc.ir.types import describe, same_type
from adaptc.passes.checks import cutout
from adaptc.passes.checks.boundary import visit_rewrites
from adaptc.passes.checks.claims import check_claims
from adaptc.passes.checks.structure import failure
from adaptc.torch_internals import node_value, real_tensors, tree_leaves

if TYPE_CHECKING:
    from adaptc.passes.contract import Pass

#: Two ways of summing S numbers in fp64 differ by about eps * sqrt(S) of the largest sum; the factor leaves room
#: for chains of such sums and for cancellation. A wrong formula is off by parts in a thousand, one computed in
#: fp32 by parts in ten million.
SLACK = 1024
#: Roundings that a rewrite may add where the original happened to make none.
EXTRA_ROUNDINGS = 4
_SEED = 0xC07A


def validator(mode: bool | str, inputs: Sequence[Any] | None) -> Validation | None:
    """The check for ``adaptc.compile(verify=mode)``; ``inputs``: the real inputs of a captured graph, if any."""
    if mode not in (True, False, "raise"):
        raise ValueError(f'verify is True, False or "raise", not {mode!r}')
    return Validation(inputs, raises=mode == "raise") if mode else None


@dataclasses.dataclass(frozen=True)
class Validation:
    """Validates one pass on one graph. ``raises``: a failure goes to the user instead of undoing the pass."""

    inputs: Sequence[Any] | None
    raises: bool = False

    def __call__(
        self, one: Pass, original: fx.GraphModule, gm: fx.GraphModule, result: Result
    ) -> tuple[float, float] | None:
        """Largest relative error, before and after, of anything compared; None when there was nothing.

        Raises:
            VerifyError: the pass is wrong, or did something else than it reports.
        """
        check_claims(one, original, gm, result)
        errors: list[tuple[float, float]] = []

        def visit(rewrite: Rewrite, values: list[Any], written: list[fx.Node]) -> None:
            errors.extend(_Comparison(one, rewrite, values).errors(written))

        for rewrite in result.applied:
            if rewrite.before is None:
                raise _fail(one, rewrite, "both cut-outs on record (Edit(..., record=context.record))", "none")
        with real_tensors():
            visit_rewrites(original, gm, result.applied, self.inputs, visit)
        if not errors:
            return None
        before, after = zip(*errors, strict=True)
        return max(before), max(after)


@dataclasses.dataclass
class _Comparison:
    one: Pass
    rewrite: Rewrite
    values: list[Any]

    def errors(self, written: Sequence[fx.Node]) -> Iterator[tuple[float, float]]:
        """Check one rewrite; yields (error before, error after) of every result and gradient."""
        if written:
            names = ", ".join(f"%{n.name}" for n in written)
            expected = "values that stay the same from the first to the last of the replaced nodes"
            raise self.fail(expected, f"{names} is written to in between")
        wanted = self._differentiable()
        before, after = self.rewrite.before, self.rewrite.after
        assert before is not None and after is not None
        try:
            native_after, exact_after = (cutout.run(after, self.values, wanted, double=d) for d in (False, True))
        except RuntimeError as error:
            raise self.fail("nodes that run, as those before the pass do", str(error)) from error
        # A pass that says which elements are dropped is compared on those.
        masks = native_after.masks
        native, exact = (cutout.run(before, self.values, wanted, double=d, masks=masks) for d in (False, True))
        self._check_types(native.results, native_after.results)
        if self.one.contract.numerics == "exact":
            self._check_bits(native.results, native_after.results)
        results = [f"%{old.name}" for old, _ in self.rewrite.replaced]
        yield from self._compare(
            results, native.results, native_after.results, exact.results, exact_after.results
        )
        cotangents = _cotangents(native.results)
        gradients = [f"the gradient of {name}" for name in self._leaf_names(wanted)]
        yield from self._compare(
            gradients, *(r.gradients(cotangents) for r in (native, native_after, exact, exact_after))
        )

    def fail(self, expected: str, found: str) -> VerifyError:
        return _fail(self.one, self.rewrite, expected, found)

    def _differentiable(self) -> list[bool]:
        """For each leaf of the boundary values, whether the graph may ask for its gradient."""
        flags = []
        for node, value in zip(self.rewrite.boundary, self.values, strict=True):
            leaves = tree_leaves(value)
            known = tree_leaves(node_value(node))
            is_captured = self.one.contract.level == "dynamo" and len(known) == len(leaves)
            for i, leaf in enumerate(leaves):
                is_float = isinstance(leaf, torch.Tensor) and leaf.dtype.is_floating_point
                flags.append(is_captured and is_float and bool(getattr(known[i], "requires_grad", False)))
        return flags

    def _leaf_names(self, wanted: Sequence[bool]) -> list[str]:
        section = self.rewrite.site.rpartition(".")[0]
        owners = [
            tensor.text(section) if (tensor := model_tensor(node)) else f"%{node.name}"
            for node, value in zip(self.rewrite.boundary, self.values, strict=True)
            for _ in tree_leaves(value)
        ]
        return [name for name, flag in zip(owners, wanted, strict=True) if flag]

    def _check_types(self, before: Sequence[Any], after: Sequence[Any]) -> None:
        for (old, _), was, is_ in zip(self.rewrite.replaced, before, after, strict=True):
            if not same_type(was, is_):
                raise self.fail(f"%{old.name}: {describe(was)}", describe(is_))

    def _check_bits(self, before: Sequence[Any], after: Sequence[Any]) -> None:
        """A pass of class "exact" gives the same bits; gradients may round differently, because the backward of
        a dialect op is its own formula."""
        for (old, _), was, is_ in zip(self.rewrite.replaced, before, after, strict=True):
            if isinstance(was, torch.Tensor) and difference(was, is_) != 0:
                found = f"a difference of {difference(was, is_):.1e}"
                raise self.fail(f"%{old.name} to the last bit: the pass declares itself exact", found)

    def _compare(
        self,
        names: Sequence[str],
        native: Sequence[Any],
        native_after: Sequence[Any],
        exact: Sequence[Any],
        exact_after: Sequence[Any],
    ) -> Iterator[tuple[float, float]]:
        tensors = [v for v in tree_leaves(self.values) if isinstance(v, torch.Tensor)]
        tolerance = fp64_tolerance([t.numel() for t in tensors])
        floor = torch.finfo(torch.float64).eps * max((_size(t) for t in tensors), default=0.0)
        rounding = _rounding([*tensors, *native, *native_after])
        for name, was, is_, reference, reference_after in zip(
            names, native, native_after, exact, exact_after, strict=True
        ):
            pair = _filled(reference, reference_after)
            if pair is None:
                continue
            size = max(_size(pair[0]), floor)
            off = difference(*pair)
            if self.one.contract.numerics != "approximate" and not off <= tolerance * size + floor:
                raise self.fail(
                    f"{name} as before the pass, in fp64 to {tolerance:.1e} of its largest value",
                    f"a difference of {off / size if size else off:.1e} of its largest value",
                )
            if not pair[0].dtype.is_floating_point:
                yield 0.0, off / (size or 1.0)
                continue
            errors = [
                difference(pair[0], torch.zeros_like(pair[0]) if v is None else v) / (size or 1.0)
                for v in (was, is_)
            ]
            if not errors[1] <= 2 * errors[0] + rounding:
                raise self.fail(
                    f"{name} within {2 * errors[0] + rounding:.1e} of its value in fp64, relative to the largest"
                    f" (twice the error before the pass, {errors[0]:.1e}, and {EXTRA_ROUNDINGS} roundings)",
                    f"an error of {errors[1]:.1e}",
                )
            if all(map(math.isfinite, errors)):
                yield errors[0], errors[1]


def fp64_tolerance(sizes: Sequence[int]) -> float:
    """How far two ways of computing one thing in fp64 may differ, relative to the largest value.

    ``sizes``: elements of each tensor at the boundary; the largest bounds the length of any sum.
    """
    return SLACK * torch.finfo(torch.float64).eps * math.sqrt(max(sizes, default=1) or 1)


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest absolute difference, in fp64. Equal infinities, and NaN in both, count as equal; otherwise a value
    that is not finite makes it infinite. Integers beyond fp64's 53 bits differ by at least one."""
    if a.numel() == 0:
        return 0.0
    left, right = (t.detach().to(torch.float64) for t in (a, b))
    same = (left == right) | (left.isnan() & right.isnan())
    off = torch.where(same, 0.0, (left - right).abs())
    if not (a.is_floating_point() or b.is_floating_point()):
        off = torch.where(a == b, 0.0, off.clamp(min=1.0))
    return float(torch.nan_to_num(off, nan=math.inf, posinf=math.inf).max())


def _size(t: torch.Tensor) -> float:
    """Largest finite absolute value."""
    if t.numel() == 0:
        return 0.0
    values = t.detach().abs().to(torch.float64)
    return float(torch.where(values.isfinite(), values, 0.0).max())


def _rounding(values: Sequence[Any]) -> float:
    """A few roundings of the coarsest floating dtype among ``values``."""
    dtypes = {v.dtype for v in tree_leaves(list(values)) if isinstance(v, torch.Tensor)}
    eps = [torch.finfo(d).eps for d in dtypes if d.is_floating_point]
    return EXTRA_ROUNDINGS * max(eps, default=0.0)


def _filled(a: Any, b: Any) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Two results or gradients as tensors; no gradient is zero. None when neither is a tensor."""
    if isinstance(a, torch.Tensor):
        return a, torch.zeros_like(a) if b is None else b
    if isinstance(b, torch.Tensor):
        return torch.zeros_like(b), b
    return None


def _cotangents(results: Sequence[Any]) -> list[torch.Tensor | None]:
    generator = torch.Generator().manual_seed(_SEED)
    cotangents: list[torch.Tensor | None] = []
    for result in results:
        if isinstance(result, torch.Tensor) and result.dtype.is_floating_point:
            drawn = torch.randn(result.shape, generator=generator, dtype=torch.float64)
            # Rounded to the result's dtype, so that the run in fp64 gets the same numbers.
            cotangents.append(drawn.to(result.dtype).to(result.device))
        else:
            cotangents.append(None)
    return cotangents


def _fail(one: Pass, rewrite: Rewrite, expected: str, found: str) -> VerifyError:
    gm = rewrite.owner
    fresh = [new for _, new in rewrite.replaced]
    shown = next((n for n in fresh if gm is not None and n in set(gm.graph.nodes)), None)
    return failure(
        one, gm if gm is not None else fx.GraphModule({}, fx.Graph()), shown, rewrite.site,
        expected=expected, found=found,
    )  # fmt: skip


__all__ = ["Validation", "difference", "fp64_tolerance", "validator"]
