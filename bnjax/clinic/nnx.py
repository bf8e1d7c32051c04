"""Adapts NNX networks for the functions of the clinic.

A norm is any `flax.nnx.BatchNorm` or a subclass that calls it, even if it is wrapped in `nnx.vmap`,
`nnx.scan` or `nnx.remat`. All functions run a copy of the model, so the model is unchanged.
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

from bnjax.clinic.network import FLAGS, SEEN, Around, Call, Network, NormLayer, Path, norm_paths
from bnjax.train_step import model_inputs, takes_mask
from bnjax.types import Array, Batch, BatchStats, Images, Logits, Params

# NNX is imported inside the functions, because the import takes a third of a second.


def nnx(model: Any, call: Callable[[Any, Images, bool], Logits] | None = None) -> "Nnx":
    """Wraps a copy of an NNX model as a `Network` for the functions of the clinic.

    Evaluation calls `model.eval()`. For training, the flags of the model are left unchanged if any
    norm is in training mode; otherwise `model.train()` is called. A training flag of `__call__`
    (`train`, `training`, `is_training`, `deterministic` or `use_running_average`) is also set.
    `network.model` returns an NNX model.

    Args:
        model: an NNX module; without `call`, its `__call__` takes images [n, h, w, c].
        call: (model, images, train) -> logits, for a model with a different signature.

    >>> from flax import nnx as flax_nnx
    >>> norm = flax_nnx.BatchNorm(3, rngs=flax_nnx.Rngs(0))
    >>> model = flax_nnx.Sequential(norm, lambda x: x.mean((1, 2)))
    >>> [norm.name for norm in nnx(model).norms({"image": jnp.ones((2, 4, 4, 3))})]
    ['layers.0']
    """
    from flax import nnx as flax_nnx

    if not isinstance(model, flax_nnx.Module):
        raise ValueError(
            f"clinic.nnx needs a flax.nnx.Module, not {type(model).__name__}. Use clinic.linen for "
            "a linen model and clinic.equinox for an Equinox model."
        )
    graphdef, *states = flax_nnx.split(model, flax_nnx.Param, flax_nnx.BatchStat, ...)
    leaves = [flatten_dict(flax_nnx.to_pure_dict(state)) for state in states]
    shapes = jax.eval_shape(lambda: leaves)
    own = tuple(tuple(tree.items()) for tree in shapes)
    params, batch_stats, rest = (_named(tree) for tree in leaves)
    modules = _modules(model)
    if foreign := {*norm_paths(batch_stats)} - modules.keys():
        raise ValueError(
            f"the norms {', '.join(map('.'.join, sorted(foreign)))} are not NNX modules. Use "
            "clinic.linen with the linen model that contains them."
        )
    for path, one in modules.items():
        if isinstance(one, flax_nnx.BatchNorm) and (names := _shared(path, one, _by_name(own))):
            raise ValueError(
                f"the norm {'.'.join(path)} shares {', '.join(names)} with another module. Share "
                "the whole norm or none of its variables."
            )
    return Nnx(params, batch_stats, rest, type(model), graphdef, own, call)


@struct.dataclass
class Nnx(Network):
    """An NNX model; a pytree of its variables.

    Attributes:
        params: the variables of type `Param`, keyed by path.
        batch_stats: the variables of type `BatchStat`, keyed by path.
        rest: all other variables, keyed by path, for instance dropout keys.
        kind: the class of the model.
        graphdef: the model without variables.
        own: for `params`, `batch_stats` and `rest`, the NNX paths and the shapes of the variables.
            In NNX paths, the indices of lists are integers.
        call: as for `nnx`.
    """

    rest: Any
    kind: type = struct.field(pytree_node=False)
    graphdef: Any = struct.field(pytree_node=False)
    own: tuple[Any, ...] = struct.field(pytree_node=False)
    call: Callable[[Any, Images, bool], Logits] | None = struct.field(pytree_node=False)

    @property
    def model(self) -> Any:
        """An NNX model with these variables."""
        return self._model(self.rest)

    def _model(self, rest: Any) -> Any:
        from flax import nnx as flax_nnx

        named = _by_name(self.own)
        leaves = [flatten_dict(tree) for tree in (self.params, self.batch_stats, rest)]
        state = {
            named[path]: leaf for tree in leaves for path, leaf in tree.items() if path in named
        }
        model = flax_nnx.merge(self.graphdef, flax_nnx.State(unflatten_dict(state)))
        modules = _modules(model)
        for (*path, name), leaf in leaves[1].items():  # the leaves added by `with_seen`
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
        names = inspect.signature(self.kind.__call__).parameters
        options |= {
            flag: train == in_training for flag, in_training in FLAGS.items() if flag in names
        }
        kinds, own = (flax_nnx.BatchNorm, flax_nnx.Conv, flax_nnx.Linear), _by_name(self.own)
        units = {
            path: one
            for path, one in _modules(model).items()
            # Norms cannot be folded into a layer that shares its kernel with another layer.
            if isinstance(one, kinds) and not _shared(path, one, own)
        }
        norms = [one for one in units.values() if isinstance(one, flax_nnx.BatchNorm)]
        if not train:
            model.eval()
        elif all(norm.use_running_average for norm in norms):
            model.train()
        for norm in norms:  # so that the model runs outside the mapped axis that training used
            norm.axis_name = norm.axis_index_groups = None
        for path, one in units.items():
            one.watched = path, around  # type: ignore[union-attr]
            one.__class__ = _watched(type(one))
        logits = self.call(model, images, train) if self.call else model(images, **options)
        written = flatten_dict(flax_nnx.to_pure_dict(flax_nnx.state(model, flax_nnx.BatchStat)))
        return logits, _named(written)

    def folded(
        self, params: Params, batch_stats: BatchStats, pairs: Sequence[tuple[Path, Path]]
    ) -> "Nnx":
        """See `Network.folded`."""
        from flax import nnx as flax_nnx

        model, leaves = self.model, flatten_dict(params)
        modules = _modules(model)
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
        """Whether `call` is None and the model's `__call__` has an argument `mask`."""
        return not self.call and takes_mask(self.kind)

    def shapes(self, images: Images) -> tuple[Any, Any]:
        """Returns the shapes of the variables of the model passed to `nnx`."""
        params, batch_stats, _ = (_named(dict(part)) for part in self.own)
        return params, batch_stats


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

    def get(self, name: str) -> Any:
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
            dtype=norm.dtype or self.x.dtype,  # NNX casts the input to the dtype of the output
            axes=self.axes,
            by_batch=not (norm.use_running_average if given is None else given),
        )


@functools.cache
def _watched(kind: type) -> type:
    """Returns a subclass that passes each call to the function in its attribute `watched`."""
    from flax import nnx as flax_nnx

    is_norm = issubclass(kind, flax_nnx.BatchNorm)
    # If a subclass of the norm calls its superclass, that inner call counts as the norm's call.
    is_super = "super" in inspect.unwrap(kind.__call__).__code__.co_names
    base = flax_nnx.BatchNorm if is_norm and is_super else kind

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
        """Replaces a norm that was folded into a layer; returns its input in the norm's dtype."""

        dtype: Any
        param_dtype: Any

        def __call__(self, x: Array, *args: Any, **kwargs: Any) -> Array:
            dtype = self.dtype or jnp.promote_types(x.dtype, self.param_dtype)
            return x.astype(dtype)

    return Folded


def _modules(model: Any) -> dict[Path, Any]:
    """Returns the modules of a model, keyed by path."""
    from flax import nnx as flax_nnx

    graph = flax_nnx.iter_graph(model)
    return {tuple(map(str, path)): one for path, one in graph if isinstance(one, flax_nnx.Module)}


def _shared(path: Path, module: Any, own: dict[Path, Any]) -> list[str]:
    """Returns the names of the variables that NNX lists at the path of another module."""
    from flax import nnx as flax_nnx

    variables = [name for name, of in vars(module).items() if isinstance(of, flax_nnx.Variable)]
    return [name for name in variables if name not in SEEN and (*path, name) not in own]


def _by_name(own: Sequence[Any]) -> dict[Path, Any]:
    """Maps each variable's path in the `Network` to its NNX path."""
    return {tuple(map(str, key)): key for part in own for key, _ in part}


def _named(leaves: Any) -> Any:
    return unflatten_dict({tuple(map(str, path)): leaf for path, leaf in leaves.items()})


def _with_keys(rest: Any, dropout: jax.Array) -> Any:
    """Returns the variables with all random keys derived from one key."""
    leaves = flatten_dict(rest)
    for i, (path, leaf) in enumerate(leaves.items()):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            key = jax.random.fold_in(dropout, i)
            leaves[path] = jax.random.split(key, leaf.shape) if leaf.shape else key
    return unflatten_dict(leaves)
