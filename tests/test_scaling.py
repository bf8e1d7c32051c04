"""What `scripts/scaling.py` reads out of programs, and its model of time, against closed forms."""

import functools
import sys
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

from bnjax import norms
from bnjax.models.convnet import ConvNet
from bnjax.train.parallel import spread
from bnjax.train_step import init_state, train_step

sys.path.append(str(Path(__file__).parents[1] / "scripts"))
from hlo import Reduction, group_size, reductions
from links import BACKWARD, MACHINES, Level, all_reduce_seconds, compute_seconds, ring, step

# A network of two hidden layers: what its layers take and give.
CHANNELS = (3, 4, 6)  # of the norms: of the pixels, the convolution, and the dense layer
WEIGHTS = 9 * 3 * 4 + 4 + (4 * 2 * 2) * 6 + 6 + 6 * 5 + 5
FLAT = (3, 16, 6)  # the dense layer is given the convolution's four positions of four channels


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


def test_norms_of_each_device_reduce_nothing_but_their_averages():
    assert total("per_device", "moments") == 0
    together = total("per_device", "averages") + total("per_device", "gradients")
    print(together, found("per_device"))
    for over in ("global", 4, "per_device"):
        print(
            over,
            Counter((one.use, one.devices) for one in found(over)),
            {u: total(over, u) for u in ("moments", "averages", "gradients", "metrics")},
        )
    print(4 * (WEIGHTS + 2 * sum(FLAT)), 2 * 4 * sum(FLAT), WEIGHTS)
    assert 0
