"""Eight simulated devices and no silent broadcasting, for every test; set before JAX is imported."""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")
