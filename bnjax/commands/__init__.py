"""The commands of the BN clinic, one a file: `bnjax audit | precise | fold | port`.

Each is a thin layer over a function in `bnjax.clinic`, for the networks in run folders. Whatever a
command needs is imported when it runs, so that --help is quick.
"""

import argparse
from collections.abc import Callable

from bnjax.commands import audit, fold, port, precise

COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "audit": audit.run,
    "precise": precise.run,
    "fold": fold.run,
    "port": port.run,
}


def add_commands(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds the parsers of the commands; `command(name, text)` makes one."""
    for each in (audit, precise, fold, port):
        each.add(command)
