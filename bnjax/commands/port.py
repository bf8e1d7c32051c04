"""`bnjax port`: converts weights and running statistics to or from PyTorch or Keras."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from bnjax.commands import Checkpoint, Workdir
from bnjax.errors import UserError

if TYPE_CHECKING:
    from bnjax.clinic.linen import Linen
    from bnjax.clinic.porting import Framework, Table
    from bnjax.train.trained import Trained

PROBE_IMAGES = 8
TOLERANCE = 1e-4  # the largest accepted difference between logits


def run(
    file: Annotated[
        Positional[Path], arg(metavar="FILE", help="the safetensors file with the weights")
    ],
    workdir: Workdir,
    checkpoint: Checkpoint = "last",
    to: Annotated[Literal["torch", "keras"] | None, arg(help="write the network to FILE")] = None,
    source: Annotated[
        Literal["torch", "keras"] | None, arg(name="from", help="create a run in --out from FILE")
    ] = None,
    out: Annotated[
        Path | None, arg(metavar="DIR", help="with --from: the folder of the new run")
    ] = None,
    table: Annotated[
        Path | None,
        arg(metavar="JSON", help="the framework's layer names; default: those of bnjax"),
    ] = None,
    probe: Annotated[
        Path | None,
        arg(
            metavar="FILE",
            help="a file with `image` and `logits`; --to writes the file; --from rejects weights "
            "whose logits differ from those in the file by more than 1e-4",
        ),
    ] = None,
) -> int:
    """Convert weights and running statistics between a run and PyTorch or Keras.

    Files are in the safetensors format, without pickle. In PyTorch, use safetensors.torch:
    save_file(network.state_dict(), FILE) and network.load_state_dict(load_file(FILE)). In Keras 3,
    use safetensors.numpy: save_file({v.path: v.numpy() for v in network.weights}, FILE) and
    v.assign(load_file(FILE)[v.path]). The network needs the same layers and epsilon as the network
    in --workdir. A table of names is JSON that maps the layers of bnjax to those of the framework:
    {"names": {"conv{i}": "features.{i}", "{layer}": "{layer}"}}.
    """
    if bool(to) == bool(source):
        raise UserError("give either --to or --from.")
    if bool(source) != bool(out):
        raise UserError("--from creates a run and needs --out for its folder; --to does not.")
    from bnjax.train.cpu import prepare
    from bnjax.train.trained import Trained

    prepare()
    trained = Trained(workdir, checkpoint)
    names = _table(trained, table)
    if to:
        _export(trained, to, file, names, probe)
    elif source and out:
        _import(trained, source, file, names, probe, out)
    return 0


def _export(
    trained: "Trained", framework: "Framework", file: Path, table: "Table", probe: Path | None
) -> None:
    """Writes the weights and the probe batch to their files."""
    import numpy as np

    from bnjax.clinic import porting

    network, shape = trained.network, trained.data.image_shape
    arrays = porting.port_to(framework, network.params, network.batch_stats, table)
    porting.write(file, arrays)
    print(f"{file}: {len(arrays)} arrays of {trained.workdir}, step {trained.step}")
    for norm in network.norms({"image": np.zeros((1, *shape), np.float32)})[:1]:
        momentum = porting.converted_momentum(framework, norm.module.momentum)
        print(
            f"norms in {framework}: epsilon {norm.module.epsilon:g}, momentum {momentum:g}; the "
            f"variances are {norm.variance}; {framework} averages {porting.VARIANCE[framework]} "
            "variances"
        )
    if getattr(trained.model, "mean", ()):
        mean, std = (tuple(trained.config.model[key]) for key in ("mean", "std"))
        print(
            "the network first standardises pixels from 0 to 1: "
            f"(x - {mean}) / {std} for each channel"
        )
    if probe is not None:
        images = np.random.default_rng(0).random((PROBE_IMAGES, *shape), np.float32)
        there = images.transpose(0, 3, 1, 2) if framework == "torch" else images
        porting.write(probe, {"image": there, "logits": _logits(network, images)})
        print(f"{probe}: {PROBE_IMAGES} images and their logits")


def _import(
    trained: "Trained",
    framework: "Framework",
    file: Path,
    table: "Table",
    probe: Path | None,
    out: Path,
) -> None:
    """Creates the folder of a run at step 0 from the file."""
    import dataclasses

    import numpy as np

    from bnjax.clinic import linen, porting
    from bnjax.train import rundir, summary
    from bnjax.train.checkpoint import Checkpoints
    from bnjax.train.optimizers import optimizer
    from bnjax.train.steps import key_of
    from bnjax.train_step import init_state

    arrays, config = porting.read(file), trained.config.copy_and_resolve_references()
    config.model.variance = porting.VARIANCE[framework]
    like = (trained.params, trained.batch_stats)
    params, stats = porting.port_from(framework, arrays, like, table)
    if probe is not None:
        network = linen(trained.model, params, stats)
        _check(porting.read(probe), framework, network, trained.data.image_shape)
    tx = optimizer(config, 1)
    images = np.zeros((1, *trained.data.image_shape), np.uint8)
    untrained, _ = init_state(trained.model, tx, key_of(config.seed), images)
    state = dataclasses.replace(untrained, params=params, opt_state=tx.init(params))
    with rundir.locked(out):
        if (out / "config.json").exists():
            raise UserError(f"{out} already holds a run. Choose another folder with --out.")
        rundir.take(out, config, trained.data)
        about: dict[str, Any] = {"config": config.to_dict(), "versions": summary.versions()}
        about["ported_from"] = framework
        with Checkpoints(out / "checkpoints") as checkpoints:
            checkpoints.save(state, stats, None, about)
    print(
        f"{out}: {file}, {len(arrays)} arrays, all used\n"
        f"norms: epsilon {config.model.epsilon:g}, momentum {config.model.momentum:g} (the kept "
        f"fraction), variance {config.model.variance}\n"
        f"\npredict with:    bnjax predict --workdir {out} --split test"
    )


def _logits(network: "Linen", images: Any) -> Any:
    """Returns the logits computed in evaluation mode, with float32 products on every device."""
    import jax

    from bnjax.train.trained import logits

    with jax.default_matmul_precision("highest"):
        return logits(network, images)


def _check(
    probe: Any, framework: "Framework", network: "Linen", shape: tuple[int, int, int]
) -> None:
    """Compares the network's logits with those stored in the probe batch."""
    import numpy as np

    images, logits = probe.get("image", np.empty(0)), probe.get("logits", np.empty(0))
    if framework == "torch" and images.ndim == 4:
        images = images.transpose(0, 2, 3, 1)
    if images.shape[1:] != shape or not len(images) == len(logits) > 0:
        raise UserError(
            f"the probe batch needs images with the shape {[*shape]} ([h, w, c]) as `image`, and "
            "their logits as `logits`."
        )
    found = _logits(network, images)
    difference = np.abs(found - logits).max() if found.shape == logits.shape else np.inf
    if not difference <= TOLERANCE:
        raise UserError(
            f"the logits differ from those in the probe batch by up to {difference:.2g}, more than "
            f"{TOLERANCE:g}. Common causes: a different epsilon (1e-5 in torch, 1e-3 in Keras); "
            "different padding; a dense layer after flattened images that is missing under "
            "`flattened` in the table; images on a different scale; logits computed in training "
            "mode."
        )
    print(f"the logits of {len(images)} images differ by at most {difference:.1e}")


def _table(trained: "Trained", file: Path | None) -> "Table":
    """Returns the user's table of names, completed with the flattened layers of the network."""
    from bnjax.clinic.porting import Table, convnet_table, read_table
    from bnjax.models.convnet import ConvNet
    from bnjax.models.resnet import TORCHVISION, ResNet
    from bnjax.models.speednet import SpeedNet

    if isinstance(trained.model, ConvNet):
        own = convnet_table(trained.model, trained.data.image_shape)
    elif isinstance(trained.model, ResNet | SpeedNet):
        own = Table(TORCHVISION if isinstance(trained.model, ResNet) else None)
    else:
        raise UserError(
            f"the run's network is {type(trained.model).__name__}, which this command cannot port: "
            "use the unfolded run. bnjax.clinic.porting supports any linen model."
        )
    if file is None:
        return own
    given = read_table(file)
    return Table(given.names, {**own.flattened, **given.flattened})
