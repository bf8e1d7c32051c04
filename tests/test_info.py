"""`bnjax --version`, `bnjax info`, and the pages of the config keys and the commands."""

import json
import re
from importlib.metadata import version

import jax
import pages
import pytest

from bnjax import main
from bnjax.train.config import KEYS


def test_version(capsys):
    assert main.main(["--version"]) == 0
    assert capsys.readouterr().out == f"bnjax {version('bnjax')}\n"


@pytest.mark.parametrize("words", [[], ["--json"]])
def test_info_names_versions_and_devices(capsys, words):
    assert main.main(["info", *words]) == 0
    out = capsys.readouterr().out
    about = (
        json.loads(out) if words else dict(line.split(None, 1) for line in out.splitlines()[:12])
    )
    assert about["jax"] == jax.__version__
    assert f"cpu:0 {jax.devices()[0].device_kind}" in about["devices"]


def test_the_page_of_the_keys_is_made_from_their_declaration():
    page = pages.CONFIG_KEYS.read_text()
    assert page == pages.keys_page()
    assert all(page.count(f"| `{key.name}` |") == 1 for key in KEYS)


def test_the_page_of_the_commands_is_made_from_their_signatures():
    assert pages.COMMAND_LINE.read_text() == pages.commands_page()


@pytest.mark.parametrize("name", main.COMMANDS)
def test_help_agrees_with_the_page_and_lists_the_keys(bnjax, name):
    code, out, _ = bnjax(name, "--help")
    assert code == 0
    option = r"(--[\w-]+|[A-Z]+)(?![.\w])"
    shown = re.findall(rf"^[│ ] (?:-h, )?{option}", out, re.MULTILINE)
    section = pages.COMMAND_LINE.read_text().split(f"## bnjax {name}\n")[1].split("\n## ")[0]
    assert sorted(shown) == sorted(["--help", *re.findall(rf"^\| `{option}", section, re.M)])
    for key in KEYS if name in main.OVERRIDDEN else ():
        assert f"--config.{key.name}=" in out
    assert f"    {name:9}" in bnjax("--help")[1]
