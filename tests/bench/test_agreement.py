"""The bench refuses to compare contenders that do not compute the same thing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench import agreement
from bench.agreement import Agreement
from bench.contenders import (
    BUILDERS,
    Base,
    Contender,
    build_base,
    build_floor,
    build_peft_compile,
    build_peft_eager,
    fill_adapter,
)
from bench.errors import BenchError, DisagreementError
from bench.settings import Case, Settings

SMALL = Settings(layers=1, hidden=64, head_dim=16, vocab=64, tokens=24, rank=4, backend="aot_eager")
PLAIN, DROPPED, BF16 = Case("fp32", 0.0), Case("fp32", 0.05), Case("bf16", 0.0)


@pytest.fixture(scope="module")
def bases() -> dict[str, Base]:
    return {case.dtype: build_base(SMALL, case) for case in (PLAIN, BF16)}


@pytest.fixture(scope="module")
def agreements(bases: dict[str, Base]) -> dict[Case, Agreement]:
    torch.manual_seed(1)
    return {case: Agreement(bases[case.dtype], SMALL, case) for case in (PLAIN, DROPPED, BF16)}


@pytest.mark.parametrize("case", [PLAIN, pytest.param(BF16, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("name", ["peft-eager", "peft-compile", "adaptc"])
def test_right_contenders_agree(
    bases: dict[str, Base], agreements: dict[Case, Agreement], case: Case, name: str
) -> None:
    found = agreements[case].check(BUILDERS[name](bases[case.dtype], SMALL, case))
    assert 0 <= found["gradient_distance"] <= found["gradient_bound"]
    # A bound that a real difference could pass under would guard nothing.
    assert found["gradient_bound"] < (1e-5 if case.dtype == "fp32" else 0.15)


@pytest.mark.parametrize("name", ["peft-eager", "peft-compile", "adaptc"])
def test_right_contenders_agree_with_dropout(
    bases: dict[str, Base], agreements: dict[Case, Agreement], name: str
) -> None:
    torch.manual_seed(2)
    found = agreements[DROPPED].check(BUILDERS[name](bases["fp32"], SMALL, DROPPED))
    assert found["dropout_distance"] > 0.1


def sites(contender: Contender) -> list[Any]:
    assert isinstance(contender.model, torch.nn.Module)
    return [m for m in contender.model.modules() if hasattr(m, "base_layer")]


def scale_one_site(contender: Contender) -> None:
    sites(contender)[3].scaling["default"] *= 1.05


def swap_two_factors(contender: Contender) -> None:
    q, k = (contender.adapter[f"model.layers.0.self_attn.{n}_proj.lora_B"] for n in "qk")
    with torch.no_grad():
        q.copy_(k)


def cast_one_input(contender: Contender) -> None:
    def rounded(module: Any, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        return (args[0].bfloat16().to(args[0].dtype),)

    sites(contender)[0].register_forward_pre_hook(rounded)


@pytest.mark.parametrize("damage", [scale_one_site, swap_two_factors, cast_one_input])
def test_wrong_values_are_refused(
    bases: dict[str, Base], agreements: dict[Case, Agreement], damage: Callable[[Contender], None]
) -> None:
    wrong = build_peft_eager(bases["fp32"], SMALL, PLAIN)
    damage(wrong)
    with pytest.raises(DisagreementError, match=r"gradient of .* differs by|loss .* instead of"):
        agreements[PLAIN].check(wrong)


def test_a_wrong_scale_is_refused_in_bf16_too(
    bases: dict[str, Base], agreements: dict[Case, Agreement]
) -> None:
    wrong = build_peft_eager(bases["bf16"], SMALL, BF16)
    sites(wrong)[3].scaling["default"] *= 1.5
    with pytest.raises(DisagreementError, match=r"gradient of .* differs by"):
        agreements[BF16].check(wrong)


def test_a_wrong_loss_is_refused(bases: dict[str, Base], agreements: dict[Case, Agreement]) -> None:
    wrong = build_peft_eager(bases["fp32"], SMALL, PLAIN)
    right = wrong.forward
    wrong.forward = lambda: right() + 0.001  # type: ignore[method-assign]
    with pytest.raises(DisagreementError, match=r"peft-eager \(fp32, p = 0\): loss .* instead of"):
        agreements[PLAIN].check(wrong)


def test_another_dropout_rate_is_refused() -> None:
    # More tokens than elsewhere: with few, the masks' own scatter hides a small difference.
    settings = dataclasses.replace(SMALL, layers=1, tokens=192)
    base = build_base(settings, DROPPED)
    torch.manual_seed(4)
    checked = Agreement(base, settings, DROPPED)
    for rate in (0.0, 0.02, 0.1):
        wrong = build_peft_eager(base, settings, dataclasses.replace(DROPPED, dropout=rate))
        with pytest.raises(DisagreementError, match="dropout moves the factors' gradients by"):
            checked.check(wrong)
    for _ in range(5):
        checked.check(build_peft_eager(base, settings, DROPPED))


def test_inputs_without_a_gradient_are_refused(
    bases: dict[str, Base], agreements: dict[Case, Agreement]
) -> None:
    wrong = build_floor(bases["fp32"], SMALL, PLAIN)
    wrong.adapter = build_peft_eager(bases["fp32"], SMALL, PLAIN).adapter
    with pytest.raises(DisagreementError, match=r"floor: model\.layers\.0\.\S+ has no gradient"):
        agreements[PLAIN].check(wrong)
    lazy = build_peft_eager(bases["fp32"], SMALL, PLAIN)
    lazy.embeds.requires_grad_(False)
    with pytest.raises(DisagreementError, match="peft-eager: inputs_embeds has no gradient"):
        agreements[PLAIN].check(lazy)


def test_a_gradient_of_zero_is_refused(bases: dict[str, Base], agreements: dict[Case, Agreement]) -> None:
    wrong = build_peft_eager(bases["fp32"], SMALL, PLAIN)
    with torch.no_grad():
        wrong.adapter["model.layers.0.mlp.up_proj.lora_B"].zero_()
    with pytest.raises(DisagreementError, match=r"the gradient of \S+\.0\.mlp\.up_proj\.lora_A is zero"):
        agreements[PLAIN].check(wrong)


def test_values_that_are_not_finite_are_refused(
    bases: dict[str, Base], agreements: dict[Case, Agreement]
) -> None:
    wrong = build_peft_eager(bases["fp32"], SMALL, PLAIN)
    right = wrong.forward
    factor: Any = wrong.adapter["model.layers.0.mlp.up_proj.lora_B"]
    hook = factor.register_hook(lambda grad: grad * float("nan"))
    with pytest.raises(DisagreementError, match=r"the gradient of \S+\.up_proj\.lora_B is not finite"):
        agreements[PLAIN].check(wrong)
    hook.remove()
    wrong.forward = lambda: right() + float("inf")  # type: ignore[method-assign]
    with pytest.raises(DisagreementError, match="peft-eager: the loss is inf"):
        agreements[PLAIN].check(wrong)


def test_a_missing_site_is_refused(bases: dict[str, Base], agreements: dict[Case, Agreement]) -> None:
    wrong = build_peft_eager(bases["fp32"], SMALL, PLAIN)
    del wrong.adapter["model.layers.0.self_attn.q_proj.lora_A"]
    with pytest.raises(
        DisagreementError,
        match=r"1 parameters are not the same as PEFT's: \S+q_proj\.lora_A: \(4, 64\) and absent",
    ):
        agreements[PLAIN].check(wrong)


def test_the_floor_needs_an_input_gradient_only(
    bases: dict[str, Base], agreements: dict[Case, Agreement]
) -> None:
    assert agreements[PLAIN].check(build_floor(bases["fp32"], SMALL, PLAIN)) == {}


def test_contenders_have_equal_values_and_their_own_storage(bases: dict[str, Base]) -> None:
    one = build_peft_eager(bases["fp32"], SMALL, PLAIN)
    other = build_peft_compile(bases["fp32"], SMALL, PLAIN)
    assert len(one.adapter) == 2 * 7 * SMALL.layers
    for name, parameter in one.adapter.items():
        assert torch.equal(parameter, other.adapter[name])
        assert parameter.data_ptr() != other.adapter[name].data_ptr()
        assert parameter.any()


def test_an_adapter_of_another_kind_cannot_be_filled() -> None:
    with pytest.raises(BenchError, match=r"unknown adapter parameter 'x\.magnitude': neither lora_A nor"):
        fill_adapter({"x.magnitude": torch.nn.Parameter(torch.ones(2))}, seed=0)


def test_factor_distance_is_a_root_mean_square_without_the_inputs() -> None:
    reference = {"inputs_embeds": torch.ones(2), "a": torch.tensor([3.0, 4.0]), "b": torch.tensor([2.0])}
    found = {"inputs_embeds": torch.zeros(2), "a": torch.tensor([3.0, 9.0]), "b": torch.tensor([2.0])}
    # a is off by 5 of 5, b by nothing.
    assert agreement.factor_distance(reference, found) == pytest.approx(0.5**0.5)
