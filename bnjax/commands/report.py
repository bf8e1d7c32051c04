"""`bnjax report`: writes one page about runs and comparisons."""

import sys
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from bnjax.errors import UserError, needs


def run(
    folders: Annotated[
        Positional[tuple[Path, ...]], arg(metavar="RUN", help="the folder of a run or a comparison")
    ],
    out: Annotated[
        Path | None, arg(metavar="DIR", help="the output folder; default: the first RUN")
    ] = None,
) -> int:
    """Write report.html and report.md about runs and comparisons."""
    if not folders:
        raise UserError("give at least one folder of a run or a comparison.")
    with needs("report", "a report"):
        from bnjax.compare import report
    page, problems = report.write(folders, out or folders[0])
    for problem in problems:
        print(f"WARNING: {problem}", file=sys.stderr)
    print(f"written: {page}")
    return 0
