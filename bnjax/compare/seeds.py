"""One config over several seeds: one after the other, all in one program, or side by side on several devices."""

import queue
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path

import jax
from ml_collections import ConfigDict

from bnjax.data.datasets import Dataset
from bnjax.errors import NonFiniteError
from bnjax.train.interrupt import StopRequest
from bnjax.train.loop import Stopped, Summary, Trainer

Results = dict[int, Summary | NonFiniteError]


def fast_way() -> str:
    """Returns the way that is fast on the default backend.

    On a CPU convolutions under `jax.vmap` are far slower than one run after the other; an accelerator is kept busier by them, and
    several are kept busier still by runs of their own.
    """
    if jax.default_backend() == "cpu":
        return "one"
    return "devices" if jax.local_device_count() > 1 else "vmap"


def train(
    config: ConfigDict,
    dataset: Dataset,
    workdirs: Mapping[int, Path],
    way: str,
    stop: StopRequest,
    begin: Callable[[Sequence[int]], None],
) -> Results:
    """Trains the config with each seed in its folder, and returns what each came to.

    Under "vmap" and on other devices a run is that of `train_and_evaluate` but for rounding: the compiler orders sums differently.

    Args:
        config: its own seed does not matter.
        dataset: what it is trained on.
        workdirs: the folder of each seed.
        way: "one": one after the other, compiled once; "vmap": in one program; "devices": each device trains one seed at a time.
        stop: ends all of them.
        begin: is told the seeds that come now, perhaps from another thread.

    Raises:
        UserError, Stopped: as `bnjax.train.loop.Trainer.train`.
    """

    def several(trainer: Trainer, seeds: Sequence[int]) -> Results:
        begin(seeds)
        return trainer.train({seed: workdirs[seed] for seed in seeds}, stop)

    if way == "devices":
        return _side_by_side(lambda seed: several(Trainer(config, dataset), [seed]), list(workdirs))
    trainer = Trainer(config, dataset)
    found: Results = {}
    for seeds in [list(workdirs)] if way == "vmap" else [[seed] for seed in workdirs]:
        found |= several(trainer, seeds)
    return found


def _side_by_side(one: Callable[[int], Results], seeds: list[int]) -> Results:
    """Returns what `one` returns for all seeds, each in a thread that has a device for itself."""
    free: queue.SimpleQueue[jax.Device] = queue.SimpleQueue()
    for device in jax.local_devices():
        free.put(device)

    def on_a_device(seed: int) -> Results:
        device = free.get()
        try:
            with jax.default_device(device):
                return one(seed)
        finally:
            free.put(device)

    with ThreadPoolExecutor(jax.local_device_count()) as pool:
        futures = [pool.submit(on_a_device, seed) for seed in seeds]
        wait(futures, return_when=FIRST_EXCEPTION)
        for future in futures:
            future.cancel()
        wait(futures)
    errors = [
        error for future in futures if not future.cancelled() and (error := future.exception())
    ]
    # That something went wrong is not to be hidden by others that were stopped and are saved.
    for error in sorted(errors, key=lambda error: isinstance(error, Stopped)):
        raise error
    return {seed: result for future in futures for seed, result in future.result().items()}
