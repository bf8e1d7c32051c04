"""Finds the norms in networks of any library, and the moments of the norms' inputs.

The adapter for a library subclasses `Network`. Its method `run` passes each call of a module to a
function, so the model needs no changes.
"""

import abc
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
from flax import struct
from flax.traverse_util import flatten_dict, unflatten_dict

from bnjax.norms.moments import AxisName, Moments, Total, full_mask, merge, moments, total_over
from bnjax.types import Array, Batch, BatchStats, Images, Logits, Params

# "train": as in training, with dropout; "batch": as in evaluation, but with batch statistics;
# "running": as in evaluation.
Mode = Literal["train", "batch", "running"]
Path = tuple[str, ...]
# Maps the path of a norm's leaves in `batch_stats` to the moments of the norm's inputs so far.
Seen = Mapping[Path, Moments]
# Additional leaves next to `mean` and `var` that collect these moments during a pass. They have the
# shape of `mean`, so lifted transformations treat them like `mean`.
SEEN = ("seen_mean", "seen_var", "seen_count")
# The name scope in which `run` only converts variables to the library's layout.
STORED = "@stored@"
# The known training flags of `__call__`, with their values in training.
FLAGS = {
    "train": True,
    "training": True,
    "is_training": True,
    "deterministic": False,
    "use_running_average": False,
}


@dataclasses.dataclass(frozen=True)
class NormLayer:
    """Facts about a batch norm in one pass.

    Attributes:
        path: the path of the norm's leaves in `batch_stats`.
        module: an object with the norm's fields (`epsilon`, `momentum`, …), without arrays.
        shape, dtype: the shape and dtype of the input.
        axes: the reduced axes.
        by_batch: whether this pass normalised by batch statistics.
    """

    path: Path
    module: Any
    shape: tuple[int, ...]
    dtype: Any
    axes: tuple[int, ...]
    by_batch: bool

    @property
    def name(self) -> str:
        """The path, joined with dots."""
        return ".".join(self.path)

    @property
    def variance(self) -> str:
        """The kind of variance in the average, "biased" or "unbiased"."""
        return getattr(self.module, "variance", "biased")


@dataclasses.dataclass
class Call(abc.ABC):
    """A call of a module during a pass; calling it runs the module.

    Attributes:
        module: the module with its variables.
        path: the path of the module.
        proceed: a function that runs the module with the given arguments.
        args, kwargs: the arguments of the call.
        is_norm: whether the module is a batch norm.
    """

    module: Any
    path: Path
    proceed: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    is_norm: bool

    @property
    def kind(self) -> type:
        """The class of the module."""
        return type(self.module)

    @property
    @abc.abstractmethod
    def is_layer(self) -> bool:
        """Whether the module is a dense layer or a convolution."""

    @property
    @abc.abstractmethod
    def is_standard(self) -> bool:
        """Whether a norm or layer computes the same as the library's own class."""

    def __call__(self) -> Any:
        """Runs the module and returns its output."""
        return self.proceed(*self.args, **self.kwargs)

    @property
    def x(self) -> Array:
        """The input of the module."""
        return self.args[0] if self.args else self.kwargs["x"]

    @property
    def mask(self) -> Any:
        """The mask passed to a norm, or None."""
        return self.kwargs.get("mask")

    @property
    def axes(self) -> tuple[int, ...]:
        """The axes of the input that a norm reduces."""
        axis, x = self.module.axis, self.x
        channels = {one % x.ndim for one in ([axis] if isinstance(axis, int) else axis)}
        return tuple(one for one in range(x.ndim) if one not in channels)

    @abc.abstractmethod
    def get(self, name: str) -> Any:
        """Returns a running statistic of a norm, or None if the norm has no such leaf."""

    @abc.abstractmethod
    def put(self, name: str, value: Array) -> None:
        """Replaces a running statistic of a norm."""

    @abc.abstractmethod
    def layer(self) -> NormLayer:
        """Returns the facts about a norm in this pass."""

    def moments(self, of_batch: Any = None, total: Total = lambda part: part) -> Moments:
        """Returns the moments of a norm's input, float32, in the shape of the norm's `mean`.

        Args:
            of_batch: the mask of the batch, used if the norm is called without a mask.
            total: a function that sums over devices.

        Raises:
            ValueError: if the batch is padded and the input has no axis of examples.
        """
        mask = self.full_mask(of_batch)
        given = moments(jnp.asarray(self.x, jnp.float32), self.axes, mask, total)
        shape = self.get("mean").shape
        return Moments(*(jnp.broadcast_to(leaf, given.mean.shape).reshape(shape) for leaf in given))

    def full_mask(self, of_batch: Any) -> Any:
        """Returns the mask of a norm's input, with the rank of the input, or None.

        Arguments and errors are as for `moments`.
        """
        x, mask = self.x, self.mask
        if mask is None and of_batch is not None:
            if 0 not in self.axes or x.shape[0] != of_batch.shape[0]:
                raise ValueError(
                    f"the batch is padded, but the input {x.shape} of {'.'.join(self.path)} "
                    f"does not have the {of_batch.shape[0]} examples along its first axis. "
                    "Give batches without padding, or a model whose __call__ takes `mask`."
                )
            mask = of_batch
        return None if mask is None else full_mask(mask, x.shape, self.axes)

    @property
    def seen(self) -> Moments | None:
        """The moments of a norm's inputs so far; None without the leaves added by `with_seen`."""
        is_there = self.is_norm and self.get(SEEN[0]) is not None
        return Moments(*map(self.get, SEEN)) if is_there else None

    def see(self, seen: Moments) -> None:
        """Stores moments; called after the norm has run.

        A norm that calls its superclass stores moments twice, and the last ones count.
        """
        for name, leaf in zip(SEEN, seen, strict=True):
            self.put(name, leaf)


Around = Callable[[Call], Any]
SUPPORTED = "a batch norm of Flax, Equinox or bnjax, with `mean` and `var`,"


def check(batch: Any) -> None:
    """Checks that a batch is a dict with images.

    Raises:
        ValueError: if it is not.
    """
    if not isinstance(batch, Mapping) or "image" not in batch:
        keys = f" with the keys {[*batch]}" if isinstance(batch, Mapping) else ""
        raise ValueError(
            f"a batch must be a dict with 'image', not {type(batch).__name__}{keys}. For example, "
            "give {'image': x, 'label': y} as `batch`, and a list of such dicts as `batches`."
        )


@struct.dataclass
class Network(abc.ABC):
    """A trained network with the same interface for all libraries; a pytree of variables.

    Attributes:
        params: the weights, keyed by path.
        batch_stats: the running statistics, keyed by path, with `mean` and `var` for each norm.
    """

    params: Params
    batch_stats: Any

    # Whether modules are called on single examples, with channels first.
    per_example = False

    @abc.abstractmethod
    def run(
        self,
        batch: Batch,
        *,
        train: bool,
        dropout: jax.Array | None = None,
        around: Around = lambda call: call(),
    ) -> tuple[Logits, BatchStats]:
        """Runs the network on a batch; returns the logits and the updated running statistics.

        Norms do not synchronise statistics over mapped axes.

        Args:
            batch: `image` [n, h, w, c] and optionally `mask` bool [n].
            train: whether to run training instead of evaluation.
            dropout: the dropout key.
            around: a function that runs each call of a module and returns its output.
        """

    @abc.abstractmethod
    def folded(
        self, params: Params, batch_stats: BatchStats, pairs: Sequence[tuple[Path, Path]]
    ) -> "Network":
        """Returns the network with new variables, and without the folded norms.

        Args:
            params, batch_stats: the new variables, without leaves of folded norms.
            pairs: for each folded norm, its path and the path of its layer, which has a bias.
        """

    @property
    def takes_mask(self) -> bool:
        """Whether the model accepts a mask."""
        return False

    def shapes(self, images: Images) -> tuple[Any, Any]:
        """Returns the shapes of the model's own parameters and running statistics."""
        return jax.eval_shape(lambda: (self.params, self.batch_stats))

    def norms(self, batch: Batch, *, train: bool = False) -> tuple[NormLayer, ...]:
        """Traces the model; returns its norms in the order of their calls.

        A norm with several calls, or a stack of norms in a scan or vmap, is one entry.

        Args:
            batch: `image` [n, h, w, c], or its shape, and optionally `mask`.
            train: whether to trace training instead of evaluation.
        """
        found: dict[Path, NormLayer] = {}

        def watch(call: Call) -> Any:
            is_stored = call.is_norm and call.get("mean") is not None  # a folded norm has no leaves
            y = call()
            if is_stored:
                found.setdefault(call.path, call.layer())
            return y

        def run(network: Network, batch: Batch) -> Any:
            return network.run(batch, train=train, dropout=jax.random.key(0), around=watch)

        jax.eval_shape(run, self, dict(batch))
        return tuple(found.values())

    def observe(
        self,
        seen: Seen,
        batch: Batch,
        *,
        mode: Mode,
        dropout: jax.Array | None = None,
        axis_name: AxisName | None = None,
    ) -> tuple[Logits, Seen]:
        """Runs a batch; returns the logits, and `seen` merged with the moments of norms' inputs.

        Moments are weighted by count (Chan et al., 1979) in float32; activations are not stored.
        Masked examples are excluded, even if the model takes no mask.

        Args:
            seen: the moments so far, from `nothing_seen` or the previous batch.
            batch: `image` [n, h, w, c] and optionally `mask` bool [n].
            mode: how to run the network; with "batch" the running statistics have no effect.
            dropout: the dropout key for mode "train".
            axis_name: the mapped axis or axes over which the moments are computed.

        Raises:
            ValueError: if a batch is not a dict with `image`, or is padded and the input of a norm
                has no axis of examples.
        """
        check(batch)
        mask, total = batch.get("mask"), total_over(axis_name)

        def watch(call: Call) -> Any:
            if (before := call.seen) is None:
                return call()
            given = call.moments(mask, total)
            if mode == "batch":
                call.put("mean", given.mean)
                call.put("var", given.var)
            y = call()
            call.see(merge(before, given))
            return y

        network = dataclasses.replace(self, batch_stats=with_seen(self.batch_stats, seen))
        logits, written = network.run(batch, train=mode == "train", dropout=dropout, around=watch)
        return logits, seen_in(written, seen)


SameNetwork = TypeVar("SameNetwork", bound=Network)


def norm_paths(batch_stats: BatchStats) -> list[Path]:
    """Returns the paths of the norms, which have the leaves `mean` and `var`."""
    leaves = flatten_dict(batch_stats)
    return [(*path,) for *path, name in leaves if name == "mean" and (*path, "var") in leaves]


def nothing_seen(batch_stats: BatchStats) -> Seen:
    """Returns empty moments for each norm, the initial `seen` of `Network.observe`."""
    leaves = flatten_dict(batch_stats)
    paths = norm_paths(batch_stats)
    zeros = {path: jnp.zeros(leaves[*path, "mean"].shape, jnp.float32) for path in paths}
    return {path: Moments(zero, zero, zero) for path, zero in zeros.items()}


def with_seen(batch_stats: BatchStats, seen: Seen) -> BatchStats:
    """Returns the statistics with additional leaves that hold the moments."""
    leaves = flatten_dict(batch_stats)
    for path, moments_ in seen.items():
        leaves |= {(*path, name): leaf for name, leaf in zip(SEEN, moments_, strict=True)}
    return unflatten_dict(leaves)


def seen_in(batch_stats: BatchStats, paths: Iterable[Path]) -> Seen:
    """Returns the moments in the leaves added by `with_seen`, for the norms at these paths."""
    leaves = flatten_dict(batch_stats)
    return {path: Moments(*(leaves[*path, name] for name in SEEN)) for path in paths}
