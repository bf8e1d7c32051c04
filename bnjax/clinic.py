"""The commands of the BN clinic: `bnjax audit | precise | fold | port`.

Each is a thin layer over a function in `bnjax.stats`, for the networks in run folders.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

# Whatever a command needs is imported in it, so that --help is quick.


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say which trained network, and where its data lie."""
    parser.add_argument(
        "--workdir", type=Path, required=True, metavar="DIR", help="the folder of the run"
    )
    parser.add_argument(
        "--checkpoint",
        default="last",
        metavar="best|last|STEP",
        help="which of its checkpoints (default: last)",
    )
    parser.add_argument(
        "--data-dir", metavar="DIR", help="where the data lie, if not where they lay in training"
    )


def add_commands(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds the parsers of the commands; `command(name, text)` makes one."""


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {}
