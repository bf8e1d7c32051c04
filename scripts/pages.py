"""Writes what programs print into the pages of the findings and the guides, and the config's keys.

    python scripts/pages.py

Runs the blocks of Python of each page, and replaces the block of text after each by its output.
The page of the keys is made from their declaration.
"""

import contextlib
import io
import re
from pathlib import Path
from typing import Any

from bnjax.train.config import KEYS, SECTIONS

DOCS = Path(__file__).parents[1] / "docs"
CONFIG_KEYS = DOCS / "keys.md"
FINDINGS, GUIDES = (sorted((DOCS / folder).glob("*.md")) for folder in ("findings", "guides"))
RUN = re.compile(r"(?<=```python\n)(.*?)```\n\n```text\n.*?```", re.DOTALL)


INTRODUCTION = """# Config keys

Set any key on the command line, for instance `--config.model.momentum=0.9`, or in a
[config file](recipes.md). `bnjax train --help` prints the same list. A duration given in one
unit replaces a duration given in another unit."""


def with_output(page: str) -> str:
    """Returns a page with what its blocks of Python print."""
    names: dict[str, Any] = {"__name__": "page"}

    def run(block: re.Match[str]) -> str:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile(block[1], "page", "exec"), names)  # noqa: S102
        return f"{block[1]}```\n\n```text\n{out.getvalue()}```"

    return RUN.sub(run, page)


def keys_page() -> str:
    """Returns docs/keys.md, made from the declaration of the keys."""
    lines = [INTRODUCTION]
    for section in SECTIONS:
        lines += [
            "",
            f"## {section or 'Keys without a section'}",
            "",
            "| key | default | purpose |",
        ]
        lines.append("|---|---|---|")
        for key in KEYS:
            if key.name.rpartition(".")[0] == section:
                only = f"with {key.only.key} = {' or '.join(key.only.values)}: " if key.only else ""
                text = f"{only}{key.help} ({key.allowed.words})".replace("|", r"\|")
                lines.append(f"| `{key.name}` | `{key.default!r}` | {text} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    CONFIG_KEYS.write_text(keys_page())
    for path in [*FINDINGS, *GUIDES]:
        path.write_text(with_output(path.read_text()))
