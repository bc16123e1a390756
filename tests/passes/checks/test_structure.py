"""The checks that always run: each guard says no once, at its site and with the graph around it."""

from __future__ import annotations

import copy
import operator

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import adaptc
from adaptc.errors import NoGradientWarning, VerifyError
from adaptc.ir.edit import Edit, Result, nested
from adaptc.ir.sites import lora_nodes, site_of
from adaptc.passes.checks.structure import check_structure, signature
from adaptc.passes.contract import Context
from adaptc.passes.manager import Pipeline, get
from tests.passes.checks.wrong_passes import adapted, again, around, capture, replace_adapters, wrong
from tests.reference import check_against_reference


def run_pipeline(run, *, dtype=torch.float32, model=None, after="insert"):
    """The default pipeline with a broken pass, without validation: errors are raised."""
    model = adapted(dtype=dtype)[1] if model is None else model
    gm, _, sites = capture(model, torch.randn(4, 6, dtype=dtype))
    return around(wrong("broken", run), after=after).run(gm, "dynamo", Context(sites=sites))


def first(gm):
    return lora_nodes(gm)[0]


def read_before_definition(gm, context):
    node = first(gm)
    next(n for n in gm.graph.nodes if n.op == "placeholder").append(node)
    return Result()


def remove_input(gm, context):
    site_id = next(n for n in gm.graph.nodes if n.op == "placeholder" and "site_id" in n.name)
    gm.graph.erase_node(site_id)
    return Result()


def add_input(gm, context):
    with gm.graph.inserting_before(next(iter(gm.graph.nodes))):
        gm.graph.placeholder("extra")
    return Result()


def reorder_inputs(gm, context):
    one, other = [n for n in gm.graph.nodes if n.op == "placeholder"][:2]
    other.append(one)
    return Result()


def drop_output(gm, context):
    gm.graph.output_node().args = ((),)
    return Result()


def change_output_dtype(gm, context):
    output = gm.graph.output_node()
    (value,) = output.args[0]
    edit = Edit(gm, "second", [value], [value], at=output)
    output.args = ((edit.call("to", value, torch.float64),),)
    return Result()


def change_output_shape(gm, context):
    output = gm.graph.output_node()
    (value,) = output.args[0]
    edit = Edit(gm, "second", [value], [value], at=output)
    output.args = ((edit.call("unsqueeze", value, 0),),)
    return Result()


def output_a_constant(gm, context):
    gm.graph.output_node().args = ((3,),)
    return Result()


def leave_it_dead(gm, context):
    node = first(gm)
    for user in list(node.users):
        user.replace_all_uses_with(node.args[1])
    return Result()


def add_unread(gm, context):
    node = first(gm)
    edit = Edit(gm, site_of(node), [node], [node])
    edit.call(node.target, *node.args)
    return Result(applied=[edit.finish(edit.call(node.target, *node.args))])


def forget_value(gm, context):
    result = replace_adapters(again)(gm, context)
    del first(gm).meta["example_value"]
    return result


def keep_old_value(gm, context):
    """Casts the input of a node that was added before, and leaves that node's fake value as it was."""
    result = replace_adapters(again)(gm, context)
    node = first(gm)
    edit = Edit(gm, site_of(node), [node], [node])
    node.replace_input_with(node.args[1], edit.call("to", node.args[1], torch.float64))
    return result


def change_dtype(gm, context):
    return replace_adapters(lambda edit, node: edit.call("to", again(edit, node), torch.float64))(gm, context)


def change_shape(gm, context):
    return replace_adapters(lambda edit, node: edit.call("unsqueeze", again(edit, node), 0))(gm, context)


BROKEN = {
    "read_before_definition": (read_before_definition, "the whole graph", "a well-formed graph", "topological"),
    "remove_input": (remove_input, "the whole graph", "the inputs from before the pass", "site_id_ is gone"),
    "add_input": (add_input, "the whole graph", "the inputs from before the pass", "%extra is new"),
    "reorder_inputs": (reorder_inputs, "the whole graph", "the inputs from before", "in another order"),
    "drop_output": (drop_output, "the whole graph", "1 outputs, as before the pass", "0"),
    "change_output_dtype": (change_output_dtype, "second", "output 0: f32[4, 6] on cpu", "f64[4, 6] on cpu"),
    "change_output_shape": (change_output_shape, "second", "output 0: f32[4, 6]", "f32[1, 4, 6]"),
    "output_a_constant": (output_a_constant, "the whole graph", "output 0: f32[4, 6]", "3"),
    "leave_it_dead": (leave_it_dead, "first", "no dead dialect node", "nobody reads %lora_linear_default"),
    "add_unread": (add_unread, "first", "no dead dialect node", "nobody reads %lora_linear_default_2"),
    "forget_value": (forget_value, "first", "a fake value on every new node", "no meta['example_value'] on %"),
    "keep_old_value": (keep_old_value, "first", "as its inputs give it: f64[4, 6]", "f32[4, 6]"),
    "change_dtype": (change_dtype, "first", "%getitem: f32[4, 6] on cpu", "f64[4, 6] on cpu"),
    "change_shape": (change_shape, "first", "%getitem: f32[4, 6]", "f32[1, 4, 6]"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_graph_is_an_error(name):
    run, site, expected, found = BROKEN[name]
    with pytest.raises(VerifyError) as caught:
        run_pipeline(run)
    error = caught.value
    assert error.headline == f"VerifyError after pass broken, at {site}"
    assert expected in error.facts["expected"]
    assert found in error.facts["found"]


def test_error_shows_ten_nodes_either_side():
    deep = nn.Sequential(*[nn.Linear(6, 6) for _ in range(12)])
    model = adaptc.compile(deep, adaptc.LoRA(r=2, init="random", targets=["6"]), backend="aot_eager")
    with pytest.raises(VerifyError) as caught:
        run_pipeline(change_dtype, model=model)
    head, *lines = caught.value.facts["graph"].split("\n")
    (marked,) = (i for i, line in enumerate(lines) if line.startswith(">"))
    assert head == "10 nodes before and after %to"
    assert marked == 10 and "%to = " in lines[marked] and "f64[4, 6]" in lines[marked]
    # Five layers follow, and the end of the graph.
    assert len([line for line in lines[marked + 1 :] if "linear(" in line]) == 5
    text = str(caught.value)
    start = "VerifyError after pass broken, at 6\n  expected  %getitem: f32[4, 6] on cpu\n  found     f64"
    assert text.startswith(start)


def test_right_passes_satisfy_every_check():
    model = adapted()[1]
    gm, _, sites = capture(model, torch.randn(4, 6))
    _, reports = Pipeline([get("insert"), get("canonicalise")]).run(gm, "dynamo", Context(sites=sites))
    assert [len(r.result.applied) for r in reports] == [2, 4]


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=False)


def in_body(run):
    """``run`` on the nested body instead of the graph."""

    def outer(gm, context):
        ((_, body, _),) = nested(gm)
        result = run(body, context)
        body.recompile()
        return result

    return outer


@pytest.mark.parametrize("name", ["read_before_definition", "remove_input", "leave_it_dead", "forget_value"])
def test_nested_bodies_are_checked(name):
    run, site, expected, _ = BROKEN[name]
    plan = adaptc.LoRA(r=2, init="random", targets=["inner"])
    model = adaptc.compile(Checkpointed(), plan, backend="aot_eager")
    with pytest.raises(VerifyError, match=f"expected +{expected}") as caught:
        run_pipeline(in_body(run), model=model)
    place = site if site == "the whole graph" else "inner"
    assert caught.value.headline == f"VerifyError after pass broken, at {place}"


def test_a_lost_nested_body_is_an_error():
    def lose(gm, context):
        ((call, _, _),) = nested(gm)
        delattr(gm, call.args[0].target)
        call.args[0].target = "other"
        gm.other = nn.Identity()
        return Result()

    model = adaptc.compile(Checkpointed(), adaptc.LoRA(r=2, targets=["inner"]), backend="aot_eager")
    with pytest.raises(VerifyError, match=r"expected +nested bodies wrap_body_0\n +found +nested bodies \(none\)"):
        run_pipeline(lose, model=model)


class Unread(nn.Module):
    """Calls an adapted layer and drops its output."""

    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        self.unused(x)
        return self.used(x)


@pytest.mark.parametrize("verify", [False, "raise"])
def test_a_site_that_the_model_itself_never_reads_is_legal(verify):
    model = adaptc.compile(
        Unread(), adaptc.LoRA(r=2, init="random", targets="all-linear"), backend="aot_eager", verify=verify
    )
    with pytest.warns(NoGradientWarning, match="does not depend on its output: unused"):
        model(torch.randn(4, 6)).sum().backward()
    assert model.used.adapters["default"].lora_A.grad.abs().max() > 0
    assert len(model.adaptc.graphs[0].reports[0].result.applied) >= 1


def test_joint_results_keep_their_strides():
    def transpose_twice(edit, node):
        out = again(edit, node)
        aten = torch.ops.aten
        flipped = edit.call(aten.permute.default, out, [1, 0])
        dense = edit.call(aten.clone.default, flipped, memory_format=torch.contiguous_format)
        return edit.call(aten.permute.default, dense, [1, 0])

    base, model = adapted()
    one = wrong("strided", replace_adapters(transpose_twice), level="joint")
    object.__setattr__(model.adaptc.adapters, "pipeline", lambda: around(one, after="canonicalise"))
    with pytest.raises(Exception, match=r"expected  %getitem: f32\[4, 6\] stride \(6, 1\) on cpu"):
        check_against_reference(model, base, torch.randn(4, 6))


def test_dynamic_sizes_are_compared_without_guards():
    base, _ = adapted()
    plan = adaptc.LoRA(r=2, alpha=4, init="random", targets="all-linear")
    model = adaptc.compile(copy.deepcopy(base), plan, backend="aot_eager", dynamic=True)
    for rows in (4, 7, 9):
        check_against_reference(model, base, torch.randn(rows, 6))
    assert model.adaptc.metrics()["recompiles"] == 0


def test_signature_notices_only_what_it_should():
    model = adapted()[1]
    gm, _, sites = capture(model, torch.randn(4, 6))
    before = signature(gm)
    result = get("insert").run(gm, Context(sites=sites))
    check_structure(get("insert"), gm, before, result)
    assert signature(gm)[""].inputs == before[""].inputs
    assert all(u.target is operator.getitem for n in lora_nodes(gm) for u in n.users)
