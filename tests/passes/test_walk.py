"""The walk, and the page of the docs that says how a rewrite is added."""

from __future__ import annotations

import operator
import pathlib
import re
import sys
import types

import pytest
import torch

from adaptc.ir.sites import lora_nodes, site_of
from adaptc.passes.contract import Context
from adaptc.passes.walk import Match, Refusal, Together, each, everywhere
from tests.passes.graphs import Graph, check_adapters, ops, run_rewrite, tensors

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "adding-a-rewrite.md"


def chain(ranks=(2, 3, 2)):
    """(values, graph) of adapters one on the other, called a, b, c."""
    values = tensors(ranks=ranks)
    build = Graph()
    x, y, *factors = (build.input(name, tensor) for name, tensor in values.items())
    for i, site in zip(range(len(ranks)), "abc", strict=False):
        y = build.lora(x, y, *factors[3 * i : 3 * i + 3], site=site)
    return values, build.module(y)


def again(node):
    """The same call once more."""
    return Match(node, lambda edit: edit.call(node.target, *node.args))


def sites(result):
    return [r.site for r in result.applied], result.refused


def test_a_node_is_rewritten_refused_or_left_alone():
    answers = {"a": again, "b": lambda node: "a reason", "c": lambda node: None}
    values, gm = chain()
    result = run_rewrite(each("lora_linear")(lambda node: answers[site_of(node)](node)), gm)
    assert sites(result) == (["a"], [("b", "a reason")])
    check_adapters(gm, values)


def test_nodes_are_listed_before_any_is_rewritten():
    seen = []
    _, gm = chain()
    result = run_rewrite(each(lambda gm: reversed(lora_nodes(gm)))(lambda node: seen.append(node) or again(node)), gm)
    assert [r.site for r in result.applied] == ["c", "b", "a"]
    assert len(set(seen)) == 3


def test_a_match_is_written_before_the_next_is_asked_for():
    def swap_all(gm, context):
        for _ in range(3):
            node = lora_nodes(gm)[-1]
            yield again(node)
            assert node not in list(gm.graph.nodes)

    _, gm = chain((2,))
    assert len(run_rewrite(swap_all, gm).applied) == 3 and ops(gm) == {"lora_linear": 1}


def test_one_node_may_take_the_place_of_several():
    def merge(node):
        outputs = list(node.users)
        return Match(node, lambda edit: edit.item(edit.op("lora_linear", *node.args), 0), [node, *outputs], outputs)

    values = tensors()
    build = Graph()
    first = build.lora(*(build.input(name, tensor) for name, tensor in values.items()))
    second = build.call(operator.getitem, first.args[0], 0)
    gm = build.module(build.call(operator.sub, build.call(operator.add, first, first), second))
    assert len(run_rewrite(each("lora_linear")(merge), gm).applied) == 1
    assert ops(gm) == {"lora_linear": 1, "add": 1, "sub": 1}
    check_adapters(gm, values)


@pytest.mark.parametrize("budget, done, left", [(None, "ab", None), (5, "ab", 2), (3, "ab", 0), (2, "", 2)])
def test_together_is_all_or_nothing(budget, done, left):
    """Its own cost, and the names of all its sites, whatever it is made of."""
    _, gm = chain()
    a, b, _ = lora_nodes(gm)
    context = Context(budget=budget)
    result = run_rewrite(lambda gm, context: iter([Together(["a", "b"], map(again, (a, b)), cost=3)]), gm, context)
    refused = [] if done else [("a", "limit reached"), ("b", "limit reached")]
    assert sites(result) == (list(done), refused)
    assert context.budget == left


def test_a_refusal_costs_nothing():
    _, gm = chain()
    context = Context(budget=1)
    result = run_rewrite(lambda gm, context: iter([Refusal("x", "why"), again(lora_nodes(gm)[0])]), gm, context)
    assert sites(result) == (["a"], [("x", "why")]) and context.budget == 0


def test_cut_outs_are_kept_where_they_are_asked_for():
    for record in (False, True):
        _, gm = chain((2,))
        (rewrite,) = run_rewrite(each("lora_linear")(again), gm, Context(record=record)).applied
        assert (rewrite.before is not None) == (rewrite.after is not None) == record
        assert rewrite.owner is gm and rewrite.matched == ("lora_linear_default",)


def test_bodies_come_after_their_graph():
    _, inner = chain((2,))
    _, gm = chain((2,))
    gm.body = inner
    with gm.graph.inserting_before(next(iter(reversed(gm.graph.nodes)))):
        body = gm.graph.get_attr("body")
        gm.graph.call_function(torch.ops.higher_order.invoke_subgraph, (body, "body"))
    result = everywhere(gm, (each("lora_linear")(again), each("lora_linear")(again)), Context())
    assert [r.owner for r in result.applied] == [gm, gm, inner, inner]


def code_of_page():
    """File name -> its text, of the Python files that the page shows."""
    blocks = re.findall(r"```python\n# (\S+)\n(.*?)```", PAGE.read_text(), re.DOTALL)
    return dict(blocks)


def test_the_example_of_the_docs(monkeypatch):
    files = code_of_page()
    assert list(files) == ["adaptc/passes/canonicalise/add_scales.py", "tests/passes/test_add_scales.py"]
    found = {}
    for path, text in files.items():
        name = path.removesuffix(".py").replace("/", ".")
        module = types.ModuleType(name)
        monkeypatch.setitem(sys.modules, name, module)
        exec(compile(text, path, "exec"), vars(module))
        found |= {key: value for key, value in vars(module).items() if key.startswith("test_")}
    assert len(found) == 3
    for test in found.values():
        test()


def test_the_docs_name_what_there_is():
    text = PAGE.read_text()
    package = PAGE.parents[1] / "adaptc"
    for name in re.findall(r"`((?:\w+/)*\w+\.py)`", text):
        base = package.parent if name.startswith("adaptc/") else package / "passes"
        assert (base / name).exists(), name
    row = re.search(r"^- (REWRITES = .*)$", text, re.MULTILINE)
    assert row is not None and row[1] in (package / "passes" / "canonicalise" / "__init__.py").read_text()
    assert all(name in text for name in (*Match._fields[:5], *Together._fields))
