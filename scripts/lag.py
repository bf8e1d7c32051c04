"""Draws how running averages lag behind the batch statistics, for `scripts/pictures.py`."""

import functools
import io
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

from bnjax.data.batches import TrainRows, take
from bnjax.norms.moments import Moments
from bnjax.norms.running_average import Averages, updated_average
from bnjax.train import build, parsing
from bnjax.train.cpu import compiler_options
from bnjax.train_step import init_state, train_step

STEPS, BATCH, LAYER = 200, 128, "dense1_norm"
# The colours are distinct for colour-blind readers; in greyscale, the dashes are.
AVERAGES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "momentum 0.9": ({"momentum": 0.9, "debias": False}, {"color": "#2a78b5"}),
    "momentum 0.99": ({"momentum": 0.99, "debias": False}, {"color": "#d55e00", "linestyle": "--"}),
    "0.99, debiased": ({"momentum": 0.99, "debias": True}, {"color": "#1a9873", "linestyle": "-."}),
}


def lag(words: Sequence[str]) -> bytes:
    """Returns an SVG of a channel's batch statistics and of three running averages of them.

    Args:
        words: config keys for training, of the form `--config.KEY=VALUE`.
    """
    matplotlib.use("svg")
    from matplotlib import pyplot

    data, batches = moments(words)
    steps, out = 1 + np.arange(STEPS), io.BytesIO()
    with pyplot.rc_context({"svg.hashsalt": "bnjax", "svg.fonttype": "none", "font.size": 13}):
        figure, panels = pyplot.subplots(2, figsize=(9, 7), sharex=True, layout="constrained")
        for panel, i, what in zip(panels, (0, 1), ("mean", "variance"), strict=True):
            panel.plot(steps, batches[i], color="0.65", linewidth=1, label="each batch")
            for name, (options, style) in AVERAGES.items():
                line = averages(batches, **options)[i]
                panel.plot(steps, line, **style, linewidth=2.4, label=name)
            panel.set(ylabel=f"{what} of the input", xlim=(0, STEPS), ylim=(0, None))
            panel.spines[["top", "right"]].set_visible(False)
            panel.grid(alpha=0.25)
        panels[0].set_title(f"One channel of a batch norm in training ({data})", pad=14)
        panels[1].set_xlabel(f"training steps of {BATCH} images")
        lines, names = panels[0].get_legend_handles_labels()
        figure.legend(lines, names, loc="outside lower center", ncols=4, frameon=False)
        figure.savefig(out, metadata={"Date": None})
        pyplot.close(figure)
    return out.getvalue()


def moments(words: Sequence[str]) -> tuple[str, Moments]:
    """Trains a network; returns the name of its data set and the statistics of each batch [steps].

    In the layer `LAYER`, the channel whose mean changes most is chosen. With a momentum of 0, the
    running averages are the statistics of the latest batch.
    """
    more = (f"--config.train.steps={STEPS}", "--config.model.momentum=0")
    config = parsing.load("digits", [*words, *more])
    dataset = build.dataset(config)
    experiment = build.experiment(config, dataset)
    model, tx = experiment.model, experiment.tx
    rows = TrainRows(len(dataset.train), BATCH, seed=0)
    init = jax.jit(functools.partial(init_state, model, tx))
    bound = functools.partial(train_step, model=model, tx=tx)
    step = jax.jit(bound, compiler_options=compiler_options())
    state, batch_stats = init(jax.random.key(0), take(dataset.train, rows(0))["image"])
    found = []
    for i in range(STEPS):
        state, batch_stats, _ = step(state, batch_stats, take(dataset.train, rows(i)))
        found.append(jax.device_get(batch_stats[LAYER]))
    mean, var = (np.stack([one[leaf] for one in found]) for leaf in ("mean", "var"))
    channel = np.abs(mean[-1] - mean[0]).argmax()
    return dataset.label, Moments(mean[:, channel], var[:, channel], np.float32(BATCH))


def averages(batches: Moments, momentum: float, debias: bool) -> tuple[np.ndarray, np.ndarray]:
    """Returns the running mean and variance after each batch, float32 [steps]."""

    def update(old: Any, batch: Moments) -> Any:
        new = updated_average(old, batch, momentum, debias, "biased", masked=False)
        return new, new[:2]

    start = Averages(jnp.float32(0), jnp.float32(1), jnp.int32(0))
    counts = jnp.full(len(batches.mean), batches.count)
    _, found = jax.lax.scan(update, start, batches._replace(count=counts))
    return jax.device_get(found)
