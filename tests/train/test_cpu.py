"""Options and memory that make XLA fast on a CPU, and the cache of compiled programs."""

import os
import subprocess
import sys
from pathlib import Path
from platform import libc_ver

import jax
import numpy as np
import pytest
from marks import SUMS_ONE_BY_ONE

from bnjax.norms.moments import moments
from bnjax.train import cpu


def test_the_options_compile_and_change_no_result():
    rng = np.random.default_rng(0)
    x, weight = (rng.normal(size=size).astype("f") for size in ((4, 9, 9, 3), (3, 3, 3, 5)))

    def convolve(x, weight):
        numbers = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}
        return jax.lax.conv_general_dilated(x, weight, (1, 1), "VALID", **numbers)

    fast = jax.jit(convolve, compiler_options=cpu.compiler_options())(x, weight)
    np.testing.assert_allclose(fast, jax.jit(convolve)(x, weight), rtol=1e-4, atol=1e-4)


@SUMS_ONE_BY_ONE
def test_batch_statistics_keep_their_digits_under_the_options():
    """A fast reduction must not be a sloppy one: 80,000 values, a mean of 10,000 deviations."""
    x = (np.random.default_rng(0).normal(size=(512, 13, 12, 5)) + 1e4).astype(np.float32)
    found = jax.jit(lambda x: moments(x, (0, 1, 2))[:2], compiler_options=cpu.compiler_options())(x)
    wide = x.astype(np.float64)
    np.testing.assert_allclose(np.ravel(found[0]), wide.mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(np.ravel(found[1]), wide.var((0, 1, 2)), rtol=1e-5)


def test_options_that_xla_lacks_or_the_user_set_are_left_out(monkeypatch):
    known = {"xla_cpu_prefer_vector_width": "512"}
    assert cpu.usable({"xla_cpu_no_such_option": "1", **known}) == known
    (name, value), *others = cpu.compiler_options().items()
    monkeypatch.setenv("XLA_FLAGS", f"--{name}={value}")
    assert cpu.compiler_options() == dict(others)


def in_a_process(code, *without, **env):
    """Returns the words that a program prints, run without and with these variables."""
    names = ("LD_PRELOAD", "GLIBC_TUNABLES", "BNJAX_MALLOC", *without)
    clean = {name: value for name, value in os.environ.items() if not name.startswith(names)}
    words = [sys.executable, "-c", code]
    return subprocess.check_output(words, env=clean | env, text=True).split()


@pytest.mark.slow
def test_the_platform_is_known_before_jax_starts_it():
    code = "from bnjax.train import cpu; print(cpu.will_use_cpu()); import jax\n"
    mine, its = in_a_process(code + "print(jax.default_backend() == 'cpu')", "JAX_PLATFORMS")
    assert mine == its


def test_of_the_platforms_that_are_asked_for_the_first_counts():
    before = jax.config.values["jax_platforms"]
    try:
        for platforms in ("cpu", "cuda,cpu"):
            jax.config.update("jax_platforms", platforms)
            assert cpu.will_use_cpu() == (platforms == "cpu")
    finally:
        jax.config.update("jax_platforms", before)


ROOMY = pytest.mark.skipif(
    libc_ver()[0] != "glibc" or cpu._meminfo("MemAvailable") < cpu.LEAST_MEMORY,
    reason="needs glibc and 8 GB",
)
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


@ROOMY
@pytest.mark.slow
def test_freed_memory_is_kept():
    """A new page of 4 KB costs a fault: 8 times 64 MB are 131,072, or 256 in huge pages."""
    kept, few = in_a_process(PAGE_FAULTS)
    released, many = in_a_process(PAGE_FAULTS, BNJAX_MALLOC="0")
    assert (kept, released) == ("True", "False")
    assert int(few) < 1000
    assert int(many) > 8 * int(few)


GIVEN_BACK = """
from pathlib import Path
from bnjax.train import cpu
cpu.keep_freed_memory()
import jax, jax.numpy as jnp
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
jax.block_until_ready([jnp.ones((4096, 4096)) for _ in range(4)])
before, cpu.MEMINFO = resident(), Path(FOLDER) / "meminfo"
for available in (26, 24):
    cpu.MEMINFO.write_text(f"MemTotal:  100 kB\\nMemAvailable:  {available} kB\\n")
    print(cpu.give_back_freed_memory(), before - resident())
"""


@ROOMY
@pytest.mark.slow
def test_what_is_kept_is_given_back_where_little_is_left(tmp_path):
    enough, _, little, freed = in_a_process(f"FOLDER = {str(tmp_path)!r}\n{GIVEN_BACK}")
    assert (enough, little) == ("False", "True")
    assert int(freed) > 4 * 4096 * 4096 * 4 * 0.9


@pytest.mark.slow
def test_compiled_programs_are_kept_for_the_next_process_where_the_user_wants(tmp_path):
    mine, own = tmp_path / "mine", tmp_path / "own"
    code = f"""
import jax, pathlib
from bnjax.train import cpu
cpu.keep_compiled(pathlib.Path({str(mine)!r}))
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
jax.jit(lambda x: x @ x + 1)(jax.numpy.ones((3, 3)))
print(jax.config.jax_compilation_cache_dir)
"""

    def compiled_in(**env):
        (folder,) = in_a_process(code, "JAX_COMPILATION", "JAX_PERSISTENT", **env)
        return {path.name for path in Path(folder).iterdir() if path.name.endswith("-cache")}

    assert compiled_in(JAX_COMPILATION_CACHE_DIR=str(own))
    assert not mine.exists()
    assert (kept := compiled_in())
    assert mine.exists()
    assert compiled_in() == kept
