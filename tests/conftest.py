import gc
import os
import re
import signal
import tempfile
from importlib.metadata import version
from pathlib import Path

# Before JAX is imported anywhere: eight simulated devices, so that every test can be about several;
# and machine code that is quick to make, since compiling these small networks takes longer than
# running them. The older of XLA's two emitters takes a quarter of the time of the newer, which
# .ci/run's lanes and all real runs are about; jaxlib 0.11 dropped it, and ends at unknown flags.
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
    "--xla_cpu_parallel_codegen_split_count=1 "
    + "--xla_cpu_use_fusion_emitters=false "
    * version("jaxlib").startswith(("0.7.", "0.8.", "0.9.", "0.10."))
    + os.environ.get("XLA_FLAGS", "")
)
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["BNJAX_MALLOC"] = "0"  # many small processes share this machine

import jax
import jaxtyping
import pytest
from hypothesis import HealthCheck, settings

# A shell that starts this in the background has Ctrl-C ignored, whose tests want it heard.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# JAX keeps millions of small objects while it traces; looking for cycles among them again and again
# took a tenth of the time.
gc.set_threshold(100_000, 50, 100)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "standard")
# Many tests train the same small network, some in processes of their own; it is compiled once.
_COMPILED = tempfile.TemporaryDirectory(prefix="bnjax-compiled-")
for _name, _value in (
    ("jax_compilation_cache_dir", _COMPILED.name),
    ("jax_persistent_cache_min_compile_time_secs", 0.0),
    ("jax_persistent_cache_min_entry_size_bytes", -1),
):
    jax.config.update(_name, _value)
    os.environ[_name.upper()] = str(_value)
ROOT = Path(__file__).parents[1]
# These have no tests, and import libraries that are not installed everywhere.
collect_ignore_glob = ["zoo/kit_*.py"]
# The shapes in the annotations are checked in every call that a test makes; not in the one file
# whose class inherits fields from Flax with annotations that cannot be checked.
MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (ROOT / "bnjax").rglob("[!_]*.py")
    if re.search(r"(import|from) (jaxtyping|bnjax\.types)", path.read_text())
    and path.stem != "per_example"
]
jaxtyping.install_import_hook(MODULES, "beartype.beartype")


# Property tests: the same examples each time, as many as the time for every change allows;
# `--hypothesis-profile=thorough` is for more.
_CHECKS = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
settings.register_profile(
    "default", max_examples=100, deadline=None, derandomize=True, suppress_health_check=_CHECKS
)
settings.register_profile("thorough", settings.get_profile("default"), max_examples=1000)
settings.load_profile("default")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    """No test sees the user's downloads, nor leaves any."""
    monkeypatch.setenv("BNJAX_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path_factory.mktemp("tensorflow_datasets")))


@pytest.fixture
def bnjax(capsys):
    """Runs a command in this process; returns exit code, standard output and standard error."""
    from bnjax import errors, main

    def call(*arguments):
        with pytest.raises(SystemExit) as left:
            errors.run(lambda: main.main([*map(str, arguments)]))
        return left.value.code or 0, *capsys.readouterr()

    return call


# Runs that several commands are tried on; each worker trains them once.
@pytest.fixture(scope="session")
def healthy(tmp_path_factory):
    from digit_runs import train

    return train(tmp_path_factory.mktemp("runs") / "healthy", momentum=0.5)


@pytest.fixture(scope="session")
def unready(tmp_path_factory):
    """The averages of this one still remember their initial values."""
    from digit_runs import train

    return train(tmp_path_factory.mktemp("runs") / "unready", momentum=0.99)
