"""NNX networks for the clinic.

A norm is any `flax.nnx.BatchNorm` or a subclass that calls it, also under `nnx.vmap`, `nnx.scan`
and `nnx.remat`. Everything runs on a copy of the model, so the model stays as it is.
"""

import functools
import inspect
import types
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from flax.traverse_util import flatten_dict, unflatten_dict

from bnjax.clinic.network import FLAGS, Around, Call, Network, NormLayer, Path
from bnjax.train_step import model_inputs
from bnjax.types import Array, Batch, BatchStats, Images, Logits, Params

# NNX is imported in the functions, because it takes a third of a second.


def nnx(model: Any, call: Callable[[Any, Images, bool], Logits] | None = None) -> "Nnx":
    """Returns a copy of an NNX model as a network for the functions of the clinic.

    Training runs the model with its flags as they are if one of its norms is in training mode,
    otherwise after `model.train()`; evaluation runs it after `model.eval()`. A training flag of
    `__call__` (`train`, `training`, `is_training`, `deterministic` or `use_running_average`) is set
    too. `network.model` is an NNX model again.

    Args:
        model: an NNX module whose `__call__` takes images [n, h, w, c], or what `call` passes on.
        call: (model, images, train) -> logits, for a model with a different signature.

    >>> from flax import nnx as flax_nnx
    >>> norm = flax_nnx.BatchNorm(3, rngs=flax_nnx.Rngs(0))
    >>> model = flax_nnx.Sequential(norm, lambda x: x.mean((1, 2)))
    >>> [norm.name for norm in nnx(model).norms({"image": jnp.ones((2, 4, 4, 3))})]
    ['layers.0']
    """
    from flax import nnx as flax_nnx

    graphdef, *states = flax_nnx.split(model, flax_nnx.Param, flax_nnx.BatchStat, ...)
    leaves = [flatten_dict(flax_nnx.to_pure_dict(state)) for state in states]
    keys = tuple(path for tree in leaves for path in tree)
    params, batch_stats, rest = (_named(tree) for tree in leaves)
    return Nnx(params, batch_stats, rest, graphdef, keys, call)


@struct.dataclass
class Nnx(Network):
    """An NNX model; a pytree of its variables.

    Attributes:
        params: the variables of type `Param`, by path.
        batch_stats: the variables of type `BatchStat`.
        rest: all other variables, for instance keys of dropout.
        graphdef: the model without variables.
        keys: the paths of the variables in NNX, in which elements of lists are numbers.
        call: see `nnx`.
    """

    rest: Any
    graphdef: Any = struct.field(pytree_node=False)
    keys: tuple[tuple[Any, ...], ...] = struct.field(pytree_node=False)
    call: Callable[[Any, Images, bool], Logits] | None = struct.field(pytree_node=False)

    @property
    def model(self) -> Any:
        """An NNX model with these variables."""
        return self._model(self.rest)

    def _model(self, rest: Any) -> Any:
        from flax import nnx as flax_nnx

        named = {tuple(map(str, key)): key for key in self.keys}
        leaves = [flatten_dict(tree) for tree in (self.params, self.batch_stats, rest)]
        state = {
            named[path]: leaf for tree in leaves for path, leaf in tree.items() if path in named
        }
        model = flax_nnx.merge(self.graphdef, flax_nnx.State(unflatten_dict(state)))
        modules = {tuple(map(str, path)): one for path, one in flax_nnx.iter_graph(model)}
        for (*path, name), leaf in leaves[1].items():  # those of `with_seen`
            if (*path, name) not in named:
                setattr(modules[*path,], name, flax_nnx.BatchStat(leaf))
        return model

    def run(
        self,
        batch: Batch,
        *,
        train: bool,
        dropout: jax.Array | None = None,
        around: Around = lambda call: call(),
    ) -> tuple[Logits, BatchStats]:
        """See `Network.run`."""
        from flax import nnx as flax_nnx

        model = self._model(self.rest if dropout is None else _with_keys(self.rest, dropout))
        images, options = model_inputs(model, batch)
        names = inspect.signature(type(model).__call__).parameters
        options |= {
            flag: train == in_training for flag, in_training in FLAGS.items() if flag in names
        }
        modules = [
            (tuple(map(str, path)), one)
            for path, one in flax_nnx.iter_graph(model)
            if isinstance(one, flax_nnx.Module)
        ]
        norms = [one for _, one in modules if isinstance(one, flax_nnx.BatchNorm)]
        if not train:
            model.eval()
        elif all(norm.use_running_average for norm in norms):
            model.train()
        for norm in norms:  # a model trained with `axis_name` can then run outside of that axis
            norm.axis_name = norm.axis_index_groups = None
        for path, one in modules:
            if callable(one):
                one.watched = path, around  # type: ignore[attr-defined]
                one.__class__ = _watched(type(one))
        logits = self.call(model, images, train) if self.call else model(images, **options)
        written = flatten_dict(flax_nnx.to_pure_dict(flax_nnx.state(model, flax_nnx.BatchStat)))
        return logits, _named(written)

    def folded(
        self, params: Params, batch_stats: BatchStats, pairs: Sequence[tuple[Path, Path]]
    ) -> "Nnx":
        """See `Network.folded`."""
        from flax import nnx as flax_nnx

        model = self.model
        modules = {tuple(map(str, path)): one for path, one in flax_nnx.iter_graph(model)}
        leaves = flatten_dict(params)
        for norm, layer in pairs:
            modules[norm].__class__ = _folded()
            for name in ("mean", "var", "scale", "bias"):
                setattr(modules[norm], name, None)
            modules[layer].use_bias = True
            modules[layer].bias = flax_nnx.Param(leaves[*layer, "bias"])
            modules[layer].kernel = flax_nnx.Param(leaves[*layer, "kernel"])
        return nnx(model, self.call)

    @property
    def takes_mask(self) -> bool:
        """Whether the model's `__call__` has an argument `mask`."""
        return "mask" in inspect.signature(self.graphdef_type.__call__).parameters

    @property
    def graphdef_type(self) -> type:
        """The class of the model."""
        return type(self.model)


class NnxCall(Call):
    """A call of an NNX module."""

    @property
    def kind(self) -> type:
        """See `Call.kind`."""
        return self.module.kind

    @property
    def is_layer(self) -> bool:
        """See `Call.is_layer`."""
        from flax import nnx as flax_nnx

        return issubclass(self.kind, flax_nnx.Conv | flax_nnx.Linear)

    @property
    def is_standard(self) -> bool:
        """See `Call.is_standard`."""
        from flax import nnx as flax_nnx

        is_norm = self.kind.__call__ is flax_nnx.BatchNorm.__call__
        return is_norm if self.is_norm else self.kind in (flax_nnx.Conv, flax_nnx.Linear)

    def get(self, name: str) -> Array | None:
        """See `Call.get`."""
        variable = getattr(self.module, name, None)
        return None if variable is None else variable[...]

    def put(self, name: str, value: Array) -> None:
        """See `Call.put`."""
        variable = getattr(self.module, name)
        variable[...] = value.astype(variable[...].dtype)

    def layer(self) -> NormLayer:
        """See `Call.layer`."""
        norm = self.module
        given = self.args[1] if len(self.args) > 1 else self.kwargs.get("use_running_average")
        fields = {
            name: value
            for name, value in vars(norm).items()
            if isinstance(value, bool | int | float | str | type(None))
        }
        return NormLayer(
            path=self.path,
            module=types.SimpleNamespace(**fields),
            shape=self.x.shape,
            dtype=self.x.dtype,
            axes=self.axes,
            by_batch=not (norm.use_running_average if given is None else given),
        )


@functools.cache
def _watched(kind: type) -> type:
    """Returns a subclass whose calls go through the function in its attribute `watched`."""
    from flax import nnx as flax_nnx

    is_norm = issubclass(kind, flax_nnx.BatchNorm)
    # A subclass of the norm calls its superclass: that is the norm.
    base = flax_nnx.BatchNorm if is_norm else kind

    @functools.wraps(base.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        path, around = self.watched
        proceed = functools.partial(base.__call__, self)
        return around(NnxCall(self, path, proceed, args, kwargs, is_norm))

    watched = type(kind.__name__, (base,), {"__call__": call, "kind": kind})
    return watched if kind is base else type(kind.__name__, (kind, watched), {})


@functools.cache
def _folded() -> type:
    from flax import nnx as flax_nnx

    class Folded(flax_nnx.Module):
        """A norm that was folded into a layer: returns its input in the dtype of its output."""

        dtype: Any
        param_dtype: Any

        def __call__(self, x: Array, *args: Any, **kwargs: Any) -> Array:
            dtype = self.dtype or jnp.promote_types(x.dtype, self.param_dtype)
            return x.astype(dtype)

    return Folded


def _named(leaves: Any) -> Any:
    return unflatten_dict({tuple(map(str, path)): leaf for path, leaf in leaves.items()})


def _with_keys(rest: Any, dropout: jax.Array) -> Any:
    """Returns the variables with all random keys drawn from one key."""
    leaves = flatten_dict(rest)
    for i, (path, leaf) in enumerate(leaves.items()):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            key = jax.random.fold_in(dropout, i)
            leaves[path] = jax.random.split(key, leaf.shape) if leaf.shape else key
    return unflatten_dict(leaves)
