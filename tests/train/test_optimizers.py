import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnjax.train.config import default_config
from bnjax.train.optimizers import optimizer


def made(steps=10, **options):
    config = default_config()
    config.train.batch_size = 8
    for name, value in options.items():
        section, _, key = name.rpartition("__")
        config[section or "optimizer"][key or name] = value
    return optimizer(config, steps)


def walk(tx, params, grads):
    """The parameters before each update and after the last."""
    state, every = tx.init(params), [params]
    for grad in grads:
        updates, state = jax.jit(tx.update)(grad, state, every[-1])
        every.append(jax.tree.map(jnp.add, every[-1], updates))
    return every


def rates(name, warmup=0.0, steps=10):
    drops = (0.3, 0.7)
    tx = made(steps, name="sgd", learning_rate=2.0, schedule=name, warmup=warmup, drops=drops)
    return -np.diff([float(one) for one in walk(tx, jnp.zeros(()), [jnp.ones(())] * steps)])


def test_adam_makes_its_published_first_and_second_step():
    """Kingma & Ba 2015, algorithm 1, by hand in float64."""
    grads = [0.5, -0.2]
    found = walk(made(), jnp.array([1.0]), [jnp.array([grad]) for grad in grads])[-1]
    value, m, v = 1.0, 0.0, 0.0
    for t, grad in enumerate(grads, start=1):
        m, v = 0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * grad**2
        value -= 1e-3 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
    np.testing.assert_allclose(found, [value], rtol=1e-6)


@pytest.mark.parametrize(
    ("nesterov", "moves"), [(False, (0.1, 0.15)), (True, (0.15, 0.1 * (1 + 0.5 * 1.5)))]
)
def test_sgd_with_momentum(nesterov, moves):
    tx = made(name="sgd", learning_rate=0.1, momentum=0.5, nesterov=nesterov)
    found = walk(tx, jnp.ones(()), [jnp.ones(())] * 2)
    np.testing.assert_allclose(-np.diff(found), moves, rtol=1e-6)


T = np.arange(10)
UP = np.linspace(0, 2, 5)[:4]


def along(start, end, part):
    return end + (start - end) * (1 + np.cos(np.pi * part)) / 2


@pytest.mark.parametrize(
    ("name", "warmup", "wanted"),
    [
        ("linear", 0.0, 2 * (1 - T / 10)),
        ("cosine", 0.0, 1 + np.cos(np.pi * T / 10)),
        ("constant", 0.4, [*UP, *[2.0] * 6]),
        ("linear", 0.4, [*UP, *2 * (1 - T[:6] / 6)]),
        ("cosine", 0.4, [*UP, *1 + np.cos(np.pi * T[:6] / 6)]),
        ("steps", 0.0, [2, 2, 2, *[0.2] * 4, *[0.02] * 3]),
        ("steps", 0.2, [0, 1, 2, *[0.2] * 4, *[0.02] * 3]),
        # Smith & Topin, 2018, with the divisors of torch's OneCycleLR.
        ("one_cycle", 0.4, [*along(0.08, 2, T[:4] / 4), *along(2, 8e-6, (T[4:] - 4) / 6)]),
    ],
)
def test_schedules_have_the_values_of_their_formulas(name, warmup, wanted):
    np.testing.assert_allclose(rates(name, warmup), wanted, rtol=1e-3, atol=1e-5)


PARAMS = {
    "conv": {"kernel": jnp.ones((3, 3, 2, 4)), "bias": jnp.ones(4)},
    "norm": {"scale": jnp.ones(4), "bias": jnp.ones(4)},
    "logits": {"kernel": jnp.ones((4, 3))},
}


@pytest.mark.parametrize("name", ["sgd", "adam"])
@pytest.mark.parametrize("decay", ["kernels", "all"])
def test_decay_is_of_kernels_unless_all_is_asked_for(name, decay):
    tx = made(name=name, learning_rate=0.5, weight_decay=0.1, weight_decay_mask=decay)
    _, after = walk(tx, PARAMS, [jax.tree.map(jnp.zeros_like, PARAMS)])
    for path, leaf in jax.tree_util.tree_leaves_with_path(after):
        wanted = 0.95 if decay == "all" or path[-1].key == "kernel" else 1.0
        np.testing.assert_allclose(leaf, wanted, rtol=1e-6)


def test_rates_for_the_sum_of_the_losses_are_those_for_the_mean_times_the_batch():
    grads = [jnp.array([0.5]), jnp.array([-2.0])]
    sgd = functools.partial(made, name="sgd", momentum=0.5)
    of_sum = walk(sgd(learning_rate=0.25, reduction="sum"), jnp.ones(1), grads)
    of_mean = walk(sgd(learning_rate=2.0), jnp.ones(1), grads)
    np.testing.assert_allclose(of_sum, of_mean, rtol=1e-6)


RNG = np.random.default_rng(0)
SPEED = {
    "whiten": {"kernel": jnp.ones((2, 2, 3, 24)), "bias": jnp.ones(24)},
    "group0_conv0": {"kernel": jnp.asarray(RNG.normal(size=(3, 3, 4, 8)), jnp.float32)},
    "group0_conv0_norm": {"bias": jnp.ones(8)},
    "logits": {"kernel": jnp.ones((8, 3))},
}


def gradients(count):
    return [
        jax.tree.map(lambda leaf: jnp.asarray(RNG.normal(size=leaf.shape), jnp.float32), SPEED)
        for _ in range(count)
    ]


def test_muon_is_its_definition_in_float64():
    """Momentum with Nesterov's look ahead, the polynomial, and the sphere, over three steps."""
    tx = made(3, name="muon", learning_rate=0.2, muon__beta=0.6, schedule="linear")
    grads = gradients(3)
    found = walk(tx, SPEED, grads)[-1]["group0_conv0"]["kernel"]
    p = np.asarray(SPEED["group0_conv0"]["kernel"], np.float64).reshape(-1, 8)
    mean = np.zeros_like(p)
    for t, grad in enumerate(grads):
        g = np.asarray(grad["group0_conv0"]["kernel"], np.float64).reshape(-1, 8)
        mean = 0.6 * mean + 0.4 * g
        ahead = 0.6 * mean / (1 - 0.6 ** (t + 2)) + 0.4 * g / (1 - 0.6 ** (t + 1))
        x = (ahead / np.linalg.norm(ahead)).T
        for _ in range(3):
            square = x @ x.T
            x = 3.4576 * x + (-4.7391 * square + 2.0843 * square @ square) @ x
        p = p * np.sqrt(8) / np.linalg.norm(p) - 0.2 * (1 - t / 3) * x.T
    np.testing.assert_allclose(found.reshape(-1, 8), p, atol=1e-5)


def test_kernels_are_rescaled_as_often_as_asked():
    tx = made(12, name="muon", learning_rate=0.1, muon__rescale_every=(2, 3))
    every = walk(tx, SPEED, gradients(12))
    kernels = [one["group0_conv0"]["kernel"] for one in every]
    # A step of orthogonal columns has the norm sqrt(8) * 0.1 or so: more than that is a rescaling.
    steps = [float(jnp.linalg.norm(new - old)) for old, new in itertools.pairwise(kernels)]
    due = [t for t in range(12) if t % (2 + int(3 * t / 12)) == 0]
    assert due == [0, 2, 6, 8]
    assert max(step for t, step in enumerate(steps) if t not in due) < 0.1 * np.sqrt(8) * 1.3
    still = made(12, name="muon", learning_rate=1e-9, muon__rescale_every=(2, 3))
    _, after = walk(still, SPEED, gradients(1))
    norm = jnp.linalg.norm(after["group0_conv0"]["kernel"])
    np.testing.assert_allclose(norm, np.sqrt(8), rtol=1e-5)


@pytest.mark.parametrize("decay", ["kernels", "all"])
def test_what_muon_leaves_to_sgd_has_rates_and_decay_of_its_own(decay):
    options = {"name": "muon", "schedule": "linear", "weight_decay": 0.01}
    options |= {"muon__bias_rate": 0.1, "muon__head_rate": 0.2, "muon__whiten_steps": 2}
    tx = made(4, weight_decay_mask=decay, **options)
    every = walk(tx, SPEED, [jax.tree.map(jnp.ones_like, SPEED)] * 4)

    def sgd(rate, steps, is_kernel=False):
        value, values = 1.0, [1.0]
        shrinks = 0.01 / rate if is_kernel or decay == "all" else 0.0
        for t in range(4):
            falling = rate * max(0, 1 - t / steps)
            value -= falling * (1 + shrinks * value)
            values.append(value)
        return values

    def values(layer, leaf):
        return [float(one[layer][leaf].mean()) for one in every]

    np.testing.assert_allclose(values("logits", "kernel"), sgd(0.2, 4, is_kernel=True), rtol=1e-5)
    np.testing.assert_allclose(values("group0_conv0_norm", "bias"), sgd(0.1, 4), rtol=1e-5)
    np.testing.assert_allclose(values("whiten", "bias"), sgd(0.1, 2), rtol=1e-5)
    assert values("whiten", "kernel") == [1.0] * 5
