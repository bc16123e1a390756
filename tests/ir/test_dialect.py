"""The table of dialect ops, and the hashes that keep caches honest."""

from __future__ import annotations

import dataclasses
import functools
import os
import subprocess
import sys
import types

import pytest
import torch

from adaptc import methods
from adaptc.ir import code_hash as code_hash_module
from adaptc.ir import dialect
from adaptc.ir.code_hash import code_hash
from adaptc.ir.dialect import Cost, DialectOp


def test_every_name_of_the_table_is_a_registered_op():
    methods.load_all()
    assert set(dialect.names()) >= {
        "lora_linear", "lora_bottleneck_grad", "lora_factor_grad", "lora_input_grad",
    }  # fmt: skip
    for name in dialect.names():
        op = dialect.get(name)
        assert dialect.of_target(op.overload) is op
        assert op.overload._schema.name == f"adaptc::{name}"
        assert not op.overload._schema.is_mutable


def test_other_targets_are_not_dialect_ops():
    for target in (torch.ops.aten.mm.default, torch.relu, "relu", torch.ops.adaptc.lora_linear):
        assert dialect.of_target(target) is None


def test_the_body_that_runs_is_the_one_in_the_table(monkeypatch):
    op = dialect.get("lora_input_grad")
    q, A = torch.ones(2, 3), torch.ones(3, 4)
    monkeypatch.setattr(op, "body", lambda q, A: q.new_full((2, 4), 7.0))
    assert op.overload(q, A).unique().tolist() == [7.0]
    monkeypatch.setattr(op, "fake", lambda q, A: q.new_empty((5, 6)))
    assert op.overload(q.to("meta"), A.to("meta")).shape == (5, 6)


def test_costs_add_up():
    assert Cost(1, 2, 3, 4) + Cost(10, 20, 30, 40) == Cost(11, 22, 33, 44)


def changed(function):
    """The same function with something added."""

    def wrapper(*args, **kwargs):
        return function(*args, **kwargs) * 2

    return wrapper


PARTS = [
    (name, part)
    for name in ("lora_linear", "lora_bottleneck_grad", "lora_factor_grad", "lora_input_grad")
    for part in ("body", "fake", "save", "gradient", "cost")
    if getattr(dialect.get(name), part) is not None
]


@pytest.mark.parametrize("name, part", PARTS)
@pytest.mark.parametrize("how", ["wrapped", "wrapped with functools.wraps"])
def test_fingerprint_changes_with_every_part_of_an_op(monkeypatch, name, part, how):
    before = dialect.fingerprint()
    op = dialect.get(name)
    old = getattr(op, part)
    new = changed(old) if how == "wrapped" else functools.wraps(old)(changed(old))
    monkeypatch.setattr(op, part, new)
    assert dialect.fingerprint() != before
    monkeypatch.undo()
    assert dialect.fingerprint() == before


def test_fingerprint_covers_helpers_and_schemas(monkeypatch):
    before = dialect.fingerprint()
    lora = sys.modules["adaptc.ir.ops.lora"]
    monkeypatch.setattr(lora, "rows", changed(lora.rows))
    assert dialect.fingerprint() != before
    monkeypatch.undo()
    monkeypatch.setattr(dialect.get("lora_input_grad"), "schema", "(Tensor q, Tensor A, bool f=False) -> Tensor")
    assert dialect.fingerprint() != before


def test_fingerprint_covers_ops_that_others_define(monkeypatch):
    before = dialect.fingerprint()
    op = DialectOp(
        "test_doubled", "(Tensor x) -> Tensor", body=lambda x: 2 * x, fake=torch.empty_like,
        cost=lambda x: Cost(x.numel()), sample=lambda draw: (torch.ones(2),),
    )  # fmt: skip
    monkeypatch.setattr(dialect, "_OPS", dict(dialect._OPS))
    dialect.define(op)
    assert "test_doubled" in dialect.names()
    with_op = dialect.fingerprint()
    assert with_op != before
    assert torch.ops.adaptc.test_doubled(torch.ones(2)).tolist() == [2.0, 2.0]
    op.body = lambda x: 3 * x
    assert dialect.fingerprint() != with_op


def make(source, **globals_):
    """A function from source text, as an edit of a file makes it."""
    space = {"__name__": "adapters_of_a_user", **globals_}
    exec(source, space)
    return space["f"]


def helper(x):
    return x + 1


def other_helper(x):
    return x + 2


def module(**members):
    made = types.ModuleType("helpers_of_a_user")
    vars(made).update(members)
    return made


@dataclasses.dataclass(frozen=True)
class Scaler:
    factor: int

    def __call__(self, x):
        return x * self.factor

    def method(self, x):
        return x * self.factor


def closed_over(value):
    return lambda x: x * value


PAIRS = {
    "constant": ("def f(x): return x * 2", "def f(x): return x * 3"),
    "operator": ("def f(x): return x * 2", "def f(x): return x + 2"),
    "method": ("def f(x): return x.sin()", "def f(x): return x.cos()"),
    "default": ("def f(x, k=1): return x * k", "def f(x, k=2): return x * k"),
    "keyword default": ("def f(x, *, k=1): return x * k", "def f(x, *, k=2): return x * k"),
    "set constant": ("def f(x): return x in {'a', 'b'}", "def f(x): return x in {'a', 'c'}"),
    "nested function": (
        "def f(x):\n def g(y): return y * 2\n return g(x)",
        "def f(x):\n def g(y): return y * 3\n return g(x)",
    ),
    "helper": (("def f(x): return h(x)", {"h": helper}), ("def f(x): return h(x)", {"h": other_helper})),
    "helper of a nested function": (
        ("def f(x): return (lambda y: h(y))(x)", {"h": helper}),
        ("def f(x): return (lambda y: h(y))(x)", {"h": other_helper}),
    ),
    "helper in a module": (
        ("def f(x): return m.h(x)", {"m": module(h=helper)}),
        ("def f(x): return m.h(x)", {"m": module(h=other_helper)}),
    ),
    "helper in a table": (
        ("def f(x): return T['h'](x)", {"T": {"h": helper}}),
        ("def f(x): return T['h'](x)", {"T": {"h": other_helper}}),
    ),
    "global constant": (("def f(x): return x * K", {"K": 2}), ("def f(x): return x * K", {"K": 3})),
    "cached helper": (
        ("def f(x): return h(x)", {"h": functools.cache(helper)}),
        ("def f(x): return h(x)", {"h": functools.cache(other_helper)}),
    ),
}


def built(entry):
    return make(entry) if isinstance(entry, str) else make(entry[0], **entry[1])


@pytest.mark.parametrize("what", PAIRS)
def test_hash_changes_with(what):
    first, second = PAIRS[what]
    assert code_hash(built(first)) == code_hash(built(first))
    assert code_hash(built(first)) != code_hash(built(second))


@pytest.mark.parametrize(
    "make_one",
    [
        closed_over,
        Scaler,
        lambda k: Scaler(k).method,
        lambda k: functools.partial(helper, k),
        lambda k: functools.partial(helper, x=k),
        lambda k: closed_over([{"a": k}]),
        lambda k: closed_over(closed_over(k)),
    ],
    ids=["closure", "object", "bound method", "partial", "partial keyword", "data in closure", "function in closure"],
)
def test_hash_changes_with_bound_values(make_one):
    assert code_hash(make_one(2)) == code_hash(make_one(2))
    assert code_hash(make_one(2)) != code_hash(make_one(3))


def test_hash_ignores_where_a_function_stands():
    assert code_hash(make("def f(x): return x * 2")) == code_hash(make("\n\n\ndef f(x):\n    return x * 2"))


def test_hash_ends_on_functions_that_call_each_other():
    f = make("def f(x): return g(x)\ndef g(x): return f(x)")
    assert code_hash(f) == code_hash(f)


def test_torch_and_the_standard_library_count_by_name(monkeypatch):
    f = make("def f(x): return F.linear(x, x)", F=torch.nn.functional)
    assert not code_hash_module._is_plain(torch.nn.functional.relu)
    assert not code_hash_module._is_plain(functools.reduce)
    assert code_hash(f) != code_hash(make("def f(x): return F.bilinear(x, x)", F=torch.nn.functional))


@pytest.fixture(scope="module")
def uuids_of_other_processes():
    """Pipeline id and fingerprint in two processes: their string hashes and the methods that they use first differ."""
    program = (
        "from adaptc import methods; from adaptc.ir import dialect; from adaptc.passes.manager import Pipeline;"
        "methods.get({kind!r}); print(Pipeline.from_options().uuid(), dialect.fingerprint())"
    )
    lines = set()
    for seed, kind in (("1", "vera"), ("2", "lora")):
        done = subprocess.run(
            [sys.executable, "-c", program.format(kind=kind)], capture_output=True, text=True, check=True,
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
        )  # fmt: skip
        lines.add(done.stdout.strip())
    return lines


@pytest.mark.slow
def test_hashes_are_equal_in_every_process(uuids_of_other_processes):
    assert len(uuids_of_other_processes) == 1
    (line,) = uuids_of_other_processes
    assert all(len(value) == 64 for value in line.split())
