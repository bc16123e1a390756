"""Deliberately wrong passes: each is detected, undone under verify=True, and raised under verify="raise"."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed

import adaptc
from adaptc.errors import AdaptcWarning, VerifyError
from adaptc.ir.edit import Edit, Result, Rewrite
from adaptc.ir.sites import lora_nodes, site_of
from adaptc.passes.checks.validate import difference, fp64_tolerance, validator
from adaptc.passes.contract import Context
from adaptc.passes.manager import Pipeline, get
from tests.passes.checks.wrong_passes import (
    WRONG,
    adapted,
    again,
    around,
    capture,
    drop_scale,
    replace_adapters,
    swap_factors,
    wrong,
)
from tests.reference import check_against_reference


def run_pipeline(model, x, pipeline, mode, **options):
    gm, inputs, sites = capture(model, x)
    check = validator(mode, inputs)
    return pipeline.run(gm, "dynamo", Context(sites=sites, record=True), validate=check, **options)


@pytest.mark.parametrize("name", WRONG)
def test_wrong_pass_is_undone_and_reported(name):
    run, dtype, message = WRONG[name]
    _, model = adapted(dtype=dtype)
    x = torch.randn(4, 6, dtype=dtype)
    stages = []
    with pytest.warns(AdaptcWarning, match=f"after pass {name}, at .*the pass was undone.*skip: \\[{name}\\]"):
        gm, reports = run_pipeline(
            model, x, around(wrong(name, run)), True, on_stage=lambda stage, _: stages.append(stage)
        )
    by_name = {r.name: r for r in reports}
    assert list(by_name) == ["insert", name, "canonicalise"]
    undone = by_name[name].rolled_back
    assert undone.startswith(f"VerifyError after pass {name}, at ")
    assert message in undone
    assert by_name["insert"].rolled_back is None and by_name["canonicalise"].rolled_back is None
    assert stages == ["insert", "canonicalise"]
    # What is left is what the right passes make without it.
    alone, _ = run_pipeline(model, x, Pipeline([get("insert"), get("canonicalise")]), False)
    assert gm.code == alone.code


@pytest.mark.parametrize("name", WRONG)
def test_wrong_pass_raises_on_request(name):
    run, dtype, message = WRONG[name]
    _, model = adapted(dtype=dtype)
    with pytest.raises(VerifyError, match=re.escape(message)) as caught:
        run_pipeline(model, torch.randn(4, 6, dtype=dtype), around(wrong(name, run)), "raise")
    assert caught.value.headline.startswith(f"VerifyError after pass {name}, at ")
    assert {"expected", "found"} <= caught.value.facts.keys()


@pytest.mark.parametrize("name", WRONG)
def test_compiled_model_is_right_without_the_wrong_pass(name, monkeypatch):
    run, dtype, _ = WRONG[name]
    base, model = adapted(dtype=dtype, verify=True)
    monkeypatch.setattr(model.adaptc.adapters, "pipeline", lambda: around(wrong(name, run)))
    loose = {"rtol": 0.05, "atol": 0.2} if dtype == torch.bfloat16 else {}
    with pytest.warns(AdaptcWarning, match=f"after pass {name}"):
        check_against_reference(model, base, torch.randn(4, 6, dtype=dtype), **loose)
    reports = {r.name: r for r in model.adaptc.graphs[0].reports}
    assert [n for n, r in reports.items() if r.rolled_back] == [name]
    assert len(reports["insert"].result.applied) == 2 and len(reports["lower"].result.applied) > 2


@pytest.mark.parametrize("name", WRONG)
def test_user_sees_the_error_through_dynamo(name, monkeypatch):
    run, dtype, message = WRONG[name]
    _, model = adapted(dtype=dtype, verify="raise")
    monkeypatch.setattr(model.adaptc.adapters, "pipeline", lambda: around(wrong(name, run)))
    with pytest.raises((BackendCompilerFailed, VerifyError), match=f"VerifyError after pass {name}") as caught:
        model(torch.randn(4, 6, dtype=dtype))
    error = getattr(caught.value, "inner_exception", caught.value)
    assert isinstance(error, VerifyError)
    assert message in str(error)


def swap_operands(gm, context):
    """Joint level: dA = q^T x with q and x swapped; shapes agree when r = K."""
    result = Result()
    target = torch.ops.adaptc.lora_factor_grad.default
    for node in gm.graph.find_nodes(op="call_function", target=target):
        left, right, dtype = node.args
        edit = Edit(gm, site_of(node), [node], [node], record=context.record)
        result.applied.append(edit.finish(edit.call(target, right, left, dtype)))
    gm.recompile()
    return result


@pytest.mark.parametrize(
    "name, run",
    [
        ("drop_scale", replace_adapters(drop_scale)),
        ("swap_factors", replace_adapters(swap_factors)),
        ("swap_operands", swap_operands),
    ],
)
def test_wrong_pass_on_the_joint_graph(name, run, monkeypatch):
    base, model = adapted(verify=True)
    one = wrong(name, run, level="joint")
    monkeypatch.setattr(model.adaptc.adapters, "pipeline", lambda: around(one, after="canonicalise"))
    with pytest.warns(AdaptcWarning, match=f"after pass {name}, at "):
        check_against_reference(model, base, torch.randn(4, 6))
    undone = next(r for r in model.adaptc.graphs[0].reports if r.name == name).rolled_back
    assert "as before the pass, in fp64" in undone


def test_values_that_hide_an_error_are_varied():
    # B is zero and the scale is one: before the first step a wrong scale changes nothing.
    _, model = adapted(init="default", alpha=6)
    with pytest.raises(VerifyError, match="as before the pass, in fp64"):
        run_pipeline(model, torch.randn(4, 6), around(wrong("drop_scale", replace_adapters(drop_scale))), "raise")


def round_b(edit, node):
    return again(edit, node, B=edit.call("bfloat16", node.args[3]))


def test_fp64_alone_would_miss_a_rounding_and_fp32_alone_a_small_error():
    def tilt(edit, node):
        return again(edit, node, scale=edit.call("mul", node.args[4], 1 + 1e-9))

    _, model = adapted()
    for rewrite, message in ((round_b, "twice the error before"), (tilt, "in fp64 to")):
        with pytest.raises(VerifyError, match=message):
            run_pipeline(model, torch.randn(4, 6), around(wrong("w", replace_adapters(rewrite))), "raise")


def test_exact_means_the_same_bits():
    def reassociate(edit, node):
        return again(edit, node, scale_at="r")

    _, model = adapted()
    x = torch.randn(64, 6)
    allowed = wrong("reassociate", replace_adapters(reassociate), numerics="reassociates")
    _, reports = run_pipeline(model, x, around(allowed), "raise")
    assert reports[1].errors is not None and 0 < reports[1].errors[1] < 1e-6
    strict = wrong("reassociate", replace_adapters(reassociate), numerics="exact")
    with pytest.raises(VerifyError, match="to the last bit: the pass declares itself exact"):
        run_pipeline(model, x, around(strict), "raise")


def test_approximate_pass_is_held_to_the_native_error_only():
    def half(edit, node):
        return again(edit, node, scale=edit.call("mul", node.args[4], 1 + 1e-8))

    def double(edit, node):
        return again(edit, node, scale=edit.call("mul", node.args[4], 2.0))

    _, model = adapted()
    for rewrite, ok in ((half, True), (double, False)):
        one = wrong("near", replace_adapters(rewrite), numerics="approximate")
        if ok:
            _, reports = run_pipeline(model, torch.randn(4, 6), around(one), "raise")
            assert reports[1].rolled_back is None
        else:
            with pytest.raises(VerifyError, match="twice the error before the pass"):
                run_pipeline(model, torch.randn(4, 6), around(one), "raise")


def test_a_fake_value_that_lies_is_found_by_running():
    with torch.library._scoped_library("adaptc_test", "FRAGMENT") as library:
        library.define("lying(Tensor x) -> Tensor")
        library.impl("lying", lambda x: x.float(), "CompositeExplicitAutograd")
        torch.library.register_fake("adaptc_test::lying", lambda x: torch.empty_like(x), lib=library)

        def run(edit, node):
            return edit.call(torch.ops.adaptc_test.lying.default, again(edit, node))

        _, model = adapted(dtype=torch.bfloat16)
        with pytest.raises(VerifyError, match=r"expected  %\w+: bf16\[4, 6\].*\n.*found     f32\[4, 6\]"):
            x = torch.randn(4, 6, dtype=torch.bfloat16)
            run_pipeline(model, x, around(wrong("lie", replace_adapters(run))), "raise")


def test_a_rewrite_that_cannot_run_is_wrong():
    with torch.library._scoped_library("adaptc_test", "FRAGMENT") as library:
        library.define("broken(Tensor x) -> Tensor")

        def fail(x):
            raise RuntimeError("no kernel for this size")

        library.impl("broken", fail, "CompositeExplicitAutograd")
        torch.library.register_fake("adaptc_test::broken", lambda x: torch.empty_like(x), lib=library)

        def run(edit, node):
            return edit.call(torch.ops.adaptc_test.broken.default, again(edit, node))

        _, model = adapted()
        with pytest.raises(VerifyError, match="no kernel for this size"):
            run_pipeline(model, torch.randn(4, 6), around(wrong("broken", replace_adapters(run))), "raise")


def test_a_rewrite_without_a_record_is_refused():
    def run(gm, context):
        return replace_adapters(again)(gm, Context(record=False))

    _, model = adapted()
    with pytest.raises(VerifyError, match="both cut-outs on record"):
        run_pipeline(model, torch.randn(4, 6), around(wrong("secret", run)), "raise")


class Mutating(nn.Module):
    """The same layer reads ``h`` twice, and ``h`` is doubled in between."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x):
        h = torch.tanh(x)
        first = self.layer(h)
        h.mul_(2)
        return first + self.layer(h)


def share_calls(gm, context):
    """Wrong where memory is written in between: two equal calls become one."""
    first, second = (n for n in gm.graph.nodes if n.target is torch.nn.functional.linear)
    edit = Edit(gm, "layer", [first, second], [first, second], at=first, record=context.record)
    new = edit.call(first.target, *first.args)
    return Result(applied=[edit.finish(new, new)])


def test_a_read_moved_across_a_write_is_found():
    torch.manual_seed(0)
    plan = adaptc.LoRA(r=3, init="random", targets=["layer"])
    model = adaptc.compile(Mutating(), plan, backend="aot_eager")
    with pytest.raises(VerifyError, match=r"%h is written to in between"):
        run_pipeline(model, torch.randn(4, 6), around(wrong("share", share_calls)), "raise")


def test_limit_is_not_spent_by_a_pass_that_was_undone():
    _, model = adapted()
    pipeline = around(wrong("drop_scale", replace_adapters(drop_scale)))
    pipeline.limits["*"] = 4
    with pytest.warns(AdaptcWarning):
        _, reports = run_pipeline(model, torch.randn(4, 6), pipeline, True)
    assert [len(r.result.applied) for r in reports] == [2, 2, 2]


def test_sites_are_known_after_an_undone_pass():
    def claim(gm, context):
        return Result(applied=[Rewrite("first", (), (), owner=gm)])

    _, model = adapted()
    pipeline = Pipeline([wrong("claim", claim), get("insert")])
    with pytest.warns(AdaptcWarning):
        gm, reports = run_pipeline(model, torch.randn(4, 6), pipeline, True)
    assert [r.site for r in reports[1].result.applied] == ["first", "second"]
    assert [site_of(n) for n in lora_nodes(gm)] == ["first", "second"]


def test_verify_disturbs_nothing_of_the_user():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 6)
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, x):
            self.calls += 1
            x.mul_(0.5)
            return torch.nn.functional.dropout(self.layer(x), 0.5, self.training)

    base = Noisy()
    plan = adaptc.LoRA(r=3, init="random", targets=["layer"], dropout=0.3)
    found = []
    for mode in (False, "raise"):
        torch.manual_seed(3)
        model = adaptc.compile(copy.deepcopy(base), plan, backend="aot_eager", verify=mode)
        torch.manual_seed(4)
        x = torch.ones(4, 6)
        y = model(x)
        found.append((y, x, model.calls.clone(), torch.rand(3)))
        torch.compiler.reset()
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
    assert found[1][2] == 1


def test_modes():
    assert validator(False, None) is None
    assert validator(True, None).raises is False and validator("raise", None).raises is True
    with pytest.raises(ValueError, match="verify is True, False or \"raise\", not 'yes'"):
        validator("yes", None)


def test_difference_and_tolerance():
    inf, nan = float("inf"), float("nan")
    a = torch.tensor([1.0, inf, nan, -inf])
    assert difference(a, a.clone()) == 0
    assert difference(a, torch.tensor([1.5, inf, nan, -inf])) == 0.5
    assert difference(a, torch.tensor([1.0, 3.0, nan, -inf])) == inf
    assert difference(a, torch.tensor([1.0, inf, 0.0, -inf])) == inf
    assert difference(torch.empty(0), torch.empty(0)) == 0
    assert difference(torch.tensor([2**62]), torch.tensor([2**62 + 1])) == 1, "no double holds both"
    # Looser than rounding, tighter than fp32: 1e-7 would hide a cast that was left behind.
    assert 1e-13 < fp64_tolerance([1]) < fp64_tolerance([4096 * 4096]) < 2e-9
