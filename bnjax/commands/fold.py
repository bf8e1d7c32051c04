"""`bnjax fold`: the batch norms of a trained network, folded into its layers."""

import functools
import statistics
import time
from collections.abc import Iterator
from typing import Annotated, Any

from tyro.conf import arg

from bnjax.commands import Checkpoint, DataDir, Out, Workdir

BATCHES = (1, 32, 1024)
SECONDS = 4.0  # for the repeats of one batch size


def run(
    workdir: Workdir,
    checkpoint: Checkpoint = "last",
    data_dir: DataDir = None,
    out: Out = None,
    latency: Annotated[bool, arg(help="time predictions before and after; half a minute")] = False,
) -> int:
    """Fold the batch norms of a trained network into its layers where that is exact.

    The logits are compared on noise, or with --data-dir on test images. Norms that stay are listed
    with the reason. Exits with 1 if no norm can be folded.
    """
    import jax
    import numpy as np

    from bnjax.clinic.folding import plan
    from bnjax.text import text_table
    from bnjax.train import rundir
    from bnjax.train.cpu import prepare
    from bnjax.train.trained import Trained, check_folded
    from bnjax.types import named_leaves

    prepare()
    if out:
        rundir.check_is_free(out)
    trained = Trained(workdir, checkpoint)
    before = trained.network
    folding = plan(before, np.zeros((1, *trained.data.image_shape), np.uint8))
    stood = {"after": "followed", "before": "preceded"}
    rows = [
        (
            ".".join(one.norm),
            f"stays: {one.reason}"
            if one.layer is None
            else f"folded into {'.'.join(one.layer)}, which it {stood[one.place or 'after']}",
        )
        for one in folding.norms
    ]
    print(text_table(rows) if rows else "the network has no norm")
    if not any(one.layer for one in folding.norms):
        print("nothing was folded, and nothing is written")
        return 1
    about = check_folded(trained, folding, data_dir)
    counts = [
        sum(leaf.size for leaf in named_leaves([one.params, one.batch_stats]).values())
        for one in (before, folding.network)
    ]
    print(
        f"\n{counts[0]:,} numbers before, {counts[1]:,} after\n"
        f"logits of {about['probe']} differ by {about['difference']:.1e} of the largest"
    )
    if latency:
        both = (before, folding.network)
        for size, first, second in _latencies(both, trained.data.image_shape, jax):
            print(f"batch {size:5,}: {first * 1e3:9.3f} ms before, {second * 1e3:9.3f} ms after")
    if out:
        trained.write(out, folding.network, about, folding.pairs)
        print(f"\npredict with:    bnjax predict --workdir {out} --split test")
    return 0


def _latencies(networks: Any, shape: Any, jax: Any) -> Iterator[tuple[int, float, float]]:
    """Yields batch sizes and the median seconds of a prediction of each network, in turns."""
    import numpy as np

    from bnjax.train.cpu import compiler_options
    from bnjax.train_step import predict_step

    for size in BATCHES:
        options = compiler_options(size)
        calls = []
        for network in networks:
            step = functools.partial(predict_step, model=network.model)
            compiled = jax.jit(step, compiler_options=options)
            images = np.zeros((size, *shape), np.uint8)
            calls.append(functools.partial(compiled, network.params, network.batch_stats, images))
            jax.block_until_ready(calls[-1]())
        times: tuple[list[float], list[float]] = ([], [])
        until = time.perf_counter() + SECONDS
        while len(times[0]) < 5 or time.perf_counter() < until:
            for call, own in zip(calls, times, strict=True):
                start = time.perf_counter()
                jax.block_until_ready(call())
                own.append(time.perf_counter() - start)
        yield size, statistics.median(times[0]), statistics.median(times[1])
