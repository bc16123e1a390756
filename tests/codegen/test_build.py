"""What a first step needs is made in a second thread, which is out of the way of timings, of forks and of the end."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from torch import nn
from torch._inductor import codecache, cpu_vec_isa
from torch._inductor.codecache import CppCodeCache

import adaptc
from adaptc import torch_internals
from adaptc.codegen import choices
from adaptc.codegen.cpp import build
from adaptc.codegen.cpp.sources import text_of
from adaptc.errors import AdaptcWarning
from adaptc.passes.manager import Pipeline

SOON = 20.0
forks = pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")


class Piece:
    """A piece of work that ends when it is let go."""

    def __init__(self):
        self.begun, self.let_go, self.done = threading.Event(), threading.Event(), threading.Event()

    def __call__(self):
        self.begun.set()
        assert self.let_go.wait(SOON)
        self.done.set()


@pytest.fixture
def resting():
    """The thread of this process, which earlier tests may have given work, does none of it meanwhile."""
    with build.quiet():
        yield


@pytest.fixture
def line(resting, monkeypatch):
    """The line that timings look at, empty; the one of this process rests."""
    line = build.Line()
    monkeypatch.setattr(build, "_line", line)
    monkeypatch.setattr(build, "_begun", set())
    yield line


def test_pieces_are_done_one_after_the_other_whatever_they_raise(line):
    first, second, seen = Piece(), Piece(), []
    line.add([first, lambda: 1 / 0, lambda: seen.append(first.done.is_set()), second])
    assert first.begun.wait(SOON) and not second.begun.is_set()
    first.let_go.set()
    assert second.begun.wait(SOON) and seen == [True]
    second.let_go.set()
    with build.quiet():
        assert second.done.is_set()
    last = Piece()
    line.add([last])  # the thread has ended, or is about to
    assert last.begun.wait(SOON)
    last.let_go.set()


def test_nothing_begins_while_the_line_is_held(line):
    first, second = Piece(), Piece()
    line.add([first, second])
    assert first.begun.wait(SOON)
    with build.hold():
        assert not first.done.is_set()  # it does not wait
        first.let_go.set()
        with build.quiet():
            assert first.done.is_set()
        assert not second.begun.wait(0.2)
    assert second.begun.wait(SOON)
    second.let_go.set()


def test_what_is_timed_has_the_machine_to_itself(line, monkeypatch, tmp_path):
    monkeypatch.setattr(choices.torch_internals, "cache_dir", lambda: str(tmp_path))
    monkeypatch.setattr(choices._MEMORY, "known", {})
    first, second, beside = Piece(), Piece(), []

    def way():
        beside.append(second.begun.is_set() or not first.done.is_set())

    line.add([first, second])
    assert first.begun.wait(SOON)
    threading.Timer(0.2, first.let_go.set).start()
    assert choices.choose("a product", lambda: {"usual": way, "other": way}) is not None
    assert beside and not any(beside)
    second.let_go.set()
    assert second.done.wait(SOON)


def in_fork(check):
    """What ``check`` says in a forked process; not true where that hangs."""
    child = os.fork()
    if child == 0:
        try:
            os._exit(0 if check() else 1)
        finally:
            os._exit(2)
    end = time.monotonic() + SOON
    while (status := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < end:
        time.sleep(0.01)
    if status[0] == 0:
        os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status[1]) == 0


def quiet_comes():
    with build.quiet():
        return True


@forks
def test_a_forked_process_waits_for_no_thread(line):
    piece = Piece()
    line.add([piece])
    assert piece.begun.wait(SOON)
    with build.hold():
        assert in_fork(quiet_comes)
    piece.let_go.set()


def test_the_interpreter_ends_with_the_piece_that_it_is_in(tmp_path):
    script = f"""
import pathlib, threading, time
from adaptc.codegen.cpp import build
here, begun = pathlib.Path({str(tmp_path)!r}), []
def first():
    begun.append(1)
    while threading.main_thread().is_alive():
        time.sleep(0.01)
    (here / "first").touch()
build._line.add([first, (here / "second").touch])
while not begun:
    time.sleep(0.01)
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
    assert [file.name for file in tmp_path.iterdir()] == ["first"]


def begun_with(monkeypatch, parameters, **found):
    """What ``parameters`` begin to compile."""
    for name, value in found.items():
        monkeypatch.setattr(torch_internals, name, lambda value=value: value)
    sources = []
    monkeypatch.setattr(torch_internals, "compile_cpp", sources.append)
    monkeypatch.setattr(torch_internals, "compile_headers", lambda: None)
    monkeypatch.setattr(build._line, "add", lambda pieces: [piece() for piece in pieces])
    build.begin(parameters)
    return sources


def test_kernels_of_the_largest_parameters_dtype_are_begun_with_once(line, monkeypatch):
    norm = torch.zeros(8)
    wide, half = torch.zeros(8, 8), torch.zeros(8, 8, dtype=torch.bfloat16)
    plain = {"may_call_onednn": False, "has_avx512_bf16": False}
    both = [text_of("products.cpp"), text_of("skinny.cpp")]
    assert begun_with(monkeypatch, [norm, half, nn.UninitializedParameter()], **plain) == both
    assert begun_with(monkeypatch, [norm, half], **plain) == []
    assert begun_with(monkeypatch, [wide, half[0]], may_call_onednn=True) == [text_of("onednn.cpp")]
    assert begun_with(monkeypatch, [half], has_avx512_bf16=True) == [text_of("pairs.cpp")]
    assert begun_with(monkeypatch, [wide.half()]) == []


def test_nothing_is_begun_with_for_a_model_elsewhere_or_without_a_compiler(line, monkeypatch):
    asked = []
    monkeypatch.setattr(build, "_pieces", lambda dtype: asked.append(dtype) or [])
    build.begin([])
    build.begin([torch.zeros(2), torch.zeros(8, device="meta")])
    with torch._inductor.config.patch(max_autotune=True):  # it times kernels itself
        build.begin([torch.zeros(8)])
    with monkeypatch.context() as patch:
        patch.setattr(torch_internals, "inductor_missing", lambda: "no compiler")
        build.begin([torch.zeros(8)])
    assert asked == []
    build.begin([torch.zeros(8)])
    assert asked == [torch.float32]


class BegunError(Exception):
    pass


@pytest.mark.parametrize(
    "backend, options, training, begins",
    [
        ("inductor", {}, True, True),
        ("inductor", {"mode": "default"}, True, True),
        pytest.param("inductor", {}, False, False, marks=pytest.mark.inductor),
        pytest.param("inductor", {"options": {"cpp.simdlen": 256}}, True, False, marks=pytest.mark.inductor),
        ("aot_eager", {}, True, False),
    ],
)
def test_the_first_step_under_inductor_begins(monkeypatch, backend, options, training, begins):
    model = nn.Sequential(nn.Linear(8, 8))
    adaptc.compile(model, adaptc.LoRA(r=2, targets=["0"]), backend=backend, **options)
    given = []

    def begin(parameters):
        given.extend(parameters)
        raise BegunError

    monkeypatch.setattr(build, "begin", begin)
    if begins:
        with pytest.raises(BegunError):
            model(torch.zeros(2, 8))
        assert any(p is model[0].weight for p in given)
    else:
        with torch.set_grad_enabled(training):
            assert model(torch.zeros(2, 8)).shape == (2, 8)
        if not training:
            with pytest.raises(BegunError):  # after an evaluation
                model(torch.zeros(2, 8))


def test_what_is_compiled_aside_is_loaded_without_a_compiler(resting, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    source = 'extern "C" int answer_of_test_build() { return 42; }'
    with monkeypatch.context() as patch:
        patch.setattr(CppCodeCache, "_load_library", lambda *args: pytest.fail("loaded aside"))
        torch_internals.compile_cpp(source)
    assert len(list(tmp_path.rglob("*main.so"))) == 1
    monkeypatch.setattr("torch._inductor.cpp_builder.run_compile_cmd", lambda *args, **kw: pytest.fail("again"))
    CppCodeCache.cache_clear()  # as another process that finds the file, too
    assert torch_internals.load_cpp(source).answer_of_test_build() == 42
    torch_internals.compile_cpp(source)


def test_what_does_not_compile_aside_is_reported_where_it_is_loaded(line, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    source = "this is no C++ of test_build"
    with pytest.raises(Exception, match="no C"):
        torch_internals.compile_cpp(source)
    after = threading.Event()
    line.add([functools.partial(torch_internals.compile_cpp, source), after.set])
    assert after.wait(SOON)
    with pytest.warns(AdaptcWarning, match="do not compile"):
        assert torch_internals.load_cpp(source) is None


@pytest.mark.inductor
def test_headers_are_those_of_a_loop_that_inductor_compiles(resting):
    def headers():
        return codecache._precompile_header.cache_info()

    torch_internals.compile_headers()
    before = headers()
    other = time.time()  # of which no cache knows the loop
    torch.compile(lambda x: x.sin() + other)(torch.zeros(64))
    assert headers().hits > before.hits and headers().misses == before.misses


class Kind:
    """Vector instructions that two threads probe at the same time."""

    def __init__(self, name, both):
        self.name, self.both, self.known, self.asked = name, both, False, 0

    def __str__(self):
        return self.name

    def __bool__(self):
        self.asked += 1
        if not self.known:
            self.both.wait(SOON)
            time.sleep(0.2)  # for others to ask meanwhile
            self.known = True
        return self.name != "avx512"


@pytest.fixture
def kinds(resting, monkeypatch):
    """Those that Inductor asks here: the first two."""
    both = threading.Barrier(2)
    kinds = [Kind("avx512", both), Kind("avx2", both), Kind("avx512 amx_tile", both)]
    monkeypatch.setattr(cpu_vec_isa, "supported_vec_isa_list", kinds)
    monkeypatch.setattr(cpu_vec_isa, "x86_isa_checker", lambda: ["avx2", "avx512"])
    find = functools.cache(lambda: [kind for kind in kinds[:2] if kind])
    monkeypatch.setattr(cpu_vec_isa, "valid_vec_isa_list", find)
    return kinds


def test_instructions_are_probed_once_however_many_ask(kinds):
    find = cpu_vec_isa.valid_vec_isa_list
    torch_internals.cpp._probe_at_once.__wrapped__()
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(cpu_vec_isa.valid_vec_isa_list())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SOON)
    assert answers == [[kinds[1]]] * 4 and kinds[2].asked == 0
    # Once in a thread of its own, and once by whoever sums up first, after all was known.
    assert not kinds[0].both.broken and [kind.asked for kind in kinds[:2]] == [2, 2]
    cpu_vec_isa.valid_vec_isa_list.cache_clear()
    assert find.cache_info().currsize == 0


@forks
def test_a_forked_process_probes_for_itself(kinds):
    torch_internals.cpp._probe_at_once.__wrapped__()
    asking = torch_internals.in_thread(cpu_vec_isa.valid_vec_isa_list)  # in the middle of probing from now on
    while kinds[0].asked == 0:
        time.sleep(0.001)

    def again():
        both = threading.Barrier(2)  # the other one has waiting threads, which are not there
        for kind in kinds:
            kind.both = both
        return cpu_vec_isa.valid_vec_isa_list() == [kinds[1]]

    assert in_fork(again)
    asking.join(SOON)


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="signals reach all threads here")
def test_an_interrupt_is_not_taken_for_an_instruction_that_is_missing():
    program = "import os, signal, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(0.1)"
    found = []
    thread = torch_internals.in_thread(
        lambda: found.append(subprocess.run([sys.executable, "-c", program], check=False).returncode)
    )
    thread.join(SOON)
    assert found == [0] and signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_where_no_thread_is_left_the_step_goes_on_without(line, monkeypatch, kinds):
    def start(self):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        line.add([lambda: None])
        for kind in kinds:
            kind.known = True
        torch_internals.cpp._probe_at_once.__wrapped__()
        assert cpu_vec_isa.valid_vec_isa_list() == [kinds[1]]
    piece = Piece()
    line.add([piece])
    assert piece.begun.wait(SOON)
    piece.let_go.set()


def test_joint_passes_hold_the_line(line, monkeypatch):
    monkeypatch.setattr(build, "begin", lambda parameters: None)
    model, piece, held = nn.Sequential(nn.Linear(8, 8)), Piece(), []
    adaptc.compile(model, adaptc.LoRA(r=2, targets=["0"]), backend="aot_eager")
    run = Pipeline.run

    def watched(self, gm, level, *args, **kwargs):
        if level == "joint":
            line.add([piece])
            held.append(not piece.begun.wait(0.2))
        return run(self, gm, level, *args, **kwargs)

    monkeypatch.setattr(Pipeline, "run", watched)
    piece.let_go.set()
    model(torch.zeros(2, 8)).sum().backward()
    assert held == [True] and piece.done.wait(SOON)
