"""Describes TPUs and GPUs that are not installed, to compile for them without a driver.

    pip install libtpu jax-cuda12-plugin jax-cuda12-pjrt    # these two in jaxlib's version

Import it before JAX is imported.
"""

import dataclasses
import functools
import importlib.util
import math
import os
from typing import Any

# Before JAX is imported: it would look for the chips. By a lock file libtpu lets in one process
# of a machine, since that takes the chips; none is used here.
os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

from jax.experimental import topologies

# Without the chip nothing can be timed, and matrix products are left to cuBLAS.
CUDA_OPTIONS = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}


@dataclasses.dataclass(frozen=True)
class Tpu:
    """A TPU with its name in libtpu."""

    name: str
    memory: int  # bytes of one chip
    counts: tuple[int, ...] = (1, 4)  # of chips in a machine
    requires: str = "libtpu"

    def devices(self, count: int) -> Any:
        """Returns that many devices, to compile for."""
        side = math.isqrt(count)
        shape = f"{self.name}:{side}x{count // side}"
        return topologies.get_topology_desc(platform="tpu", topology_name=shape).devices


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A GPU by the figures in NVIDIA's data sheets and tuning guides."""

    name: str
    memory: int  # bytes
    capability: tuple[int, int]
    cores: int  # streaming multiprocessors
    lanes: int  # float32 units of each
    threads: int  # that are resident in each
    shared: int  # KiB of each
    shared_block: int  # KiB that a block may ask for
    cache: int  # MiB, level 2
    bandwidth: float  # bytes a second
    clock: float  # GHz
    counts: tuple[int, ...] = (1, 8)
    requires: str = "jax_cuda12_plugin"

    def devices(self, count: int) -> Any:
        """Returns that many devices, to compile for."""
        target = f"""
            platform_name: "CUDA" device_description_str: "{self.name}"
            dnn_version_info {{ major: 9 minor: 8 }} runtime_version {{ major: 12 minor: 8 }}
            gpu_device_info {{
              cuda_compute_capability {{ major: {self.capability[0]} minor: {self.capability[1]} }}
              core_count: {self.cores} fpus_per_core: {self.lanes} clock_rate_ghz: {self.clock}
              threads_per_core_limit: {self.threads}
              threads_per_block_limit: 1024 threads_per_warp: 32
              block_dim_limit_x: {2**31 - 1} block_dim_limit_y: 65535 block_dim_limit_z: 65535
              registers_per_core_limit: 65536 registers_per_block_limit: 65536
              shared_memory_per_core: {self.shared << 10} shared_memory_per_block: {48 << 10}
              shared_memory_per_block_optin: {self.shared_block << 10}
              l2_cache_size: {self.cache << 20}
              memory_bandwidth: {self.bandwidth:.0f} device_memory_size: {self.memory}
            }}"""
        with_cuda_for_gpu()
        shape = {"target_config": target, "topology": f"1x1x{count}"}
        return topologies.get_topology_desc(platform="cuda", topology_name="", **shape).devices


CHIPS: dict[str, Tpu | Gpu] = {
    "v5e": Tpu("v5e", 16 << 30),
    "v6e": Tpu("v6e", 32 << 30),
    "T4": Gpu("Tesla T4", 15 << 30, (7, 5), 40, 64, 1024, 64, 64, 4, 320e9, 1.59),
    "A100": Gpu("A100-SXM4-40GB", 39 << 30, (8, 0), 108, 64, 2048, 164, 163, 40, 1555e9, 1.41),
    "H100": Gpu("H100 80GB HBM3", 79 << 30, (9, 0), 132, 128, 2048, 228, 227, 50, 3350e9, 1.98),
}


@functools.cache
def with_cuda_for_gpu() -> None:
    """Lets JAX lower for CUDA where no GPU says what "gpu" means (jax-ml/jax#23971)."""
    from jax._src import xla_bridge

    original = xla_bridge.canonicalize_platform

    def canonicalize(platform: str) -> str:
        try:
            return original(platform)
        except RuntimeError:
            if platform != "gpu":
                raise
            return "cuda"

    xla_bridge.canonicalize_platform = canonicalize


def chip_of(name: str) -> Tpu | Gpu:
    """Returns a chip by its name; exits if the compiler for it is not installed."""
    chip = CHIPS[name]
    if importlib.util.find_spec(chip.requires) is None:
        raise SystemExit(f"{name} needs {chip.requires}; {__file__} says how to install it")
    return chip


def options_of(chip: Tpu | Gpu) -> Any:
    """Returns the compiler options for a chip that is not installed."""
    return CUDA_OPTIONS if isinstance(chip, Gpu) else None
