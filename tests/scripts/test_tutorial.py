"""The tutorial: its blocks run in order on small digits, with the findings that the page has."""

import contextlib
import re

import numpy as np
import pytest
from pages import TUTORIAL, with_output

from bnjax.data import datasets
from bnjax.train_step import predict_step

pytestmark = pytest.mark.scripts

PAGE = TUTORIAL.read_text()


@pytest.fixture(scope="module")
def on_digits(tmp_path_factory):
    """The page with what its blocks print for digits of 8x8 pixels, and the names they define."""
    data, names = datasets.load("digits"), {}
    splits = (datasets.Split(of.image[:, ::4, ::4], of.label) for of in (data.train, data.test))
    small = datasets.Dataset("digits", "digits", True, *splits, data.classes)
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.chdir(tmp_path_factory.mktemp("tutorial")),
    ):
        patch.setattr(datasets, "load", lambda name, fallback: small)
        assert "(64, 128, 256)" in PAGE  # unoptimised code is slow for so many channels
        return with_output(PAGE.replace("(64, 128, 256)", "(16, 32, 64)"), names), names


@pytest.fixture(params=["cifar10", "digits"])
def page(request, on_digits):
    """The page as it is, which shows CIFAR-10, and the page with the output for digits."""
    return PAGE if request.param == "cifar10" else on_digits[0]


def accuracies(page, kind):
    return [float(x) for x in re.findall(rf"\b{kind} accuracy (\d\.\d+)", page)]


def test_a_network_that_has_learnt_is_near_chance_until_it_is_repaired():
    first, further, *others = accuracies(PAGE, "training")
    stored, precise, later, faster, debiased = accuracies(PAGE, "test")
    assert stored < 0.2 < first - 0.2
    assert precise == pytest.approx(first, abs=0.06)
    assert later == pytest.approx(further, abs=0.06)
    assert later > precise
    assert others == pytest.approx([first, first], abs=0.01)  # the norms differ in evaluation
    assert stored < faster < debiased < precise + 0.05


def test_the_audit_finds_the_cause_and_then_nothing(page):
    assert re.findall(r"^([a-z]+-[a-z-]+): ", page, re.MULTILINE) == ["not-converged"]
    assert "a weight of 81.8%" in page
    assert page.count("\nfindings: ()\n") == 1


def test_the_exported_files_give_the_logits_of_the_network(on_digits):
    page, names = on_digits
    model, params, stats = names["model"], names["state"].params, names["batch_stats"]
    images = names["data"].test.image[:5]
    own = predict_step(params, stats, images, model=model)
    np.testing.assert_array_equal(names["logits"].argmax(-1), own["class"])
    classes = " ".join(names["data"].classes[i] for i in own["class"])
    assert f"\npredicted: {classes}\n" in page


def test_every_block_shows_its_output_and_the_page_is_short():
    assert PAGE.count("```python") == PAGE.count("```text\n") == PAGE.count("```text") > 5
    assert "```text\n```" not in PAGE
    assert len(PAGE.splitlines()) <= 220
