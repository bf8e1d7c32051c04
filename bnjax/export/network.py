"""A network to try: its scores, whatever its batch norms normalise by, compiled before use."""

import dataclasses
import functools
import operator
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from bnjax.clinic.layers import Mode, norm_layers, nothing_seen, observe
from bnjax.export.exported import Exported
from bnjax.train.cpu import compiler_options
from bnjax.train.trained import Trained
from bnjax.train_step import classes_and_scores
from bnjax.types import Array, Batch, BatchStats, Params

STORED, BATCH, NONE = "stored", "batch", "none"
SIZES = (1, 8, 32)  # of the batches that programs are compiled for; smaller ones are padded


class Layer(NamedTuple):
    """Means and variances, float32 [channels], of a batch norm or of what it was given.

    `values` is of how many in a channel: None for averages.
    """

    name: str
    mean: np.ndarray
    var: np.ndarray
    values: int | None = None


class Answer(NamedTuple):
    """What a network says of n images: `class` [n] and `score` [n, classes], and the rest.

    `given` is what each batch norm was given, in the order of the calls; empty if unknown.
    """

    predicted: dict[str, np.ndarray]
    given: list[Layer]


@dataclasses.dataclass(frozen=True)
class About:
    """What a network is.

    Attributes:
        kind: "run" or "exported".
        name: of the config.
        step: of the checkpoint.
        dataset: that it was trained on.
        classes: their names, in the order of the scores.
        image_shape: of what it takes, [h, w, c].
        statistics: what its batch norms can normalise by, of "stored", "batch" and "none".
        folded: the norms that are no more, and the layers that have them now.
    """

    kind: str
    name: str
    step: int
    dataset: str
    classes: tuple[str, ...]
    image_shape: tuple[int, int, int]
    statistics: tuple[str, ...]
    folded: Mapping[str, str]


class Network(Protocol):
    """What can be tried; `stored` are the running statistics."""

    about: About
    stored: list[Layer]

    def predict(self, images: Array, statistics: str) -> Answer:
        """Returns what it says of images float32 [n, h, w, c] from 0 to 1, n at most SIZES[-1]."""


class RunNetwork:
    """The network of a run, with its batch norms."""

    def __init__(self, trained: Trained):
        """Compiles what `predict` may be asked for."""
        shape = trained.data.image_shape
        layers = norm_layers(
            trained.model,
            trained.params,
            trained.batch_stats,
            {"image": np.zeros((SIZES[-1], *shape), np.float32)},
            train=False,
        )
        self._paths = [layer.path for layer in layers]
        params, stored = jax.device_put((trained.params, trained.batch_stats))
        # "batch" takes nothing from them but their shapes.
        stats = {STORED: stored, BATCH: stored, NONE: no_statistics(stored)}
        self._variables = {name: (params, one) for name, one in stats.items()}
        self.stored = [_layer(path, _at(trained.batch_stats, path)) for path in self._paths]
        modes: tuple[Mode, ...] = ("running", "batch") if layers else ("running",)
        wanted = [(mode, size) for mode in modes for size in SIZES]
        self._programs = {
            (mode, size): self._compiled(trained, mode, size)
            for mode, size in tqdm.tqdm(wanted, "compiling", unit="program", disable=None)
        }
        self.about = About(
            "run",
            trained.config.name,
            trained.step,
            trained.data.label,
            tuple(trained.data.classes),
            shape,
            (STORED, BATCH, NONE) if layers else (STORED,),
            {
                ".".join(norm): ".".join(layer)
                for norm, layer in getattr(trained.model, "pairs", ())
            },
        )

    def predict(self, images: Array, statistics: str) -> Answer:
        """Returns scores, and what the norms were given; see `Network`."""
        size = size_for(len(images))
        batch = {
            "image": padded(np.asarray(images, np.float32), size),
            "mask": np.arange(size) < len(images),
        }
        program = self._programs["batch" if statistics == BATCH else "running", size]
        predicted, seen = jax.device_get(program(*self._variables[statistics], batch))
        real = {name: rows[: len(images)] for name, rows in predicted.items()}
        given = [
            _layer(path, found._asdict())._replace(values=int(found.count.max()))
            for path, found in ((path, seen[path]) for path in self._paths)
        ]
        return Answer(real, given)

    def _compiled(self, trained: Trained, mode: Mode, size: int) -> Any:
        batch = {
            "image": jax.ShapeDtypeStruct((size, *trained.data.image_shape), jnp.float32),
            "mask": jax.ShapeDtypeStruct((size,), jnp.bool_),
        }
        classify = functools.partial(_classify, model=trained.model, mode=mode)
        jitted = jax.jit(classify, compiler_options=compiler_options(size))
        return jitted.lower(*self._variables[STORED], batch).compile()


class ExportedNetwork:
    """An exported network, whose batch norms are in its program or folded."""

    def __init__(self, exported: Exported):
        """Compiles what `predict` may be asked for."""
        self._weights = exported.weights
        self._programs = {
            size: exported.compiled(size)
            for size in tqdm.tqdm(SIZES, "compiling", unit="program", disable=None)
        }
        found = exported.manifest
        height, width, channels = found.image_shape
        self.stored = []
        for name in self._weights:
            path, _, leaf = name.removeprefix("batch_stats.").rpartition(".")
            if name.startswith("batch_stats.") and leaf == "mean":
                moments = {
                    one: self._weights[f"batch_stats.{path}.{one}"] for one in ("mean", "var")
                }
                self.stored.append(_layer((path,), moments))
        self.about = About(
            "exported",
            found.name,
            found.step,
            found.dataset,
            tuple(found.classes),
            (height, width, channels),
            (STORED,),
            found.folded,
        )

    def predict(self, images: Array, statistics: str) -> Answer:
        """Returns scores under the stored statistics, of pixels that are rounded to 8 bits."""
        size = size_for(len(images))
        pixels = np.round(np.asarray(images) * 255).astype(np.uint8)
        logits = self._programs[size](self._weights, padded(pixels, size))[: len(images)]
        return Answer(jax.device_get(classes_and_scores(logits)), [])


def no_statistics(batch_stats: BatchStats) -> BatchStats:
    """Returns running statistics that change nothing: means of 0 and variances of 1."""
    values = {"mean": jnp.zeros_like, "var": jnp.ones_like}

    def blank(path: Any, leaf: Array) -> Array:
        return values.get(path[-1].key, jnp.asarray)(leaf)

    return jax.tree_util.tree_map_with_path(blank, batch_stats)


def size_for(images: int) -> int:
    """Returns the size of the batch that as many images are computed in.

    >>> [size_for(images) for images in (1, 2, 8, 9, 32)]
    [1, 8, 8, 32, 32]
    """
    return next(size for size in SIZES if size >= images)


def padded(images: np.ndarray, size: int) -> np.ndarray:
    """Returns the images with empty ones after them."""
    filling = np.zeros((size - len(images), *images.shape[1:]), images.dtype)
    return np.concatenate([images, filling])


def _at(batch_stats: BatchStats, path: tuple[str, ...]) -> Mapping[str, Any]:
    return functools.reduce(operator.getitem, path, batch_stats)


def _layer(path: tuple[str, ...], moments: Mapping[str, Any]) -> Layer:
    return Layer(".".join(path), np.ravel(moments["mean"]), np.ravel(moments["var"]))


def _classify(
    params: Params, batch_stats: BatchStats, batch: Batch, *, model: Any, mode: Mode
) -> tuple[dict[str, jax.Array], Any]:
    nothing = nothing_seen(batch_stats)
    logits, seen = observe(params, batch_stats, nothing, batch, model=model, mode=mode)
    return classes_and_scores(logits), seen
