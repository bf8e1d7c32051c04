"""The commands: each module has a function `run`; tyro makes the options from its signature."""

from pathlib import Path
from typing import Annotated

from tyro.conf import arg

# Shared options.
Workdir = Annotated[Path, arg(metavar="DIR", help="the folder of the run")]
Checkpoint = Annotated[str, arg(metavar="best|last|STEP", help="the checkpoint to use")]
DataDir = Annotated[
    str | None, arg(metavar="DIR", help="the folder of the data; default: as in training")
]
Out = Annotated[Path | None, arg(metavar="DIR", help="the output folder for the new network")]
Json = Annotated[bool, arg(help="print one JSON object instead of a table")]
