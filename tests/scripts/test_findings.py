"""The page of each finding: its program has that finding, its cure heals, and all is as printed."""

import re

import numpy as np
import pytest
from pages import FINDINGS, with_output

from bnjax.clinic.checks import ILLNESSES

pytestmark = pytest.mark.scripts

NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?(?:e-?\d+)?")


def numbers(text):
    return [float(number.replace(",", "")) for number in NUMBER.findall(text)]


@pytest.mark.parametrize("path", FINDINGS, ids=lambda path: path.stem)
def test_the_page_is_what_the_audit_says(path):
    name, page = path.stem, path.read_text()
    now = with_output(page)
    assert NUMBER.sub("0", now) == NUMBER.sub("0", page), now
    np.testing.assert_allclose(numbers(now), numbers(page), rtol=0.03)
    assert page.startswith(f"# {name}\n")
    sick, healed = re.findall(r"```text\n(.*?)```", now, re.DOTALL)
    assert re.findall(r"^([a-z-]+): ", sick, re.MULTILINE) == [name]
    assert healed == "()\n"
    assert len(page.splitlines()) <= 60


def test_there_is_a_page_for_each_finding_and_no_other():
    assert {path.stem for path in FINDINGS} == {*ILLNESSES}
