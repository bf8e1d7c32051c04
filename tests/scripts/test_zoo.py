"""The audit finds what a sick network has, and nothing in its healthy twin."""

import pytest
from zoo import cases, kit, variants

pytestmark = pytest.mark.scripts


def marked(name, library):
    """By default a case runs in one library."""
    case = cases()[name]
    slow = case.slow or library != next(iter(case.make))
    return pytest.param(name, library, marks=[pytest.mark.slow] * slow)


@pytest.mark.parametrize(("name", "library"), [marked(*of) for of in variants()])
def test_a_sick_network_has_the_finding_and_its_twin_none(name, library):
    case = cases()[name]
    if library in ("torch", "equinox"):
        pytest.importorskip(library)
    sick, healthy = (kit.ids(case.patient(library, sick)) for sick in (True, False))
    assert healthy == ()
    assert (case.finds in sick) is (library not in case.missed), sick
