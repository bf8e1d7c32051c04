"""`bnjax port`: weights and running statistics to PyTorch or Keras, or from there."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from bnjax.commands import Checkpoint, Workdir
from bnjax.errors import UserError

if TYPE_CHECKING:
    from bnjax.clinic.porting import Framework, Table
    from bnjax.train.trained import Trained

NORMS = "norms"  # the note of a file with the fields of its norms, in the framework's words
VARIANCE = "variance"  # the note with its variances, "biased" or "unbiased"
PROBE_IMAGES = 8


def run(
    file: Annotated[Positional[Path], arg(metavar="FILE", help="the weights, as safetensors")],
    workdir: Workdir,
    checkpoint: Checkpoint = "last",
    to: Annotated[Literal["torch", "keras"] | None, arg(help="write FILE, from the run")] = None,
    source: Annotated[
        Literal["torch", "keras"] | None, arg(name="from", help="read FILE, into --out")
    ] = None,
    out: Annotated[
        Path | None, arg(metavar="DIR", help="--from: the folder of the new run")
    ] = None,
    table: Annotated[
        Path | None, arg(metavar="JSON", help="the names of the layers there; by default as here")
    ] = None,
    probe: Annotated[
        Path | None,
        arg(
            metavar="FILE",
            help="a file with `image` and `logits`: --to writes one; --from refuses weights whose "
            "logits differ by more than 1e-4",
        ),
    ] = None,
    examples: Annotated[
        int | None,
        arg(
            metavar="N",
            help="the images of a training batch, to convert stored variances between n and n - 1; "
            "by default they stay, so that the logits are equal",
        ),
    ] = None,
    epsilon: Annotated[
        float | None, arg(metavar="X", help="--from: of the norms there, if FILE does not say it")
    ] = None,
    momentum: Annotated[
        float | None, arg(metavar="X", help="--from: likewise, in the framework's meaning")
    ] = None,
) -> int:
    """Take a run's weights and running statistics to PyTorch or Keras, or from there into a run.

    Files are safetensors; nothing is unpickled. In torch: save_file(network.state_dict(), FILE) and
    network.load_state_dict(load_file(FILE)) of safetensors.torch. In Keras 3: save_file({v.path:
    v.numpy() for v in network.weights}, FILE) of safetensors.numpy, and v.assign(load_file(FILE)
    [v.path]). The network has to have the layers of that in --workdir. A table of names is JSON,
    our layers first: {"names": {"conv{i}": "features.{i}", "{layer}": "{layer}"}}.
    """
    if bool(to) == bool(source):
        raise UserError("give either --to or --from.")
    if source and out is None:
        raise UserError("--from makes a new run: say in which folder with --out.")
    if to and (out, epsilon, momentum) != (None, None, None):
        raise UserError("--out, --epsilon and --momentum are of --from.")
    if examples is not None and examples < 1:
        raise UserError(f"--examples {examples} is too few: give 1 or above.")
    from bnjax.train.cpu import prepare
    from bnjax.train.trained import Trained

    prepare()
    trained = Trained(workdir, checkpoint)
    if to:
        lines = _export(trained, to, file, table, probe, examples)
    else:
        norms = {"epsilon": epsilon, "momentum": momentum}
        lines = _import(trained, source, file, out, table, probe, examples, norms)  # type: ignore[arg-type]
    print("\n".join(lines))
    return 0


def _export(
    trained: "Trained",
    framework: "Framework",
    file: Path,
    table: Path | None,
    probe: Path | None,
    examples: int | None,
) -> list[str]:
    """Writes FILE; returns what to print."""
    import jax
    import numpy as np

    from bnjax.clinic import porting
    from bnjax.train_step import forward

    network, shape = trained.network, trained.data.image_shape
    stats, stored = network.batch_stats, porting.STORED[framework]
    norms = network.norms({"image": np.zeros((1, *shape), np.float32)})
    if examples is not None:
        stats = porting.convert_variance(stats, norms, examples, wanted=stored)
    arrays = porting.port_to(framework, network.params, stats, _table(trained.model, shape, table))
    for key, value in arrays.items():
        if key.endswith("num_batches_tracked") and not value:
            arrays[key] = np.array(trained.step, np.int64)
    notes = {"format": "pt"} if framework == "torch" else {}
    if norms:
        fields = norms[0].module
        notes[NORMS] = json.dumps(porting.norm_fields(framework, fields.epsilon, fields.momentum))
        notes[VARIANCE] = norms[0].variance if examples is None else stored
    porting.write(file, arrays, notes)
    lines = [f"{file}: {len(arrays)} arrays of {trained.workdir}, step {trained.step}"]
    if norms and examples is None and norms[0].variance != stored:
        lines.append(
            f"running variances are as they were stored, {norms[0].variance}; {framework} stores "
            f"{stored} ones (--examples N converts, and changes the logits by 1/n)"
        )
    if probe is not None:
        images = np.random.default_rng(0).random((PROBE_IMAGES, *shape), np.float32)
        with jax.default_matmul_precision("highest"):
            batch = {"image": images}
            logits, _ = forward(network.params, stats, batch, model=network.model, train=False)
        if framework == "torch":
            images = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
        porting.write(probe, {"image": images, "logits": np.array(logits)}, {})
        lines.append(f"{probe}: {PROBE_IMAGES} images and the logits of the network")
    if getattr(trained.model, "mean", ()):
        mean, std = (tuple(trained.config.model[key]) for key in ("mean", "std"))
        lines.append(
            "before its first layer the network standardises pixels: "
            f"(x - {mean}) / {std} for each channel, white 1"
        )
    return lines


def _import(
    trained: "Trained",
    framework: "Framework",
    file: Path,
    out: Path,
    table: Path | None,
    probe: Path | None,
    examples: int | None,
    norms: dict[str, float | None],
) -> list[str]:
    """Makes a run's folder of FILE; returns what to print."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from bnjax.clinic import Network, porting
    from bnjax.train import build, rundir
    from bnjax.train.checkpoint import Checkpoints
    from bnjax.train.optimizers import optimizer
    from bnjax.train_step import TrainState

    arrays, notes = porting.read(file)
    config, shape = trained.config.copy_and_resolve_references(), trained.data.image_shape
    name = "eps" if framework == "torch" else "epsilon"
    fields = porting.norm_fields(framework, config.model.epsilon, config.model.momentum)
    try:
        noted = json.loads(notes.get(NORMS, "{}"))
        fields |= {key: float(noted[key]) for key in fields if key in noted}
        stored = {"biased": "biased", "unbiased": "unbiased"}[
            notes.get(VARIANCE, porting.STORED[framework])
        ]
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"the notes of {file} are damaged ({error}).") from error
    given = {name: norms["epsilon"], "momentum": norms["momentum"]}
    fields |= {key: value for key, value in given.items() if value is not None}
    own = porting.our_fields(framework, fields[name], fields["momentum"])
    if own["momentum"] is None:
        raise UserError(f"{file} has momentum = None, and a run's is a number: give --momentum.")
    config.model.epsilon, config.model.momentum = own["epsilon"], own["momentum"]
    if examples is None:
        config.model.variance = stored
    model = build.network(config.model, len(trained.data.classes), shape)
    like = (trained.params, trained.batch_stats)
    params, stats = porting.port_from(framework, arrays, like, _table(model, shape, table))
    lines = [f"{out}: {file}, {len(arrays)} arrays, all accounted for"]
    if broken := [key for key, array in arrays.items() if not np.isfinite(array).all()]:
        lines.append(f"WARNING: numbers that are not finite in {', '.join(broken)}")
    if probe is not None:
        batch, _ = porting.read(probe)
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
        difference = porting.check_logits(model, params, stats, images, batch["logits"])
        lines.append(f"the logits of {len(images)} images differ by {difference:.1e} at most")
    if examples is not None:
        layers = Network(params, stats, model).norms({"image": np.zeros((1, *shape), np.float32)})
        stats = porting.convert_variance(stats, layers, examples, stored=stored)
    steps = [int(value) for key, value in arrays.items() if key.endswith("num_batches_tracked")]
    state = TrainState(
        jnp.int32(max(steps, default=0)),
        params,
        optimizer(config, 1).init(params),
        jax.random.split(jax.random.key(config.seed))[1],
    )
    with rundir.locked(out):
        if (out / "config.json").exists():
            raise UserError(f"{out} holds a run already. Choose another folder with --out.")
        rundir.take(out, config, trained.data)
        about: dict[str, Any] = {"config": config.to_dict(), "versions": rundir.versions()}
        about |= {"norm": rundir.norm_conventions(config), "ported_from": framework}
        with Checkpoints(out / "checkpoints") as checkpoints:
            checkpoints.save(state, stats, None, about)
    return [
        *lines,
        f"norms: epsilon {own['epsilon']:g}, momentum {own['momentum']:g} (the fraction that is "
        f"kept), variance {config.model.variance}",
        f"\npredict with:    bnjax predict --workdir {out} --split test",
    ]


def _table(model: Any, shape: tuple[int, int, int], file: Path | None) -> "Table":
    """Returns the user's table of names, and the network's own flattened layers."""
    from bnjax.clinic.porting import Table, convnet_table, read_table
    from bnjax.models.convnet import ConvNet
    from bnjax.models.resnet import TORCHVISION, ResNet
    from bnjax.models.speednet import SpeedNet

    if isinstance(model, ConvNet):
        own = convnet_table(model, shape)
    elif isinstance(model, ResNet | SpeedNet):
        own = Table(TORCHVISION if isinstance(model, ResNet) else None)
    else:
        raise UserError(
            f"the run's network is {type(model).__name__}, which the command does not port: use "
            "the run that is not folded. bnjax.clinic.porting takes any linen model."
        )
    if file is None:
        return own
    given = read_table(file)
    return Table(given.names, {**own.flattened, **given.flattened}, given.depthwise)
