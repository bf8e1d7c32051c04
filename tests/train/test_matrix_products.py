"""The choice between XLA's libraries for the matrix products of a program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import YNNPACK

from bnjax.train import matmul_library
from bnjax.train.cpu import CPU_OPTIONS, EIGEN_OPTIONS, ONEDNN_OPTIONS

N, K, M = 256, 4096, 2500  # 2 N K M = 5.2e9
SHAPES = jax.ShapeDtypeStruct((N, K), jnp.float32), jax.ShapeDtypeStruct((K, M), jnp.float32)


def test_large_products_are_found_in_all_called_programs():
    @jax.jit
    def loss(x, weight):
        small = x[:, :8] @ weight[:8]
        halves = x.astype(jnp.float16) @ weight.astype(jnp.float16)
        rounded = jnp.dot(x.astype(jnp.bfloat16), weight.astype(jnp.bfloat16))
        return (jnp.tanh(x @ weight) + small + halves + jax.lax.stop_gradient(rounded)).sum()

    found = list(matmul_library.large_products(jax.jit(jax.grad(loss)).trace(*SHAPES).jaxpr.jaxpr))
    forward, backward = ((N, K), (K, M)), ((N, M), (K, M))
    assert sorted((one.operands, one.left, one.right) for one in found) == [
        ("bfloat16", *forward),
        ("float32", *backward),
        ("float32", *forward),
    ]
    assert {matmul_library.flops(product) for product in found} == {2.0 * N * K * M}


def test_seeds_are_counted_in_the_operations_of_a_product():
    seeds = (jax.ShapeDtypeStruct((3, *one.shape), one.dtype) for one in SHAPES)
    (found,) = matmul_library.large_products(jax.jit(jax.vmap(jnp.dot)).trace(*seeds).jaxpr.jaxpr)
    assert matmul_library.flops(found) == 3 * 2.0 * N * K * M


@pytest.fixture
def trace(monkeypatch, tmp_path):
    monkeypatch.setenv("BNJAX_CACHE", str(tmp_path))
    monkeypatch.setattr(matmul_library, "SMALLEST", 1.0)
    return jax.jit(jnp.dot).trace(np.ones((4, 3), np.float32), np.ones((3, 2), np.float32))


@YNNPACK
@pytest.mark.parametrize(
    ("eigen", "onednn", "expected"),
    [
        (0.9, 1.0, EIGEN_OPTIONS),
        (0.96, 0.96, CPU_OPTIONS),
        (0.9, 0.8, ONEDNN_OPTIONS),
        (1.5, 2.0, CPU_OPTIONS),
    ],
)
def test_the_fastest_library_is_chosen_and_the_choice_is_kept(
    trace, monkeypatch, eigen, onednn, expected
):
    monkeypatch.setattr(matmul_library, "seconds", lambda *_: [1.0, eigen, onednn])
    assert matmul_library.fastest_options(trace.jaxpr) == expected
    monkeypatch.setattr(matmul_library, "seconds", None)  # so that timing again would fail
    assert matmul_library.fastest_options(trace.jaxpr) == expected


@YNNPACK
def test_all_libraries_compute_the_program(trace, tmp_path):
    x, y = (np.random.default_rng(i).normal(size=s) for i, s in enumerate([(4, 3), (3, 2)]))
    single = [one.astype(np.float32) for one in (x, y)]
    for options in (
        *matmul_library.LIBRARIES.values(),
        matmul_library.fastest_options(trace.jaxpr),
    ):
        found = trace.lower().compile(options)(*single)
        np.testing.assert_allclose(found, single[0].astype(float) @ single[1], rtol=1e-5)
    assert len(list(tmp_path.glob("compiled/products-*.json"))) == 1
