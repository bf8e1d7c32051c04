"""Speeds up XLA on CPUs with compiler options and memory settings; caches programs."""

import ctypes
import functools
import importlib.metadata
import importlib.util
import mmap
import os
import platform
import re
import sys
import warnings
from pathlib import Path

import jax

from bnjax.data.datasets import cache_dir
from bnjax.errors import UserError

Options = dict[str, str | bool | int]

# Measured with jaxlib 0.10.2 and 0.12.0.1 on the tutorial's network, in batches of 512 and 5,000.
# By default YNNPACK also computes convolutions, but their gradients are slow: 830 to 910 images/s
# instead of 1,490 on AVX-512 cores, and fewer on AVX2 cores. These options limit YNNPACK to matrix
# products (INDIVIDUAL_DOT) and reductions (REDUCE: 5 % faster); with ELTWISE a step takes 13 %
# longer. Without the region analysis XLA copies both of Adam's averages for the largest layer (102
# MB each) in each step, which takes 5 % longer and gives the same bits.
FUSIONS = "xla_cpu_experimental_ynn_fusion_type"
CPU_OPTIONS: Options = {
    FUSIONS: "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,LIBRARY_FUSION_TYPE_REDUCE",
    "xla_cpu_copy_insertion_use_region_analysis": True,
}
# With these options Eigen computes the float32 matrix products. Which library is faster depends on
# the processor and the shapes (see `products.py`): on AVX-512 cores of an AMD EPYC, Eigen needs
# 18 % less time than YNNPACK with the tutorial's network in batches of 5,000, and 8 % more in
# batches of 512.
EIGEN_OPTIONS: Options = CPU_OPTIONS | {FUSIONS: "LIBRARY_FUSION_TYPE_REDUCE"}
# With this option, oneDNN computes products and convolutions. On the same cores, with jaxlib
# 0.12.0.1 and dtype bfloat16, a step of the tutorial's network takes 0.22 s instead of 0.35 s; in
# float32 it takes equally long, and 0.36 s instead of 0.25 s with bfloat16 operands and float32
# results. In jaxlib 0.10.2 and earlier, the option has no effect.
ONEDNN_OPTIONS: Options = CPU_OPTIONS | {"xla_cpu_experimental_onednn_custom_call": True}
# The program for the initial values runs once and contains much code for random numbers. With this
# option it compiles in 1.5 s instead of 5.1 s for the tutorial's network and in 1.4 s instead of
# 3.8 s for the digits, and it runs equally fast.
CPU_INIT_OPTIONS: Options = {"xla_backend_optimization_level": 1}

# Parameters and values for glibc's mallopt: never return free memory to the kernel, map no large
# allocations separately, and use one heap.
KEEP_FREED_MEMORY = {"M_TRIM_THRESHOLD": (-1, -1), "M_MMAP_MAX": (-4, 0), "M_ARENA_MAX": (-8, 1)}
MADV_HUGEPAGE = 14
LEAST_MEMORY = 8 << 30  # the number of bytes that must be available
# The fraction of the machine's memory to leave available. The memory that glibc keeps can grow to
# several times what a step needs (18.7 GB instead of 4.9): glibc does not reuse a large freed block
# for an aligned block of the same size once a small block lies behind it.
SPARE_MEMORY = 0.25
# Linux's files that describe the machine, and the device files of NVIDIA, AMD, Google and WSL.
CPUINFO, MEMINFO = Path("/proc/cpuinfo"), Path("/proc/meminfo")
ACCELERATORS = ("nvidia[0-9]*", "kfd", "accel*", "vfio/[0-9]*", "dxg")


def prepare(*, training: bool = False) -> None:
    """Prepares this process for computation with JAX; must be called before any computation.

    Args:
        training: whether the process will train. If so, and JAX will use a CPU, freed memory is
            kept for the next step.

    Raises:
        UserError: if JAX_PLATFORMS selects a platform without a device.
    """
    if training and will_use_cpu():
        keep_freed_memory()
    keep_compiled(compiled_folder())
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        wanted, why = os.environ.get("JAX_PLATFORMS", ""), f" ({error})" if str(error) else ""
        raise UserError(
            f"JAX has no device for JAX_PLATFORMS={wanted}{why}. Unset that variable to use any "
            "device, or install JAX for the platform, for instance with pip install "
            "'bnjax[cuda12]'."
        ) from error


def will_use_cpu() -> bool:
    """Returns whether JAX will choose a CPU.

    Does not call JAX, because `keep_freed_memory` has no effect once JAX has started its threads,
    and a step then takes 35 % longer.
    """
    if platforms := jax.config.values["jax_platforms"]:
        return platforms.split(",")[0] == "cpu"
    packages = any(map(importlib.util.find_spec, ("jax_plugins", "libtpu")))
    plugins = packages or importlib.metadata.entry_points(group="jax_plugins")
    return not (plugins and any(any(Path("/dev").glob(name)) for name in ACCELERATORS))


def compiler_options() -> Options:
    """Returns options for `jax.jit(f, compiler_options=...)`, fast on the default backend."""
    return usable(CPU_OPTIONS)


def init_options() -> Options:
    """Returns the compiler options for a large program that runs once."""
    return usable(CPU_INIT_OPTIONS)


def usable(cpu_options: Options) -> Options:
    """Drops options that this jaxlib does not support or that the user set in XLA_FLAGS.

    Drops all options if the backend is not a CPU.
    """
    candidates = cpu_options if jax.default_backend() == "cpu" else {}
    flags = os.environ.get("XLA_FLAGS", "")
    return {
        name: value
        for name, value in candidates.items()
        if name not in flags and _is_known(name, value)
    }


def memory() -> int | None:
    """Returns the memory of the default device in bytes; for a CPU, the memory of the machine.

    Returns None if the amount is unknown.
    """
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    if limit is None and jax.default_backend() == "cpu" and sys.platform != "win32":
        limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return limit


def keep_freed_memory() -> bool:
    """Makes glibc keep freed memory for later steps, in huge pages; returns whether it does so.

    On a CPU, XLA allocates and frees gigabytes in each step, and page faults take a fifth of the
    time. Call this function before any other use of JAX. It does nothing if less than 8 GB is
    available, if there is no glibc, if BNJAX_MALLOC is 0, or if the user chose another malloc or
    other settings (LD_PRELOAD, GLIBC_TUNABLES).
    """
    chosen = "malloc" in os.environ.get("LD_PRELOAD", "") + os.environ.get("GLIBC_TUNABLES", "")
    available = _meminfo("MemAvailable")
    if chosen or os.environ.get("BNJAX_MALLOC") == "0" or available < LEAST_MEMORY:
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    kept = all(libc.mallopt(name, value) == 1 for name, value in KEEP_FREED_MEMORY.values())
    # Grows the heap once by a block marked for huge pages, which stays in the heap when freed.
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.free.argtypes = [ctypes.c_void_p]
    block, page = libc.malloc(available // 2), mmap.PAGESIZE
    if block:
        libc.madvise(-(-block // page) * page, available // 2 - page, MADV_HUGEPAGE)
        libc.free(block)
    return kept


def give_back_freed_memory() -> bool:
    """Releases kept memory to the kernel if little other memory is left; returns whether it did.

    Call it between steps, about once a second. Does nothing if the backend is not a CPU.
    """
    if jax.default_backend() != "cpu":
        return False
    if _meminfo("MemAvailable") >= SPARE_MEMORY * _meminfo("MemTotal"):
        return False
    libc = ctypes.CDLL(None)
    return hasattr(libc, "malloc_trim") and libc.malloc_trim(0) == 1


def _meminfo(name: str) -> int:
    """Returns an entry of /proc/meminfo in bytes, or 0 if it does not exist."""
    lines = MEMINFO.read_text() if MEMINFO.exists() else ""
    found = re.search(rf"^{name}: +(\d+) kB$", lines, re.MULTILINE)
    return int(found[1]) << 10 if found else 0


def compiled_folder() -> Path:
    """Returns the folder in which bnjax keeps compiled programs."""
    return cache_dir() / "compiled"


def processor() -> str:
    """Returns the name of the processor and its widest vector instructions, if known."""
    text = CPUINFO.read_text() if CPUINFO.exists() else ""
    name = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    names = ("amx_bf16", "avx512_bf16", "avx512f", "avx2")
    widest = [word for word in names if f" {word} " in text]
    return " ".join([name[1] if name else platform.machine(), *widest[:1]])


def keep_compiled(folder: Path) -> None:
    """Caches compiled programs (at most 2 GB) in a folder for later processes.

    A folder that the user chose with JAX_COMPILATION_CACHE_DIR or jax.config is used instead.
    """
    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_compilation_cache_max_size", 2 << 30)
        # JAX's default, 1 s, would skip most programs of a small network.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    # jaxlib 0.12.0.1 cannot store programs in which oneDNN computes convolutions; each process
    # compiles them again.
    unstored = "Error writing persistent compilation cache entry .* std::bad_alloc"
    warnings.filterwarnings("ignore", unstored, UserWarning)


@functools.cache
def _is_known(name: str, value: str | bool | int) -> bool:
    try:
        jax.jit(lambda x: x, compiler_options={name: value}).lower(0.0).compile()
    except Exception:  # JAX raises several private error types
        return False
    return True
