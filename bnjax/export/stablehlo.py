"""A trained network as files that run without bnjax: a StableHLO program and its weights, or ONNX.

The folder has `manifest.json` (`manifest.Manifest`), `model.stablehlo` (a function of weights and
images, as `jax.export` serialises it), `weights.safetensors` (the first of its arguments, arrays by
name) and perhaps `model.onnx`. The weights are an argument and no constants of the program: so they
lie on the disk once, other tools can read them, and XLA neither parses nor folds a hundred
megabytes of text.
"""

import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import safetensors.numpy
from jax import export

from bnjax.clinic.fold import Folding, NormFold, difference, fold
from bnjax.clinic.folded import Folded
from bnjax.clinic.layers import norm_layers
from bnjax.errors import UserError
from bnjax.export import manifest
from bnjax.export.manifest import Manifest
from bnjax.train import fold_run, network, rundir
from bnjax.train.records import write_json
from bnjax.train.summary import versions
from bnjax.train.trained import Trained
from bnjax.train_step import forward
from bnjax.types import BatchStats, Images, Params

PROGRAM, WEIGHTS, ONNX = "model.stablehlo", "weights.safetensors", "model.onnx"
PLATFORMS = ("cpu", "cuda", "tpu")
NOT_ASKED = "folding was not asked for"
TOLERANCE = 1e-4  # in units of the largest logit

Weights = dict[str, np.ndarray]


def export_run(
    trained: Trained,
    out: Path,
    *,
    folded: bool = True,
    onnx: bool = False,
    data_dir: str | None = None,
    platforms: Sequence[str] = PLATFORMS,
) -> Manifest:
    """Writes a run's network into a new folder, after checking its logits; returns what it says.

    Args:
        trained: the network.
        out: the folder, new or empty.
        folded: whether batch norms are folded where that is exact.
        onnx: whether to write ONNX as well.
        data_dir: where the data lie whose test images the logits are compared on; None: noise.
        platforms: that the StableHLO program is for, of those that `jax.export` knows.

    Raises:
        UserError: if the folder is neither new nor empty, the logits are others, a package is
            missing, or ONNX has no operator for the network.
    """
    rundir.check_is_free(out)
    folding = _folding(trained, folded, data_dir)
    images, probe = fold_run.probe(trained, data_dir)
    variables = (folding.params, folding.batch_stats)
    weights = named(*variables)
    content = {
        PROGRAM: program(folding.model, *variables, trained.data.image_shape, platforms),
        WEIGHTS: safetensors.numpy.save(weights),
    }
    about: dict[str, Any] = {"images": f"{len(images)} {probe}"}
    # Its rounding differs from one program to the next.
    is_low = "bfloat16" in (trained.config.model.dtype, trained.config.model.dense_product)
    if export.default_export_platform() in platforms:
        own = fold_run.logits(trained.model, trained.params, trained.batch_stats, images)
        call = jax.jit(export.deserialize(bytearray(content[PROGRAM])).call)
        about["stablehlo"] = _agreement("StableHLO program", call(weights, images), own, not is_low)
    about_onnx = None
    if onnx:
        content[ONNX], about_onnx = _onnx(trained, _in_float32(trained, folding.model), *variables)
        exact = _in_float32(trained, trained.model)
        own = fold_run.logits(exact, trained.params, trained.batch_stats, images)
        about["onnx"] = _agreement("ONNX model", _run_onnx(content[ONNX], images), own, True)
    today = datetime.datetime.now(datetime.UTC).date()
    found = versions()
    what = Manifest(
        name=trained.config.name,
        step=int(trained.step),
        dataset=trained.data.label,
        classes=[*trained.data.classes],
        image_shape=[*trained.data.image_shape],
        image_dtype="uint8",
        arithmetic=trained.config.model.dtype,
        folded={".".join(norm): ".".join(layer) for norm, layer in _pairs(folding)},
        kept={".".join(one.norm): one.reason for one in folding.norms if one.layer is None},
        exported=today.isoformat(),
        versions=found,
        platforms=[*platforms],
        window=manifest.window(today, found["jax"]),
        onnx=about_onnx,
        agreement=about,
        files={name: manifest.checksum(data) for name, data in content.items()},
    )
    out.mkdir(parents=True, exist_ok=True)
    for name, data in content.items():
        (out / name).write_bytes(data)
    write_json(out / manifest.FILE, vars(what))  # last, since it makes the folder a model's
    return what


def named(params: Params, batch_stats: BatchStats) -> Weights:
    """Returns weights and statistics by name, "params.conv0.kernel" for instance, on the host."""
    leaves = jax.tree_util.tree_leaves_with_path({"params": params, "batch_stats": batch_stats})
    return {_name(path): np.array(leaf, order="C") for path, leaf in leaves}


def program(
    model: nn.Module,
    params: Params,
    batch_stats: BatchStats,
    image_shape: tuple[int, int, int],
    platforms: Sequence[str] = PLATFORMS,
) -> bytes:
    """Returns the evaluation of a network as `jax.export.deserialize` takes it.

    Its `call(weights, images)` is given the arrays of `named` and images uint8 [n, h, w, c], and
    returns the logits [n, classes], for any n.

    Args:
        model: any linen module with `__call__(x, train=...)`.
        params: its weights, or their shapes.
        batch_stats: its running statistics, likewise.
        image_shape: of one image.
        platforms: that it is for.
    """
    tree = {"params": params, "batch_stats": batch_stats}
    like = {
        _name(path): jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }

    def logits(weights: Any, images: Any) -> Any:
        own = jax.tree_util.tree_map_with_path(lambda path, _: weights[_name(path)], tree)
        batch = {"image": images}
        return forward(own["params"], own["batch_stats"], batch, model=model, train=False)[0]

    (batch,) = export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, *image_shape), np.uint8)
    return bytes(export.export(jax.jit(logits), platforms=[*platforms])(like, images).serialize())


def _name(path: Sequence[Any]) -> str:
    return ".".join(str(key.key) for key in path)


def _folding(trained: Trained, folded: bool, data_dir: str | None) -> Folding:
    """Returns the network that is exported, and what became of its norms."""
    network = (trained.model, trained.params, trained.batch_stats)
    like = {"image": np.zeros((1, *trained.data.image_shape), np.uint8)}
    if not folded:
        layers = norm_layers(*network, like, train=False)
        return Folding(*network, tuple(NormFold(one.path, reason=NOT_ASKED) for one in layers))
    found = fold(*network, like)
    if any(one.layer is not None for one in found.norms):
        fold_run.check(trained, found, data_dir)
    return found


def _pairs(folding: Folding) -> Sequence[Any]:
    return folding.model.pairs if isinstance(folding.model, Folded) else ()


def _in_float32(trained: Trained, model: nn.Module) -> nn.Module:
    """Returns a run's network, folded or not, with arithmetic that every ONNX runtime has."""
    config = trained.config.model.copy_and_resolve_references()
    config.dtype = config.dense_product = "float32"
    exact = network.model(config, len(trained.data.classes), trained.data.image_shape)
    return Folded(exact, model.pairs) if isinstance(model, Folded) else exact


def _onnx(
    trained: Trained, model: nn.Module, params: Params, batch_stats: BatchStats
) -> tuple[bytes, dict[str, Any]]:
    try:
        from bnjax.export.onnx import IR_VERSION, OPSET, onnx_model
    except ModuleNotFoundError as error:
        raise _missing(error) from error
    notes = {"name": trained.config.name, "classes": [*trained.data.classes]}
    made = onnx_model(model, params, batch_stats, trained.data.image_shape, notes)
    about = {"opset": OPSET, "ir_version": IR_VERSION, "arithmetic": "float32"}
    return made.SerializeToString(deterministic=True), about


def _run_onnx(content: bytes, images: Images) -> np.ndarray:
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise _missing(error) from error
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return session.run(["logits"], {"images": images})[0]


def _missing(error: ModuleNotFoundError) -> UserError:
    return UserError(f"--onnx needs the package {error.name}: pip install 'bnjax[onnx]'.")


def _agreement(what: str, logits: Any, own: Any, checked: bool) -> float:
    """Returns how far logits are from the run's, in units of the largest.

    Raises:
        UserError: if it is more than `TOLERANCE`, unless low precision makes it so.
    """
    found = difference(logits, own)
    if checked and not found <= TOLERANCE:
        raise UserError(
            f"the logits of the {what} differ from the run's by {found:.1e} of the largest, more "
            f"than {TOLERANCE}, and nothing is written."
        )
    return found
