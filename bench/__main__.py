"""``python -m bench <table> [flags]`` measures; ``python -m bench render <json>`` redraws table and plot."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    """Run the command line; 0 when a report was written, 2 when the run is refused."""
    # Kineto prints two lines for every profile up to level 5; it reads this when torch is imported.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    from bench import batch, orders, overhead, report, switch, train
    from bench.errors import BenchError

    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    formatter = argparse.ArgumentDefaultsHelpFormatter
    train.add_arguments(commands.add_parser("train", help=train.__doc__, formatter_class=formatter))
    compiling = commands.add_parser("compile", help=train.COMPILE_HELP, formatter_class=formatter)
    train.add_arguments(compiling)
    compiling.set_defaults(**train.COMPILE_DEFAULTS)
    orders.add_arguments(commands.add_parser("orders", help=orders.__doc__, formatter_class=formatter))
    called = commands.add_parser("overhead", help=overhead.__doc__, formatter_class=formatter)
    overhead.add_arguments(called)
    batched = commands.add_parser("batch", help=batch.__doc__, formatter_class=formatter)
    batch.add_arguments(batched)
    switched = commands.add_parser("switch", help=switch.__doc__, formatter_class=formatter)
    switch.add_arguments(switched)
    render = commands.add_parser("render", help="write table and plot again from a result file")
    render.add_argument("json", type=Path)
    arguments = parser.parse_args(argv)
    try:
        runs = {
            "render": lambda: report.render(arguments.json),
            "batch": lambda: batch.run(arguments),
            "orders": lambda: orders.run(arguments),
            "overhead": lambda: overhead.run(arguments),
            "switch": lambda: switch.run(arguments),
        }
        written = runs.get(arguments.command, lambda: train.run(arguments))()
    except BenchError as error:
        print(f"refused: {error}", file=sys.stderr)
        return 2
    print(next(path for path in written if path.suffix == ".md").read_text())
    print("written: " + ", ".join(path.name for path in written), file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
