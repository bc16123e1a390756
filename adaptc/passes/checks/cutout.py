"""Running one cut-out: as it is, or as a reference in fp64, with gradients."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from adaptc.ir.ops.dropout import keep_mask
from adaptc.passes.checks.boundary import exact_copy, private_randomness
from adaptc.torch_internals import replace_calls, tree_leaves, tree_map

_SEED = 0xD1CE
#: ATen ops that only make random numbers -> the in-place method that fills a tensor with such numbers.
_NOISE = {
    "rand": "uniform_",
    "rand_like": "uniform_",
    "randn": "normal_",
    "randn_like": "normal_",
    "bernoulli": "bernoulli_",
    **{name: name for name in ("bernoulli_", "uniform_", "normal_", "exponential_", "geometric_")},
}


@dataclasses.dataclass
class Outcome:
    """One run: ``results``, and the floating leaves of the inputs with respect to which it is differentiated.

    ``masks``: what every seeded dropout kept, in order.
    """

    results: list[Any]
    leaves: list[torch.Tensor]
    masks: list[torch.Tensor] = dataclasses.field(default_factory=list)

    def gradients(self, cotangents: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
        """Vector-Jacobian product of the results with ``cotangents``, one per result; None: no gradient flows."""
        pairs = [
            (result, cotangent.to(result.dtype))
            for result, cotangent in zip(self.results, cotangents, strict=True)
            if cotangent is not None and result.requires_grad
        ]
        if not pairs or not self.leaves:
            return [None] * len(self.leaves)
        outputs, seeds = zip(*pairs, strict=True)
        return list(torch.autograd.grad(outputs, self.leaves, seeds, allow_unused=True))


def run(
    cutout: fx.GraphModule, values: Sequence[Any], differentiate: Sequence[bool], *, double: bool,
    masks: Sequence[torch.Tensor] = (),
) -> Outcome:  # fmt: skip
    """Run ``cutout`` on private copies of ``values``.

    Args:
        differentiate: for each leaf of ``values``, whether its gradient is wanted.
        double: in fp64: floating tensors and dtype constants are raised, and autocast is off. What a dtype
            constant inside a nested body says is not raised.
        masks: what the first dropouts keep, instead of masks drawn here.

    Random ops draw the same numbers in every run, whatever the dtype: dropout masks agree.
    """
    seen: list[torch.Tensor] = []
    dtype = torch.float64 if double else None
    flags = iter(differentiate)
    leaves: list[torch.Tensor] = []

    def private(leaf: Any) -> Any:
        wanted = next(flags)
        if not isinstance(leaf, torch.Tensor):
            return leaf
        copy = exact_copy(leaf, dtype if leaf.dtype.is_floating_point else None)
        if wanted and copy.dtype.is_floating_point:
            leaves.append(copy.requires_grad_())
        return copy

    with torch.inference_mode(False), torch.enable_grad(), contextlib.ExitStack() as stack:
        stack.enter_context(private_randomness(values))
        inputs = tree_map(private, list(values))
        if double:
            for kind in {leaf.device.type for leaf in tree_leaves(inputs) if isinstance(leaf, torch.Tensor)}:
                stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(_repeatable_noise(masks, seen))
        interpreter = _Doubled(cutout) if double else fx.Interpreter(cutout)
        return Outcome(list(interpreter.run(*inputs)), leaves, seen)


class _Doubled(fx.Interpreter):
    """Runs a graph with every floating dtype that it names raised to fp64."""

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        return tree_map(_raised, args), tree_map(_raised, kwargs)

    def call_method(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target in ("float", "half", "bfloat16"):
            target = "double"
        return super().call_method(target, args, kwargs)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().get_attr(target, args, kwargs)
        is_float = isinstance(value, torch.Tensor) and value.dtype.is_floating_point
        return value.double() if is_float else value


def _raised(value: Any) -> Any:
    """fp64 for a floating dtype, and its name for the name of one (anchors take names)."""
    if isinstance(value, torch.dtype):
        return torch.float64 if value.is_floating_point else value
    if isinstance(value, str):
        named = getattr(torch, value, None)
        return "float64" if isinstance(named, torch.dtype) and named.is_floating_point else value
    return value


def _repeatable_noise(masks: Sequence[torch.Tensor], seen: list[torch.Tensor]) -> Any:
    """A context in which random ops draw from a generator of their own, in fp32 on the CPU.

    Devices draw other numbers for other dtypes, and then a run in fp64 would drop other elements. The masks of seeded
    dropouts are a function of their seeds and are noted in ``seen``; ``masks`` go to the other dropouts, in order.
    """
    generator = torch.Generator().manual_seed(_SEED)
    given = iter(masks)

    def call(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = op._schema.name.removeprefix("aten::")
        if name == "adaptc::seeded_dropout":
            seen.append(keep_mask(*args))
        mask = next(given, None) if name in ("native_dropout", "bernoulli_") else None
        if name == "native_dropout":
            return _dropout(generator, mask, *args)
        if mask is not None:
            return args[0].copy_(mask)
        if name not in _NOISE:
            return op(*args, **kwargs)
        # The op itself decides shape, dtype, strides and device; its numbers are replaced.
        filled = op(*args, **kwargs)
        options = args[1:] if name.endswith("_") or op._overloadname == "p" else ()
        if name == "bernoulli" and not options:
            options = args[:1]
        return filled.copy_(_draw(generator, _NOISE[name], filled.shape, *options))

    return replace_calls(call)


def _draw(generator: torch.Generator, method: str, shape: Any, *options: Any) -> torch.Tensor:
    options = tuple(o.cpu().float() if isinstance(o, torch.Tensor) else o for o in options)
    fresh = torch.empty(shape, dtype=torch.float32)
    return getattr(fresh, method)(*options, generator=generator)  # type: ignore[no-any-return]


def _dropout(
    generator: torch.Generator, mask: torch.Tensor | None, x: torch.Tensor, p: float, train: bool | None
) -> tuple[torch.Tensor, torch.Tensor]:
    keep = 1.0 if train is False else 1 - p
    if mask is None:
        mask = _draw(generator, "bernoulli_", x.shape, keep).to(x.device)
    return x * mask.to(x.dtype) * (1 / keep if keep else 0.0), mask.bool()
