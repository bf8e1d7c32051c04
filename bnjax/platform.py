"""What XLA has to be told to be fast on the backend at hand, and where it keeps what it has compiled."""

import os
from pathlib import Path

import jax

# Measured with jaxlib 0.10.2, the tutorial's network in float32, two AVX2 cores. By default convolutions go to a slow path as well:
# batch 5000 takes 24 s a step, 11.5 s where only matrix products (INDIVIDUAL_DOT) take it. With the reductions (REDUCE) the
# three large BatchNorm layers, forward and backward, take 370 ms instead of 890 of these; ELTWISE would slow the step down.
CPU_OPTIONS = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,LIBRARY_FUSION_TYPE_REDUCE"}
# On two AVX-512 cores, the two together: 1,150 images/s instead of 415. On AVX2 cores this one costs a fifth.
AVX512_OPTIONS = {"xla_cpu_prefer_vector_width": "512"}


def compiler_options() -> dict[str, str]:
    """Returns the options for `jax.jit(f, compiler_options=...)` that are fast on the default backend.

    An option that this jaxlib does not know is left out, as is one that the user set in XLA_FLAGS.
    """
    candidates: dict[str, str] = {}
    if jax.default_backend() == "cpu":
        candidates = CPU_OPTIONS | (AVX512_OPTIONS if _has_avx512() else {})
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


def _is_known(name: str, value: str) -> bool:
    try:
        jax.jit(lambda x: x, compiler_options={name: value}).lower(0.0).compile()
    except Exception:  # jaxlib raises different types for an unknown name and for an unknown value, none of them public
        return False
    return True


def _has_avx512() -> bool:
    cpu = Path("/proc/cpuinfo")
    return cpu.exists() and " avx512f " in cpu.read_text()
