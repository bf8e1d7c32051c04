"""The folded network of a run: checked against the one that was trained, and timed."""

import functools
import statistics
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bnjax.clinic.fold import Folding, difference
from bnjax.clinic.folded import Folded
from bnjax.errors import UserError
from bnjax.train import network
from bnjax.train.cpu import compiler_options
from bnjax.train.trained import Trained
from bnjax.train_step import forward, predict_step
from bnjax.types import BatchStats, Images, Params, named_leaves

TOLERANCE = 1e-5  # in units of the largest logit
PROBE = 256  # images
BATCHES = (1, 32, 1024)
SECONDS = 4.0  # that the repeats of one size may take


def probe(trained: Trained, data_dir: str | None) -> tuple[Images, str]:
    """Returns images that both networks are tried on, uint8 [n, h, w, c], and what they are.

    Without a folder of the data, noise: each image with a mean and a contrast of its own.
    """
    if data_dir is not None:
        return trained.dataset(data_dir).test.select(slice(PROBE)).image, "test images"
    rng = np.random.default_rng(0)
    each = (PROBE, 1, 1, 1)
    noise = rng.uniform(-1, 1, (PROBE, *trained.data.image_shape)) * rng.uniform(0, 128, each)
    return np.clip(rng.uniform(0, 255, each) + noise, 0, 255).astype(np.uint8), "images of noise"


def check(trained: Trained, folding: Folding, data_dir: str | None) -> dict[str, Any]:
    """Returns how far the logits of the folded network are from those of the trained one.

    As `difference`, under "difference", and under "difference_in_bfloat16" with the arithmetic of a
    run in bfloat16, whose rounding would hide what is wrong.

    Raises:
        UserError: if it is more than `TOLERANCE` with all arithmetic in float32.
    """
    images, what = probe(trained, data_dir)
    config = trained.config.model.copy_and_resolve_references()
    low = "bfloat16" in (config.dtype, config.dense_product)
    config.dtype = config.dense_product = "float32"
    configs = (config, trained.config.model)[: 1 + low]
    found = []
    for of in configs:
        plain = network.model(of, len(trained.data.classes), trained.data.image_shape)
        before = Folded(plain, trained.folded) if trained.folded else plain
        after = Folded(plain, folding.model.pairs)
        one = logits(before, trained.params, trained.batch_stats, images)
        other = logits(after, folding.params, folding.batch_stats, images)
        found.append(difference(one, other))
    if not found[0] <= TOLERANCE:
        raise UserError(
            f"the logits of the folded network differ on {len(images)} {what} by {found[0]:.1e} of "
            f"the largest, more than {TOLERANCE}, and nothing is written. A mean that is large "
            "against its standard deviation, as in a layer whose inputs hardly vary, or statistics "
            "that were never updated can cause it: look at them with bnjax audit."
        )
    about = {"probe": f"{len(images)} {what}", "difference": found[0]}
    return about | ({"difference_in_bfloat16": found[1]} if low else {})


def latencies(trained: Trained, folding: Folding) -> Iterator[tuple[int, float, float]]:
    """Yields the size of a batch, and the median seconds of a prediction before and after.

    The two take turns, so that what else the machine does meets both.
    """
    networks = (
        (trained.model, trained.params, trained.batch_stats),
        (folding.model, folding.params, folding.batch_stats),
    )
    for size in BATCHES:
        images = jnp.zeros((size, *trained.data.image_shape), jnp.uint8)
        calls = [
            functools.partial(
                jax.jit(
                    functools.partial(predict_step, model=model),
                    compiler_options=compiler_options(size),
                ),
                params,
                batch_stats,
                images,
            )
            for model, params, batch_stats in networks
        ]
        times: tuple[list[float], list[float]] = ([], [])
        for call in calls:
            jax.block_until_ready(call())
        until = time.perf_counter() + SECONDS
        while len(times[0]) < 5 or time.perf_counter() < until:
            for call, own in zip(calls, times, strict=True):
                start = time.perf_counter()
                jax.block_until_ready(call())
                own.append(time.perf_counter() - start)
        yield size, statistics.median(times[0]), statistics.median(times[1])


def table(folding: Folding) -> str:
    """Returns a line for each norm: its name, and what it was folded into or why not."""
    width = max((len(".".join(one.norm)) for one in folding.norms), default=0)
    lines = []
    for one in folding.norms:
        if one.layer is None:
            text = f"stays: {one.reason}"
        else:
            text = f"folded into {'.'.join(one.layer)}, which it {_STOOD[one.place or 'after']}"
        lines.append(f"{'.'.join(one.norm):{width}}  {text}")
    return "\n".join(lines)


_STOOD = {"after": "followed", "before": "preceded"}


def numbers(params: Params, batch_stats: BatchStats) -> int:
    """Returns how many numbers a network consists of."""
    return sum(leaf.size for leaf in named_leaves([params, batch_stats]).values())


def logits(model: Any, params: Params, batch_stats: BatchStats, images: Images) -> jax.Array:
    """Returns the logits of a network in evaluation, all images at once."""
    run = jax.jit(
        functools.partial(forward, model=model, train=False), compiler_options=compiler_options()
    )
    return run(params, batch_stats, {"image": images})[0]
