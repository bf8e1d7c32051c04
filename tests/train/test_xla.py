import os
import subprocess
import sys
from platform import libc_ver

import jax
import numpy as np
import pytest
from marks import SUMS_ONE_BY_ONE

from bnjax.norms.moments import moments
from bnjax.train import xla


def test_the_options_compile_and_change_no_result():
    options = xla.compiler_options()
    x = np.random.default_rng(0).normal(size=(4, 9, 9, 3)).astype(np.float32)
    weight = np.random.default_rng(1).normal(size=(3, 3, 3, 5)).astype(np.float32)

    def convolve(x, weight):
        return jax.lax.conv_general_dilated(
            x, weight, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    fast, plain = (
        jax.jit(convolve, compiler_options=options)(x, weight),
        jax.jit(convolve)(x, weight),
    )
    np.testing.assert_allclose(fast, plain, rtol=1e-4, atol=1e-4)


def test_an_option_that_xla_does_not_know_is_left_out(monkeypatch):
    monkeypatch.setattr(xla, "CPU_OPTIONS", {"xla_cpu_no_such_option": "1", **xla.CPU_OPTIONS})
    assert "xla_cpu_no_such_option" not in xla.compiler_options()


def test_what_the_user_set_is_left_alone(monkeypatch):
    (name, value), *others = xla.compiler_options().items()
    monkeypatch.setenv("XLA_FLAGS", f"--{name}={value}")
    assert xla.compiler_options() == dict(others)


@pytest.mark.parametrize("wide", [True, False])
def test_wide_vectors_only_where_the_processor_has_them(monkeypatch, wide):
    monkeypatch.setattr(xla, "_has_avx512", lambda: wide)
    assert ("xla_cpu_prefer_vector_width" in xla.compiler_options()) == wide


@pytest.mark.parametrize(
    ("wide", "batch_size", "product", "yields"),
    [
        (True, 512, "float32", True),
        (True, 5000, "float32", False),
        (True, 5000, "bfloat16", True),
        (False, 5000, "float32", True),
    ],
)
def test_the_library_of_products_follows_from_the_batch(
    monkeypatch, wide, batch_size, product, yields
):
    monkeypatch.setattr(xla, "_has_avx512", lambda: wide)
    chosen = xla.compiler_options(batch_size, product)[xla.FUSIONS]
    assert ("INDIVIDUAL_DOT" in chosen) == yields
    assert "REDUCE" in chosen


PAGE_FAULTS = """
import resource
from bnjax.train import xla
print(xla.keep_freed_memory())
import jax, jax.numpy as jnp
double = jax.jit(lambda x: 2 * x)
x = jnp.ones((4096, 4096))
for step in range(12):
    if step == 4:
        began = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    double(x).block_until_ready()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - began)
"""


def page_faults(**env):
    """Returns whether freed memory is kept, and the page faults of 8 steps that free 64 MB."""
    clean = {
        name: value
        for name, value in os.environ.items()
        if name not in ("LD_PRELOAD", "GLIBC_TUNABLES")
    }
    done = subprocess.run(
        [sys.executable, "-c", PAGE_FAULTS],
        env=clean | env,
        capture_output=True,
        text=True,
        check=True,
    )
    kept, faults = done.stdout.split()
    return kept == "True", int(faults)


@pytest.mark.skipif(
    libc_ver()[0] != "glibc" or xla._available_memory() < xla.LEAST_MEMORY,
    reason="needs glibc and 8 GB",
)
def test_freed_memory_is_kept():
    """A new page of 4 KB costs a fault: 8 times 64 MB are 131,072, or 256 in huge pages."""
    kept, few = page_faults()
    released, many = page_faults(BNJAX_MALLOC="0")
    assert (kept, released) == (True, False)
    assert few < 1000
    assert many > 8 * few


@pytest.mark.parametrize(
    "chosen",
    [
        {"LD_PRELOAD": "libtcmalloc.so.4"},
        {"GLIBC_TUNABLES": "glibc.malloc.arena_max=2"},
        {"BNJAX_MALLOC": "0"},
    ],
)
def test_another_malloc_is_left_alone(monkeypatch, chosen):
    monkeypatch.setattr(xla.ctypes, "CDLL", lambda name: pytest.fail("libc was touched"))
    monkeypatch.setattr(xla, "_available_memory", lambda: 1 << 40)
    for name, value in chosen.items():
        monkeypatch.setenv(name, value)
    assert not xla.keep_freed_memory()


def test_memory_is_kept_only_where_there_is_enough(monkeypatch):
    monkeypatch.setattr(xla.ctypes, "CDLL", lambda name: pytest.fail("libc was touched"))
    monkeypatch.setattr(xla, "_available_memory", lambda: xla.LEAST_MEMORY - 1)
    assert not xla.keep_freed_memory()


@SUMS_ONE_BY_ONE
def test_batch_statistics_keep_their_digits_under_the_options():
    """A fast reduction must not be a sloppy one: 80,000 values, a mean of 10,000 deviations."""
    x = (np.random.default_rng(0).normal(size=(512, 13, 12, 5)) + 1e4).astype(np.float32)
    found = jax.jit(lambda x: moments(x, (0, 1, 2))[:2], compiler_options=xla.compiler_options())(x)
    wide = x.astype(np.float64)
    np.testing.assert_allclose(np.ravel(found[0]), wide.mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(np.ravel(found[1]), wide.var((0, 1, 2)), rtol=1e-5)


def compile_in_a_process(home, **env):
    """Compiles something, and returns the folder that JAX then has for it."""
    code = (
        "import jax, pathlib\nfrom bnjax.train import xla\n"
        f"xla.keep_compiled(pathlib.Path({str(home)!r}))\n"
        "jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)\n"
        "jax.jit(lambda x: x @ x + 1)(jax.numpy.ones((3, "
        "3)))\nprint(jax.config.jax_compilation_cache_dir)"
    )
    clean = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("JAX_COMPILATION", "JAX_PERSISTENT"))
    }
    return subprocess.run(
        [sys.executable, "-c", code], env=clean | env, capture_output=True, text=True, check=True
    ).stdout.strip()


def test_what_was_compiled_is_kept_for_the_next_process(tmp_path):
    assert compile_in_a_process(tmp_path / "mine") == str(tmp_path / "mine")
    kept = {path.name for path in (tmp_path / "mine").iterdir() if path.name.endswith("-cache")}
    assert kept
    compile_in_a_process(tmp_path / "mine")
    assert {
        path.name for path in (tmp_path / "mine").iterdir() if path.name.endswith("-cache")
    } == kept


def test_the_users_own_folder_is_used(tmp_path):
    own = str(tmp_path / "own")
    assert compile_in_a_process(tmp_path / "mine", JAX_COMPILATION_CACHE_DIR=own) == own
    assert not (tmp_path / "mine").exists()
