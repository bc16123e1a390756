"""What importing adaptc pulls in, and where private parts of torch may be named."""

from __future__ import annotations

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
HOOKS = {*(ROOT / "adaptc/torch_internals").glob("*.py"), ROOT / "bench/torch_internals.py"}
HEAVY = (
    "typer", "rich", "matplotlib", "pydantic", "transformers", "peft", "triton", "sklearn", "yaml", "jinja2",
    "accelerate", "bitsandbytes", "torchao",
)  # fmt: skip


def private_names(tree):
    """(line, name) of every private part of torch or triton that a module imports or reads."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] in ("torch", "triton") and any(p.startswith("_") and not p.startswith("__") for p in parts[1:]):
                yield node.lineno, name


def test_the_search_finds_private_names():
    lines = ["import torch._dynamo", "from torch._C import x", "torch._ops.y", "from torch.fx import _z"]
    tree = ast.parse("\n".join([*lines, "torch.__version__"]))
    assert {line for line, _ in private_names(tree)} == {1, 2, 3, 4}


@pytest.mark.parametrize("folder", ["adaptc", "bench"])
def test_private_parts_of_torch_are_named_in_one_place(folder):
    found = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in sorted((ROOT / folder).rglob("*.py")) if path not in HOOKS
        for line, name in private_names(ast.parse(path.read_text()))
    ]  # fmt: skip
    assert found == []


def loaded_by(program):
    code = f"import sys\n{program}\nprint([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(ast.literal_eval(done.stdout))


def test_importing_adaptc_pulls_in_nothing_heavy():
    program = "import adaptc; adaptc.LoRA(targets='all-linear'); adaptc.methods()"
    assert loaded_by(program) <= loaded_by("import torch._dynamo, torch.fx")


def test_compiling_needs_what_torch_compile_needs():
    program = (
        "import torch, adaptc; m = torch.nn.Sequential(torch.nn.Linear(4, 3)); "
        "adaptc.compile(m, adaptc.LoRA(targets='all-linear'), backend='aot_eager')(torch.ones(2, 4)).sum().backward(); "
        "str(m.adaptc.explain())"
    )
    compiled = "import torch; torch.compile(torch.nn.Linear(4, 3), backend='aot_eager')(torch.ones(2, 4))"
    assert loaded_by(program) <= loaded_by(compiled)


def test_every_public_name_is_there():
    import adaptc

    assert {"compile", "rewrite", "methods", "Plan", "LoRA", "IA3"} <= set(adaptc.__all__) <= set(dir(adaptc))
    for name in adaptc.__all__:
        assert getattr(adaptc, name) is not None
    with pytest.raises(AttributeError, match="module 'adaptc' has no attribute 'Lora'"):
        adaptc.Lora  # noqa: B018
