"""The audit finds what a sick network has, and nothing in its healthy twin."""

import pytest
from zoo import SET_ASIDE, cases, kit, variants

CASES, VARIANTS = cases(), variants()


def sick(name, library):
    missed = getattr(CASES[name], "MISSED", {}).get(library)
    marks = [pytest.mark.xfail(reason=missed, raises=AssertionError)] if missed else []
    return pytest.param(name, library, marks=marks)


@pytest.mark.parametrize(("name", "library"), [sick(*one) for one in VARIANTS])
def test_a_sick_network_has_the_finding(name, library):
    if library == "torch":
        pytest.importorskip("torch")
    found = kit.ids(getattr(CASES[name], library)(sick=True))
    assert {*CASES[name].FINDS} <= {*found}, found


@pytest.mark.parametrize(("name", "library"), VARIANTS)
def test_its_twin_is_healthy(name, library):
    if library == "torch":
        pytest.importorskip("torch")
    assert kit.ids(getattr(CASES[name], library)(sick=False)) == ()


def test_what_is_set_aside_exists():
    assert {*SET_ASIDE} <= {*CASES}
