"""The pages of findings and the guides: their programs print what the pages show."""

import re

import numpy as np
import pytest
from pages import FINDINGS, GUIDES, with_output

from bnjax.clinic.checks import ILLNESSES

pytestmark = pytest.mark.scripts

NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?(?:e-?\d+)?")


def output(page):
    """Returns the page with its output, and the numbers in it and on the page as texts."""
    now = with_output(page)
    assert NUMBER.sub("0", now) == NUMBER.sub("0", page), now
    return now, *([text.replace(",", "") for text in NUMBER.findall(one)] for one in (now, page))


@pytest.mark.parametrize("path", FINDINGS, ids=lambda path: path.stem)
def test_a_program_has_its_finding_and_the_cure_heals(path):
    name, page = path.stem, path.read_text()
    now, *numbers = output(page)
    np.testing.assert_allclose(*(np.array(texts, float) for texts in numbers), rtol=0.03)
    assert page.startswith(f"# {name}\n")
    sick, healed = re.findall(r"```text\n(.*?)```", now, re.DOTALL)
    assert re.findall(r"^([a-z-]+): ", sick, re.MULTILINE) == [name]
    assert healed == "()\n"
    assert len(page.splitlines()) <= 60


def test_there_is_a_page_for_each_finding_and_no_other():
    assert {path.stem for path in FINDINGS} == {*ILLNESSES}


@pytest.mark.parametrize("path", GUIDES, ids=lambda path: path.stem)
def test_a_guide_shows_what_its_programs_print(path):
    page = path.read_text()
    now, *numbers = output(page)
    for found, shown in zip(*numbers, strict=True):
        last_digit = 10.0 ** -len(shown.partition(".")[2])
        assert float(found) == pytest.approx(float(shown), rel=0.1, abs=1.01 * last_digit), now
    assert page.count("```python") == page.count("```text") > 0
    assert len(page.splitlines()) <= 80
