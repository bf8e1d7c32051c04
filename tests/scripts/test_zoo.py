"""The audit finds what a sick network has, and nothing in its healthy twin."""

import pytest
from zoo import LIBRARIES, SET_ASIDE, cases, kit, variants

pytestmark = pytest.mark.scripts

CASES, VARIANTS = cases(), variants()


def marked(name, library, *marks):
    """By default a case runs in one library."""
    first = next(other for other in LIBRARIES if hasattr(CASES[name], other))
    slow = library != first or hasattr(CASES[name], "SLOW")
    return pytest.param(name, library, marks=[*marks, *[pytest.mark.slow] * slow])


def sick(name, library):
    missed = getattr(CASES[name], "MISSED", {}).get(library)
    marks = [pytest.mark.xfail(reason=missed, raises=AssertionError)] if missed else []
    return marked(name, library, *marks)


@pytest.mark.parametrize(("name", "library"), [sick(*one) for one in VARIANTS])
def test_a_sick_network_has_the_finding(name, library):
    if library in ("torch", "equinox"):
        pytest.importorskip(library)
    found = kit.ids(getattr(CASES[name], library)(sick=True))
    assert {*CASES[name].FINDS} <= {*found}, found


@pytest.mark.parametrize(("name", "library"), [marked(*one) for one in VARIANTS])
def test_its_twin_is_healthy(name, library):
    if library in ("torch", "equinox"):
        pytest.importorskip(library)
    assert kit.ids(getattr(CASES[name], library)(sick=False)) == ()


def test_what_is_set_aside_exists():
    assert {*SET_ASIDE} <= {*CASES}
