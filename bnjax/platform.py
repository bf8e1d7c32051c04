"""What XLA has to be told to be fast on the backend at hand, and where it keeps what it has compiled."""

import functools
import os
from pathlib import Path

import jax

Options = dict[str, str | bool | int]

# Measured with jaxlib 0.10.2, the tutorial's network in float32, two AVX2 cores. By default convolutions go to a slow path as well:
# batch 5000 takes 24 s a step, 11.5 s where only matrix products (INDIVIDUAL_DOT) take it. With the reductions (REDUCE) the
# three large BatchNorm layers, forward and backward, take 370 ms instead of 890 of these; ELTWISE would slow the step down.
# Without the analysis of regions XLA copies what Adam remembers of the largest layer, twice 102 MB in each step: a step of batch 512
# takes 1.20 and 1.30 s, with it 1.06 and 1.18 s, and 0.18 GB less; the bits are the same.
CPU_OPTIONS: Options = {
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,LIBRARY_FUSION_TYPE_REDUCE",
    "xla_cpu_copy_insertion_use_region_analysis": True,
}
# On two AVX-512 cores, the two together: 1,150 images/s instead of 415. On AVX2 cores this one costs a fifth.
AVX512_OPTIONS: Options = {"xla_cpu_prefer_vector_width": "512"}


# Initial values are computed once, and their random numbers are a lot of code: of the tutorial's network 1.5 s of compiling instead of
# 5.1, and as fast to run; of the network for the digits 1.4 s instead of 3.8.
CPU_INIT_OPTIONS: Options = {"xla_backend_optimization_level": 1}


def compiler_options() -> Options:
    """Returns the options for `jax.jit(f, compiler_options=...)` that are fast on the default backend.

    An option that this jaxlib does not know is left out, as is one that the user set in XLA_FLAGS.
    """
    return _usable(CPU_OPTIONS | (AVX512_OPTIONS if _has_avx512() else {}))


def init_options() -> Options:
    """Returns the options, likewise, for what runs only once and is large: the initial values of a network."""
    return _usable(CPU_INIT_OPTIONS)


def _usable(cpu_options: Options) -> Options:
    candidates = cpu_options if jax.default_backend() == "cpu" else {}
    flags = os.environ.get("XLA_FLAGS", "")
    return {name: value for name, value in candidates.items() if name not in flags and _is_known(name, value)}


def memory() -> int | None:
    """Returns the bytes that the default device can hold, on a CPU those of the machine; None where nobody says."""
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    if limit is None and jax.default_backend() == "cpu" and "SC_PHYS_PAGES" in os.sysconf_names:
        limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return limit


def keep_compiled(folder: Path) -> None:
    """Keeps compiled programs in a folder, so that the next process need not compile them; at most 2 GB, the latest used.

    Nothing is changed where the user has chosen a folder, by JAX_COMPILATION_CACHE_DIR or by jax.config.
    """
    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_compilation_cache_max_size", 2 << 30)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)  # JAX's own 1 s leaves out most of a small network


@functools.cache
def _is_known(name: str, value: str | bool | int) -> bool:
    try:
        jax.jit(lambda x: x, compiler_options={name: value}).lower(0.0).compile()
    except Exception:  # jaxlib raises different types for an unknown name and for an unknown value, none of them public
        return False
    return True


def _has_avx512() -> bool:
    cpu = Path("/proc/cpuinfo")
    return cpu.exists() and " avx512f " in cpu.read_text()
