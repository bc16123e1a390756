"""The command line, ``adaptc``."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line, or say which extra it needs."""
    try:
        from adaptc.cli.app import app
    except ModuleNotFoundError as missing:
        if missing.name != "typer":
            raise
        sys.exit("the command line needs typer: pip install 'adaptc[demo]'")
    app()
