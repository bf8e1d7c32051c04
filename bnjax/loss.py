"""The loss of each example: softmax cross-entropy with label smoothing.

`bnjax.train_step.loss_of` averages it over the unmasked examples of a batch.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from bnjax.types import Labels, Logits, Losses, Shares

# A function (logits, label) -> losses of the examples, [n].
LossFn = Callable[[Logits, Labels | Shares], Losses]


def softmax_cross_entropy(
    logits: Logits, label: Labels | Shares, *, smoothing: float = 0.0
) -> Losses:
    """Returns the softmax cross-entropy of each example, in nats and at least float32.

    Args:
        logits: float [n, classes].
        label: int [n], or class probabilities, float [n, classes], in which each row sums to 1.
        smoothing: the fraction of each label that is distributed evenly over all classes (Szegedy
            et al., 2016, section 7).

    >>> import jax.numpy as jnp
    >>> print(softmax_cross_entropy(jnp.zeros((1, 2)), jnp.array([1])))
    [0.6931472]
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    if jnp.ndim(label) == 2:
        losses = optax.softmax_cross_entropy(logits, label)
    else:
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, label)
    if not smoothing:
        return losses
    even = jax.nn.logsumexp(logits, -1) - logits.mean(-1)  # the loss for a uniform label
    return (1 - smoothing) * losses + smoothing * even
