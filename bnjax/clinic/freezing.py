"""Freezes the statistics and parameters of norms."""

import dataclasses
import fnmatch
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from bnjax.clinic.linen import FROZEN, intercepting, with_fields
from bnjax.clinic.network import Call, Network, norm_paths
from bnjax.types import BatchStats, Params, Tree


def freeze_statistics(model: nn.Module, *patterns: str) -> nn.Module:
    """Returns the model with the statistics of some norms frozen.

    In training these norms normalise by their running statistics, which are not updated and are
    treated as constants in the gradient. Scale and bias are still trained. The model has the same
    fields, parameters, statistics and `__call__` arguments as before, so checkpoints and masks
    remain valid.

    Args:
        model: any linen module whose norms are the BatchNorm of Flax or bnjax; they may be wrapped
            in `nn.scan`, `nn.remat` or `nn.vmap`.
        patterns: shell patterns for the names in `bnjax.clinic.Network.norms`, such as
            "BasicBlock_0.*" or "*.norm_proj"; "*" for all.

    Raises:
        ValueError: when the model is called, if a pattern matches no norm; the message lists the
            names.

    >>> from bnjax.models.convnet import ConvNet
    >>> from bnjax.train_step import forward, init_variables
    >>> x = jax.random.uniform(jax.random.key(1), (4, 8, 8, 3))
    >>> net = ConvNet((4, 4, 4), strides=(1, 1, 1), dense=(8, 8), norm=nn.BatchNorm)
    >>> params, stats = init_variables(net, jax.random.key(0), x)
    >>> frozen = freeze_statistics(net, "conv*")
    >>> _, written = forward(params, stats, {"image": x}, model=frozen, train=True)
    >>> for name in ("conv0_norm", "logits_norm"):
    ...     print(name, (written["batch_stats"][name]["mean"] == stats[name]["mean"]).all())
    conv0_norm True
    logits_norm False
    """
    kind = type(model)

    # A new class, because Flax and `train_step` inspect the class. Flax has already wrapped
    # `kind.__call__`, so `call` must not be wrapped.
    @nn.nowrap
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        names: dict[str, None] = {}

        def watch(call: Call) -> Any:
            if not call.is_norm:
                return call()
            name = ".".join(call.path[len(self.path) :])
            names[name] = None
            if not matches(name, patterns):
                return call()
            object.__setattr__(call.module, FROZEN, True)
            # Flax accepts `use_running_average` as a field or as an argument, not both.
            fields = {"use_running_average": None, "statistics": "running", "update_average": False}
            with with_fields(call.module, **fields):
                return call.proceed(call.x, **call.kwargs | {"use_running_average": True})

        with nn.intercept_methods(intercepting(watch)):
            result = kind.__call__(self, *args, **kwargs)
        matching(names, patterns)
        return result

    call.__signature__ = inspect.signature(kind.__call__)  # type: ignore[attr-defined]
    own = {"__call__": call, "__doc__": kind.__doc__, "__module__": kind.__module__}
    fields = {
        field.name: getattr(model, field.name)
        for field in dataclasses.fields(model)
        if field.init and field.name != "parent"
    }
    return type(kind.__name__, (kind,), own)(**fields)


def affine_mask(params: Params, batch_stats: BatchStats, *patterns: str) -> Tree:
    """Returns a mask with the structure of `params`: True for scale and bias of matching norms.

    Use the result as the mask for `optax.masked` or `without_frozen`.

    Args:
        params: the weights, or their shapes.
        batch_stats: the running statistics, or their shapes, which identify the norms.
        patterns: as for `freeze_statistics`.

    Raises:
        ValueError: if a pattern matches no norm; the message lists the names.

    >>> params = {"dense": {"kernel": 1, "bias": 2}, "norm": {"scale": 3, "bias": 4}}
    >>> affine_mask(params, {"norm": {"mean": jax.numpy.zeros(2), "var": jax.numpy.ones(2)}}, "*")
    {'dense': {'kernel': False, 'bias': False}, 'norm': {'scale': True, 'bias': True}}
    """
    names = {".".join(path): path for path in norm_paths(batch_stats)}
    norms = {names[name] for name in matching(names, patterns)}
    affine = {(*norm, leaf) for norm in norms for leaf in ("scale", "bias")}
    return unflatten_dict({path: path in affine for path in flatten_dict(params)})


def without_frozen(tx: optax.GradientTransformation, mask: Tree) -> optax.GradientTransformation:
    """Returns an optimizer that does not update parameters where the mask is True.

    Only the other parameters are passed to `tx`, so masked parameters have no weight decay and are
    excluded from a global gradient norm. (`optax.transforms.freeze` only sets updates to 0.)

    Args:
        tx: the optimizer for the other parameters.
        mask: a tree of bools with the structure of the parameters, for instance from
            `affine_mask`.

    >>> import jax.numpy as jnp
    >>> params = {"scale": jnp.ones(2), "kernel": jnp.ones(2)}
    >>> mask = {"scale": True, "kernel": False}
    >>> tx = without_frozen(optax.adamw(0.1, weight_decay=0.1), mask)
    >>> updates, _ = tx.update(params, tx.init(params), params)
    >>> print(updates["scale"], updates["kernel"].round(2))
    [0. 0.] [-0.11 -0.11]
    """
    labels = jax.tree.map(lambda frozen: "frozen" if frozen else "trained", mask)
    return optax.multi_transform({"trained": tx, "frozen": optax.set_to_zero()}, labels)


def moved(before: Network, after: Network, patterns: Iterable[str] = ("*",)) -> tuple[str, ...]:
    """Returns the names of the norm leaves that are not bitwise equal in two networks.

    Args:
        before: a network before training.
        after: the same network after training.
        patterns: the norms to compare, as for `freeze_statistics`.

    Raises:
        ValueError: if a pattern matches no norm, or the networks have different leaves.

    >>> from bnjax.clinic.linen import Linen
    >>> def network(mean):
    ...     norm = {"mean": jax.numpy.full(2, mean), "var": jax.numpy.ones(2)}
    ...     return Linen({}, {"norm": norm}, nn.Dense(1))
    >>> moved(network(0.0), network(0.5))
    ('norm.mean',)
    """
    norms = {".".join(path): path for path in norm_paths(after.batch_stats)}
    chosen = {norms[name] for name in matching(norms, patterns)}
    old, new = (
        {
            path: leaf
            for tree in (network.batch_stats, network.params)
            for path, leaf in flatten_dict(dict(tree)).items()
            if path[:-1] in chosen
        }
        for network in (before, after)
    )
    if old.keys() != new.keys():
        names = ", ".join(".".join(path) for path in sorted(old.keys() ^ new.keys()))
        raise ValueError(f"the two networks have different leaves; only one of them has {names}")
    return tuple(".".join(path) for path in differing(old, new))


def differing(old: Mapping[Any, Any], new: Mapping[Any, Any]) -> list[Any]:
    """Returns the keys at which two dicts of arrays are not bitwise equal.

    >>> differing({"a": np.float32(0.0), "b": 1}, {"a": np.float32(-0.0), "b": 1})
    ['a']
    """
    pairs = {key: (np.asarray(old[key]), np.asarray(new[key])) for key in new}
    return [key for key, (one, other) in pairs.items() if one.tobytes() != other.tobytes()]


def matching(names: Iterable[str], patterns: Iterable[str]) -> list[str]:
    """Returns the names that match at least one pattern, in the given order.

    Raises:
        ValueError: if `patterns` is empty, or a pattern matches no name.

    >>> matching(["conv0_norm", "conv1_norm", "head.norm"], ["conv*", "*.norm"])
    ['conv0_norm', 'conv1_norm', 'head.norm']
    """
    names, patterns = [*names], [*patterns]
    idle = [pattern for pattern in patterns if not fnmatch.filter(names, pattern)]
    if idle or not patterns:
        which = (
            f"no norm matches {' or '.join(map(repr, idle))}" if idle else "no pattern was given"
        )
        raise ValueError(
            f"{which}. The norms of this model are: {', '.join(names) or 'none'}. Use their names "
            "or shell patterns: '*' matches any characters, including dots."
        )
    return [name for name in names if matches(name, patterns)]


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Returns whether the name matches at least one pattern."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
