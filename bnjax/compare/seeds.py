"""One config over several seeds: in turn, all in one program, or side by side on devices."""

import queue
import signal
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path

import jax

from bnjax.errors import UserError
from bnjax.train.loop import Stopped, Summary, Trainer
from bnjax.train.run import StopRequest

Results = Mapping[int, Summary | UserError]


def fast_way() -> str:
    """Returns the way that is fast on the default backend.

    On a CPU convolutions under `jax.vmap` are far slower than one run after the other; an
    accelerator is kept busier by them, and several are kept busier still by runs of their own.
    """
    if jax.default_backend() == "cpu":
        return "one"
    return "devices" if jax.local_device_count() > 1 else "vmap"


def train(
    new_trainer: Callable[[], Trainer],
    workdirs: Mapping[int, Path],
    way: str,
    stop: StopRequest,
    begin: Callable[[Sequence[int]], None],
    end: Callable[[Results], None],
) -> Results:
    """Trains with each seed in its folder, and returns what each came to: a run, or a breakdown.

    Under "vmap" and on other devices a run is that of `train_and_evaluate` but for rounding: the
    compiler orders sums differently.

    Args:
        new_trainer: makes what trains; called once, or once for each device that is used.
        workdirs: the folder of each seed.
        way: "one": one after the other; "vmap": in one program; "devices": each device trains one
            seed at a time.
        stop: ends all of them.
        begin: is told the seeds that come now, perhaps from another thread.
        end: is told what they came to, as soon as it is known.

    Raises:
        UserError: if a folder or the disk fails; other devices save what they have and stop.
        Stopped: as `bnjax.train.loop.Trainer.train`.
    """

    def several(trainer: Trainer, seeds: Sequence[int]) -> Results:
        begin(seeds)
        found = trainer.train({seed: workdirs[seed] for seed in seeds}, stop)
        end(found)
        return found

    if way != "devices":
        trainer = new_trainer()
        groups = [[*workdirs]] if way == "vmap" else [[seed] for seed in workdirs]
        return _together(several(trainer, seeds) for seeds in groups)
    waiting: queue.SimpleQueue[int | None] = queue.SimpleQueue()
    devices = jax.local_devices()[: len(workdirs)]
    for seed in [*workdirs, *[None for _ in devices]]:
        waiting.put(seed)

    def on(device: jax.Device) -> Results:
        with jax.default_device(device):
            trainer = new_trainer()  # what it compiles is for this device
            found: Results = {}
            for seed in iter(waiting.get, None):
                if stop.signal:
                    raise Stopped(None, stop.signal)
                try:
                    found = {**found, **several(trainer, [seed])}
                except UserError as error:
                    end({seed: error})
                    raise
            return found

    with ThreadPoolExecutor(len(devices)) as pool:
        futures = [pool.submit(on, device) for device in devices]
        _, others = wait(futures, return_when=FIRST_EXCEPTION)
        if others:
            stop.signal = stop.signal or signal.SIGTERM
        wait(futures)
    errors = [error for future in futures if (error := future.exception())]
    # That something went wrong is not to be hidden by others that were stopped and are saved.
    for error in sorted(errors, key=lambda error: isinstance(error, Stopped)):
        raise error
    return _together(future.result() for future in futures)


def _together(several: Iterable[Results]) -> Results:
    return {seed: result for results in several for seed, result in results.items()}
