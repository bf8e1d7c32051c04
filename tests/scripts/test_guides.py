"""The guides: their programs print what the pages show."""

import re

import pytest
from pages import GUIDES, with_output

pytestmark = pytest.mark.scripts

NUMBER = re.compile(r"\d+(?:\.\d+)?")


@pytest.mark.parametrize("path", GUIDES, ids=lambda path: path.stem)
def test_the_page_shows_what_its_programs_print(path):
    page = path.read_text()
    now = with_output(page)
    assert NUMBER.sub("0", now) == NUMBER.sub("0", page), now
    for found, shown in zip(NUMBER.findall(now), NUMBER.findall(page), strict=True):
        last_digit = 10.0 ** -len(shown.partition(".")[2])
        assert float(found) == pytest.approx(float(shown), rel=0.1, abs=1.01 * last_digit), now
    assert page.count("```python") == page.count("```text") > 0
    assert len(page.splitlines()) <= 80
