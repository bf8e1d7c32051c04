"""What `scripts/scaling.py` reads out of programs, and its model of time, against closed forms."""

import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

from bnjax import norms
from bnjax.models.convnet import ConvNet
from bnjax.train.devices import spread
from bnjax.train_step import init_state, train_step

sys.path.append(str(Path(__file__).parents[2] / "scripts"))
from hlo import Reduction, reductions
from links import BACKWARD, MACHINES, Level, all_reduce_seconds, compute_seconds, ring, step

pytestmark = pytest.mark.scripts
SCRIPT = Path(__file__).parents[2] / "scripts" / "scaling.py"

# A network of two hidden layers: what its layers take and give.
WEIGHTS = 9 * 3 * 4 + 4 + (4 * 2 * 2) * 6 + 6 + 6 * 5 + 5
FLAT = (3, 16, 6)  # channels of the norms; the second has four positions of four flattened


def program(over):
    """The text of a step that is compiled for eight simulated devices."""
    parallel = spread(jax.devices()[:8], over)
    norm = norms.build("batch", momentum=0.9, **parallel.norm_axes)
    small = {"filters": (4,), "kernels": (3,), "strides": (1,), "dense": (6,), "classes": 5}
    model = ConvNet(**small, norm=norm, norm_dense=(True,), dropout=(0.0,))
    tx = optax.sgd(0.1)
    compiled = parallel.compile(
        lambda axis: functools.partial(train_step, model=model, tx=tx, axis_name=axis),
        (None, None, 0),
    )
    plain = model.clone(norm=norms.build("batch"))
    images = np.zeros((16, 4, 4, 3), np.uint8)
    state = init_state(plain, tx, jax.random.key(0), images)
    batch = {"image": images, "label": np.zeros(16, np.int32)}
    return compiled.lower(*state, batch).compile().as_text()


@functools.cache
def found(over):
    return reductions(program(over), 8)


def total(over, use):
    return sum(one.bytes for one in found(over) if one.use == use)


@pytest.mark.parametrize("over", ["global", 4])
def test_norms_over_devices_reduce_two_numbers_a_channel_forward_and_two_backward(over):
    # The first norm passes no gradient on, so that backward it needs no sums before the others.
    forward, backward = 2 * 4 * sum(FLAT), 2 * 4 * sum(FLAT[1:])
    own = [one for one in found(over) if one.use == "moments"]
    assert total(over, "moments") == forward + backward
    assert {one.devices for one in own} == {8 if over == "global" else over}


def test_gradients_and_averages_are_of_all_devices():
    # Under jit the scales' gradients come from the sums backward, but for the first norm's; the
    # shifts' come once more. The loss is a float, and there is one to three whole numbers.
    assert total("global", "gradients") == 4 * (WEIGHTS + sum(FLAT) + FLAT[0]) + 4
    assert total("global", "averages") == 0
    everything, averages = 4 * (WEIGHTS + 2 * sum(FLAT)) + 4, 2 * 4 * sum(FLAT)
    for over in (4, "per_device"):  # averages may be combined with the gradients
        both = total(over, "gradients") + total(over, "averages")
        # Mean and variance; with the oldest JAX their counts, which are all alike, travel too.
        assert both - everything in (averages, 3 / 2 * averages)
        assert total(over, "gradients") >= everything
        assert {one.devices for one in found(over) if one.use == "gradients"} == {8}
    assert {one.devices for one in found(4) if one.use == "averages"} == {2}
    assert total("per_device", "moments") == 0


ASYNCHRONOUS = """
%s = ((f32[5,3]{1,0}, bf16[7]), f32[5,3]{1,0}, bf16[7]) all-reduce-start(%a, %b), \
replica_groups=[1,8]<=[8], metadata={op_name="jit(f)/transpose(jvp(N))/dense/dot_general"}
%c = f32[3]{0} fusion(%x), kind=kLoop
%d = f32[3]{0} bitcast(%x)
%e = f32[5,3]{1,0} all-reduce-done(%s)
%f = (f32[3]{0}, f32[3]{0}) all-reduce(%c, %d), replica_groups={{0,1},{2,3}}, \
metadata={op_name="jit(f)/transpose(jvp(N))/(conv_norm/reduce_sum:conv_norm/reduce_sum)"}
%g = f32[9]{0} all-reduce(%c), replica_groups={}, metadata={op_name="jit(f)/(N/a_norm/psum:psum)"}
%h = f32[9]{0} all-reduce(%c), metadata={op_name="jit(f)/jvp(N)/a_norm/psum"}
%i = s32[]{} all-reduce(%c), metadata={op_name="jit(f)/psum"}
"""


def test_what_is_done_meanwhile_counts_as_overlap():
    assert reductions(ASYNCHRONOUS, 4) == [
        Reduction("gradients", 5 * 3 * 4 + 7 * 2, 2, 8, 1),
        Reduction("moments", 24, 2, 2, 0),
        Reduction("gradients", 36, 1, 4, 0),
        Reduction("averages", 36, 1, 4, 0),
        Reduction("metrics", 4, 1, 4, 0),
    ]


def test_levels_pass_on_a_part_each():
    """A ring of n: 2 (n - 1) steps, each with an n-th of the bytes (Patarasuk & Yuan, 2009)."""
    inner, outer = ring(4, 8.0, 0.5), Level(2, 1.0, 2, 3.0)
    wanted = 1.0 + 2 * 3 / 4 * 16 / 8 + 6 * 0.5 + 2 * 1 / 2 * (16 / 4) / 1 + 2 * 3.0
    assert all_reduce_seconds(16.0, [inner, outer], start=1.0) == pytest.approx(wanted)


def test_pods_have_the_published_all_reduce_bandwidth():
    for name, published in (("v5e", 51.2e12), ("v6e", 102.4e12)):
        (pod,) = MACHINES[name].levels(256)
        assert pod.bandwidth * pod.size == published
        assert pod.hops == 2 * (8 + 8)  # there and back, half around each way
        slice_ = MACHINES[name].levels(8)[0]  # 2x4 chips, whose sides are open
        assert (slice_.hops, slice_.bandwidth) == (2 * (1 + 3), pod.bandwidth / 2)
        assert [level.size for level in MACHINES[name].levels(1024)] == [256, 4]
    assert [level.size for level in MACHINES["H100"].levels(64)] == [8, 8]


def test_a_step_hides_what_it_may_and_no_more():
    machine = MACHINES["v5e"]
    compute = compute_seconds(machine, "bfloat16", 197e12, 819e9 * 2, 0.5)
    assert compute == pytest.approx(4.0)  # memory takes longer than arithmetic

    def seconds(size, chips):
        return all_reduce_seconds(size, machine.levels(chips), machine.start)

    moments, half = Reduction("moments", 80, 2, 8, 0), Reduction("gradients", 3 * 10**11, 1, 16, 5)
    found = [moments, half, half, Reduction("metrics", 4, 1, 16, 0)]
    one = step(machine, compute, found, 16, 64)
    assert one.norms == pytest.approx(seconds(80, 8))  # groups of 8 stay so
    # Both together are hidden once, and not each for itself.
    assert seconds(half.bytes, 64) > BACKWARD * compute
    exposed = 2 * seconds(half.bytes, 64) - BACKWARD * compute
    assert one.gradients == pytest.approx(exposed + seconds(4, 64))
    everywhere = step(machine, compute, [moments._replace(devices=16)], 16, 64)
    assert everywhere.norms == pytest.approx(seconds(80, 64))
    assert everywhere.norm_share == pytest.approx(seconds(80, 64) / 4.0)
    assert step(machine, compute, found, 16, 1).seconds == compute


@pytest.mark.slow
@pytest.mark.parametrize(
    ("chip", "needs"), [("v5e", "libtpu"), ("H100", "jax_cuda12_plugin")], ids=["v5e", "H100"]
)
def test_the_published_resnet50_fits_on_eight_chips(chip, needs, tmp_path):
    """With 32 images a chip, normalised there: only gradients and averages are exchanged."""
    if importlib.util.find_spec(needs) is None:
        pytest.skip(f"compiling for {chip} needs {needs}, which bnjax does not require")
    words = ["--network", "resnet50", "--batch", "32", "--over", "per device"]
    words += ["--chip", chip, "--chips", "8", "--dtype", "bfloat16", "--json", tmp_path / "found"]
    own = {name for name in os.environ if name == "XLA_FLAGS" or name.startswith("JAX_")}
    done = subprocess.run(
        [sys.executable, SCRIPT, *words],
        env={name: value for name, value in os.environ.items() if name not in own},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "epoch minutes" in done.stdout
    found = json.loads((tmp_path / "found").read_text())
    parameters, channels = 25_557_032, 26_560  # of torchvision's; the channels of all norms
    assert 3 * 4 * parameters < found["peak_bytes"] < found["memory"] / 2
    exchanged = [one for one in found["reductions"] if one["use"] != "metrics"]
    assert "moments" not in {one["use"] for one in exchanged}
    total = sum(one["bytes"] for one in exchanged)
    assert 4 * parameters <= total <= 4 * (parameters + 3 * channels) + 64
