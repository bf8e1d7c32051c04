"""What a key of the config is, and what its value may be: in words, and as a function."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

MAX_SIZE = 1 << 20  # of a layer: beyond it is a slip of the finger
MAX_SIDE = 1 << 14  # of an image
MAX_WORKERS = 1024
MAX_PICTURES = 100  # that are still looked at


class Check(NamedTuple):
    """What a value has to be, in words and as a function of a value of the key's type."""

    words: str
    holds: Callable[[Any], bool]


class Key(NamedTuple):
    """One key of the config.

    Attributes:
        name: with its section and a dot before it, if it is in one.
        default: its type is that of every value.
        allowed: what is checked of a value by itself.
        help: what the key is for.
        norm: the field of the classes in `bnjax.norms` that it sets, if it sets one.
    """

    name: str
    default: Any
    allowed: Check
    help: str
    norm: str = ""


def one_of(*values: str) -> Check:
    """Allows some texts."""
    return Check(", ".join(values), lambda value: value in values)


def whole(low: int, high: float = math.inf, words: str = "") -> Check:
    """Allows whole numbers from `low` to `high`."""
    return Check(words or f"a whole number, {low} or above", lambda value: low <= value <= high)


def each(words: str, holds: Callable[[Any], bool]) -> Check:
    """Allows tuples of which each value is allowed."""
    return Check(words, lambda values: all(map(holds, values)))


TEXT = Check("any text", lambda value: isinstance(value, str))
FLAG = Check("True or False", lambda value: isinstance(value, bool))
POSITIVE = Check("a number above 0", lambda value: 0 < value < math.inf)
AMOUNT = Check("a number, 0 or above", lambda value: 0 <= value < math.inf)
FRACTION = Check("0 up to but not including 1", lambda value: 0 <= value < 1)
# Steps are counted in int32.
DURATION = Check(
    "a number above 0 and below 2**31, or 0 to use the other unit",
    lambda value: 0 <= value < 1 << 31,
)
SAVES = Check("a number above 0 and below 2**31, or 0 for none", DURATION.holds)
IMAGES = whole(0, MAX_SIZE, f"a whole number up to {MAX_SIZE:,}, or 0 for none")
STEP = whole(1, 2**31 - 1, "a whole number above 0 and below 2**31")
SIZES = each(
    f"whole numbers above 0, up to {MAX_SIZE:,}",
    lambda size: type(size) is int and 0 < size <= MAX_SIZE,
)
SEED = whole(0, 2**32 - 1, "a whole number from 0 up to 2**32 - 1")
DTYPE = one_of("float32", "bfloat16")
