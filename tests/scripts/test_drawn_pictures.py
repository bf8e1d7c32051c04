"""The pictures: averages against their equation, and a drawing of functions that exist."""

import tomllib
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import drawing
import numpy as np
import pytest
from lag import averages

from bnjax.norms.moments import Moments

pytestmark = pytest.mark.scripts
SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize("debias", [False, True])
def test_averages_are_weighted_sums_of_the_batches(debias):
    mean, var = np.random.default_rng(0).random((2, 6), np.float32)
    found = averages(Moments(mean, var, np.float32(4)), 0.9, debias)
    n = np.arange(6)
    weights = np.tril(0.1 * 0.9 ** (n[:, None] - n))
    for average, batches, first in zip(found, (mean, var), (0, 1), strict=True):
        kept = 0.9 ** (n + 1)
        wanted = weights @ batches / (1 - kept) if debias else weights @ batches + kept * first
        np.testing.assert_allclose(average, wanted, rtol=1e-5)


def test_the_drawing_has_every_name_as_text_within_its_box():
    found = ElementTree.fromstring(drawing.batch())
    boxes = [one for one in found.iter(f"{SVG}rect") if one.get("class") in ("box", "value")]
    names = [one for one in found.iter(f"{SVG}text") if one.get("class") == "name"]
    assert [one.text for one in names] == [box.name for box in drawing.BOXES]
    for box, name in zip(boxes, names, strict=True):
        left, top, width, height = (float(box.get(key)) for key in ("x", "y", "width", "height"))
        assert left < float(name.get("x")) < left + width - 8.5 * len(name.text)
        assert top < float(name.get("y")) < top + height


def test_badges_say_what_the_project_says():
    root = Path(__file__).parents[2]
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    drawn = (root / "docs" / "pictures" / "badges.svg").read_text()
    texts = [one.text for one in ElementTree.fromstring(drawn).iter(f"{SVG}text")]
    assert texts[1::2] == [project["version"], "3.11 or newer", project["license"]]
    assert drawn == drawing.badges()


@pytest.mark.parametrize(
    ("module", "name", "owner"),
    [
        ("train.run", "Run.store", ""),
        ("data.feed", "Feed.images", ""),
        ("train_step", "state, stats", "train_step"),
        ("train.steps", "make_batch", ""),
    ],
)
def test_a_name_that_does_not_exist_is_an_error(module, name, owner):
    with pytest.raises(AttributeError, match=name.split(", ")[-1]):
        drawing.check(drawing.Box(0, 0, module, name, ("", ""), owner))
