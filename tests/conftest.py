import os
import tempfile

# Before JAX is imported anywhere: eight simulated devices, so that every test can be about several.
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 " + os.environ.get("XLA_FLAGS", "")
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jaxtyping
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "standard")
# Many tests train the same small network; it is compiled once.
_COMPILED = tempfile.TemporaryDirectory(prefix="bnjax-compiled-")
jax.config.update("jax_compilation_cache_dir", _COMPILED.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
# The shapes in the annotations are checked in every call that a test makes.
jaxtyping.install_import_hook("bnjax", "beartype.beartype")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    """No test sees the user's downloads, nor leaves any."""
    monkeypatch.setenv("BNJAX_CACHE", str(tmp_path_factory.mktemp("cache")))
