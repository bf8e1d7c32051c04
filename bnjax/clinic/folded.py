"""A network without the norms that were folded into its layers."""

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax.linen.dtypes import canonicalize_dtype

from bnjax.clinic.flow import Path
from bnjax.clinic.layers import NORMS
from bnjax.norms import StandardizedConv
from bnjax.types import Array, Images, Logits, Mask

# By their exact types: a subclass may do something else with its kernel.
LAYERS = (nn.Conv, nn.Dense, StandardizedConv)


class Folded(nn.Module):
    """A network without the norms that were folded into its layers; all else is as it was.

    Its parameters have the names that they had. The folded norms return what they are given, and
    have no leaves; the layers have a bias, and a standardised kernel is used as it is stored.

    Attributes:
        unfolded: the network with its norms.
        pairs: the paths of each norm that was folded and of the layer that has it now.
    """

    unfolded: nn.Module
    pairs: Sequence[tuple[Path, Path]]

    @nn.compact
    def __call__(self, x: Images, *, train: bool, mask: Mask | None = None) -> Logits:
        """Returns the logits [n, classes] of images [n, h, w, c]."""
        # In this module's own scope, so that the leaves keep their names.
        model = self.unfolded.copy(parent=self.scope, name=None)
        norms, layers = ({tuple(path) for path in side} for side in zip(*self.pairs, strict=True))

        def intercept(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            module, path = context.module, context.module.path[len(self.path) :]
            if context.method_name == "__call__" and path in norms and isinstance(module, NORMS):
                return _unchanged(module, *args, **kwargs)
            if context.method_name == "__call__" and path in layers and _lacks_bias(module):
                return _with_bias(module)(*args, **kwargs)
            return call(*args, **kwargs)

        takes_mask = "mask" in inspect.signature(type(self.unfolded).__call__).parameters
        options = {"mask": mask} if takes_mask else {}
        with nn.intercept_methods(intercept):
            return model(x, train=train, **options)


def _unchanged(norm: Any, x: Array, *_: Any, **__: Any) -> Array:
    """Returns the input in the dtype that the norm's output had."""
    affine = [jnp.zeros((), norm.param_dtype)] if norm.use_scale or norm.use_bias else []
    return x.astype(canonicalize_dtype(x, *affine, dtype=norm.dtype))


def _lacks_bias(layer: Any) -> bool:
    return type(layer) in LAYERS and (isinstance(layer, StandardizedConv) or not layer.use_bias)


def _with_bias(layer: Any) -> nn.Module:
    """Returns the layer with a bias, in the same place; one that standardises is so no more."""
    kind: Callable[..., nn.Module] = nn.Dense if isinstance(layer, nn.Dense) else nn.Conv
    fields = {field.name: getattr(layer, field.name) for field in dataclasses.fields(layer)}
    return kind(**fields | {"use_bias": True, "name": None, "parent": layer.scope})
