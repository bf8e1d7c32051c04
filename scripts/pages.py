"""Writes what programs print into the tutorial, findings and guides, and writes two references.

    python scripts/pages.py                                   # all pages
    BNJAX_CACHE=FOLDER python scripts/pages.py tutorial       # only docs/tutorial.md

Runs the blocks of Python of each page, and replaces the block of text after each by its output.
The tutorial is left unchanged if CIFAR-10 is not in BNJAX_CACHE, the folder for downloads.
The page of the config keys is made from their declaration, and the page of the commands from the
signatures from which tyro makes their parsers. The notebook receives the repository's address from
pyproject.toml.
"""

import contextlib
import functools
import importlib
import inspect
import io
import json
import re
import sys
import tempfile
import textwrap
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from tyro.conf import Positional, Suppress

from bnjax.data import cifar
from bnjax.data.datasets import cache_dir
from bnjax.main import COMMANDS, OVERRIDDEN
from bnjax.train.config import KEYS, SECTIONS

DOCS = Path(__file__).absolute().parents[1] / "docs"
TUTORIAL = DOCS / "tutorial.md"
CONFIG_KEYS, COMMAND_LINE = DOCS / "keys.md", DOCS / "commands.md"
FINDINGS, GUIDES = (sorted((DOCS / folder).glob("*.md")) for folder in ("findings", "guides"))
PROJECT, NOTEBOOK = DOCS.parent / "pyproject.toml", DOCS.parent / "scripts" / "colab.ipynb"
BADGE = "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
RUN = re.compile(r"(?<=```python\n)(.*?)```\n\n```text\n.*?```", re.DOTALL)

INTRODUCTION = """# Config keys

Set any key on the command line, for instance `--config.model.momentum=0.9`, or in a
[config file](recipes.md). `bnjax train --help` prints the same list. A duration given in one
unit replaces a duration given in another unit."""

COMMANDS_INTRODUCTION = """# Commands

`bnjax COMMAND --help` prints the section on a command, and `bnjax --version` prints the version.
`bnjax COMMAND --tyro-print-completion SHELL` prints a completion script for bash, zsh or tcsh.
`python -m bnjax.main` is the same as `bnjax`, and the word `train` may be omitted.

The exit status is 0 after success, 1 after a failure, 2 after an error that you can fix (such as
invalid input, damaged files or a full disk) and 130 after Ctrl-C, unless the section on a command
gives another meaning."""
FLAGS = re.compile(r"--\w[\w.=-]*\w(?: --\w[\w.=-]*\w)*")


def with_output(page: str, names: dict[str, Any] | None = None) -> str:
    """Returns a page with what its blocks of Python print; they define their names in `names`."""
    names = {} if names is None else names
    names["__name__"] = "page"

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


def commands_page() -> str:
    """Returns docs/commands.md, made from the signatures of the commands."""
    lines = [COMMANDS_INTRODUCTION, "", "| command | purpose |", "|---|---|"]
    lines += [f"| [`{name}`](#bnjax-{name}) | {text} |" for name, text in COMMANDS.items()]
    for name in COMMANDS:
        command = importlib.import_module(f"bnjax.commands.{name}").run
        usage, rows = [f"bnjax {name}"], []
        for word, text, shown in options_of(command):
            usage += [shown] if shown else []
            cells = f"`{word}`", FLAGS.sub(r"`\g<0>`", text)
            rows.append("| {} | {} |".format(*(cell.replace("|", r"\|") for cell in cells)))
        usage.append("[OPTION …]")
        if name in OVERRIDDEN:
            usage.append("[--config.KEY=VALUE …]")
            rows.append("| `--config.KEY=VALUE` | set a [key of the config](keys.md) |")
        paragraphs = FLAGS.sub(r"`\g<0>`", inspect.cleandoc(command.__doc__)).split("\n\n")
        about = "\n\n".join(textwrap.fill(x, 100, break_on_hyphens=False) for x in paragraphs)
        lines += ["", f"## bnjax {name}", "", "```sh", " ".join(usage), "```", "", about, ""]
        lines += ["| option | purpose |", "|---|---|", *rows]
    return "\n".join(lines) + "\n"


def options_of(command: Any) -> Iterator[tuple[str, str, str]]:
    """Yields each option with its value, its purpose, and its form in a short usage, or ""."""
    for option in inspect.signature(command).parameters.values():
        kind, *marks = get_args(option.annotation)
        if Suppress in marks:
            continue
        about = marks[-1]
        literals = [one for one in (kind, *get_args(kind)) if get_origin(one) is Literal]
        word = about.metavar or "|".join(str(x) for one in literals for x in get_args(one))
        if Positional in marks:
            word += " …" * (get_origin(kind) is tuple)
        else:
            word = f"--{(about.name or option.name).replace('_', '-')} {word}".rstrip()
        if option.default is option.empty:
            yield word, f"{about.help} (required)", word
        else:
            is_unset = option.default in (None, False, ())
            default = "" if is_unset else f" (default: {option.default})"
            yield word, about.help + default, f"[{word}]" if Positional in marks else ""


def repository() -> str:
    """Returns `Repository` in the [project.urls] of pyproject.toml, or "" without such an entry."""
    return tomllib.loads(PROJECT.read_text())["project"].get("urls", {}).get("Repository", "")


def with_address(notebook: str, address: str) -> str:
    """Returns a notebook with the repository's address in `REPO`, and a badge if it is on GitHub.

    Args:
        notebook: the JSON of a notebook whose first two cells are the title and the parameters.
        address: the https address of the repository, or "" if it is unknown.
    """
    content = json.loads(notebook)
    title, parameters = content["cells"][:2]
    text = "".join(title["source"]).partition(f"\n\n{BADGE}")[0]
    if on_github := re.fullmatch(r"https://github\.com/([^/]+/[^/]+?)(\.git|/)?", address):
        path = f"github/{on_github[1]}/blob/main/scripts/colab.ipynb"
        text += f"\n\n{BADGE}(https://colab.research.google.com/{path})"
    title["source"] = text.splitlines(keepends=True)
    code = re.sub('^REPO = ".*?"', lambda _: f'REPO = "{address}"', "".join(parameters["source"]))
    parameters["source"] = code.splitlines(keepends=True)
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def main(names: Sequence[str]) -> None:
    """Writes the pages with these names, or all of them."""
    made = {
        CONFIG_KEYS: keys_page,
        COMMAND_LINE: commands_page,
        NOTEBOOK: lambda: with_address(NOTEBOOK.read_text(), repository()),
    }
    has_data = cifar.find(cifar.VERSIONS["cifar10"], cache_dir())
    for path in [*made, *[TUTORIAL] * bool(has_data), *FINDINGS, *GUIDES]:
        if not names or path.stem in names:
            make = made.get(path) or functools.partial(with_output, path.read_text())
            # The blocks of the tutorial write files into the current folder.
            with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
                path.write_text(make())


if __name__ == "__main__":
    main(sys.argv[1:])
