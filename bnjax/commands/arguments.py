"""Options that several commands have."""

import argparse
from pathlib import Path
from typing import Any


def add_run_arguments(
    parser: argparse.ArgumentParser, *, data: bool = True, among: Any = None
) -> None:
    """Adds the options that say which trained network, and where its data lie.

    The run's folder is one of the group `among`, if there are other ways to give a network.
    """
    (among or parser).add_argument(
        "--workdir", type=Path, required=among is None, metavar="DIR", help="the folder of the run"
    )
    parser.add_argument(
        "--checkpoint",
        default="last",
        metavar="best|last|STEP",
        help="which of its checkpoints (default: last)",
    )
    if data:
        parser.add_argument(
            "--data-dir",
            metavar="DIR",
            help="where the data lie, if not where they lay in training",
        )


def count(text: str, least: int = 1) -> int:
    """Returns the number that an option gives.

    Raises:
        argparse.ArgumentTypeError: if it is no whole number, or smaller.
    """
    if not (text.isdecimal() and len(text) < 10 and int(text) >= least):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, {least} or above")
    return int(text)
