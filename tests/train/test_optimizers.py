import functools

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


def made_rates(name, warmup):
    options = {"learning_rate": 2.0, "schedule": name, "warmup": warmup, "drops": (0.3, 0.7)}
    values = walk(made(name="sgd", **options), jnp.zeros(()), [jnp.ones(())] * 10)
    return -np.diff([float(one) for one in values])


def test_adam_makes_its_published_first_and_second_step():
    """Kingma & Ba 2015, algorithm 1, by hand in float64."""
    grads = [0.5, -0.2]
    found = walk(made(), jnp.ones(1), [jnp.array([grad]) for grad in grads])[-1]
    value, m, v = 1.0, 0.0, 0.0
    for t, grad in enumerate(grads, start=1):
        m, v = 0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * grad**2
        value -= 1e-3 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
    np.testing.assert_allclose(found, [value], rtol=1e-6)


@pytest.mark.parametrize(("nesterov", "moves"), [(False, (0.1, 0.15)), (True, (0.15, 0.175))])
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
    np.testing.assert_allclose(made_rates(name, warmup), wanted, rtol=1e-3, atol=1e-5)


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


@pytest.mark.parametrize("interval", [(1, 0), (2, 3)])
def test_muon_is_its_definition_in_float64(interval):
    """Nesterov momentum, the Newton-Schulz polynomial, and a fixed norm every few updates."""
    count, (every, more) = 12, interval
    options = {"learning_rate": 0.2, "muon__beta": 0.6, "muon__rescale_every": interval}
    tx = made(count, name="muon", schedule="linear", **options)
    grads = [
        jax.tree.map(lambda leaf: jnp.asarray(RNG.normal(size=leaf.shape), jnp.float32), SPEED)
        for _ in range(count)
    ]
    found = [one["group0_conv0"]["kernel"].reshape(-1, 8) for one in walk(tx, SPEED, grads)]
    p = np.asarray(found[0], np.float64)
    mean = np.zeros_like(p)
    for t, grad in enumerate(grads):
        g = np.asarray(grad["group0_conv0"]["kernel"], np.float64).reshape(-1, 8)
        mean = 0.6 * mean + 0.4 * g
        ahead = 0.6 * mean / (1 - 0.6 ** (t + 2)) + 0.4 * g / (1 - 0.6 ** (t + 1))
        x = (ahead / np.linalg.norm(ahead)).T
        for _ in range(3):
            square = x @ x.T
            x = 3.4576 * x + (-4.7391 * square + 2.0843 * square @ square) @ x
        if t % (every + int(more * t / count)) == 0:
            p = p * np.sqrt(8) / np.linalg.norm(p)
        p = p - 0.2 * (1 - t / count) * x.T
        np.testing.assert_allclose(found[t + 1], p, atol=3e-5)


@pytest.mark.parametrize("decay", ["kernels", "all"])
def test_what_muon_leaves_to_sgd_has_rates_and_decay_of_its_own(decay):
    options = {"name": "muon", "schedule": "linear", "weight_decay": 0.01}
    options |= {"muon__bias_rate": 0.1, "muon__head_rate": 0.2, "muon__whiten_steps": 2}
    tx = made(4, weight_decay_mask=decay, **options)
    every = walk(tx, SPEED, [jax.tree.map(jnp.ones_like, SPEED)] * 4)

    def sgd(rate, steps, decays):
        values, shrinks = [1.0], 0.01 / rate if decays else 0.0
        for t in range(4):
            values.append(values[-1] - rate * max(0, 1 - t / steps) * (1 + shrinks * values[-1]))
        return values

    for (layer, leaf), wanted in {
        ("logits", "kernel"): sgd(0.2, 4, True),
        ("group0_conv0_norm", "bias"): sgd(0.1, 4, decay == "all"),
        ("whiten", "bias"): sgd(0.1, 2, decay == "all"),
        ("whiten", "kernel"): [1.0] * 5,
    }.items():
        found = [float(one[layer][leaf].mean()) for one in every]
        np.testing.assert_allclose(found, wanted, rtol=1e-5)
