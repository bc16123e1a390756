"""Inductor's and AOTAutograd's caches: used again where nothing changed, and never where something did.

Their keys see a dialect op as a name in the graph's code. What it means reaches them only through the pipeline's
uuid.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch._functorch._aot_autograd.autograd_cache import AOTAutogradCache
from torch._inductor.codecache import FxGraphCache
from torch._inductor.utils import fresh_cache
from torch.nn.attention import SDPBackend, sdpa_kernel

import adaptc
from adaptc import torch_internals
from adaptc.capture.backend import FROM_CACHE
from adaptc.codegen.ops import registry
from adaptc.ir import dialect
from adaptc.ir.ops import lora
from adaptc.passes.manager import Pipeline
from tests.models import hosts

pytestmark = pytest.mark.inductor


@pytest.fixture(scope="module", autouse=True)
def _own_folder():
    with fresh_cache():
        yield


@pytest.fixture(autouse=True)
def _no_graphs(_own_folder):
    """Compiled C++ is kept from test to test: its key is its source."""
    FxGraphCache.clear()
    AOTAutogradCache.clear()


class Site(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 5)

    def forward(self, x):
        return torch.tanh(self.fc(x))


def step(training=True, passes=None):
    """One compilation in a fresh state: (output, gradient of A, gradient of B, misses, hits)."""
    torch.compiler.reset()
    counters.clear()
    torch.manual_seed(0)
    plan = adaptc.Plan([adaptc.LoRA(r=3, alpha=6, init="random", targets="fc")], passes=passes)
    model = adaptc.compile(Site(), plan, backend="inductor")
    x = torch.randn(4, 6)
    with torch.set_grad_enabled(training):
        out = model(x)
    if training:
        out.sum().backward()
    adapter = model.fc.adapters.default
    grads = [None if p.grad is None else p.grad.clone() for p in (adapter.lora_A, adapter.lora_B)]
    misses, hits = (
        (counters["aot_autograd"][f"autograd_cache_{what}"], counters["inductor"][f"fxgraph_cache_{what}"])
        for what in ("miss", "hit")
    )
    return out.detach(), *grads, misses, hits


def written_out():
    """The output and the gradients by the formula in fp64, for the values of ``step``."""
    torch.manual_seed(0)
    model = adaptc.compile(Site(), adaptc.LoRA(r=3, alpha=6, init="random", targets="fc"), backend="eager")
    x = torch.randn(4, 6).double()
    W, b = model.fc.weight.double(), model.fc.bias.double()
    A, B = (p.detach().double() for p in (model.fc.adapters.default.lora_A, model.fc.adapters.default.lora_B))
    out = torch.tanh(x @ W.T + b + 2.0 * (x @ A.T @ B.T))
    g = 1 - out**2
    return out.detach(), (2.0 * (g @ B).T @ x).detach(), (2.0 * g.T @ (x @ A.T)).detach()


def assert_close(found, wanted):
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)


def assert_compiled_anew(found):
    *_, (aot_misses, fx_misses), hits = found
    assert aot_misses == 1 and fx_misses >= 1 and hits == (0, 0)


def assert_from_the_cache(found):
    *_, misses, (aot_hits, fx_hits) = found
    assert aot_hits == 1 and fx_hits >= 1 and misses == (0, 0)


@pytest.mark.parametrize("passes", [None, {"skip": ["lower"]}], ids=["lowered", "dialect"])
def test_an_unedited_graph_comes_from_the_cache(passes):
    first = step(passes=passes)
    assert_compiled_anew(first)
    again = step(passes=passes)
    assert_from_the_cache(again)
    for got in (first, again):
        assert_close(got[:3], written_out())


def test_the_report_says_what_came_from_the_cache():
    notes = []
    for _ in range(2):
        torch.compiler.reset()
        torch.manual_seed(0)
        model = adaptc.compile(Site(), adaptc.LoRA(r=3, init="random", targets="fc"))
        model(torch.randn(4, 6)).sum().backward()
        notes.append(model.adaptc.graphs[0].notes)
        assert (notes[-1] == []) == model.adaptc.graphs[0].saw_joint
    assert notes == [[], [FROM_CACHE]]


def report_on(options, autocast):
    """(whether the joint passes were still to run when the step had ended, the report, every stage as text)."""
    torch.compiler.reset()
    torch.manual_seed(0)
    model = adaptc.compile(hosts.build("llama"), adaptc.LoRA(r=4, dropout=0.05, targets="all-linear"), **options)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        model(**hosts.batch("llama"))[0].float().sum().backward()
    graphs = model.adaptc.graphs
    waiting = [not graph.saw_joint for graph in graphs]
    state = torch.get_rng_state()
    told = model.adaptc.explain().to_dict()
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
    return waiting, told, [graph.stage(stage) for graph in graphs for stage in graph.stages]


@pytest.mark.parametrize(
    "options, autocast",
    [
        pytest.param({}, False, id="whole", marks=pytest.mark.slow),
        pytest.param({"regional": True}, True, id="regional, autocast", marks=pytest.mark.long),
    ],
)
def test_a_report_on_code_from_the_cache_says_what_the_first_one_said(options, autocast):
    (first_waits, first, stages), (waiting, again, same) = (report_on(options, autocast) for _ in range(2))
    assert not any(first_waits) and all(waiting)
    passes = first["graph 0: passes"]
    # What ``accumulate`` did is told as "in place".
    of_graph = [name for name in str(Pipeline.from_options()).split(",") if name != "accumulate"]
    assert [line.split()[0] for line in passes if not line.startswith((" ", "in place"))] == of_graph
    # What Inductor's own graph holds is not made again.
    only_of_the_first = ("in place ", "compiled code from the cache")
    first, again = (
        {title: [line for line in lines if not line.strip().startswith(only_of_the_first)]
         for title, lines in told.items()}
        for told in (first, again)
    )  # fmt: skip
    assert again == first and same == stages


class Counting(Site):
    """A buffer is written to with what the layer makes: behind the write Dynamo's tensor for it requires a gradient."""

    def __init__(self):
        super().__init__()
        self.register_buffer("sums", torch.zeros(4, 5))

    def forward(self, x):
        y = super().forward(x)
        self.sums.add_(y.detach())
        return y


def test_a_report_on_a_graph_that_writes_to_its_inputs():
    found = []
    for _ in range(2):
        torch.compiler.reset()
        torch.manual_seed(0)
        model = adaptc.compile(Counting(), adaptc.LoRA(r=3, init="random", targets="fc"))
        model(torch.randn(4, 6)).sum().backward()
        (graph,) = model.adaptc.graphs
        found.append((graph.saw_joint, [graph.stage(stage) for stage in graph.stages], graph.saved_bytes("lower")))
    assert [saw for saw, *_ in found] == [True, False] and found[0][1:] == found[1][1:]


def test_modes_are_as_they_were_at_the_capture_and_as_they_are_afterwards():
    inductor, functorch = torch._inductor.config, torch._functorch.config

    def modes():
        return (
            torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"),
            torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.backends.cuda.flash_sdp_enabled(), functorch.activation_memory_budget, inductor.deterministic,
        )  # fmt: skip

    plain = torch_internals.ambient_modes()
    with (
        torch.no_grad(), torch.autocast("cpu", torch.float16), sdpa_kernel(SDPBackend.MATH),
        functorch.patch(activation_memory_budget=0.5), inductor.patch(deterministic=True),
    ):  # fmt: skip
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            special, there = torch_internals.ambient_modes(), modes()
            with plain():
                assert modes()[:6] == (True, False, torch.bfloat16, False, False, True)
            assert modes() == there
        finally:
            torch.use_deterministic_algorithms(False)
    with inductor.patch(deterministic=True):
        here = modes()
        with plain():
            assert modes() == here
        with special():
            assert modes() == there
        assert modes() == here


def test_passes_that_inductor_is_not_to_run_are_not_said_to_be_in_the_cache():
    model = adaptc.compile(
        Site(), adaptc.LoRA(r=3, targets="fc"), options={"use_joint_graph_passes": False}
    )
    model(torch.randn(4, 6)).sum().backward()
    (graph,) = model.adaptc.graphs
    assert "joint" not in graph.stages
    assert graph.notes == ["Inductor is not to run passes on joint graphs: none ran"]


def test_what_cannot_be_shown_says_why(monkeypatch):
    step()
    torch.compiler.reset()
    torch.manual_seed(0)
    model = adaptc.compile(Site(), adaptc.LoRA(r=3, alpha=6, init="random", targets="fc"))
    model(torch.randn(4, 6)).sum().backward()
    (graph,) = model.adaptc.graphs

    def fails(*_):
        raise RuntimeError("torch has changed")

    monkeypatch.setattr(torch_internals, "show_joint_graph", fails)
    assert "lower" not in graph.stages
    assert graph.notes[1] == "they cannot be shown: RuntimeError: torch has changed"
    assert "  they cannot be shown" in str(model.adaptc.explain())


PROCESS = """
import json, torch
from torch import nn
import adaptc

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512))
plan = adaptc.LoRA(r=256, init="random", dropout=0.1, targets="all-linear")
model = adaptc.compile(model, plan)
x = torch.randn(256, 512, requires_grad=True)
out = model(x)
out.square().sum().backward()
(graph,) = model.adaptc.graphs
numbers = [out, x.grad, *(p.grad for p in model.adaptc.parameters())]
print(json.dumps({
    "cached": not graph.saw_joint,
    "numbers": [t.detach().double().sum().item().hex() for t in numbers],
    "chosen": model.adaptc.explain().to_dict().get("chosen for this host"),
    "notes": graph.notes,
}))
"""


@pytest.mark.slow
def test_another_process_finds_code_and_choices_and_computes_the_same(tmp_path):
    def run():
        folder = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
        done = subprocess.run(
            [sys.executable, "-c", PROCESS], env=folder, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    def tables():
        return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.glob("adaptc/*.json")}

    first = run()
    timed = tables()
    again = run()
    assert not first["cached"] and again["cached"]
    assert again["numbers"] == first["numbers"]
    assert again["chosen"] == first["chosen"]
    assert (first["chosen"] is not None) == torch_internals.may_call_onednn()
    assert again["notes"] == [FROM_CACHE] and tables() == timed
    for name in timed:
        (tmp_path / "adaptc" / name).unlink()
    without = run()
    assert without["cached"] and without["numbers"] == first["numbers"]
    assert without["chosen"] is None and tables() == {}
    if timed:
        assert without["notes"][1].startswith("what it chose is no longer on file for: ")


def test_with_verify_nothing_comes_from_the_cache():
    """What was made without the checks was not checked."""
    plan = adaptc.LoRA(r=3, alpha=6, init="random", targets="fc")
    for verify, checked in ((False, False), ("raise", True), ("raise", True), (False, False)):
        torch.compiler.reset()
        torch.manual_seed(0)
        model = adaptc.compile(Site(), plan, verify=verify)
        model(torch.randn(4, 6)).sum().backward()
        reports = [r for r in model.adaptc.graphs[0].reports if r.result.applied]
        assert len(reports) > 3 and all((r.errors is not None) == checked for r in reports)


@pytest.mark.slow
def test_another_pipeline_does_not_find_it():
    step()
    assert_compiled_anew(step(passes={"skip": ["canonicalise"]}))
    assert_from_the_cache(step())


def tenfold_gradient(ctx, *grads):
    return tuple(None if g is None else 10 * g for g in lora.linear_gradient(ctx, *grads))


def edit_gradient(monkeypatch):
    monkeypatch.setattr(dialect.get("lora_linear"), "gradient", tenfold_gradient)


def test_an_edited_gradient_formula_gives_the_new_gradient(monkeypatch):
    out, dA, dB = written_out()
    assert_close(step()[:3], (out, dA, dB))
    edit_gradient(monkeypatch)
    edited = step()
    assert_compiled_anew(edited)
    assert_close(edited[:3], (out, 10 * dA, 10 * dB))
    monkeypatch.undo()
    back = step()
    assert_from_the_cache(back)
    assert_close(back[:3], (out, dA, dB))


def edit_lowering(monkeypatch):
    """The gradient at the bottleneck, and so the first factor's, and the second factor's are 10 times too large."""
    row = registry.row("lora_bottleneck_grads")

    def tenfold(edit, *args):
        return tuple(edit.call(torch.ops.aten.mul.Tensor, node, 10.0) for node in row.lowering(edit, *args))

    monkeypatch.setitem(registry.ROWS, "lora_bottleneck_grads", dataclasses.replace(row, lowering=tenfold))


def test_an_edited_lowering_gives_the_new_number(monkeypatch):
    out, dA, dB = written_out()
    assert_close(step()[:3], (out, dA, dB))
    edit_lowering(monkeypatch)
    edited = step()
    assert_compiled_anew(edited)
    assert_close(edited[:3], (out, 10 * dA, 10 * dB))


def doubled_body(x, y, A, B, scale, scale_at):
    out, h = lora.linear_body(x, y, A, B, scale, scale_at)
    return 2 * out, h


@pytest.mark.parametrize("training", [True, False])
def test_an_edited_body_gives_the_new_number(monkeypatch, training):
    """Where the op stays one call in the compiled code, and with it in the key."""
    passes = {"skip": ["fuse", "lower"]}
    out, *_ = written_out()
    assert_close(step(training, passes)[:1], (out,))
    monkeypatch.setattr(dialect.get("lora_linear"), "body", doubled_body)
    edited = step(training, passes)
    assert_compiled_anew(edited)
    assert_close(edited[:1], (torch.tanh(2 * torch.atanh(out)),))


@pytest.mark.parametrize("edit", [edit_gradient, edit_lowering])
def test_with_a_uuid_that_does_not_change_the_old_gradient_comes_back(monkeypatch, edit):
    """What the uuid is for; if this fails, torch has begun to see the edit itself."""
    wanted = written_out()
    with monkeypatch.context() as frozen:
        frozen.setattr(Pipeline, "uuid", lambda self: "frozen")
        assert_close(step()[:3], wanted)
        edit(frozen)
        stale = step()
        assert_from_the_cache(stale)
        assert_close(stale[:3], wanted)
    with monkeypatch.context() as thawed:
        edit(thawed)
        assert_close(step()[:3], (wanted[0], 10 * wanted[1], 10 * wanted[2]))
