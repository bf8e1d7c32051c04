"""Processes that train together, one or several on each host."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from bnjax.errors import UserError
from bnjax.train.parallel import Parallel

# A process of which nothing is heard for so long is lost, and the others end.
HEARTBEAT_SECONDS = 30


def join(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Connects this process with the others; call it before anything is computed.

    What is None is found in the environment: on TPU pods, under Slurm and Open MPI.

    Args:
        coordinator: host and port of process 0.
        processes: how many there are.
        process: which of them this is.

    Raises:
        UserError: if that does not say who belongs together, or they do not meet.
    """
    try:
        jax.distributed.initialize(
            coordinator, processes, process, heartbeat_timeout_seconds=HEARTBEAT_SECONDS
        )
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"the processes of this training did not meet ({' '.join(str(error).split())[:300]}). "
            "Start the same command on each host with --coordinator=HOST:PORT of process 0, "
            "--processes=N and --process=0 to N-1, or with --hosts alone under Slurm, Open MPI or "
            "on a TPU pod."
        ) from error


def is_first() -> bool:
    """Returns whether this is the process that writes."""
    return jax.process_index() == 0


def from_first(*numbers: int) -> tuple[int, ...]:
    """Returns the numbers that the first process gives, once all have come here."""
    if jax.process_count() == 1:
        return numbers
    sent = multihost_utils.broadcast_one_to_all(np.array(numbers, np.int32))
    return tuple(int(number) for number in np.asarray(sent))


class Agreement:
    """What one process wishes after a step, all do after the same one.

    Asking costs no waiting: among several processes the answer is about what was wished a dispatch
    earlier, which the devices have summed up meanwhile.
    """

    def __init__(self, parallel: Parallel):
        """Nothing has been wished yet."""
        self._mesh, self._asked = parallel.mesh, None
        whole = NamedSharding(self._mesh, PartitionSpec())
        self._max = jax.jit(functools.partial(jnp.max, axis=0), out_shardings=whole)

    def __call__(self, *wishes: int) -> tuple[int, ...]:
        """Returns the largest of what the processes gave, for each of the numbers."""
        if jax.process_count() == 1:
            return wishes
        by_device = NamedSharding(self._mesh, PartitionSpec(self._mesh.axis_names))
        rows = np.tile(np.array(wishes, np.int32), (len(self._mesh.local_devices), 1))
        before: Any = self._asked
        self._asked = self._max(jax.make_array_from_process_local_data(by_device, rows))
        if before is None:
            return (0,) * len(wishes)
        return tuple(int(wish) for wish in np.asarray(before.addressable_data(0)))
