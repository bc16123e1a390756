"""Contenders that do not compute the same thing are not compared: the run is refused.

The reference is PEFT, eager, on the same values one precision higher (fp32 for a 16-bit base, fp64 for
fp32). The bound is PEFT eager's own distance from it in the case's dtype: a contender may be ``SLACK`` times
as far away, plus a few units of rounding. Loss, input gradient and the gradient of every factor are compared,
because the loss of a randomly initialised model hardly depends on the adapter.

With dropout the masks differ between contenders, so gradients cannot be equal. What must agree is how far
dropout moves the factors' gradients as a whole, within the scatter of that distance over several masks of
PEFT eager: a contender that drops nothing, or at another rate, is refused.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping

import torch

from bench.contenders import Base, Contender, build_peft_eager
from bench.errors import DisagreementError
from bench.settings import Case, Settings

SLACK = 4.0
ROUNDING_UNITS = 4.0
#: Masks that PEFT eager draws to know the scatter, and how far outside of it a contender may be: a standard
#: deviation from so few draws is easily half the true one, and at large sizes it is a fraction of a percent.
DROPOUT_DRAWS = 6
DROPOUT_DEVIATIONS = 6.0
DROPOUT_RELATIVE = 0.05
HIGHER = {"fp32": torch.float64, "bf16": torch.float32, "fp16": torch.float32}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Loss and gradients of one step, the gradients by name, in fp64 on the CPU."""

    loss: float
    gradients: dict[str, torch.Tensor]


def outcome_of(contender: Contender) -> Outcome:
    """Run one step and collect what must agree.

    Raises:
        DisagreementError: a gradient is missing, zero or not finite.
    """
    loss = contender.step().item()
    gradients = {}
    tensors: dict[str, torch.Tensor] = {"inputs_embeds": contender.embeds, **contender.adapter}
    for name, tensor in tensors.items():
        if tensor.grad is None:
            raise DisagreementError(f"{contender.name}: {name} has no gradient")
        gradients[name] = tensor.grad.detach().to("cpu", torch.float64)
        if not gradients[name].any():
            raise DisagreementError(f"{contender.name}: the gradient of {name} is zero")
        if not gradients[name].isfinite().all():
            raise DisagreementError(f"{contender.name}: the gradient of {name} is not finite")
    if not math.isfinite(loss):
        raise DisagreementError(f"{contender.name}: the loss is {loss}")
    contender.clear()
    return Outcome(loss, gradients)


@dataclasses.dataclass(frozen=True)
class Distance:
    """Relative distance from the reference: of the loss, and of the worst gradient, with its name."""

    loss: float
    gradient: float
    worst: str


def distance(reference: Outcome, found: Outcome) -> Distance:
    """How far ``found`` is from ``reference``.

    Raises:
        DisagreementError: they have not the same adapter parameters, or in other shapes.
    """
    shapes = {name: tuple(g.shape) for name, g in reference.gradients.items()}
    other = {name: tuple(g.shape) for name, g in found.gradients.items()}
    if shapes != other:
        odd = sorted(n for n in shapes.keys() | other.keys() if shapes.get(n) != other.get(n))
        listed = "; ".join(f"{n}: {shapes.get(n, 'absent')} and {other.get(n, 'absent')}" for n in odd[:3])
        raise DisagreementError(f"{len(odd)} parameters are not the same as PEFT's: {listed}")
    errors = {n: _relative(g, found.gradients[n]) for n, g in reference.gradients.items()}
    worst = max(errors, key=lambda name: errors[name])
    return Distance(abs(found.loss / reference.loss - 1), errors[worst], worst)


def _relative(reference: torch.Tensor, found: torch.Tensor) -> float:
    return float((found - reference).norm() / reference.norm())


class Agreement:
    """Reference and yardstick of one case; ``check`` raises or returns the distances that it measured."""

    def __init__(self, base: Base, settings: Settings, case: Case) -> None:
        plain = dataclasses.replace(case, dropout=0.0)
        self.case = case
        self.reference = outcome_of(build_peft_eager(base.to(HIGHER[case.dtype]), settings, plain))
        peft = build_peft_eager(base, settings, case)
        self.yardstick = outcome_of(peft)
        self.epsilon = torch.finfo(case.torch_dtype).eps
        self.scatter: list[float] = []
        if case.dropout:
            outcomes = (outcome_of(peft) for _ in range(DROPOUT_DRAWS))
            self.scatter = [factor_distance(self.reference.gradients, o.gradients) for o in outcomes]

    def check(self, contender: Contender) -> dict[str, float]:
        """Compare one step of ``contender``; returns distances and bounds for the result file.

        Raises:
            DisagreementError: the contender is farther from the reference than its dtype excuses.
        """
        found = outcome_of(contender)
        if not contender.adapter:  # the floor: another function, of which only the input gradient is needed
            return {}
        if self.case.dropout:
            return self._check_dropout(contender, found)
        near = distance(self.reference, found)
        peft = distance(self.reference, self.yardstick)
        loss_bound = SLACK * peft.loss + ROUNDING_UNITS * self.epsilon
        bound = SLACK * peft.gradient + ROUNDING_UNITS * self.epsilon
        if near.loss > loss_bound:
            raise DisagreementError(
                f"{contender.name} ({self.case}): loss {found.loss:.6g} instead of "
                f"{self.reference.loss:.6g}, relative difference {near.loss:.2g}, allowed {loss_bound:.2g}"
            )
        if near.gradient > bound:
            raise DisagreementError(
                f"{contender.name} ({self.case}): gradient of {near.worst} differs by {near.gradient:.2g}, "
                f"allowed {bound:.2g} (PEFT eager: {peft.gradient:.2g})"
            )
        return {
            "loss_distance": near.loss,
            "loss_bound": loss_bound,
            "gradient_distance": near.gradient,
            "gradient_bound": bound,
        }

    def _check_dropout(self, contender: Contender, found: Outcome) -> dict[str, float]:
        distance(self.reference, found)  # the same parameters, whatever their gradients
        moved = factor_distance(self.reference.gradients, found.gradients)
        expected = statistics.mean(self.scatter)
        allowed = DROPOUT_DEVIATIONS * statistics.stdev(self.scatter) + DROPOUT_RELATIVE * expected
        if abs(moved - expected) > allowed:
            raise DisagreementError(
                f"{contender.name} ({self.case}): dropout moves the factors' gradients by {moved:.3g}, "
                f"PEFT's by {expected:.3g}, allowed difference {allowed:.2g}"
            )
        return {"dropout_distance": moved, "dropout_distance_of_peft": expected, "dropout_bound": allowed}


def factor_distance(reference: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]) -> float:
    """Root mean square over the lora_A and lora_B gradients of their relative distances."""
    names = [name for name in reference if name != "inputs_embeds"]
    return math.sqrt(sum(_relative(reference[n], found[n]) ** 2 for n in names) / len(names))
