"""A network that looks at an image in several ways: test-time augmentation."""

import functools
import inspect
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from bnjax.types import Array, Images, Logits, Mask

VIEWS = (1, 2, 6)


class Views(nn.Module):
    """A network whose logits in evaluation are the mean over several views of each image.

    Training, parameters and statistics are those of the network: whatever evaluates, predicts or
    exports takes one for the other.

    Attributes:
        network: any linen module with `__call__(x, train=...)`.
        views: 1, the image; 2, with its mirror; 6, with both shifted by a pixel up and left, and
            down and right, besides, which together count as much as the two that are not shifted
            (K. Jordan, 2024). What comes in at the edge is reflected.
        share: of the images that are looked at again: those of the batch whose largest score is
            smallest. The others keep the logits of the image alone. Below 1 the logits of an image
            depend on which others share its batch.
    """

    network: nn.Module
    views: int = 6
    share: float = 1.0

    @nn.compact
    def __call__(self, x: Images, *, train: bool, mask: Mask | None = None) -> Logits:
        """Returns the logits [n, classes] of images [n, h, w, c]; `mask` False [n] is padding."""
        # In this module's own scope, so that the leaves keep their names.
        network = self.network.copy(parent=self.scope, name=None)
        takes_mask = "mask" in inspect.signature(type(self.network).__call__).parameters

        def logits(x: Array, mask: Array | None) -> Any:
            return network(x, train=train, **{"mask": mask} if takes_mask else {})

        if train or self.views == 1:
            return logits(x, mask)
        if self.share == 1:
            return averaged(functools.partial(logits, mask=mask), x, self.views)
        once = logits(x, mask)
        certain = jax.nn.softmax(once).max(-1)
        if mask is not None:
            certain = jnp.where(mask, certain, jnp.inf)
        again = jnp.argsort(certain)[: max(1, round(self.share * len(x)))]
        of_these = functools.partial(logits, mask=None if mask is None else mask[again])
        return once.at[again].set(averaged(of_these, jnp.asarray(x)[again], self.views))


def seen(network: nn.Module, views: int, share: float = 1.0) -> nn.Module:
    """Returns the network over several views of each image; the network itself for one."""
    return network if views == 1 else Views(network, views, share)


def averaged(logits: Any, x: Images, views: int) -> Array:
    """Returns the mean logits [n, classes] over views of images [n, h, w, c].

    Args:
        logits: a function of images.
        x: the images.
        views: how many; see `Views`.

    Raises:
        ValueError: for another number than 1, 2 or 6.
    """
    if views not in VIEWS:
        raise ValueError(f"views = {views}: there are {', '.join(map(str, VIEWS))}")
    if views == 1:
        return logits(x)
    straight = (logits(x) + logits(x[:, :, ::-1])) / 2
    if views == 2:
        return straight
    height, width = x.shape[1:3]
    wide = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
    shifted = (averaged(logits, wide[:, i : i + height, i : i + width], 2) for i in (0, 2))
    return (straight + sum(shifted) / 2) / 2
