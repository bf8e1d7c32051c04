"""Runs to and from the weights of other frameworks."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bnjax.clinic import weights_file
from bnjax.clinic.conventions import STORED, convert_variance, norm_fields, our_fields
from bnjax.clinic.layers import NormLayer, norm_layers
from bnjax.clinic.layouts import Framework, Table, read_table
from bnjax.clinic.port import check_logits, port_from, port_to
from bnjax.clinic.torch_convnet import convnet_table, torch_source
from bnjax.errors import UserError
from bnjax.models.convnet import ConvNet
from bnjax.models.resnet import TORCHVISION, ResNet
from bnjax.models.speednet import SpeedNet
from bnjax.train import network, rundir
from bnjax.train.checkpoint import Checkpoints
from bnjax.train.optimizer import optimizer
from bnjax.train.summary import versions
from bnjax.train.trained import Trained
from bnjax.train_step import TrainState, forward
from bnjax.types import BatchStats, Params

NOTE = "norms"  # under which a file says the fields of its norms, as the framework has them
VARIANCE = "variance"  # under which it says what its variances are, "biased" or "unbiased"
PROBE_IMAGES = 8


def export_run(
    trained: Trained,
    framework: Framework,
    file: Path,
    *,
    table: Path | None = None,
    probe: Path | None = None,
    examples: int | None = None,
) -> str:
    """Writes a run's weights and statistics for another framework; returns what to say of it.

    Args:
        trained: the run.
        framework: the other one.
        file: what to write.
        table: a JSON file with the names of the layers there; None: the same.
        probe: also write these images and their logits, to be checked there.
        examples: of a training batch, to convert the stored variance; None: leave it.
    """
    shape, stats = trained.data.image_shape, trained.batch_stats
    layers = _layers(trained.model, trained.params, stats, shape)
    if examples is not None:
        stats = convert_variance(stats, layers, examples, wanted=STORED[framework])
    arrays = port_to(framework, trained.params, stats, _table(trained.model, shape, table))
    for key, value in arrays.items():
        if key.endswith("num_batches_tracked") and not value:
            arrays[key] = np.array(trained.step, np.int64)
    notes = {"format": "pt"} if framework == "torch" else {}
    if layers:
        module = layers[0].module
        notes[NOTE] = json.dumps(norm_fields(framework, module.epsilon, module.momentum))
        notes[VARIANCE] = layers[0].variance if examples is None else STORED[framework]
    weights_file.write(file, arrays, notes)
    said = [f"{file}: {len(arrays)} arrays of {trained.workdir}, step {trained.step}"]
    if layers and examples is None and layers[0].variance != STORED[framework]:
        said.append(
            f"running variances are as they were stored, {layers[0].variance}; {framework} stores "
            f"{STORED[framework]} ones (--examples N converts, and changes the logits by 1/n)"
        )
    if probe is not None:
        images = np.random.default_rng(0).random((PROBE_IMAGES, *shape), np.float32)
        with jax.default_matmul_precision("highest"):
            batch = {"image": images}
            logits, _ = forward(trained.params, stats, batch, model=trained.model, train=False)
        if framework == "torch":
            images = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
        weights_file.write(probe, {"image": images, "logits": np.array(logits)}, {})
        said.append(f"{probe}: {PROBE_IMAGES} images and the logits of the network")
    if getattr(trained.model, "mean", ()):
        said.append(f"before its first layer the network standardises pixels: {_pixels(trained)}")
    if framework == "torch" and table is None and isinstance(trained.model, ConvNet):
        said += ["", torch_source(trained.model, shape)]
    return "\n".join(said)


def import_run(
    trained: Trained,
    framework: Framework,
    file: Path,
    out: Path,
    *,
    table: Path | None = None,
    probe: Path | None = None,
    examples: int | None = None,
    epsilon: float | None = None,
    momentum: float | None = None,
) -> str:
    """Makes a run's folder of another framework's weights; returns what to say of it.

    Args:
        trained: a run with the same network and data.
        framework: the other one.
        file: its weights.
        out: the new folder.
        table: a JSON file with the names of the layers there; None: the same.
        probe: a file with `image` and `logits`, what the other network computes.
        examples: of a training batch there, to convert the stored variance into what this run's
            norms store; None: leave it, and let the new run's norms store what theirs does.
        epsilon: of their norms; None: as the file says, or as the run has it.
        momentum: likewise, in their meaning.

    Raises:
        UserError: if the networks differ, by their keys, or by the logits of the probe batch.
    """
    arrays, notes = weights_file.read(file)
    config, shape = trained.config.copy_and_resolve_references(), trained.data.image_shape
    fields = norm_fields(framework, config.model.epsilon, config.model.momentum)
    name = "eps" if framework == "torch" else "epsilon"
    fields |= _noted(file, notes, set(fields))
    fields |= {} if epsilon is None else {name: epsilon}
    fields |= {} if momentum is None else {"momentum": momentum}
    own = our_fields(framework, fields[name], fields["momentum"])
    if own["momentum"] is None:
        raise UserError(f"{file} has momentum = None, and a run's is a number: give --momentum.")
    config.model.epsilon, config.model.momentum = own["epsilon"], own["momentum"]
    # A file that bnjax wrote may have them as the run before had, whatever the framework stores.
    stored = notes.get(VARIANCE, own["variance"])
    if stored not in ("biased", "unbiased"):
        raise UserError(f"{file}: its note {VARIANCE!r} is damaged: {stored!r}")
    if examples is None:
        config.model.variance = stored
    model = network.model(config.model, len(trained.data.classes), shape)
    like = (trained.params, trained.batch_stats)
    params, stats = port_from(framework, arrays, like, _table(model, shape, table))
    said = [f"{out}: {file}, {len(arrays)} arrays, all accounted for"]
    if broken := [name for name, array in arrays.items() if not np.isfinite(array).all()]:
        said.append(f"WARNING: numbers that are not finite in {', '.join(broken)}")
    if probe is not None:
        batch, _ = weights_file.read(probe)
        if not {"image", "logits"} <= set(batch) or not batch["image"].size:
            raise UserError(f"{probe} is no probe batch: it has to have `image` and `logits`.")
        images = batch["image"]
        if framework == "torch" and images.ndim == 4:
            images = images.transpose(0, 2, 3, 1)
        if images.shape[1:] != shape:
            raise UserError(
                f"the images of {probe} are {list(images.shape[1:])} as [h, w, c], and those of "
                f"the network {list(shape)}."
            )
        difference = check_logits(model, params, stats, images, batch["logits"])
        said.append(f"the logits of {len(images)} images differ by {difference:.1e} at most")
    if examples is not None:
        layers = _layers(model, params, stats, shape)
        stats = convert_variance(stats, layers, examples, stored=stored)
    steps = [int(value) for key, value in arrays.items() if key.endswith("num_batches_tracked")]
    state = TrainState(
        jnp.int32(max(steps, default=0)),
        params,
        optimizer(config, 1).init(params),
        jax.random.split(jax.random.key(config.seed))[1],
    )
    said.append(
        f"norms: epsilon {own['epsilon']:g}, momentum {own['momentum']:g} (the fraction that is "
        f"kept), variance {config.model.variance}"
    )
    with rundir.locked(out):
        if (out / "config.json").exists():
            raise UserError(f"{out} holds a run already. Choose another folder with --out.")
        rundir.take(out, config, trained.data)
        about: dict[str, Any] = {"config": config.to_dict(), "versions": versions()}
        about |= {"norm": rundir.norm_conventions(config), "ported_from": framework}
        with Checkpoints(out / "checkpoints") as checkpoints:
            checkpoints.save(state, stats, None, about)
    return "\n".join([*said, "", f"predict with:    bnjax predict --workdir {out} --split test"])


def _table(model: Any, shape: tuple[int, int, int], file: Path | None) -> Table:
    """Returns the table that the user gives, with what the network knows of itself added."""
    if isinstance(model, ConvNet):
        table = convnet_table(model, shape)
    elif isinstance(model, ResNet):
        table = Table(TORCHVISION)
    elif isinstance(model, SpeedNet):
        table = Table()
    else:
        raise UserError(
            f"the run's network is {type(model).__name__}, which the command does not port: train "
            "it unfolded. bnjax.clinic.port has the functions for any linen model."
        )
    if file is None:
        return table
    given = read_table(file)
    return Table(given.names, {**table.flattened, **given.flattened}, given.depthwise)


def _pixels(trained: Trained) -> str:
    mean, std = (tuple(trained.config.model[key]) for key in ("mean", "std"))
    return f"(x - {mean}) / {std} for each channel, white 1"


def _layers(
    model: Any, params: Params, batch_stats: BatchStats, shape: tuple[int, int, int]
) -> tuple[NormLayer, ...]:
    batch = {"image": np.zeros((1, *shape), np.float32)}
    return norm_layers(model, params, batch_stats, batch, train=False)


def _noted(file: Path, notes: dict[str, str], known: set[str]) -> dict[str, Any]:
    """Returns what a file says of its norms; nothing if it says nothing."""
    try:
        found = json.loads(notes.get(NOTE, "{}"))
        return {name: float(found[name]) for name in known & set(found)}
    except (ValueError, TypeError) as error:
        raise UserError(f"{file}: its note {NOTE!r} is damaged: {notes[NOTE]!r}") from error
