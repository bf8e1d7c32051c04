import os
import subprocess
import sys
from pathlib import Path
from platform import libc_ver
from unittest.mock import Mock

import jax
import numpy as np
import pytest
from marks import SUMS_ONE_BY_ONE, YNNPACK

from bnjax.norms.moments import moments
from bnjax.train import cpu


def test_the_options_compile_and_change_no_result():
    options = cpu.compiler_options()
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


def test_an_option_that_xla_does_not_know_is_left_out():
    known = {"xla_cpu_prefer_vector_width": "512"}
    assert cpu.usable({"xla_cpu_no_such_option": "1", **known}) == known


def test_what_the_user_set_is_left_alone(monkeypatch):
    (name, value), *others = cpu.compiler_options().items()
    monkeypatch.setenv("XLA_FLAGS", f"--{name}={value}")
    assert cpu.compiler_options() == dict(others)


@pytest.fixture
def processor(tmp_path):
    """Makes what Linux says of a processor with AVX-512, or of one without."""

    def make(wide):
        flags = f"fpu sse4_2 avx2 {'avx512f ' * wide}bmi2"
        (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: {flags}\n\n")
        return tmp_path / "cpuinfo"

    return make


@pytest.mark.parametrize("wide", [True, False])
def test_wide_vectors_only_where_the_processor_has_them(processor, wide):
    options = cpu.compiler_options(cpuinfo=processor(wide))
    assert ("xla_cpu_prefer_vector_width" in options) == wide
    own = Path("/proc/cpuinfo")
    if own.exists():
        wide = "avx512f" in own.read_text().split()
        assert ("xla_cpu_prefer_vector_width" in cpu.compiler_options()) == wide


@YNNPACK
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
    processor, wide, batch_size, product, yields
):
    chosen = cpu.compiler_options(batch_size, product, processor(wide))[cpu.FUSIONS]
    assert ("INDIVIDUAL_DOT" in chosen) == yields
    assert "REDUCE" in chosen


PAGE_FAULTS = """
import resource
from bnjax.train import cpu
print(cpu.keep_freed_memory())
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


def test_freed_memory_is_kept():
    """A new page of 4 KB costs a fault: 8 times 64 MB are 131,072, or 256 in huge pages."""
    if libc_ver()[0] != "glibc" or cpu.available_memory() < cpu.LEAST_MEMORY:
        pytest.skip("needs glibc and 8 GB")
    kept, few = page_faults()
    released, many = page_faults(BNJAX_MALLOC="0")
    assert (kept, released) == (True, False)
    assert few < 1000
    assert many > 8 * few


@pytest.fixture
def keep(tmp_path):
    """Keeps memory where so many bytes are available; returns whether, and what libc was told."""

    def call(available):
        (tmp_path / "meminfo").write_text(
            f"MemTotal:       99999999 kB\nMemAvailable:   {available >> 10} kB\n"
        )
        libc = Mock()
        libc.mallopt.return_value, libc.malloc.return_value = 1, None
        kept = cpu.keep_freed_memory(libc, tmp_path / "meminfo")
        return kept, [(name, *args) for name, args, _ in libc.mock_calls]

    return call


GIVEN_BACK = """
import sys
from pathlib import Path
from bnjax.train import cpu
print(cpu.keep_freed_memory())
import jax, jax.numpy as jnp
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
jax.block_until_ready([jnp.ones((4096, 4096)) for _ in range(4)])
before = resident()
for meminfo in map(Path, sys.argv[1:]):
    print(cpu.give_back_freed_memory(None, meminfo), before - resident())
"""


def test_what_is_kept_is_given_back_where_little_is_left(tmp_path):
    if libc_ver()[0] != "glibc" or cpu.available_memory() < cpu.LEAST_MEMORY:
        pytest.skip("needs glibc and 8 GB")
    for name, available in (("enough", 26), ("little", 24)):
        (tmp_path / name).write_text(f"MemTotal:  100 kB\nMemAvailable:  {available} kB\n")
    words = [sys.executable, "-c", GIVEN_BACK, tmp_path / "enough", tmp_path / "little"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    kept, enough, _, little, freed = done.stdout.split()
    assert (kept, enough, little) == ("True", "False", "True")
    assert int(freed) > 4 * 4096 * 4096 * 4 * 0.9
    assert not cpu.give_back_freed_memory(Mock(), tmp_path / "nobody says")


@pytest.mark.parametrize(
    "chosen",
    [
        {"LD_PRELOAD": "libtcmalloc.so.4"},
        {"GLIBC_TUNABLES": "glibc.malloc.arena_max=2"},
        {"BNJAX_MALLOC": "0"},
    ],
)
def test_another_malloc_is_left_alone(keep, monkeypatch, chosen):
    for name, value in chosen.items():
        monkeypatch.setenv(name, value)
    assert keep(1 << 40) == (False, [])


def test_memory_is_kept_only_where_there_is_enough(keep, monkeypatch):
    for name in ("LD_PRELOAD", "GLIBC_TUNABLES", "BNJAX_MALLOC"):
        monkeypatch.delenv(name, raising=False)
    assert keep(cpu.LEAST_MEMORY - 1024) == (False, [])
    kept, told = keep(cpu.LEAST_MEMORY)
    assert kept
    # As in malloc.h: no trimming, no mappings, one arena; then half of what is available.
    settings = [("mallopt", -1, -1), ("mallopt", -4, 0), ("mallopt", -8, 1)]
    assert told == [*settings, ("malloc", cpu.LEAST_MEMORY // 2)]


@SUMS_ONE_BY_ONE
def test_batch_statistics_keep_their_digits_under_the_options():
    """A fast reduction must not be a sloppy one: 80,000 values, a mean of 10,000 deviations."""
    x = (np.random.default_rng(0).normal(size=(512, 13, 12, 5)) + 1e4).astype(np.float32)
    found = jax.jit(lambda x: moments(x, (0, 1, 2))[:2], compiler_options=cpu.compiler_options())(x)
    wide = x.astype(np.float64)
    np.testing.assert_allclose(np.ravel(found[0]), wide.mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(np.ravel(found[1]), wide.var((0, 1, 2)), rtol=1e-5)


def compile_in_a_process(home, **env):
    """Compiles something, and returns the folder that JAX then has for it."""
    code = (
        "import jax, pathlib\nfrom bnjax.train import cpu\n"
        f"cpu.keep_compiled(pathlib.Path({str(home)!r}))\n"
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
