"""The commands: each module has a function `run`, from whose signature tyro makes its options."""

from pathlib import Path
from typing import Annotated

from tyro.conf import arg

# Options of several commands.
Workdir = Annotated[Path, arg(metavar="DIR", help="the folder of the run")]
Checkpoint = Annotated[str, arg(metavar="best|last|STEP", help="which of its checkpoints")]
DataDir = Annotated[
    str | None, arg(metavar="DIR", help="where the data lie, if not where they lay in training")
]
Out = Annotated[Path | None, arg(metavar="DIR", help="the folder to write the new network into")]
Json = Annotated[bool, arg(help="print one JSON object, not a table")]
