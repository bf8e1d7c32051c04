"""Fast XLA on a CPU: compiler options and memory; and the cache of compiled programs."""

import ctypes
import functools
import importlib.metadata
import importlib.util
import os
import re
from pathlib import Path

import jax

from bnjax.data.datasets import cache_dir
from bnjax.errors import UserError

Options = dict[str, str | bool | int]

# Measured with jaxlib 0.10.2 and 0.12.0.1, the tutorial's network, batches of 512 and 5000. By
# default YNNPACK also computes convolutions, and its gradients of them are slow: 830 to 910
# images/s instead of 1,490 on AVX-512 cores, and fewer on AVX2 cores. These options limit it to
# matrix products (INDIVIDUAL_DOT) and reductions (REDUCE: 5 % faster); with ELTWISE a step takes
# 13 % longer. Without the region analysis XLA copies Adam's averages for the largest layer in each
# step, twice 102 MB (5 % slower; the results have the same bits).
FUSIONS = "xla_cpu_experimental_ynn_fusion_type"
CPU_OPTIONS: Options = {
    FUSIONS: "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,LIBRARY_FUSION_TYPE_REDUCE",
    "xla_cpu_copy_insertion_use_region_analysis": True,
}
# On AVX-512 cores 1 to 4 % faster; on AVX2 cores a fifth slower.
AVX512_OPTIONS: Options = {"xla_cpu_prefer_vector_width": "512"}
# On AVX-512 cores Eigen multiplies many rows of float32 faster than YNNPACK (batch 5000: 9 to 12 %
# less time per step), and few rows slower (batch 512: 3 to 6 % more). For bfloat16 only YNNPACK is
# fast.
AVX512_LARGE_BATCH_OPTIONS: Options = AVX512_OPTIONS | {FUSIONS: "LIBRARY_FUSION_TYPE_REDUCE"}
LARGE_BATCH = 2048

# The program for the initial values runs once and has much code for random numbers. With this
# option it compiles in 1.5 s instead of 5.1 s for the tutorial's network, in 1.4 s instead of 3.8 s
# for the digits, and runs as fast.
CPU_INIT_OPTIONS: Options = {"xla_backend_optimization_level": 1}

# Parameters and values for glibc's mallopt: never return free memory to the kernel, no separate
# mappings for large allocations, one heap.
KEEP_FREED_MEMORY = {"M_TRIM_THRESHOLD": (-1, -1), "M_MMAP_MAX": (-4, 0), "M_ARENA_MAX": (-8, 1)}
MADV_HUGEPAGE = 14
LEAST_MEMORY = 8 << 30  # bytes that have to be available
# The fraction of the machine's memory to leave available. Kept memory can grow to several times the
# need of a step (18.7 GB instead of 4.9): glibc does not reuse a large freed block for an aligned
# one of the same size once a small block lies behind it.
SPARE_MEMORY = 0.25
# Linux's descriptions of the machine, and the device files of NVIDIA, AMD, Google and WSL.
CPUINFO, MEMINFO = Path("/proc/cpuinfo"), Path("/proc/meminfo")
ACCELERATORS = ("nvidia[0-9]*", "kfd", "accel*", "vfio/[0-9]*", "dxg")


def prepare(*, training: bool = False) -> None:
    """Prepares this process for a command that computes; has to be called before any computation.

    Args:
        training: whether the command trains; if so, and JAX will use a CPU, keeps freed memory.

    Raises:
        UserError: if JAX_PLATFORMS selects a platform without a device.
    """
    if training and will_use_cpu():
        keep_freed_memory()
    keep_compiled(cache_dir() / "compiled")
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        wanted, why = os.environ.get("JAX_PLATFORMS", ""), f" ({error})" if str(error) else ""
        raise UserError(
            f"JAX has no device of JAX_PLATFORMS={wanted}{why}. Unset that variable to use any "
            "device, or install JAX for the platform, as pip install 'bnjax[cuda12]' does."
        ) from error


def will_use_cpu() -> bool:
    """Returns whether JAX will choose a CPU.

    Does not call JAX: after JAX has started its threads, `keep_freed_memory` has no effect, and a
    step takes 35 % longer.
    """
    if platforms := jax.config.values["jax_platforms"]:
        return platforms.split(",")[0] == "cpu"
    packages = any(map(importlib.util.find_spec, ("jax_plugins", "libtpu")))
    plugins = packages or importlib.metadata.entry_points(group="jax_plugins")
    return not (plugins and any(any(Path("/dev").glob(name)) for name in ACCELERATORS))


def compiler_options(batch_size: int = 1, product: str = "float32") -> Options:
    """Returns fast options for `jax.jit(f, compiler_options=...)` on the default backend.

    Args:
        batch_size: examples that the program processes at once.
        product: the dtype of its dense layers' operands.
    """
    if not (CPUINFO.exists() and " avx512f " in CPUINFO.read_text()):
        return usable(CPU_OPTIONS)
    large = batch_size >= LARGE_BATCH and product == "float32"
    return usable(CPU_OPTIONS | (AVX512_LARGE_BATCH_OPTIONS if large else AVX512_OPTIONS))


def init_options() -> Options:
    """Returns the compiler options for a large program that runs once."""
    return usable(CPU_INIT_OPTIONS)


def usable(cpu_options: Options) -> Options:
    """Drops the options that this jaxlib does not know or that the user set in XLA_FLAGS.

    Drops all of them on other backends.
    """
    candidates = cpu_options if jax.default_backend() == "cpu" else {}
    flags = os.environ.get("XLA_FLAGS", "")
    return {
        name: value
        for name, value in candidates.items()
        if name not in flags and _is_known(name, value)
    }


def memory() -> int | None:
    """Returns the memory of the default device in bytes, on a CPU that of the machine.

    None if it is unknown.
    """
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    if limit is None and jax.default_backend() == "cpu" and "SC_PHYS_PAGES" in os.sysconf_names:
        limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return limit


def keep_freed_memory() -> bool:
    """Makes glibc keep freed memory for the next step, in huge pages; returns whether it does.

    XLA allocates and frees gigabytes in each step on a CPU, and page faults are a fifth of its
    time. Has to be called before any other use of JAX. Does nothing if less than 8 GB are
    available, without glibc, with BNJAX_MALLOC=0, or if the user chose another malloc or other
    settings (LD_PRELOAD, GLIBC_TUNABLES).
    """
    chosen = "malloc" in os.environ.get("LD_PRELOAD", "") + os.environ.get("GLIBC_TUNABLES", "")
    available = _meminfo("MemAvailable")
    if chosen or os.environ.get("BNJAX_MALLOC") == "0" or available < LEAST_MEMORY:
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    kept = all(libc.mallopt(name, value) == 1 for name, value in KEEP_FREED_MEMORY.values())
    # The heap grows once, marked for huge pages and untouched; the freed block stays part of it.
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.free.argtypes = [ctypes.c_void_p]
    block, page = libc.malloc(available // 2), os.sysconf("SC_PAGE_SIZE")
    if block:
        libc.madvise(-(-block // page) * page, available // 2 - page, MADV_HUGEPAGE)
        libc.free(block)
    return kept


def give_back_freed_memory() -> bool:
    """Returns kept memory to the kernel if little else is left; returns whether it did.

    Call it between steps, about once a second. Does nothing on other backends.
    """
    if jax.default_backend() != "cpu":
        return False
    if _meminfo("MemAvailable") >= SPARE_MEMORY * _meminfo("MemTotal"):
        return False
    libc = ctypes.CDLL(None)
    return hasattr(libc, "malloc_trim") and libc.malloc_trim(0) == 1


def _meminfo(name: str) -> int:
    """Returns an entry in bytes, 0 if it is unknown."""
    lines = MEMINFO.read_text() if MEMINFO.exists() else ""
    found = re.search(rf"^{name}: +(\d+) kB$", lines, re.MULTILINE)
    return int(found[1]) << 10 if found else 0


def keep_compiled(folder: Path) -> None:
    """Caches compiled programs in a folder for later processes, at most 2 GB.

    If the user chose a folder, by JAX_COMPILATION_CACHE_DIR or jax.config, that one is used.
    """
    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_compilation_cache_max_size", 2 << 30)
        # JAX's default, 1 s, would skip most programs of a small network.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


@functools.cache
def _is_known(name: str, value: str | bool | int) -> bool:
    try:
        jax.jit(lambda x: x, compiler_options={name: value}).lower(0.0).compile()
    except Exception:  # of several types that are not public
        return False
    return True
