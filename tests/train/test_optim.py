import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from bnjax.errors import ConfigError
from bnjax.train import build
from bnjax.train.config import default_config


@pytest.mark.parametrize(
    ("steps", "epochs", "wanted"), [(100, 0.0, 100), (0, 2.0, 20), (0, 0.25, 2), (0, 0.001, 1)]
)
def test_durations(steps, epochs, wanted):
    config = ConfigDict({"steps": steps, "epochs": epochs})
    assert build.duration(config, "", "train", batch_size=5000, images=50_000) == wanted


@pytest.mark.parametrize(("steps", "epochs"), [(0, 0.0), (5, 1.0), (-1, 0.0), (0, -2.0)])
def test_a_duration_is_given_once(steps, epochs):
    config = ConfigDict({"steps": steps, "epochs": epochs})
    with pytest.raises(ConfigError, match="train"):
        build.duration(config, "", "train", batch_size=5, images=50)


def test_adam_makes_its_published_first_and_second_step():
    """Kingma & Ba 2015, algorithm 1, by hand in float64."""
    config = default_config().optimizer
    tx = build.optimizer(config)
    grads = [0.5, -0.2]
    params = jnp.array([1.0])
    state = tx.init(params)
    value, m, v = 1.0, 0.0, 0.0
    for t, grad in enumerate(grads, start=1):
        updates, state = tx.update(jnp.array([grad]), state, params)
        params = params + updates
        m, v = 0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * grad**2
        value -= 1e-3 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
    np.testing.assert_allclose(params, [value], rtol=1e-6)


def test_sgd_with_momentum():
    config = default_config().optimizer
    config.name, config.learning_rate, config.momentum = "sgd", 0.1, 0.5
    tx = build.optimizer(config)
    params = jnp.array([1.0])
    state = tx.init(params)
    for _ in range(2):
        updates, state = tx.update(jnp.array([1.0]), state, params)
        params = params + updates
    np.testing.assert_allclose(params, [1 - 0.1 - 0.1 * 1.5], rtol=1e-6)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", "adamw9"),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("b1", 1.0),
        ("eps", 0.0),
        ("momentum", -0.1),
    ],
)
def test_impossible_values_are_named(key, value):
    config = default_config().optimizer
    config[key] = value
    with pytest.raises(ConfigError, match=f"optimizer.{key}"):
        build.optimizer(config)
