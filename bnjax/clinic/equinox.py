"""Adapts Equinox networks for the functions of the clinic.

A norm is any `equinox.nn.BatchNorm`. Leaves have the names and layouts of Flax: layers have
`kernel` [..., in, out] and `bias`; norms have `scale`, `bias`, `mean` and `var`.
"""

import dataclasses
import functools
import inspect
import types
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from flax.traverse_util import flatten_dict, unflatten_dict

from bnjax.clinic.network import SEEN, STORED, Around, Call, Network, NormLayer, Path
from bnjax.norms.moments import Moments, Total, total_over
from bnjax.train_step import model_inputs
from bnjax.types import Array, Batch, BatchStats, Images, Logits, Params

# Equinox is an optional dependency, so it is imported inside the functions.

Forward = Callable[[Any, Any, Images, Any], tuple[Logits, Any]]


class _Leaf(NamedTuple):
    """A leaf of the model: a parameter with a path, or a static value.

    Attributes:
        path: the path of a parameter in `Equinox.params`; None for a static value.
        spatial: the number of spatial axes of the leaf's layer; None for leaves outside of layers.
        value: the static value.
    """

    path: Path | None
    spatial: int | None
    value: Any


class _Norm(NamedTuple):
    """The keys under which the state stores the statistics of a norm.

    Attributes:
        path: the path of the norm's leaves.
        index: the key of its averages.
        counter: the key of the number of updates, if the averages are debiased.
        momentum: the momentum of the norm.
    """

    path: Path
    index: Any
    counter: Any
    momentum: float


class _Structure(NamedTuple):
    """The structure of a model and its state, without arrays."""

    treedef: Any
    leaves: tuple[_Leaf, ...]
    norms: tuple[_Norm, ...]
    keys: tuple[Any, ...]


def equinox(model: Any, state: Any, call: Forward | None = None) -> "Equinox":
    """Returns an Equinox model and its state as a network for the functions of the clinic.

    The network's running statistics are the statistics used in inference; for a norm with
    mode="batch", they are the averages after Equinox's debiasing. `network.model` returns the
    Equinox model, and `network.state` its state. Evaluation runs the model in inference mode. For
    training, the model's flags are kept if a norm is in training mode; otherwise all `inference`
    flags are set to False.

    Args:
        model: a module (image, state) -> (logits, state), for one image in the layout of the
            batches. If `model.__call__` has an argument `key`, the dropout key is passed to it.
        state: the state of the model, from `equinox.nn.make_with_state`.
        call: (model, state, images, key) -> (logits, state), for a model with a different
            signature. By default the model is mapped over the images, with the axis name of the
            norms.

    Raises:
        ImportError: if Equinox is not installed.
    """
    try:
        import equinox as eqx
    except ImportError as error:
        raise ImportError("clinic.equinox needs Equinox: pip install 'bnjax[equinox]'") from error
    units: dict[Path, Any] = dict(_units(model))
    leaves, params = [], {}
    with_paths, treedef = jax.tree_util.tree_flatten_with_path(model)
    for keys, leaf in with_paths:
        (*parent, name), unit = _path(keys), units.get(_path(keys[:-1]))
        if not isinstance(leaf, jax.Array | np.ndarray):
            leaves.append(_Leaf(None, None, leaf))
            continue
        is_norm = isinstance(unit, eqx.nn.BatchNorm)
        if name == "weight" and unit is not None:
            name = "scale" if is_norm else "kernel"
        spatial = None if unit is None or is_norm else getattr(unit, "num_spatial_dims", 0)
        leaves.append(_Leaf((*parent, name), spatial, None))
        params[*parent, name] = _to_flax(leaf, name, spatial)
    found: dict[Any, _Norm] = {}  # norms that share averages count as one norm
    for path, one in units.items():
        if isinstance(one, eqx.nn.BatchNorm):
            index, counter = _averages(one).marker, getattr(one.batch_counter, "marker", None)
            found.setdefault(index, _Norm(path, index, counter, one.momentum))
    norms = tuple(found.values())
    entries = _entries(state)
    structure = _Structure(treedef, tuple(leaves), norms, tuple(entries))
    of_norms = {key for norm in norms for key in (norm.index, norm.counter)}
    rest = {key: entry for key, entry in entries.items() if key not in of_norms}
    return Equinox(unflatten_dict(params), _statistics(entries, norms), rest, structure, call)


@struct.dataclass
class Equinox(Network):
    """An Equinox model and its state; a pytree of arrays.

    Attributes:
        params: the arrays of the model, keyed by path.
        batch_stats: the statistics used in inference, with a `count` if they are debiased.
        rest: all other entries of the state.
        structure: the structure of the model and its state.
        call: as for `equinox`.
    """

    per_example = True

    rest: Any
    structure: _Structure = struct.field(pytree_node=False)
    call: Forward | None = struct.field(pytree_node=False)

    @property
    def model(self) -> Any:
        """The Equinox model with these parameters."""
        params = flatten_dict(self.params)
        leaves = [
            value if path is None else _from_flax(params[path], path[-1], spatial)
            for path, spatial, value in self.structure.leaves
        ]
        return jax.tree_util.tree_unflatten(self.structure.treedef, leaves)

    @property
    def state(self) -> Any:
        """The Equinox state with these running statistics."""
        import equinox as eqx

        stats, entries = flatten_dict(self.batch_stats), dict(self.rest)
        for path, index, counter, momentum in self.structure.norms:
            mean, var = stats[*path, "mean"], stats[*path, "var"]
            count = stats.get((*path, "count"))
            if count is not None:
                # Imported statistics count as one update, so that debiasing stays correct.
                is_new = jnp.any((mean != 0) | (var != 1), axis=-1)
                count = jnp.where((count == 0) & is_new, 1, count).astype(count.dtype)
            scale = _scale(count, momentum, mean)
            entries[index] = mean * scale, var * scale
            if counter is not None:
                entries[counter] = count
            if (*path, SEEN[0]) in stats:
                entries[_seen_key(path)] = tuple(stats[*path, name] for name in SEEN)
        keys = dict.fromkeys((*self.structure.keys, *entries))
        return eqx.nn.State.tree_unflatten(tuple(keys), tuple(entries[key] for key in keys))

    def run(
        self,
        batch: Batch,
        *,
        train: bool,
        dropout: jax.Array | None = None,
        around: Around = lambda call: call(),
    ) -> tuple[Logits, BatchStats]:
        """See `Network.run`."""
        import equinox as eqx

        images, _ = model_inputs(self, batch)
        with jax.named_scope(STORED):
            model, state = self.model, self.state
        norms = [unit for _, unit in _units(model) if isinstance(unit, eqx.nn.BatchNorm)]
        if not train or all(norm.inference for norm in norms):
            model = eqx.nn.inference_mode(model, not train)
        names = inspect.signature(type(model).__call__).parameters
        model = _watched_in(model, around, self.batch_stats, self.structure.norms)
        if self.call is not None:
            logits, state = self.call(model, state, images, dropout)
        else:
            keys = None if dropout is None else jax.random.split(dropout, len(images))

            def one(image: Array, key: Any, state: Any) -> Any:
                return model(image, state, **({"key": key} if "key" in names else {}))

            axis, *others = _axis_names(norms)
            each = jax.vmap(one, (0, 0, None), (0, None), axis_name=axis)
            for name in others:  # names of device axes, here of size 1
                each = jax.vmap(each, (None, None, None), None, axis_name=name, axis_size=1)
            logits, state = each(images, keys, state)
        return logits, _statistics(_entries(state), self.structure.norms)

    def folded(
        self, params: Params, batch_stats: BatchStats, pairs: Sequence[tuple[Path, Path]]
    ) -> "Equinox":
        """See `Network.folded`."""
        leaves, model = flatten_dict(params), self.model
        units = _units(model)
        norms, layers = ({*side} for side in zip(*pairs, strict=True))
        new = {
            id(one): _with_weights(one, leaves, path) if path in layers else _folded()()
            for path, one in units
            if path in norms | layers
        }
        model = jax.tree.map(
            lambda one: new.get(id(one), one), model, is_leaf=lambda one: id(one) in new
        )
        return equinox(model, self.state, self.call)


@dataclasses.dataclass
class EquinoxCall(Call):
    """A call of an Equinox module on one example, inside a `vmap` over the batch.

    Attributes:
        state: the state passed to a norm; after the call, the state that the norm returns.
    """

    state: Any = None

    def __call__(self) -> Any:
        """Runs the module and returns its output; stores the state that a norm returns."""
        if not self.is_norm:
            return super().__call__()
        kwargs = {key: value for key, value in self.kwargs.items() if key not in ("x", "state")}
        y, self.state = self.proceed(self.x, self.state, **kwargs)
        return y

    @property
    def kind(self) -> type:
        """See `Call.kind`."""
        return self.module.kind

    @property
    def is_layer(self) -> bool:
        """See `Call.is_layer`."""
        return not self.is_norm

    @property
    def is_standard(self) -> bool:
        """See `Call.is_standard`."""
        import equinox as eqx

        kinds: tuple[Any, ...] = (eqx.nn.Linear, eqx.nn.Conv, *eqx.nn.Conv.__subclasses__())
        return self.kind is eqx.nn.BatchNorm if self.is_norm else self.kind in kinds

    @property
    def axes(self) -> tuple[int, ...]:
        """The axes of one example that a norm reduces: all except the channels."""
        return tuple(range(1, self.x.ndim))

    def get(self, name: str) -> Any:
        """See `Call.get`."""
        if name in SEEN:
            is_there = self.module.seen is not None
            return self.state.get(self.module.seen)[SEEN.index(name)] if is_there else None
        leaf = self.state.get(_averages(self.module))[("mean", "var").index(name)]
        return leaf / _scale(self._count, self.module.momentum, leaf)

    def put(self, name: str, value: Array) -> None:
        """See `Call.put`."""
        names: tuple[str, ...] = SEEN
        index = self.module.seen
        if name not in SEEN:
            index, names = _averages(self.module), ("mean", "var")
            value = value * _scale(self._count, self.module.momentum, value)
        leaves = list(self.state.get(index))
        leaves[names.index(name)] = value.astype(leaves[0].dtype)
        self.state = self.state.set(index, tuple(leaves))

    @property
    def _count(self) -> Any:
        counter = self.module.batch_counter
        return None if counter is None else self.state.get(counter)

    def layer(self) -> NormLayer:
        """See `Call.layer`."""
        norm, given = self.module, self.kwargs.get("inference")
        inference = norm.inference if given is None else given
        fields = {"epsilon": norm.eps, "momentum": norm.momentum, "debias": True}
        return NormLayer(
            path=self.path,
            module=types.SimpleNamespace(**fields),
            shape=(int(jax.lax.psum(1, norm.axis_name)), *self.x.shape),
            dtype=self.x.dtype,
            axes=(0, *(axis + 1 for axis in self.axes)),
            by_batch=not inference and norm.mode == "batch",
        )

    def moments(self, of_batch: Any = None, total: Total = lambda part: part) -> Moments:
        """See `Call.moments`."""
        over_batch = total_over(self.module.axis_name)
        return super().moments(of_batch, lambda part: total(over_batch(part)))

    def full_mask(self, of_batch: Any) -> Any:
        """Returns the mask value of this example; see `Call.full_mask`."""
        if of_batch is None:
            return None
        index = jax.lax.axis_index(self.module.axis_name)
        return jnp.asarray(of_batch)[index].reshape([1] * self.x.ndim)


def _units(model: Any) -> list[tuple[Path, Any]]:
    """Returns the norms and layers of a model with their paths."""
    import equinox as eqx

    kinds = (eqx.nn.BatchNorm, eqx.nn.Conv, eqx.nn.Linear)
    found = jax.tree_util.tree_flatten_with_path(model, is_leaf=lambda one: isinstance(one, kinds))
    return [(_path(keys), one) for keys, one in found[0] if isinstance(one, kinds)]


def _watched_in(
    model: Any, around: Around, batch_stats: BatchStats, norms: tuple[_Norm, ...]
) -> Any:
    """Returns a copy of the model that passes each call of a norm or layer to `around`."""
    import equinox as eqx

    stats, paths = flatten_dict(batch_stats), {norm.index: norm.path for norm in norms}
    units = {
        id(unit): paths[_averages(unit).marker] if isinstance(unit, eqx.nn.BatchNorm) else path
        for path, unit in _units(model)
    }

    def swapped(one: Any) -> Any:
        if id(one) not in units:
            return one
        path, seen, kind = units[id(one)], None, _watched(one.__class__)
        if (*path, SEEN[0]) in stats:
            seen = eqx.nn.StateIndex(None)
            object.__setattr__(seen, "marker", _seen_key(path))
        return _changed(one, kind, watched=(path, around), seen=seen)

    return jax.tree.map(swapped, model, is_leaf=lambda one: id(one) in units)


@functools.cache
def _watched(kind: Any) -> Any:
    """Returns a subclass that passes each call to the function in its field `watched`."""
    import equinox as eqx

    class Watched(kind):
        watched: Any = eqx.field(static=True)
        seen: Any

        @functools.wraps(kind.__call__)
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            path, around = self.watched
            is_norm = isinstance(self, eqx.nn.BatchNorm)
            proceed = functools.partial(kind.__call__, self)
            call = EquinoxCall(self, path, proceed, args, kwargs, is_norm)
            if is_norm:  # a copy, because Equinox invalidates a state that is updated
                state = args[1] if len(args) > 1 else kwargs["state"]
                call.state = jax.tree_util.tree_map(lambda leaf: leaf, state)
            y = around(call)
            return (y, call.state) if is_norm else y

    Watched.kind = kind
    return Watched


def _axis_names(norms: Sequence[Any]) -> list[Any]:
    """Returns an axis name that all norms share, followed by all other names."""
    names = [
        dict.fromkeys(one.axis_name if isinstance(one.axis_name, tuple | list) else [one.axis_name])
        for one in norms
    ]
    shared = [name for name in names[0] if all(name in of for of in names)] if names else [None]
    if not shared:
        raise ValueError(
            f"the norms have no axis name in common: {', '.join(map(str, map(list, names)))}. Give "
            "a function that maps the model over the images: clinic.equinox(model, state, call)."
        )
    return [*dict.fromkeys((shared[0], *(name for of in names for name in of)))]


def _averages(norm: Any) -> Any:
    return norm.ema_state_index if norm.mode == "ema" else norm.batch_state_index


def _entries(state: Any) -> dict[Any, Any]:
    values, keys = state.tree_flatten()
    return dict(zip(keys, values, strict=True))


def _statistics(entries: dict[Any, Any], norms: tuple[_Norm, ...]) -> BatchStats:
    """Returns the statistics used in inference."""
    stats = {}
    for path, index, counter, momentum in norms:
        count = entries.get(counter)
        for name, leaf in zip(("mean", "var"), entries[index], strict=True):
            stats[*path, name] = leaf / _scale(count, momentum, leaf)
        if counter is not None:
            stats[*path, "count"] = count
        for name, leaf in zip(SEEN, entries.get(_seen_key(path), ()), strict=False):
            stats[*path, name] = leaf
    return unflatten_dict(stats)


def _with_weights(layer: Any, leaves: dict[Path, Array], path: Path) -> Any:
    """Returns the layer with the kernel and bias at this path."""
    weight, bias = (
        _from_flax(leaves[*path, name], name, getattr(layer, "num_spatial_dims", 0))
        for name in ("kernel", "bias")
    )
    return _changed(layer, type(layer), weight=weight, bias=bias, use_bias=True)


def _changed(module: Any, kind: Any, **fields: Any) -> Any:
    """Returns a copy of a frozen module with a different class and different field values."""
    new = object.__new__(kind)
    for name, value in (vars(module) | fields).items():
        object.__setattr__(new, name, value)
    return new


@functools.cache
def _folded() -> Any:
    import equinox as eqx

    class Folded(eqx.nn.StatefulLayer):
        """Replaces a norm that was folded into a layer; returns its input."""

        def __call__(self, x: Array, state: Any, **_: Any) -> tuple[Array, Any]:
            return x, state

    return Folded


def _scale(count: Any, momentum: float, like: Array) -> Any:
    """Returns the divisor in inference, 1 - momentum ** count; 1 without a count or updates."""
    if count is None:
        return 1
    scale = jnp.where(count == 0, 1, 1 - momentum**count)
    return jnp.expand_dims(scale, tuple(range(scale.ndim, like.ndim)))


def _seen_key(path: Path) -> str:
    return f"seen by {'.'.join(path)}"


def _path(keys: Sequence[Any]) -> Path:
    # GetAttrKey has a name, SequenceKey an index, DictKey and FlattenedIndexKey a key.
    return tuple(
        str(next(getattr(key, of) for of in ("name", "idx", "key") if hasattr(key, of)))
        for key in keys
    )


def _to_flax(leaf: Array, name: str, spatial: int | None) -> Array:
    if spatial is None:
        return leaf
    if name == "kernel":
        return jnp.moveaxis(leaf, (-2 - spatial, -1 - spatial), (-1, -2))
    return leaf.reshape(leaf.shape[: leaf.ndim - spatial])


def _from_flax(leaf: Array, name: str, spatial: int | None) -> Array:
    if spatial is None:
        return leaf
    if name == "kernel":
        return jnp.moveaxis(leaf, (-1, -2), (-2 - spatial, -1 - spatial))
    return leaf.reshape(*leaf.shape, *[1] * spatial)
