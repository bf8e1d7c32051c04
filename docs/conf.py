"""How Sphinx makes the documentation: `sphinx-build -W docs docs/_build`, with the extra `docs`."""

import re
from pathlib import Path

project = "bnjax"
html_theme = "furo"
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_use_ivar = True
suppress_warnings = [
    "ref.python",  # several classes have a field named mean
]

FROM_ABOVE = {"index": "README", "contributing": "CONTRIBUTING", "changelog": "CHANGELOG"}
MODULE = "### \\1\n\n```{eval-rst}\n.. automodule:: \\1\n   :members:\n```"


def complete(app, page, source):
    """Adds a file of the folder above to its page, and the docstrings to the modules of the API."""
    text = source[0]
    if page == "api":
        text = re.sub(r"^### (bnjax.*)$", MODULE, text, flags=re.MULTILINE)
    if page in FROM_ABOVE:
        above = Path(app.srcdir).parent.joinpath(f"{FROM_ABOVE[page]}.md").read_text()
        links = re.sub(r"\]\((?!https:|#)", "](../", above).replace("](../docs/", "](")
        text = f"{links}\n{text}"
    for name, above in FROM_ABOVE.items():
        text = text.replace(f"](../{above}.md", f"]({name}.md")
    source[0] = text


def setup(app):
    """Registers the above."""
    app.connect("source-read", complete)
