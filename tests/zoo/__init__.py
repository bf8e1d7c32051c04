"""What goes wrong with batch normalization: for each case a sick network and its healthy twin."""

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

LIBRARIES = ("linen", "nnx", "equinox", "torch")


@dataclasses.dataclass(frozen=True)
class Case:
    """A fault.

    Attributes:
        finds: the id of the finding that the sick network has.
        source: a report of the fault; on GitHub if without a host.
        slow: whether it takes minutes.
        aside: whether no limit of the audit was tuned on it. Chosen before the first case was
            written: of 38 names, the ten whose SHA-256 comes first.
        make: by library, a function of (kit of the library, sick) that returns a `kit.Patient`.
        missed: by library, why the audit does not find it.
    """

    finds: str
    source: str
    slow: bool
    aside: bool
    make: dict[str, Callable[..., Any]] = dataclasses.field(default_factory=dict)
    missed: dict[str, str] = dataclasses.field(default_factory=dict)

    def of(self, libraries, missed=None):
        """Decorates the function that makes the networks in these libraries."""

        def decorated(function):
            self.make.update(dict.fromkeys(libraries.split(), function))
            self.missed.update(dict.fromkeys(libraries.split() if missed else (), missed))
            return self

        return decorated

    def patient(self, library, sick):
        """Imports a library where it is used, and returns a network in it."""
        return self.make[library](importlib.import_module(f"zoo.kit_{library}"), sick)


_CASES = {}


def case(finds, source, libraries, missed=None, slow=False, aside=False):
    """Decorates a function whose docstring says the cause."""

    def decorated(function):
        made = _CASES[function.__name__] = Case(finds, source, slow, aside)
        return made.of(libraries, missed)(function)

    return decorated


def cases():
    """Returns all cases by name."""
    for name in ("training", "normalization", "afterwards"):
        importlib.import_module(f"zoo.{name}")
    return dict(sorted(_CASES.items()))


def variants():
    """Returns (name of the case, library) for each network and its twin."""
    return [
        (name, library)
        for name, case in cases().items()
        for library in LIBRARIES
        if library in case.make
    ]
