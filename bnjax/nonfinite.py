"""Decides what happens after a training step with a non-finite loss, gradient or statistic.

Such a bad step changes only `state.step`: `train_step.descend` drops the rest. The program counts
bad steps in a row, and the run stops with an explanation after more than the config allows
(`train.on_nonfinite`, `train.most_skipped`).
"""

from typing import Any

import jax
import jax.numpy as jnp

from bnjax.errors import NonFiniteError
from bnjax.types import Losses


def is_finite(tree: Any) -> jax.Array:
    """Returns whether every number in the tree is finite, bool []."""
    # The sum of x - x is 0 unless an element is infinite or NaN. XLA fuses this sum with other
    # reads of x.
    return jnp.isfinite(
        sum(jnp.sum(leaf - leaf, dtype=jnp.float32) for leaf in jax.tree.leaves(tree))
    )


def unless(bad: Any, new: Any, old: Any) -> Any:
    """Returns the tree `new`, or the tree `old` if the step was bad.

    The trees contain parameters, optimizer state and statistics, so that these always belong
    together.
    """
    return jax.tree.map(lambda new, old: jnp.where(bad, old, new), new, old)


def too_many(bad_steps: Any, most_skipped: int) -> Any:
    """Returns whether training stops after this number of consecutive bad steps."""
    return bad_steps > most_skipped


def until_stopped(losses: Losses, bad_steps: Any, most_skipped: int) -> Losses:
    """Returns the losses, or NaN after too many consecutive bad steps.

    With a NaN loss, later steps change nothing. The host detects bad steps only after it has
    dispatched more steps, and it needs the state before the first bad step.
    """
    return jnp.where(too_many(bad_steps, most_skipped), jnp.nan, losses)


def explained(step: int, bad_steps: int, saved: int | None, where: str | None) -> NonFiniteError:
    """Returns the error that ends a run after a bad step.

    Args:
        step: the number of the bad step.
        bad_steps: the number of consecutive bad steps, including this one.
        saved: the step of the newest checkpoint, or None.
        where: the result of `bnjax.train.diagnostics.first_nonfinite`.
    """
    found = "When recomputed layer by layer, all values are finite."
    if where:
        found = f"The first non-finite value is in {where}."
    kept = (
        "Nothing has been saved yet" if saved is None else f"The checkpoint of step {saved} is kept"
    )
    rows = f" and {bad_steps - 1} before it" if bad_steps > 1 else ""
    return NonFiniteError(
        f"step {step}{rows} gave a loss, a gradient or a statistic that is not finite. {found} "
        f"{kept}. Check the images, and try a lower learning rate "
        "(--config.optimizer.learning_rate=…), a larger config.model.epsilon, or float32 instead "
        "of bfloat16; --config.train.on_nonfinite=skip drops such steps and continues. A changed "
        "config needs a different --workdir."
    )
