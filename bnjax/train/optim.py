"""Durations and optimizers."""

import optax
from ml_collections import ConfigDict

from bnjax.errors import ConfigError

OPTIMIZERS = ("adam", "sgd")


def steps_of(duration: ConfigDict, prefix: str, key: str, batch_size: int, examples: int) -> int:
    """Returns a duration in steps, at least 1; `duration` holds it as steps or as epochs.

    Args:
        duration: has the entries `<prefix>steps` and `<prefix>epochs`, exactly one of them not 0.
        key: the duration's own name in the config, for errors.
        examples: in the training set; an epoch is examples / batch_size steps and need not be whole.

    Raises:
        ConfigError: if both or neither are given, or one is negative.

    >>> steps_of(ConfigDict({"steps": 0, "epochs": 2.0}), "", "train", batch_size=5000, examples=50000)
    20
    """
    steps, epochs = duration[f"{prefix}steps"], duration[f"{prefix}epochs"]
    for unit, amount in (("steps", steps), ("epochs", epochs)):
        if not 0 <= amount < 1 << 31:
            raise ConfigError(
                f"{key}.{prefix}{unit}",
                amount,
                "a number above 0 and below 2**31, or 0 to use the other unit",
            )
    if (steps > 0) == (epochs > 0):
        other = f"the other has to be 0: for instance --config.{key}.{prefix}steps=100 --config.{key}.{prefix}epochs=0"
        raise ConfigError(
            f"{key}.{prefix}steps and .{prefix}epochs",
            (steps, epochs),
            f"exactly one of the two above 0; {other}",
        )
    steps = steps or max(1, round(epochs * examples / batch_size))
    if steps >= 1 << 31:  # the steps are counted in int32
        raise ConfigError(
            f"{key}.{prefix}epochs", epochs, "so many that they make fewer than 2**31 steps"
        )
    return steps


def build(config: ConfigDict) -> optax.GradientTransformation:
    """Returns the optimizer that `config.optimizer` describes.

    Raises:
        ConfigError: for an unknown name or an impossible value.
    """
    if config.name not in OPTIMIZERS:
        raise ConfigError("optimizer.name", config.name, " or ".join(OPTIMIZERS))
    if not 0 < config.learning_rate < float("inf"):
        raise ConfigError("optimizer.learning_rate", config.learning_rate, "a number above 0")
    for key in ("b1", "b2", "momentum"):
        if not 0 <= config[key] < 1:
            raise ConfigError(f"optimizer.{key}", config[key], "0 up to but not including 1")
    if not 0 < config.eps < float("inf"):
        raise ConfigError("optimizer.eps", config.eps, "a number above 0")
    if config.name == "sgd":
        return optax.sgd(config.learning_rate, momentum=config.momentum or None)
    return optax.adam(config.learning_rate, b1=config.b1, b2=config.b2, eps=config.eps)
