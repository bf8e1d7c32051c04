"""What becomes of the steps on TPUs and GPUs, without one; `pytest -m slow -s` prints it."""

import functools
import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from filelock import FileLock

SCRIPT = Path(__file__).parents[2] / "scripts" / "compile_elsewhere.py"
ONE = [("v5e", 1), ("v6e", 1), ("T4", 1), ("A100", 1)]
SEVERAL = [("v5e", 4), ("H100", 8)]
TPUS = ("v5e", "v6e")
DTYPES = ("float32", "bfloat16")

# The tutorial's network: what its layers take and give.
CONVS, DENSE = ((3, 30), (30, 50), (50, 60)), ((7260, 3500), (3500, 700), (700, 10))
NORMALISED = (3, 30, 50, 7260, 3500, 700)  # channels of the six norm layers
WEIGHTS = sum(9 * i * o + o for i, o in CONVS) + sum(i * o + o for i, o in DENSE)
PARAMETERS = WEIGHTS + 2 * sum(NORMALISED)  # a scale and a shift for each channel
# Kernel and bias of each layer, scale and shift of each norm: with Adam three of each. A step, a
# key and Adam's count; two averages of each norm.
LEAVES = 3 * (2 * 6 + 2 * 6) + 3 + 2 * 6
STATE_BYTES = 4 * (3 * PARAMETERS + 2 * sum(NORMALISED))

pytestmark = [pytest.mark.slow, pytest.mark.scripts]


@pytest.fixture(scope="session")
def compiled(tmp_path_factory, worker_id):
    """Returns what the script finds, by program and dtype, for so many of a chip.

    Each is compiled once, whichever process of the tests asks first: that takes a minute or more.
    """
    mine = tmp_path_factory.getbasetemp()
    shared = mine if worker_id == "master" else mine.parent

    @functools.cache
    def found(chip, devices):
        kept = shared / f"{chip}-{devices}.jsonl"
        with FileLock(f"{kept}.lock"):
            if not kept.exists():
                kept.write_text(compile_for(chip, devices))
        lines = map(json.loads, kept.read_text().splitlines())
        return {(one["program"], one["dtype"]): one for one in lines}

    return found


def compile_for(chip, devices, *words):
    """Returns what the script prints; no simulated devices there."""
    needs = "libtpu" if chip in TPUS else "jax_cuda12_plugin"
    if importlib.util.find_spec(needs) is None:
        pytest.skip(f"compiling for {chip} needs {needs}, which bnjax does not require")
    own = {name for name in os.environ if name == "XLA_FLAGS" or name.startswith("JAX_")}
    done = subprocess.run(
        [sys.executable, SCRIPT, "--json", "--chip", chip, "--devices", str(devices), *words],
        env={name: value for name, value in os.environ.items() if name not in own},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout)
    return done.stdout


@pytest.mark.parametrize(("chip", "devices"), ONE + SEVERAL)
def test_states_are_donated_and_memory_suffices(compiled, chip, devices):
    programs = compiled(chip, devices)
    names = {"train", "eval", "loop"} if devices == 1 else {"train", "eval"}
    assert set(programs) == {(name, dtype) for name in names for dtype in DTYPES}
    for (name, dtype), found in programs.items():
        assert found["donated"] == (0 if name == "eval" else LEAVES), (name, dtype)
        assert found["host_transfers"] == 0, (name, dtype)
        assert found["loops"] == (name == "loop"), dtype  # many steps are one program
        needed = 4 * PARAMETERS if name == "eval" else STATE_BYTES
        assert needed < found["peak_bytes"] < found["memory"], (name, dtype)


@pytest.mark.parametrize(("chip", "devices"), ONE)
def test_on_one_device_the_state_and_the_images_stay_where_they_are(compiled, chip, devices):
    for (name, dtype), found in compiled(chip, devices).items():
        assert not found["all_reduces"]
        for array in found["copied"]:
            shape = json.loads(array[array.index("[") :])
            assert shape[0] != 50_000, (name, dtype)
            assert sorted(shape) != [3500, 7260], (name, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("chip", "devices"), SEVERAL)
def test_between_devices_travel_gradients_and_moments(compiled, chip, devices, dtype):
    programs = compiled(chip, devices)
    moments = Counter()
    for i, channels in enumerate(NORMALISED):
        moments[4 * channels] += 2  # the mean and then the squares, float32 in either dtype
        if i > 0:  # backward two sums in one; the first layer passes no gradient on
            moments[8 * channels] += 1
    rest = Counter(programs["train", dtype]["all_reduces"])
    assert moments <= rest
    rest -= moments
    assert rest.total() <= 4  # and not one for each of 24 parameters
    # The scales' gradients come from the sums backward, but for the first layer's. Loss and
    # correct answers are 4 bytes each.
    weights = WEIGHTS * (4 if dtype == "float32" else 2)
    affine = 4 * (sum(NORMALISED) + NORMALISED[0])
    assert sum(size * times for size, times in rest.items()) == weights + affine + 8
    assert sum(programs["eval", dtype]["all_reduces"]) == 8


@pytest.mark.parametrize(("chip", "devices"), ONE + SEVERAL)
def test_products_are_of_the_dtype_and_by_the_library(compiled, chip, devices):
    # Three convolutions and three dense layers; each has two gradients.
    for (name, dtype), found in compiled(chip, devices).items():
        count = 6 if name == "eval" else 18
        if chip in TPUS:  # in float32 it rounds the operands itself, within the product or before
            assert sum(found["products"].values()) >= count
            assert dtype == "float32" or set(found["products"]) == {"bf16"}, name
            continue
        # A T4 has no bfloat16: XLA multiplies float32 there after all.
        multiplied = "bf16" if dtype == "bfloat16" and chip != "T4" else "f32"
        assert found["products"] == {multiplied: count}, (name, dtype)
        assert found["not_in_library"] == 0


@pytest.mark.parametrize("chip", ["v5e", "A100"])
def test_the_fast_recipe_over_several_seeds_is_one_program(chip):
    """Augmentation, Muon and the batches of 4 trainings: nothing of it comes from the host."""
    lines = compile_for(chip, 1, "--config", "configs/speed94.py", "--seeds", "4").splitlines()
    programs = {found["dtype"]: found for found in map(json.loads, lines)}
    assert set(programs) == set(DTYPES)
    for found in programs.values():
        assert found["program"] == "loop"
        assert found["host_transfers"] == 0
        assert found["loops"] >= 1
        assert found["peak_bytes"] < found["memory"]
    # Six convolutions, forward and back; the Newton-Schulz products are float32 always.
    assert programs["bfloat16"]["products"]["bf16"] >= 3 * 6
