"""Adapts linen networks for the functions of the clinic.

A norm is any `flax.linen.BatchNorm` or `bnjax.norms.BatchNorm`, even if it is wrapped in `nn.scan`,
`nn.remat` or `nn.vmap`. Calls are intercepted, so the model needs no changes.
"""

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from flax.linen.dtypes import canonicalize_dtype

from bnjax.clinic.network import FLAGS, Around, Call, Network, NormLayer, Path
from bnjax.norms import BatchNorm, StandardizedConv
from bnjax.train_step import forward, init_variables, takes_mask
from bnjax.types import Array, Batch, BatchStats, Images, Logits, Mask, Params, named_leaves

NORMS = (nn.BatchNorm, BatchNorm)
LAYERS = (nn.Conv, nn.Dense, StandardizedConv)


class Folded(nn.Module):
    """A network with norms folded into its layers.

    Parameters keep their names. Folded norms have no leaves and return their input. The layers they
    were folded into have a bias, and do not standardise their kernel, which is already
    standardised.

    Attributes:
        unfolded: the original network.
        pairs: for each folded norm, its path and the path of the layer it was folded into.
    """

    unfolded: nn.Module
    pairs: Sequence[tuple[Path, Path]]

    @nn.compact
    def __call__(self, x: Images, *, train: bool, mask: Mask | None = None) -> Logits:
        """Returns the logits [n, classes] of images [n, h, w, c]."""
        # The scope of this module is reused, so that variables keep their names.
        model = self.unfolded.copy(parent=self.scope, name=None)
        norms, layers = ({tuple(path) for path in side} for side in zip(*self.pairs, strict=True))

        def intercept(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            module, path = context.module, context.module.path[len(self.path) :]
            if context.method_name == "__call__" and path in norms and isinstance(module, NORMS):
                return _unchanged(module, *args, **kwargs)
            if context.method_name == "__call__" and path in layers and _lacks_bias(module):
                return _with_bias(module)(*args, **kwargs)
            return call(*args, **kwargs)

        options = {"mask": mask} if takes_mask(type(self.unfolded)) else {}
        with nn.intercept_methods(intercept):
            return model(x, train=train, **options)


def folded_model(model: nn.Module, pairs: Sequence[tuple[Path, Path]]) -> nn.Module:
    """Returns the model with more norms folded; `pairs` are as for `Folded`."""
    if isinstance(model, Folded):
        model, pairs = model.unfolded, (*model.pairs, *pairs)
    return Folded(model, pairs) if pairs else model


def folded_pairs(model: nn.Module) -> Sequence[tuple[Path, Path]]:
    """Returns the paths of the norms folded into the layers of a model, as for `Folded`."""
    return model.pairs if isinstance(model, Folded) else ()


# The attribute that marks norms frozen by `bnjax.clinic.freezing`.
FROZEN = "statistics_are_frozen"
Forward = Callable[[Any, Images, bool], Any]


@struct.dataclass
class Linen(Network):
    """A trained linen model; a pytree of its variables.

    Attributes:
        params: the weights.
        batch_stats: the running statistics; for `audit`, optionally a list of one tree per replica.
        model: a linen module with `__call__(x, train=...)`.
    """

    model: nn.Module = struct.field(pytree_node=False)

    def run(
        self,
        batch: Batch,
        *,
        train: bool,
        dropout: jax.Array | None = None,
        around: Around = lambda call: call(),
    ) -> tuple[Logits, BatchStats]:
        """See `Network.run`."""

        def unsynced(call: Call) -> Any:
            if not call.is_norm:
                return around(call)
            # Without axis names the model can run outside the mapped axis that training used.
            names = "axis_name", "axis_index_groups", "average_axis_name"
            with with_fields(call.module, **dict.fromkeys(names)):
                return around(call)

        # A model that ignores its training flag also writes statistics in evaluation.
        options: Any = {"train": train, "dropout": dropout, "mutable": ("batch_stats",)}
        with nn.intercept_methods(intercepting(unsynced)):
            logits, written = forward(
                self.params, self.batch_stats, batch, model=self.model, **options
            )
        return logits, written.get("batch_stats", {})

    def folded(
        self, params: Params, batch_stats: BatchStats, pairs: Sequence[tuple[Path, Path]]
    ) -> "Linen":
        """See `Network.folded`."""
        return Linen(params, batch_stats, folded_model(self.model, pairs))

    @property
    def takes_mask(self) -> bool:
        """Whether the model's `__call__` has an argument `mask`."""
        return takes_mask(type(self.model))

    def shapes(self, images: Images) -> tuple[Any, Any]:
        """Returns the shapes of the variables that `model.init` creates."""
        init = functools.partial(init_variables, self.model, jax.random.key(0))
        return jax.eval_shape(init, images)


def linen(model: nn.Module, params: Params, batch_stats: Any, call: Forward | None = None) -> Linen:
    """Returns a linen model and its variables as a network for the functions of the clinic.

    A mask is passed to the model only if its training flag is `train`.

    Args:
        model: any linen module whose `__call__` has one of the training flags `train`, `training`,
            `is_training`, `deterministic` and `use_running_average`.
        params: the weights of the model.
        batch_stats: the running statistics of the model; for `audit`, optionally the statistics of
            several replicas.
        call: (model, images, train) -> logits, for a model with a different signature.

    Raises:
        ValueError: if `__call__` has no known flag and `call` is None, or an argument has the wrong
            type, is the dict of all variables, or belongs in a different position.

    >>> class Net(nn.Module):
    ...     @nn.compact
    ...     def __call__(self, x, deterministic):
    ...         return nn.BatchNorm(use_running_average=deterministic)(x).mean((1, 2))
    >>> variables = Net().init(jax.random.key(0), jnp.ones((2, 4, 4, 3)), True)
    >>> [norm.name for norm in linen(Net(), **variables).norms({"image": jnp.ones((2, 4, 4, 3))})]
    ['BatchNorm_0']
    """
    if not (isinstance(model, nn.Module) and isinstance(params, Mapping)):
        raise ValueError(
            f"clinic.linen needs a linen module and a dict of parameters, not "
            f"{_kind(model)} and {_kind(params)}: clinic.linen(model, state.params, batch_stats)"
        )
    for name, variables in (("params", params), ("batch_stats", batch_stats)):
        if isinstance(variables, Mapping) and name in variables:
            raise ValueError(
                f"{name} has a key {name!r}. Give the collection itself, for instance "
                "clinic.linen(model, **variables)."
            )
    leaves = {name.rpartition(".")[2] for name in named_leaves(params)}
    if leaves and leaves <= {"mean", "var", "count"}:
        raise ValueError(
            "params has only running statistics (mean, var). The order of the arguments is "
            "clinic.linen(model, params, batch_stats)."
        )
    names = inspect.signature(type(model).__call__).parameters
    if call is None:
        flag = next((name for name in FLAGS if name in names), None)
        if flag is None:
            raise ValueError(
                f"{type(model).__name__}.__call__ has no training flag ({', '.join(FLAGS)}). "
                "Give a function that calls it: clinic.linen(…, call=lambda model, x, train: …)."
            )
        if flag == "train":
            return Linen(params, batch_stats, model)
        call = _by_flag(flag)
    return Linen(params, batch_stats, Called(model, call))


def _kind(value: Any) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__


@functools.cache  # equal networks for equal models, so that programs are compiled once
def _by_flag(flag: str) -> Forward:
    return lambda model, x, train: model(x, **{flag: train == FLAGS[flag]})


class Called(nn.Module):
    """Wraps a model so that its signature is `__call__(x, train=...)`; variables keep their names.

    Attributes:
        model: any linen module.
        call: (model, images, train) -> logits.
    """

    model: nn.Module
    call: Forward

    @nn.compact
    def __call__(self, x: Images, *, train: bool) -> Any:
        """Returns the logits of images [n, h, w, c]."""
        return self.call(self.model.copy(parent=self.scope, name=None), x, train)


class LinenCall(Call):
    """A call of a bound linen module."""

    @property
    def is_layer(self) -> bool:
        """See `Call.is_layer`."""
        return isinstance(self.module, LAYERS)

    @property
    def is_standard(self) -> bool:
        """See `Call.is_standard`."""
        is_norm = self.kind.__call__ in [norm.__call__ for norm in NORMS]
        # Subclasses of layers are not standard, because they may use the kernel differently.
        return is_norm if self.is_norm else self.kind in LAYERS

    def get(self, name: str) -> Any:
        """See `Call.get`."""
        is_there = self.module.has_variable("batch_stats", name)
        return self.module.get_variable("batch_stats", name) if is_there else None

    def put(self, name: str, value: Array) -> None:
        """See `Call.put`."""
        dtype = self.module.get_variable("batch_stats", name).dtype
        self.module.put_variable("batch_stats", name, value.astype(dtype))

    def layer(self) -> NormLayer:
        """See `Call.layer`."""
        norm = self.module
        given = self.args[1] if len(self.args) > 1 else self.kwargs.get("use_running_average")
        by_running = nn.merge_param("use_running_average", norm.use_running_average, given)
        chosen = "running" if getattr(norm, FROZEN, False) else getattr(norm, "statistics", None)
        return NormLayer(
            path=self.path,
            module=norm.clone(parent=None, name=None),
            shape=self.x.shape,
            dtype=self.x.dtype,
            axes=self.axes,
            by_batch=not by_running if chosen is None else chosen == "batch",
        )


def intercepting(around: Around) -> Callable[..., Any]:
    """Returns an interceptor for `nn.intercept_methods` that passes each call to `around`."""

    def intercept(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        if context.method_name != "__call__":
            return call(*args, **kwargs)
        # If a subclass has a different signature, its call of the superclass counts as the norm.
        names = inspect.signature(context.orig_method).parameters
        is_norm = isinstance(module, NORMS) and "use_running_average" in names
        return around(LinenCall(module, module.path, call, args, kwargs, is_norm))

    return intercept


@contextlib.contextmanager
def with_fields(module: nn.Module, **fields: Any) -> Iterator[None]:
    """Sets fields of a bound module until the context ends; skips fields that the module lacks.

    A clone would be recorded as a second module, and bound modules reject ordinary assignment.
    """
    before = {name: getattr(module, name) for name in fields if hasattr(module, name)}
    try:
        for name in before:
            object.__setattr__(module, name, fields[name])
        yield
    finally:
        for name, value in before.items():
            object.__setattr__(module, name, value)


def _unchanged(norm: Any, x: Array, *_: Any, **__: Any) -> Array:
    """Returns the input in the dtype of the norm's output."""
    affine = [jnp.zeros((), norm.param_dtype)] if norm.use_scale or norm.use_bias else []
    return x.astype(canonicalize_dtype(x, *affine, dtype=norm.dtype))


def _lacks_bias(layer: Any) -> bool:
    return type(layer) in LAYERS and (isinstance(layer, StandardizedConv) or not layer.use_bias)


def _with_bias(layer: Any) -> nn.Module:
    """Returns the layer with a bias and without standardisation, in the same scope."""
    kind: Callable[..., nn.Module] = nn.Dense if isinstance(layer, nn.Dense) else nn.Conv
    fields = {field.name: getattr(layer, field.name) for field in dataclasses.fields(layer)}
    return kind(**fields | {"use_bias": True, "name": None, "parent": layer.scope})
