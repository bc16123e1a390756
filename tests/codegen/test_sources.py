"""The files of C++: whole as text, each fit for a compiler by itself, and part of the package."""

from __future__ import annotations

import os
import pathlib
import platform
import re
import shlex
import subprocess

import pytest
from torch.utils import cpp_extension

from adaptc import torch_internals
from adaptc.codegen.cpp import sources, takes
from adaptc.codegen.cpp.sources import FOLDER, constants, text_of

FILES = sorted(path.name for kind in ("*.h", "*.cpp") for path in FOLDER.glob(kind))


@pytest.mark.parametrize("name", FILES)
def test_the_text_of_a_file_holds_ours_that_it_includes_once(name):
    text, plumbing = text_of(name), ('#include "', "#pragma once")
    assert not re.search(r'#\s*include\s*"|#pragma once', text)
    for line in ("#define UNROLLED_FOR", "struct Products {", "static Tensor empty(", "#define RULES"):
        assert text.count(line) <= 1
    assert all(line in text for line in (FOLDER / name).read_text().splitlines() if not line.startswith(plumbing))


def test_the_numbers_are_those_of_python(monkeypatch):
    for name, value in (("MOST_RANKS", takes.MOST_RANKS), ("FEWEST_ROWS", takes.FEWEST_ROWS)):
        assert f"constexpr int64_t {name} = {value};\n" in text_of("products.cpp")
    assert constants().removeprefix("#pragma once\n") in text_of("products.cpp")
    monkeypatch.setattr(sources, "cpu_emulates", lambda dtype: True)
    emulates = text_of("products.cpp")
    monkeypatch.setattr(sources, "cpu_emulates", lambda dtype: False)
    assert emulates.replace("EMULATES = true", "EMULATES = false") == text_of("products.cpp") != emulates


@pytest.mark.skipif(torch_internals.inductor_missing() is not None, reason="no C++ compiler")
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="some have instructions of x86")
@pytest.mark.parametrize("name", FILES)
def test_a_compiler_takes_a_file_by_itself(name, tmp_path):
    (tmp_path / "constants.h").write_text(constants())
    folders = [f"-I{folder}" for folder in (FOLDER, tmp_path, *cpp_extension.include_paths())]
    flags = ["-std=c++20", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512bf16", "-fsyntax-only", "-w", "-xc++", "-"]
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    subprocess.run([*compiler, *folders, *flags], input=f'#include "{name}"\n', text=True, check=True)


def test_every_file_beside_python_is_in_the_package():
    """By the patterns of pyproject.toml, of which there are no others."""
    project = (pathlib.Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert '[tool.setuptools.package-data]\n"adaptc.codegen.cpp" = ["*.h", "*.cpp"]\n' in project
    package = FOLDER.parents[1]
    others = {path for path in package.rglob("*.*") if path.suffix not in (".py", ".pyc")}
    assert others == {FOLDER / name for name in FILES}
