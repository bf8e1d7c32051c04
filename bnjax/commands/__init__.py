"""The commands; tyro derives the options of a command from the signature of its `run`."""

from pathlib import Path
from typing import Annotated

from tyro.conf import arg

# Options shared by several commands.
Workdir = Annotated[Path, arg(metavar="DIR", help="the folder of the run")]
Checkpoint = Annotated[str, arg(metavar="best|last|STEP", help="the checkpoint to use")]
DataDir = Annotated[
    str | None, arg(metavar="DIR", help="the folder of the data; default: the one used in training")
]
ProbeDir = Annotated[
    str | None,
    arg(metavar="DIR", help="compare logits on test images from this folder; default: on noise"),
]
Out = Annotated[Path | None, arg(metavar="DIR", help="the output folder for the new network")]
Json = Annotated[bool, arg(help="print one JSON object instead of a table")]
