"""Metrics as sums and counts over examples, so that they can be merged exactly."""

import jax
import jax.numpy as jnp
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
