"""Runs a step on several devices and processes; groups of devices share batch statistics."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bnjax.data.batches import Part
from bnjax.errors import UserError, brief

# The axes of the mesh: devices that share batch statistics, and the groups that they form.
MEMBERS, GROUPS = "members", "groups"
# A process that sends no heartbeat for this many seconds is considered lost, and the others end.
HEARTBEAT_SECONDS = 30
# The devices that share batch statistics: all of them, none, or groups of a given size.
Over = Literal["global", "per_device"] | int


@dataclasses.dataclass(frozen=True)
class Parallel:
    """Splits a step across devices, each of which receives an equal part of the batch.

    Without groups, batch norms normalise over the whole batch, and the step is compiled by
    `jax.jit` with shardings. With groups, `jax.shard_map` maps the step over the parts.

    Attributes:
        mesh: the mesh of devices, whose axes are `MEMBERS`, `GROUPS`, or both.
    """

    mesh: Mesh

    @property
    def axis_name(self) -> tuple[str, ...] | None:
        """The axes to sum over, in the form that `train_step` expects; None without groups."""
        return self.mesh.axis_names if GROUPS in self.mesh.axis_names else None

    @property
    def norm_axes(self) -> dict[str, str]:
        """The axis names for the batch norms of the model.

        Members of a group share batch statistics; running averages are taken over all groups.
        """
        names = {"axis_name": MEMBERS, "average_axis_name": GROUPS}
        return {key: name for key, name in names.items() if name in (self.axis_name or ())}

    @property
    def part(self) -> Part:
        """The rows of each batch that this process loads."""
        return Part(self.mesh.size, jax.process_index(), jax.process_count())

    def compile(
        self,
        make: Callable[[tuple[str, ...] | None], Callable[..., Any]],
        in_axes: Sequence[int | None],
        **options: Any,
    ) -> Any:
        """Returns a jitted step for these devices; its results are the same on all devices.

        Args:
            make: a function that maps the axis name to the step.
            in_axes: for each argument, the axis of the examples, which is split across the devices;
                None for an argument that is the same on all devices.
            options: the options of `jax.jit`.
        """
        step, specs = make(self.axis_name), tuple(map(self._spec, in_axes))
        if self.mesh.size == 1:
            return jax.jit(step, **options)
        if self.axis_name is None:
            shardings = tuple(NamedSharding(self.mesh, spec) for spec in specs)
            whole = NamedSharding(self.mesh, PartitionSpec())
            return jax.jit(step, in_shardings=shardings, out_shardings=whole, **options)
        mapped = jax.shard_map(step, mesh=self.mesh, in_specs=specs, out_specs=PartitionSpec())
        return jax.jit(mapped, **options)

    def put(self, tree: Any, axis: int | None) -> Any:
        """Puts arrays on the devices.

        Args:
            tree: the arrays of this process; each of several processes passes a different part.
            axis: the axis of the examples, which is split across the devices; None copies the whole
                arrays to each device.
        """
        if self.mesh.size == 1:
            return jax.device_put(tree)  # puts the arrays on the default device, uncommitted
        sharding = NamedSharding(self.mesh, self._spec(axis))
        if jax.process_count() == 1:
            return jax.device_put(tree, sharding)
        return jax.tree.map(lambda leaf: _joined(leaf, sharding), tree)

    def local(self, tree: Any) -> Any:
        """Returns one device's copy of arrays that are the same on all devices."""
        return jax.tree.map(lambda leaf: leaf.addressable_data(0), tree)

    def _spec(self, axis: int | None) -> PartitionSpec:
        if axis is None:
            return PartitionSpec()
        return PartitionSpec(*[None] * axis, self.mesh.axis_names)


def _joined(leaf: Any, sharding: NamedSharding) -> jax.Array:
    """Returns the global array assembled from the parts of all processes."""
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        data = _joined(jax.random.key_data(leaf), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    return jax.make_array_from_process_local_data(sharding, np.asarray(leaf))


def spread(devices: Sequence[jax.Device], over: Over = "global") -> Parallel:
    """Arranges the devices of a step in a mesh.

    Args:
        devices: at least one device.
        over: the devices that share batch statistics.

    Raises:
        ValueError: if the devices cannot form equal groups.
    """
    size = len(devices) if over == "global" else 1 if over == "per_device" else over
    if size < 1 or len(devices) % size:
        raise ValueError(f"{len(devices)} devices cannot be divided into groups of {over}")
    sizes = {GROUPS: len(devices) // size, MEMBERS: size}
    axes = {name: count for name, count in sizes.items() if count > 1} or {MEMBERS: 1}
    # The axes have the type Auto: the compiler chooses all other shardings, as with one device.
    return Parallel(Mesh(np.array(devices).reshape(*axes.values()), tuple(axes)))


def join_processes(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Connects this process with the others; must be called before any computation.

    Arguments that are None are read from the environment of TPU pods, Slurm or Open MPI.

    Args:
        coordinator: the host and port of process 0.
        processes: the number of processes.
        process: the index of this process.

    Raises:
        UserError: if the processes cannot connect.
    """
    try:
        jax.distributed.initialize(
            coordinator, processes, process, heartbeat_timeout_seconds=HEARTBEAT_SECONDS
        )
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"the training processes could not connect to each other ({brief(error)}). "
            "Start the same command on each host with --coordinator=HOST:PORT of process 0, "
            "--processes=N and --process=0 to N-1; with Slurm, Open MPI or on a TPU pod, give only "
            "--hosts."
        ) from error


def from_first(*numbers: int) -> tuple[int, ...]:
    """Returns the numbers of the first process; every process must call this function."""
    if jax.process_count() == 1:
        return numbers
    sent = multihost_utils.broadcast_one_to_all(np.array(numbers, np.int32))
    return tuple(int(number) for number in np.asarray(sent))


class Agreement:
    """Makes all processes stop or save after the same step.

    A call never blocks: with several processes it returns the maxima of the previous call, which
    the devices have computed in the meantime.
    """

    def __init__(self, parallel: Parallel):
        """Stores the mesh; the first call compiles the maximum."""
        self._mesh, self._asked = parallel.mesh, None
        whole = NamedSharding(self._mesh, PartitionSpec())
        self._max = jax.jit(functools.partial(jnp.max, axis=0), out_shardings=whole)

    def __call__(self, *numbers: int) -> tuple[int, ...]:
        """Returns the maximum of each number over all processes."""
        if jax.process_count() == 1:
            return numbers
        by_device = NamedSharding(self._mesh, PartitionSpec(self._mesh.axis_names))
        rows = np.tile(np.array(numbers, np.int32), (len(self._mesh.local_devices), 1))
        before: Any = self._asked
        self._asked = self._max(jax.make_array_from_process_local_data(by_device, rows))
        if before is None:
            return (0,) * len(numbers)
        return tuple(int(number) for number in np.asarray(before.addressable_data(0)))
