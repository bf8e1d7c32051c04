"""Writes what programs print into the pages of the findings and the guides.

    python scripts/pages.py

Runs the blocks of Python of each page, and replaces the block of text after each by its output.
"""

import contextlib
import io
import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1] / "docs"
FINDINGS, GUIDES = (sorted((DOCS / folder).glob("*.md")) for folder in ("findings", "guides"))
RUN = re.compile(r"(?<=```python\n)(.*?)```\n\n```text\n.*?```", re.DOTALL)


def with_output(page: str) -> str:
    """Returns a page with what its blocks of Python print."""
    names: dict[str, Any] = {"__name__": "page"}

    def run(block: re.Match[str]) -> str:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile(block[1], "page", "exec"), names)  # noqa: S102
        return f"{block[1]}```\n\n```text\n{out.getvalue()}```"

    return RUN.sub(run, page)


if __name__ == "__main__":
    for path in [*FINDINGS, *GUIDES]:
        path.write_text(with_output(path.read_text()))
