"""The pass manager: contracts, the text of a pipeline, options of a plan, reports, cache keys."""

from __future__ import annotations

import pathlib
import re
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import adaptc
from adaptc import methods
from adaptc.codegen import choices
from adaptc.codegen.ops import emit, registry
from adaptc.errors import PipelineError, PlanError
from adaptc.ir import dialect
from adaptc.ir.code_hash import code_hash
from adaptc.ir.dialect import Cost
from adaptc.ir.edit import Result
from adaptc.passes import canonicalise, lower, manager
from adaptc.passes.contract import Context, Contract, Pass
from adaptc.passes.manager import Pipeline, get
from tests.passes.graphs import Graph, ops, tensors
from tests.passes.models import adapted, trained_graph


def a_pass(name, level="dynamo", run=lambda gm, context: Result(), **contract):
    contract = {key: frozenset(value) for key, value in contract.items()}
    return Pass(name, run, Contract(level=level, numerics="exact", **contract))


# -- contracts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("passes, error", [
    (["canonicalise"], "pass canonicalise needs inserted\n  found  before it: nothing"),
    (["canonicalise", "insert"], "pass canonicalise needs inserted"),
    (["insert", "insert"], "pass insert is in the pipeline twice\n  found  before it: insert"),
    (["insert", "lower", "canonicalise"],
     "works on captured graphs and cannot follow a pass on joint graphs\n  found  before it: insert, lower"),
])  # fmt: skip
def test_a_list_that_cannot_run_is_refused(passes, error):
    with pytest.raises(PipelineError, match=re.escape(error)):
        Pipeline([get(name) for name in passes])


def test_a_conflict_is_refused():
    with pytest.raises(PipelineError, match="late cannot run on a graph that is folded, inserted"):
        Pipeline([get("insert"), a_pass("fold", provides={"folded"}), a_pass("late", conflicts={"folded", "inserted"})])


def test_a_pass_may_conflict_with_what_comes_later():
    pipeline = Pipeline([a_pass("early", conflicts={"inserted"}), get("insert")])
    assert [one.name for one in pipeline.passes] == ["early", "insert"]


def test_a_missing_pass_says_what_to_do():
    with pytest.raises(PipelineError, match="put the pass that provides it earlier, or leave this one out as well"):
        Pipeline.from_options(skip=["insert"])


def test_what_a_pass_needs_may_come_from_any_pass_before_it():
    needy = a_pass("needy", "joint", requires={"inserted", "canonical"})
    assert Pipeline([get("insert"), get("canonicalise"), needy]).at("joint") == (needy,)


def test_an_unknown_name_is_refused():
    known = "raise_peft, insert, merge, lift_no_grad, canonicalise, seed_dropout, reassociate, share, fuse, lower"
    with pytest.raises(PipelineError, match=f"no pass named 'cannonicalise'\n  found  {known}"):
        get("cannonicalise")


def test_a_limit_for_a_pass_that_does_not_run_is_refused():
    with pytest.raises(PipelineError, match="a limit for lower, which is not in the pipeline\n  found  insert"):
        Pipeline([get("insert")], {"lower": 2})


# -- text ----------------------------------------------------------------------------------------------


@given(data=st.data())
def test_a_pipeline_is_its_text(data):
    draw = data.draw
    order = manager.default_order()
    names = draw(st.sampled_from([order, ("insert",), ("insert", "lower"), ("lower",), ()]))
    limits = draw(st.dictionaries(st.sampled_from([*names, "*"]), st.integers(0, 99)))
    pipeline = Pipeline([get(name) for name in names], limits)
    again = Pipeline.parse(str(pipeline))
    assert (again.passes, again.limits, str(again)) == (pipeline.passes, pipeline.limits, str(pipeline))


@pytest.mark.parametrize("text", ["", "insert,lower", "insert,canonicalise{limit=3},lower;limit=9"])
def test_pipelines_of_one_text_have_one_cache_key(text):
    assert Pipeline.parse(text).uuid() == Pipeline.parse(text).uuid()
    assert Pipeline.parse(text).uuid() != Pipeline.parse("insert").uuid()


def test_the_text():
    text = "insert,canonicalise{limit=3},lower;limit=9"
    pipeline = Pipeline.parse(text)
    assert str(pipeline) == text
    assert pipeline.limits == {"canonicalise": 3, "*": 9}
    default = "insert,lift_no_grad,canonicalise,seed_dropout,reassociate,share,fuse,lower,widen,library,accumulate"
    assert str(Pipeline.from_options()) == ",".join(manager.default_order()) == default


@pytest.mark.parametrize("text, error", [
    ("insert,sink", "no pass named 'sink'"),
    ("insert{limit=many}", "a limit is not a number\n  expected  name{limit=3}, or ;limit=3 at the end"),
    ("insert;limit=-1", "a limit is not a number"),
    ("insert{limit=3", "this is no pass: insert{limit=3\n  expected  name or name{limit=3}"),
    ("insert{limit=3}s", "this is no pass: insert{limit=3}s"),
    ("insert{skip=3}", "this is no pass"),
    ("insert{limit=}", "a limit is not a number"),
    ("insert,insert", "in the pipeline twice"),
    ("canonicalise", "needs inserted"),
])  # fmt: skip
def test_text_that_is_not_a_pipeline_is_refused(text, error):
    with pytest.raises(PipelineError, match=re.escape(error)):
        Pipeline.parse(text)


# -- options of a plan ---------------------------------------------------------------------------------


@pytest.mark.parametrize("passes, text", [
    (None, "insert,lift_no_grad,canonicalise,seed_dropout,reassociate,share,fuse,lower,widen,library,accumulate"),
    ({"skip": ["canonicalise"]},
     "insert,lift_no_grad,seed_dropout,reassociate,share,fuse,lower,widen,library,accumulate"),
    ({"order": ["insert", "lower"]}, "insert,lower,accumulate"),
    ({"order": ["insert", "canonicalise", "lower"], "skip": ["lower", "accumulate"]}, "insert,canonicalise"),
    ({"limit": 3},
     "insert,lift_no_grad,canonicalise,seed_dropout,reassociate,share,fuse,lower,widen,library,accumulate;limit=3"),
    ({"limit": {"canonicalise": 0}},
     "insert,lift_no_grad,canonicalise{limit=0},seed_dropout,reassociate,share,fuse,lower,widen,library,accumulate"),
    ({"limit": {"lower": 1, "insert": 2}, "skip": ["lower"]},
     "insert{limit=2},lift_no_grad,canonicalise,seed_dropout,reassociate,share,fuse,widen,library,accumulate"),
])  # fmt: skip
def test_passes_of_a_plan(passes, text):
    _, model = adapted(passes=passes)
    graph = trained_graph(model)
    assert graph.pipeline == str(model.adaptc.adapters.pipeline()) == text
    shown = [p.name for p in Pipeline.parse(text).passes if p.contract.level != "final"]
    assert [r.name for r in graph.reports] == shown


@pytest.mark.parametrize("passes, error", [
    ({"skip": ["canonical"]}, "no pass named 'canonical'"),
    ({"skip": ["insert"]}, "pass canonicalise needs inserted"),
    ({"order": ["lower", "insert"]}, "cannot follow a pass on joint graphs"),
    ({"limit": {"melt": 1}}, "a limit for melt, which is not in the pipeline"),
])  # fmt: skip
def test_passes_of_a_plan_that_cannot_run_are_refused(passes, error):
    with pytest.raises(PipelineError, match=re.escape(error)):
        trained_graph(adapted(passes=passes)[1])


@pytest.mark.parametrize("limit", [-1, True, "3", {"lower": -1}])
def test_a_limit_that_is_no_count_is_refused(limit):
    with pytest.raises(PlanError, match=r"passes\.limit is not a count"):
        adaptc.Plan([adaptc.LoRA(targets="up")], passes={"limit": limit})


def test_a_limit_stops_one_pass():
    _, model = adapted(passes={"limit": {"canonicalise": 1}})
    insert_, _, canonical, *_, lowered = trained_graph(model).reports
    assert [len(r.result.applied) for r in (insert_, canonical)] == [2, 1]
    assert [reason for _, reason in canonical.result.refused].count("limit reached") == 3
    assert lowered.ops_after.get("lora_linear", 0) == 0


def test_a_limit_for_all_is_shared_by_the_passes_of_a_level():
    _, model = adapted(passes={"limit": 3})
    applied = {r.name: len(r.result.applied) for r in trained_graph(model).reports}
    assert applied == {
        "insert": 2, "lift_no_grad": 0, "canonicalise": 1, "seed_dropout": 0, "reassociate": 0, "share": 1, "fuse": 1,
        "lower": 1,
        "widen": 0, "library": 0,
    }  # fmt: skip


def test_the_smaller_of_two_limits_holds():
    pipeline = Pipeline([get("insert"), get("canonicalise")], {"*": 5, "canonicalise": 9})
    seen = []

    def note(gm, context):
        seen.append(context.budget)
        return Result()

    pipeline.passes = (a_pass("free", run=note), a_pass("canonicalise", run=note))
    pipeline.run(one_adapter(), "dynamo", Context())
    assert seen == [5, 5]
    pipeline.limits = {"*": 9, "canonicalise": 5}
    pipeline.run(one_adapter(), "dynamo", Context())
    assert seen == [5, 5, 9, 5]


# -- running -------------------------------------------------------------------------------------------


def one_adapter(scale_at="n"):
    build = Graph()
    values = tensors()
    return build.module(build.lora(*(build.input(name, tensor) for name, tensor in values.items()), scale_at))


def test_only_the_passes_of_a_level_run():
    order = []
    passes = [a_pass(name, level, run=lambda gm, context, name=name: order.append(name) or Result())
              for name, level in (("a", "dynamo"), ("b", "dynamo"), ("c", "joint"))]  # fmt: skip
    stages = []
    pipeline = Pipeline(passes)
    pipeline.run(one_adapter(), "dynamo", Context(), on_stage=lambda name, gm: stages.append(name))
    assert order == stages == ["a", "b"]
    pipeline.run(one_adapter(), "joint", Context())
    assert order == ["a", "b", "c"]


def test_a_report_has_ops_and_costs_of_both_sides():
    """fp32: the scale moves from M x N to M x r."""
    _, model = adapted()
    graph = trained_graph(model)
    inserted, _, canonical, *_, fused, lowered, _, _ = graph.reports
    assert [(r.name, r.level) for r in graph.reports] == [
        ("insert", "dynamo"), ("lift_no_grad", "dynamo"), ("canonicalise", "dynamo"), ("seed_dropout", "dynamo"),
        ("reassociate", "joint"), ("share", "joint"), ("fuse", "joint"), ("lower", "joint"),
        ("widen", "joint"), ("library", "joint"),
    ]  # fmt: skip
    assert inserted.ops_before["lora_site"] == 2 and "lora_site" not in inserted.ops_after
    assert inserted.ops_after["lora_linear"] == 2
    assert inserted.ops_after == canonical.ops_before == {**canonical.ops_after, "dropout": 2}
    assert inserted.cost_after == canonical.cost_before
    M, r = 14, 4
    sites = ((6, 10), (10, 6))  # K, N
    n_form = sum(2 * M * r * (K + N) + 2 * M * N for K, N in sites)
    r_form = sum(2 * M * r * (K + N) + M * r + M * N for K, N in sites)
    assert canonical.cost_before.flops - canonical.cost_after.flops == n_form - r_form
    # The product is no longer written and read again. A dropout that does nothing costs nothing: it is its input.
    assert canonical.cost_before.read - canonical.cost_after.read == sum(2 * M * N * 4 for _, N in sites)
    assert canonical.cost_after.saved == 0 and lowered.cost_before.saved > 0
    assert fused.ops_before["lora_linear"] == lowered.ops_before["lora_linear_expand"] == 2
    # An output is not written and read again between the product and the correction: two, and one input's gradient. Of
    # two gradients of outputs each is read once.
    moved = [cost.read + cost.written for cost in (fused.cost_before, fused.cost_after)]
    assert fused.cost_before.flops == fused.cost_after.flops
    assert moved[0] - moved[1] >= 4 * (2 * (M * 10 + M * 6) + 2 * M * 10 + M * 10 + M * 6)
    assert "lora_linear_expand" not in lowered.ops_after
    assert lowered.ops_after["mm"] > lowered.ops_before["mm"]
    assert all(r.seconds > 0 and r.rolled_back is None and r.errors is None for r in graph.reports)


def test_a_validated_report_has_errors():
    _, model = adapted(verify=True)
    reports = trained_graph(model).reports
    for report in (r for r in reports if r.result.applied):  # nothing to compare where nothing was rewritten
        before, after = report.errors
        assert 0 < before < 1e-4 and 0 < after < 1e-4


def test_refusals_are_in_the_report():
    build = Graph()
    values = tensors()
    values["s1"].requires_grad_()
    gm = build.module(build.lora(*(build.input(name, tensor) for name, tensor in values.items())))
    pipeline = Pipeline([a_pass("insert", provides={"inserted"}), get("canonicalise")])
    _, reports = pipeline.run(gm, "dynamo", Context())
    assert reports[1].result.refused == [("fc", "scale is trained: its gradient needs the unscaled bottleneck")]
    assert reports[1].ops_before == reports[1].ops_after
    assert reports[1].cost_before == reports[1].cost_after != Cost()
    assert ops(gm) == {"lora_linear": 1}


# -- cache keys ----------------------------------------------------------------------------------------


def edited(function):
    """The same function with other code."""
    def changed(*args, **kwargs):
        return function(*args, **kwargs)

    return changed


PARTS = ("body", "fake", "save", "gradient", "cost")
methods.load_all()
OP_PARTS = [
    (name, part) for name in dialect.names() for part in PARTS
    if getattr(dialect.get(name), part) is not None
]  # fmt: skip


@pytest.mark.parametrize("name, part", OP_PARTS)
def test_the_key_changes_with_every_part_of_an_op(monkeypatch, name, part):
    pipeline = Pipeline.from_options()
    before = pipeline.uuid()
    assert pipeline.uuid() == before
    op = dialect.get(name)
    monkeypatch.setattr(op, part, edited(getattr(op, part)))
    assert pipeline.uuid() != before
    monkeypatch.undo()
    assert pipeline.uuid() == before


@pytest.mark.parametrize("key", choices.host())
def test_the_key_and_the_table_change_with_what_timings_depend_on(monkeypatch, key):
    before, table, another = Pipeline.from_options().uuid(), choices._path(), {**choices.host(), key: "another"}
    monkeypatch.setattr(choices, "host", lambda: another)
    assert Pipeline.from_options().uuid() != before and choices._path() != table


def test_the_key_changes_with_a_library_that_is_switched_off():
    before = Pipeline.from_options().uuid()
    with torch.backends.mkldnn.flags(enabled=not torch.backends.mkldnn.enabled):
        assert Pipeline.from_options().uuid() != before


def test_the_key_changes_with_the_rows_of_ops(monkeypatch):
    before = Pipeline.from_options().uuid()
    monkeypatch.setattr(registry, "fingerprint", lambda: "another")
    assert Pipeline.from_options().uuid() != before


def test_every_entry_of_a_table_counts():
    """Also one that another entry has as well, and whatever became of objects that were hashed before."""
    def hashed(*entries):
        table = dict(enumerate(entries))
        return code_hash(lambda: table)

    one, other, third = edited(lower.lower), edited(canonicalise.canonicalise), edited(get)
    tables = [(one, other, one), (one, other, other), (one, other, third), (other, other, third), (third, other, one)]
    assert len({hashed(*table) for table in tables}) == len(tables)
    assert len({hashed(*tables[2]) for _ in range(20)}) == 1


def test_the_key_changes_with_what_a_lowering_calls(monkeypatch):
    before = Pipeline.from_options().uuid()
    monkeypatch.setattr(emit, "scaled", edited(emit.scaled))
    assert Pipeline.from_options().uuid() != before


@pytest.mark.parametrize("module, function", [
    ("adaptc.passes.insert", "_insert"), ("adaptc.passes.lower", "_lower"),
    ("adaptc.passes.canonicalise", "sink_scale"), ("adaptc.passes.canonicalise.join_adapters", "_why_not"),
])  # fmt: skip
def test_the_key_changes_with_a_pass(monkeypatch, module, function):
    import importlib

    before = Pipeline.from_options().uuid()
    owner = importlib.import_module(module)
    monkeypatch.setattr(owner, function, edited(getattr(owner, function)))
    if function == "sink_scale":
        rewrites = tuple(owner.sink_scale if r.__name__ == function else r for r in canonicalise.REWRITES)
        monkeypatch.setattr(canonicalise, "REWRITES", rewrites)
    assert Pipeline.from_options().uuid() != before


def test_keys_of_different_pipelines_differ():
    options = [{}, {"skip": ["canonicalise"]}, {"skip": ["lower"]}, {"limit": 1}, {"limit": 2}, {"limit": {"lower": 1}}]
    keys = {Pipeline.from_options(**one).uuid() for one in options}
    passes = [get("insert"), a_pass("mine", run=edited(lower.lower))]
    keys |= {Pipeline(passes).uuid(), Pipeline([passes[0], a_pass("mine", run=edited(passes[0].run))]).uuid()}
    assert len(keys) == len(options) + 2


def test_the_key_changes_with_what_the_cpu_multiplies(monkeypatch):
    keys = set()
    for emulated in ((), (torch.bfloat16,), (torch.float16,)):
        monkeypatch.setattr(manager, "cpu_emulates", lambda dtype, among=emulated: dtype in among)
        for pairs in (False, True):
            monkeypatch.setattr(manager, "has_avx512_bf16", lambda pairs=pairs: pairs)
            keys.add(Pipeline.from_options().uuid())
    assert len(keys) == 6


def test_the_key_changes_with_a_source_file_in_either_language(monkeypatch, tmp_path):
    package = pathlib.Path(adaptc.__file__).parent
    shutil.copytree(package / "codegen/cpp", tmp_path / "codegen/cpp")
    monkeypatch.setattr(manager, "__file__", str(tmp_path / "passes/manager.py"))
    hashes = {manager.package_hash.__wrapped__()}
    for name in ("skinny.py", "skinny.cpp", "skinny.h"):
        with (tmp_path / "codegen/cpp" / name).open("a") as file:
            file.write("\n")
        hashes.add(manager.package_hash.__wrapped__())
    assert len(hashes) == 4


def test_the_key_changes_with_the_version_of_torch(monkeypatch):
    before = Pipeline.from_options().uuid()
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    assert Pipeline.from_options().uuid() != before
