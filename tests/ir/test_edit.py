"""Edits of graphs: what is added, what is removed, what is kept for validation."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from adaptc.ir.edit import Edit, copy_graph_module, nested
from adaptc.torch_internals import node_value


def captured(fn, *inputs):
    graphs = []

    def keep(gm, _):
        graphs.append(gm)
        return gm.forward

    torch.compile(fn, backend=keep, fullgraph=True)(*inputs)
    (gm,) = graphs
    return copy_graph_module(gm)


def node(gm, name):
    return next(n for n in gm.graph.nodes if n.name == name)


def names(gm):
    return [n.name for n in gm.graph.nodes]


X = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(3, 4)


def sin_cos(x):
    a = torch.sin(x)
    return torch.cos(a) + a


def test_new_nodes_replace_old_ones_in_place():
    gm = captured(sin_cos, X)
    cos = node(gm, "cos")
    edit = Edit(gm, "block.fc", [cos], [cos])
    new = edit.call(torch.tan, edit.call("neg", node(gm, "a")))
    rewrite = edit.finish(new)
    gm.recompile()
    assert names(gm) == ["l_x_", "a", "neg", "tan", "add", "output"]
    torch.testing.assert_close(gm(X)[0], torch.tan(-X.sin()) + X.sin())
    assert (rewrite.site, rewrite.removed, rewrite.added) == ("block.fc", ("cos",), ("neg", "tan"))
    assert rewrite.replaced == ((cos, new),)
    assert not rewrite.dead
    gm.graph.lint()


def test_new_nodes_know_their_value_their_module_and_their_site():
    gm = captured(torch.nn.Sequential(torch.nn.Linear(4, 2, dtype=torch.float64)), X)
    linear = next(n for n in gm.graph.nodes if "linear" in str(n.target))
    edit = Edit(gm, "0", [linear], [linear])
    halved = edit.call("to", linear, torch.float32)
    assert (halved.meta["example_value"].shape, halved.meta["example_value"].dtype) == ((3, 2), torch.float32)
    assert halved.meta["nn_module_stack"] == linear.meta["nn_module_stack"]
    assert halved.meta["custom"]["adaptc"] == "0"
    assert "val" not in halved.meta
    pair = edit.call(torch.max, linear, 1)
    assert edit.item(pair, 1).meta["example_value"].dtype == torch.int64


def test_values_on_a_joint_graph_have_their_own_key():
    gm = make_fx(sin_cos, tracing_mode="fake")(X)
    cos = node(gm, "cos")
    new = Edit(gm, "s", [cos], [cos]).call(torch.ops.aten.tan.default, cos.args[0])
    assert new.meta["val"].shape == (3, 4) and "example_value" not in new.meta


def test_a_value_that_cannot_be_known_is_not_guessed():
    gm = fx.symbolic_trace(sin_cos)
    cos = node(gm, "cos")
    new = Edit(gm, "s", [cos], [cos]).call(torch.tan, cos.args[0])
    assert node_value(new) is None


def test_matched_nodes_that_others_read_stay():
    gm = captured(sin_cos, X)
    a, cos = node(gm, "a"), node(gm, "cos")
    edit = Edit(gm, "s", [a, cos], [cos])
    rewrite = edit.finish(edit.call(torch.tan, a.args[0]))
    assert rewrite.removed == ("cos",)
    assert "a" in names(gm)


def test_new_nodes_may_read_what_they_replace():
    gm = captured(sin_cos, X)
    cos = node(gm, "cos")
    after = cos.next
    edit = Edit(gm, "s", [cos], [cos], record=True)
    edit.position = after
    rewrite = edit.finish(edit.call(torch.mul, cos, 2))
    gm.recompile()
    torch.testing.assert_close(gm(X)[0], 2 * X.sin().cos() + X.sin())
    assert rewrite.removed == ()
    torch.testing.assert_close(rewrite.after(X)[0], 2 * X.cos())


def test_an_edit_of_an_unread_value_says_so():
    gm = captured(sin_cos, X)
    with gm.graph.inserting_before(node(gm, "output")):
        unread = gm.graph.call_function(torch.tan, (node(gm, "a"),))
    edit = Edit(gm, "s", [unread], [unread])
    assert edit.finish(edit.call(torch.sin, node(gm, "a"))).dead


def test_recorded_cutouts_compute_what_was_there_and_what_is_there_now():
    gm = captured(sin_cos, X)
    a, cos = node(gm, "a"), node(gm, "cos")
    total = node(gm, "add")
    edit = Edit(gm, "s", [cos, total], [total], record=True)
    rewrite = edit.finish(edit.call(torch.mul, edit.call(torch.tan, a), 3))
    assert rewrite.boundary == (a,)
    value = X.cos()
    torch.testing.assert_close(rewrite.before(value), (value.cos() + value,))
    torch.testing.assert_close(rewrite.after(value), (value.tan() * 3,))
    assert "val" not in rewrite.before.graph.find_nodes(op="placeholder")[0].meta
    unrecorded = Edit(gm, "s", [a], [a])
    assert unrecorded.finish(unrecorded.call(torch.sin, a.args[0])).before is None


def test_a_traced_body_is_copied_in():
    gm = make_fx(sin_cos, tracing_mode="fake")(X)
    body = make_fx(lambda a, b: (a * b, a - b), tracing_mode="fake")(X, X.clone())
    total = node(gm, "add")
    edit = Edit(gm, "s", [total], [total])
    product, difference = edit.copy_in(body.graph, [node(gm, "sin"), node(gm, "cos")])
    assert (product.target, difference.target) == (torch.ops.aten.mul.Tensor, torch.ops.aten.sub.Tensor)
    assert product.meta["val"].shape == (3, 4)
    edit.finish(difference)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    torch.testing.assert_close(gm(X), X.sin() - X.sin().cos())


def checkpointed(x, w):
    return checkpoint(lambda a, b: torch.sin(a) @ b, x, w, use_reentrant=False)


def test_a_copy_can_be_changed_freely():
    gm = captured(checkpointed, X, X.t().contiguous())
    copy = copy_graph_module(gm)
    assert names(copy) == names(gm)
    (_, body, _), (_, copied_body, _) = nested(gm)[0], nested(copy)[0]
    assert body is not copied_body and str(body.graph) == str(copied_body.graph)
    before = gm.print_readable(print_output=False)
    sine = copied_body.graph.find_nodes(op="call_function", target=torch.sin)[0]
    sine.target = torch.cos
    copied_body.recompile()
    assert gm.print_readable(print_output=False) == before
    inputs = (X, X.t().contiguous())
    torch.testing.assert_close(gm(*inputs)[0], X.sin() @ X.t())
    torch.testing.assert_close(copy(*inputs)[0], X.cos() @ X.t())


def test_a_copy_shares_values_but_not_metadata():
    gm = captured(sin_cos, X)
    copy = copy_graph_module(gm)
    old, new = node(gm, "a"), node(copy, "a")
    assert new.meta["example_value"] is old.meta["example_value"]
    new.meta["custom"] = {"adaptc": "s"}
    assert "custom" not in old.meta or "adaptc" not in old.meta["custom"]


def test_inputs_of_a_checkpointed_body_are_traced_to_the_outside():
    gm = captured(checkpointed, X, X.t().contiguous())
    ((call, _, operands),) = nested(gm)
    assert "checkpoint" in str(call.target)
    assert [o.name for o in operands.values()] == ["l_x_", "l_w_"]
    assert all(inside.name != outside.name or inside.graph is not outside.graph for inside, outside in operands.items())


def branches(x, w):
    return torch.cond(x.sum() > 0, lambda a, b: a @ b, lambda a, b: (a + 1) @ b, (x, w))


def test_inputs_of_both_branches_of_a_condition_are_traced_to_the_outside():
    gm = captured(branches, X, X.t().contiguous())
    first, second = nested(gm)
    for _, body, operands in (first, second):
        (product,) = [n for n in body.graph.nodes if n.target in (torch.matmul, operator.matmul)]
        assert [operands[a].name for a in product.args if a in operands][-1] == "l_w_"


def test_tensors_among_the_operands_do_not_shift_the_inputs():
    gm = captured(checkpointed, X, X.t().contiguous())
    ((call, _, _),) = nested(gm)
    gm.register_buffer("constant", X.clone())
    with gm.graph.inserting_before(call):
        constant = gm.graph.get_attr("constant")
    body, _, w = call.args
    call.args = (body, constant, w)
    ((_, _, operands),) = nested(gm)
    assert [o.name for o in operands.values()] == ["constant", "l_w_"]


@pytest.mark.parametrize("results", [0, 2])
def test_every_result_needs_a_replacement(results):
    gm = captured(sin_cos, X)
    cos = node(gm, "cos")
    edit = Edit(gm, "s", [cos], [cos])
    new = edit.call(torch.tan, cos.args[0])
    with pytest.raises(ValueError, match="argument 2 is"):
        edit.finish(*[new] * results)
