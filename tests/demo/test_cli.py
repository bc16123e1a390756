"""The command line."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from adaptc import cli
from adaptc.cli import app as commands
from adaptc.cli.app import app
from adaptc.demo import run
from adaptc.demo.data import DemoDataError

RUNNER = CliRunner()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, dict[str, Any]]]:
    """What the command asks the demo for, instead of running it."""
    recorded: list[tuple[Path, dict[str, Any]]] = []

    def run_demo(out: Path, **arguments: Any) -> Any:
        recorded.append((out, arguments))
        return SimpleNamespace(agreement=SimpleNamespace(holds=True))

    monkeypatch.setattr(run, "run_demo", run_demo)
    return recorded


def test_help_names_the_command_and_its_options() -> None:
    assert "demo" in RUNNER.invoke(app, ["--help"]).output
    shown = RUNNER.invoke(app, ["demo", "--help"], env={"COLUMNS": "120", "TERM": "dumb"})
    assert shown.exit_code == 0
    for option in ("--out", "--seed", "--backend", "--epochs", "inductor", "aot_eager"):
        assert option in shown.output, option


def test_options_reach_the_demo(calls: list[tuple[Path, dict[str, Any]]]) -> None:
    arguments = ["demo", "--out", "somewhere", "--seed", "7", "--backend", "aot_eager", "--epochs", "2"]
    assert RUNNER.invoke(app, arguments).exit_code == 0
    ((out, asked),) = calls
    assert out == Path("somewhere")
    assert (asked["seed"], asked["backend"], asked["settings"].epochs) == (7, "aot_eager", 2)


def test_defaults_are_the_settings_that_were_tuned(calls: list[tuple[Path, dict[str, Any]]]) -> None:
    assert RUNNER.invoke(app, ["demo"]).exit_code == 0
    ((out, asked),) = calls
    assert out == Path("adaptc-demo")
    assert asked["settings"] == run.Settings()
    assert (asked["seed"], asked["backend"]) == (0, "inductor")


@pytest.mark.parametrize("arguments", [["--epochs", "0"], ["--backend", "cudagraphs"], ["--nonsense"]])
def test_bad_options_are_refused(arguments: list[str], calls: list[Any]) -> None:
    assert RUNNER.invoke(app, ["demo", *arguments]).exit_code == 2
    assert calls == []


def test_unequal_predictions_end_with_status_one(monkeypatch: pytest.MonkeyPatch) -> None:
    result = SimpleNamespace(agreement=SimpleNamespace(holds=False))
    monkeypatch.setattr(run, "run_demo", lambda *_, **__: result)
    shown = RUNNER.invoke(app, ["demo"])
    assert shown.exit_code == 1
    assert "does not predict the same" in shown.output


def test_our_errors_are_shown_without_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise DemoDataError("the text corpus is empty", found="none")

    monkeypatch.setattr(run, "run_demo", fail)
    shown = RUNNER.invoke(app, ["demo"])
    assert shown.exit_code == 1
    assert shown.output == "the text corpus is empty\n  found  none\n"


def test_an_interrupt_ends_without_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "run_demo", interrupted)
    shown = RUNNER.invoke(app, ["demo"])
    assert shown.exit_code == 130
    assert shown.output == "\nInterrupted.\n"


def test_the_environment_is_set_before_torch_and_transformers_are_imported() -> None:
    code = (
        "import os, sys, types\n"
        "def run_demo(*_, **__):\n"
        "    assert not {'torch', 'huggingface_hub', 'transformers'} & set(sys.modules)\n"
        "    from huggingface_hub import constants\n"
        "    print('offline', constants.HF_HUB_OFFLINE, os.environ['OMP_WAIT_POLICY'])\n"
        "    raise KeyboardInterrupt\n"
        "for name in ('run', 'training'):\n"
        "    sys.modules['adaptc.demo.' + name] = types.ModuleType(name)\n"
        "sys.modules['adaptc.demo.run'].run_demo = run_demo\n"
        "sys.modules['adaptc.demo.training'].Settings = dict\n"
        "from adaptc.cli.app import app\n"
        "app(['demo'])\n"
    )
    environment = {
        name: value for name, value in os.environ.items() if name not in ("HF_HUB_OFFLINE", "OMP_WAIT_POLICY")
    }
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout) == (130, "offline True PASSIVE\n"), done.stderr


def test_absent_packages_are_named_at_once(
    monkeypatch: pytest.MonkeyPatch, calls: list[tuple[Path, dict[str, Any]]]
) -> None:
    find_spec = importlib.util.find_spec
    absent = {"peft", "sklearn"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n in absent else find_spec(n))
    shown = RUNNER.invoke(app, ["demo"])
    assert shown.exit_code == 1
    assert shown.output == "adaptc demo needs sklearn, peft: pip install 'adaptc[demo]'\n"
    assert calls == []
    assert absent < set(commands.DEMO_MODULES)


def test_without_typer_the_console_script_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "adaptc.cli.app")
    monkeypatch.delattr(cli, "app", raising=False)
    monkeypatch.setitem(sys.modules, "typer", None)
    with pytest.raises(SystemExit, match=r"the command line needs typer: pip install 'adaptc\[demo\]'"):
        cli.main()


def test_it_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "adaptc", "demo", "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--backend" in done.stdout


def test_help_does_not_load_torch() -> None:
    code = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from adaptc.cli.app import app\n"
        "assert CliRunner().invoke(app, ['demo', '--help']).exit_code == 0\n"
        "print([m for m in ('torch', 'transformers', 'matplotlib', 'peft') if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
