"""Chooses a library for the matrix products of a CPU program by timing each library."""

import functools
import hashlib
import json
import math
import os
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from bnjax.clinic.jaxpr import programs
from bnjax.train.cpu import (
    CPU_OPTIONS,
    EIGEN_OPTIONS,
    ONEDNN_OPTIONS,
    Options,
    compiled_folder,
    processor,
    usable,
)
from bnjax.train.jsonl import write_json

LIBRARIES = {"YNNPACK": CPU_OPTIONS, "Eigen": EIGEN_OPTIONS, "oneDNN": ONEDNN_OPTIONS}
DEFAULT = "YNNPACK"
FASTER = 0.95  # another library is chosen if it needs less than this fraction of the default's time
# Bounds on the FLOPs of a product: smaller products are not timed, larger ones are cut first.
SMALLEST, LARGEST = 5e9, 1.5e10
SHARE = 0.25  # products with less than this fraction of the largest one's FLOPs are not timed
REPEATS = 2
DTYPES = ("float32", "bfloat16")


class Product(NamedTuple):
    """A call of `jax.lax.dot_general`.

    Attributes:
        left, right: the shapes of the operands.
        numbers: the dimension numbers.
        operands, result: the dtypes of both operands and of the result.
    """

    left: tuple[int, ...]
    right: tuple[int, ...]
    numbers: Any
    operands: str
    result: str


def fastest_options(program: Any) -> Options:
    """Returns the fastest options for compiling a program on the default backend.

    If the backend is a CPU and the program contains large matrix products in float32 or bfloat16,
    they are timed with each of `LIBRARIES`. The timing takes about 2 s. The choice is stored in a
    file beside the compiled programs, so that later processes compile the same program.

    Args:
        program: a jaxpr, for instance `jax.jit(f).trace(x).jaxpr`.
    """
    # Processes that choose differently would compute different bits.
    may_choose = jax.default_backend() == "cpu" and jax.process_count() == 1
    products = sorted(set(large_products(program.jaxpr))) if may_choose else []
    default = usable(LIBRARIES[DEFAULT])
    if not products:
        return default
    choices = {name: usable(options) for name, options in LIBRARIES.items()}
    if all(options == default for options in choices.values()):
        return default
    about = {
        "processor": processor(),
        "jaxlib": jax.lib.__version__,
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
        "products": [" ".join(map(str, one)) for one in products],
    }
    name = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]
    file = compiled_folder() / f"products-{name}.json"
    if not file.exists():
        least = SHARE * max(map(flops, products))
        timed = [seconds(one, *choices.values()) for one in products if flops(one) >= least]
        found = dict(zip(choices, map(sum, zip(*timed, strict=True)), strict=True))
        fastest = min(found, key=lambda name: found[name])
        library = fastest if found[fastest] < FASTER * found[DEFAULT] else DEFAULT
        rounded = {name: round(total, 4) for name, total in found.items()}
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, {"library": library, "seconds": rounded, **about})
    return choices[json.loads(file.read_text())["library"]]


def large_products(jaxpr: Any) -> Iterator[Product]:
    """Yields the large matrix products in a jaxpr, and in the jaxprs inside its equations."""
    for equation in jaxpr.eqns:
        for called in programs(equation):
            yield from large_products(called.jaxpr)
        if equation.primitive.name == "dot_general":
            left, right = (atom.aval for atom in equation.invars)
            result = equation.outvars[0].aval.dtype.name
            numbers = equation.params["dimension_numbers"]
            product = Product(left.shape, right.shape, numbers, left.dtype.name, result)
            is_known = left.dtype == right.dtype and product.operands in DTYPES
            if is_known and flops(product) >= SMALLEST:
                yield product


def flops(product: Product) -> float:
    """Returns the number of floating-point operations of a product."""
    (_, summed), (_, batched) = product.numbers
    shared = {*summed, *batched}
    free = math.prod(n for i, n in enumerate(product.right) if i not in shared)
    return 2.0 * math.prod(product.left) * free


def seconds(product: Product, *choices: Options) -> list[float]:
    """Returns the time of a product in seconds with each of several options.

    The choices take turns, so that other load on the machine affects all of them. A product above
    LARGEST is cut, and its time is extrapolated.
    """
    (_, summed), (_, batched) = product.numbers
    right = product.right
    widest = max(set(range(len(right))) - {*summed, *batched}, key=lambda i: right[i])
    cut = list(right)
    cut[widest] = max(1, int(right[widest] * min(1.0, LARGEST / flops(product))))
    rng = np.random.default_rng(0)
    operands = [
        jax.device_put(rng.random(shape, np.float32)).astype(product.operands)
        for shape in (product.left, cut)
    ]
    dot = functools.partial(
        jax.lax.dot_general,
        dimension_numbers=product.numbers,
        preferred_element_type=product.result,
    )
    compiled = [jax.jit(dot, compiler_options=options) for options in choices]
    found: list[list[float]] = [[] for _ in choices]
    for _ in range(1 + REPEATS):
        for multiply, times in zip(compiled, found, strict=True):
            began = time.perf_counter()
            multiply(*operands).block_until_ready()
            times.append(time.perf_counter() - began)
    return [min(times[1:]) * right[widest] / cut[widest] for times in found]
