"""Metrics as sums and counts over examples, so that they can be merged exactly."""

import jax
import jax.numpy as jnp
import optax
from flax import struct

from bnjax.types import Labels, Leaf, Logits, Losses, Mask, Shares


@struct.dataclass
class Metrics:
    """Sums over the unmasked examples in one or more batches.

    Attributes:
        loss: the sum of the losses, float32 [].
        correct: the number of examples whose largest logit is that of the label, int32 [].
        count: the number of unmasked examples, int32 [].
        skipped: the number of training steps dropped because of non-finite values, int32 [].
    """

    loss: Leaf
    correct: Leaf
    count: Leaf
    skipped: Leaf

    def merge(self, other: "Metrics") -> "Metrics":
        """Returns the metrics over all examples in `self` and `other`."""
        return jax.tree.map(lambda mine, its: mine + its, self, other)

    def means(self) -> dict[str, float]:
        """Returns the mean loss and the accuracy as Python floats; waits for the device.

        Raises:
            ValueError: if no example was counted.
        """
        count = int(self.count)
        if count == 0:
            raise ValueError(
                "the metrics have no examples: all rows are masked, or no batch was merged"
            )
        return {"loss": float(self.loss) / count, "accuracy": int(self.correct) / count}


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


def from_losses(
    losses: Losses, logits: Logits, label: Labels | Shares, mask: Mask | None
) -> Metrics:
    """Returns the metrics of one batch, in which `mask` is False for padding.

    A mixed label counts as its most probable class.
    """
    real = jnp.ones(label.shape[:1], bool) if mask is None else jnp.asarray(mask)
    label = label.argmax(-1) if label.ndim == 2 else label
    return Metrics(
        loss=jnp.where(real, losses, 0).sum(dtype=jnp.float32),
        correct=(real & (logits.argmax(-1) == label)).sum(dtype=jnp.int32),
        count=real.sum(dtype=jnp.int32),
        skipped=jnp.zeros((), jnp.int32),
    )
