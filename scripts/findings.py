"""Writes what the audit says into the pages of the findings, docs/findings/*.md.

    python scripts/findings.py

Runs the blocks of Python of each page, and replaces the block of text after each by its output.
"""

import contextlib
import io
import re
from pathlib import Path
from typing import Any

PAGES = Path(__file__).parents[1] / "docs" / "findings"
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
    for path in PAGES.glob("*.md"):
        path.write_text(with_output(path.read_text()))
