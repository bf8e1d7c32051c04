"""Times two libraries for the matrix products of a CPU program, and chooses the faster one."""

import functools
import hashlib
import json
import math
import os
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bnjax.clinic.jaxpr import programs
from bnjax.train.cpu import CPU_OPTIONS, EIGEN_OPTIONS, Options, compiled_folder, processor, usable
from bnjax.train.jsonl import write_json

# Eigen is chosen if it needs less than this fraction of YNNPACK's time.
FASTER = 0.95
# Bounds on the FLOPs of a product: smaller products are not timed, larger ones are cut first.
SMALLEST, LARGEST = 5e9, 3e10
SHARE = 0.25  # products with less than this fraction of the largest one's FLOPs are not timed
REPEATS = 3
# The shapes of both operands, and the dimension numbers of `jax.lax.dot_general`.
Product = tuple[tuple[int, ...], tuple[int, ...], Any]


def fastest_options(program: Any) -> Options:
    """Returns the fastest options for compiling a program on the default backend.

    If the backend is a CPU and the program contains large float32 matrix products, they are timed
    with YNNPACK and with Eigen. The timing takes up to 2 s. The choice is stored in a file beside
    the compiled programs, so that later processes compile the same program.

    Args:
        program: a jaxpr, for instance `jax.jit(f).trace(x).jaxpr`.
    """
    # Processes that choose differently would compute different bits.
    may_choose = jax.default_backend() == "cpu" and jax.process_count() == 1
    products = sorted(set(large_products(program.jaxpr))) if may_choose else []
    if not products or usable(EIGEN_OPTIONS) == usable(CPU_OPTIONS):
        return usable(CPU_OPTIONS)
    about = {
        "processor": processor(),
        "jaxlib": jax.lib.__version__,
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
        "products": [f"{left} x {right}, {numbers}" for left, right, numbers in products],
    }
    name = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]
    file = compiled_folder() / f"products-{name}.json"
    if not file.exists():
        choices, least = (CPU_OPTIONS, EIGEN_OPTIONS), SHARE * max(map(flops, products))
        timed = [seconds(one, *map(usable, choices)) for one in products if flops(one) >= least]
        ynnpack, eigen = map(sum, zip(*timed, strict=True))
        library = "Eigen" if eigen < FASTER * ynnpack else "YNNPACK"
        found = {"YNNPACK": round(ynnpack, 4), "Eigen": round(eigen, 4)}
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, {"library": library, "seconds": found, **about})
    chosen = json.loads(file.read_text())["library"]
    return usable(EIGEN_OPTIONS if chosen == "Eigen" else CPU_OPTIONS)


def large_products(jaxpr: Any) -> Iterator[Product]:
    """Yields the large float32 matrix products in a jaxpr and in the programs that it calls."""
    for equation in jaxpr.eqns:
        for called in programs(equation):
            yield from large_products(called.jaxpr)
        if equation.primitive.name == "dot_general":
            left, right = (atom.aval for atom in equation.invars)
            product = (left.shape, right.shape, equation.params["dimension_numbers"])
            is_float32 = left.dtype == right.dtype == jnp.float32
            if is_float32 and flops(product) >= SMALLEST:
                yield product


def flops(product: Product) -> float:
    """Returns the number of floating-point operations of a product."""
    left, right, ((_, summed), (_, batched)) = product
    shared = {*summed, *batched}
    return 2.0 * math.prod(left) * math.prod(n for i, n in enumerate(right) if i not in shared)


def seconds(product: Product, *choices: Options) -> list[float]:
    """Returns the time of a product in seconds with each of several options.

    The choices take turns, so that other load on the machine affects all of them. A product above
    LARGEST is cut, and its time is extrapolated.
    """
    left, right, numbers = product
    (_, summed), (_, batched) = numbers
    widest = max(set(range(len(right))) - {*summed, *batched}, key=lambda i: right[i])
    cut = list(right)
    cut[widest] = max(1, int(right[widest] * min(1.0, LARGEST / flops(product))))
    rng = np.random.default_rng(0)
    operands = [jax.device_put(rng.random(shape, np.float32)) for shape in (left, cut)]
    dot = functools.partial(jax.lax.dot_general, dimension_numbers=numbers)
    compiled = [jax.jit(dot, compiler_options=options) for options in choices]
    found: list[list[float]] = [[] for _ in choices]
    for _ in range(1 + REPEATS):
        for multiply, times in zip(compiled, found, strict=True):
            began = time.perf_counter()
            multiply(*operands).block_until_ready()
            times.append(time.perf_counter() - began)
    return [min(times[1:]) * right[widest] / cut[widest] for times in found]
