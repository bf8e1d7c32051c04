"""Writes and reads a network as a StableHLO program with separate weights."""

import dataclasses
import datetime
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import export

from bnjax.clinic.folding import Folding, NormFold, difference, plan
from bnjax.clinic.linen import folded_model, folded_pairs
from bnjax.data.batches import eval_batches
from bnjax.errors import UserError, needs
from bnjax.text import progress
from bnjax.train import build, rundir
from bnjax.train.cpu import compiler_options
from bnjax.train.jsonl import write_json
from bnjax.train.summary import versions
from bnjax.train.trained import Trained, check_folded, in_float32, logits, probe
from bnjax.train.warm_start import WEIGHTS
from bnjax.train_step import forward
from bnjax.types import BatchStats, Images, Params

MANIFEST, FORMAT = "manifest.json", 2
PROGRAM, ONNX = "model.stablehlo", "model.onnx"
PLATFORMS = ("cpu", "cuda", "tpu")
TOLERANCE = 1e-4  # relative to the largest logit

Weights = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Facts about an exported model.

    Attributes:
        name: the name of the run's config.
        step: the training step of the exported checkpoint.
        dataset: the data set on which the network was trained.
        classes: the class names, in the order of the logits.
        image_shape: the shape [h, w, c] of one image.
        arithmetic: the dtype of the layers' arithmetic; the ONNX model computes in float32.
        folded: maps the path of each folded norm to the path of the layer it was folded into.
        kept: maps the path of each other norm to the reason it was not folded.
        exported: the date of the export.
        versions: the versions of Python and of the packages used for the export.
        platforms: the platforms supported by the StableHLO program.
        agreement: a description of the compared images, and the differences from the run's logits.
        files: the SHA-256 checksum of each file.
    """

    name: str
    step: int
    dataset: str
    classes: list[str]
    image_shape: list[int]
    arithmetic: str
    folded: dict[str, str]
    kept: dict[str, str]
    exported: str
    versions: dict[str, str]
    platforms: list[str]
    agreement: dict[str, Any]
    files: dict[str, str]
    format: int = FORMAT


def export_run(
    trained: Trained,
    out: Path,
    *,
    folded: bool = True,
    onnx: bool = False,
    data_dir: str | None = None,
    platforms: Sequence[str] = PLATFORMS,
) -> Manifest:
    """Writes a run's network into a new folder after checking its logits; returns the manifest.

    Args:
        trained: the network.
        out: the output folder, new or empty.
        folded: whether to fold batch norms wherever folding is exact.
        onnx: whether to also write an ONNX model.
        data_dir: the folder of the data set, to compare logits on test images; None to compare them
            on noise.
        platforms: the platforms for the StableHLO program, as in `jax.export`.

    Raises:
        UserError: if the folder is not empty, the logits differ, a package is missing, or the
            network cannot be written as ONNX.
    """
    rundir.check_is_free(out)
    shape, classes = trained.data.image_shape, [*trained.data.classes]
    like = np.zeros((1, *shape), np.uint8)
    if folded:
        folding = plan(trained.network, like)
        if folding.pairs:
            check_folded(trained, folding, data_dir)
    else:
        norms = trained.network.norms({"image": like})
        stay = tuple(NormFold(one.path, reason="folding was not requested") for one in norms)
        folding = Folding(trained.network, stay)
    network = folding.network
    variables = (network.params, network.batch_stats)
    images, probed = probe(trained, data_dir)
    content = {
        PROGRAM: program(network.model, *variables, shape, platforms),
        WEIGHTS: safetensors.numpy.save(named(*variables)),
    }
    agreement: dict[str, Any] = {"images": probed}
    if export.default_export_platform() in platforms:
        call = jax.jit(export.deserialize(bytearray(content[PROGRAM])).call)
        found = difference(call(named(*variables), images), logits(trained.network, images))
        agreement["stablehlo"] = found
        # In bfloat16, rounding differs between programs.
        if not trained.is_low:
            _check("StableHLO program", found)
    if onnx:
        with needs("onnx", "--onnx"):
            import onnxruntime

            from bnjax.export.onnx import onnx_model
        exact = in_float32(trained)
        model = folded_model(exact, folding.pairs)
        notes = {"name": trained.config.name, "classes": classes}
        made = onnx_model(model, *variables, shape, notes)
        content[ONNX] = made.SerializeToString(deterministic=True)
        session = onnxruntime.InferenceSession(content[ONNX], providers=["CPUExecutionProvider"])
        (found,) = session.run(["logits"], {"images": images})
        own = logits(dataclasses.replace(trained.network, model=exact), images)
        agreement["onnx"] = difference(found, own)
        _check("ONNX model", agreement["onnx"])
    manifest = Manifest(
        name=trained.config.name,
        step=int(trained.step),
        dataset=trained.data.label,
        classes=classes,
        image_shape=[*shape],
        arithmetic=build.dtype_of(trained.config.model),
        folded={".".join(of): ".".join(layer) for of, layer in folded_pairs(network.model)},
        kept={".".join(one.norm): one.reason for one in folding.norms if one.layer is None},
        exported=datetime.datetime.now(datetime.UTC).date().isoformat(),
        versions=versions(),
        platforms=[*platforms],
        agreement=agreement,
        files={name: hashlib.sha256(data).hexdigest() for name, data in content.items()},
    )
    out.mkdir(parents=True, exist_ok=True)
    for name, data in content.items():
        (out / name).write_bytes(data)
    write_json(out / MANIFEST, vars(manifest))  # last, to mark the folder as complete
    return manifest


def _check(what: str, found: float) -> None:
    if not found <= TOLERANCE:
        raise UserError(
            f"the logits of the {what} differ from the run's logits by {found:.1e} of the largest "
            f"logit, which is more than {TOLERANCE}; nothing is written."
        )


def named(params: Params, batch_stats: BatchStats) -> Weights:
    """Returns a dict of host arrays keyed by name, such as "params.conv0.kernel"."""
    leaves = flatten_dict({"params": params, "batch_stats": batch_stats}, sep=".")
    return {name: np.array(leaf, order="C") for name, leaf in leaves.items()}


def program(
    model: nn.Module,
    params: Params,
    batch_stats: BatchStats,
    image_shape: tuple[int, int, int],
    platforms: Sequence[str] = PLATFORMS,
    image_dtype: Any = np.uint8,
) -> bytes:
    """Returns a program that evaluates a network, serialised for `jax.export.deserialize`.

    The program's `call(weights, images)` takes the arrays returned by `named` and images
    [n, h, w, c] for any n. It returns the logits [n, classes].

    Args:
        model: any linen module with `__call__(x, train=...)`.
        params, batch_stats: the variables of the model, or their shapes.
        image_shape: the shape [h, w, c] of one image.
        platforms: the target platforms.
        image_dtype: the dtype of the images. uint8 images are divided by 255; floats are unchanged.
    """
    leaves = flatten_dict({"params": params, "batch_stats": batch_stats}, sep=".")
    like = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in leaves.items()}

    def logits(weights: Any, images: Any) -> Any:
        own = {"params": {}, "batch_stats": {}, **unflatten_dict(weights, sep=".")}
        batch = {"image": images}
        return forward(own["params"], own["batch_stats"], batch, model=model, train=False)[0]

    (batch,) = export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, *image_shape), image_dtype)
    return bytes(export.export(jax.jit(logits), platforms=[*platforms])(like, images).serialize())


class Exported:
    """An exported model, read from its folder.

    Attributes:
        folder: the folder of the model.
        manifest: facts about the model.
        weights: the arrays that are the first argument of the program.
    """

    def __init__(self, folder: Path):
        """Reads and checks the files.

        Raises:
            UserError: if files are missing, damaged or from a different version of bnjax, or JAX
                cannot load the program on this platform.
        """
        if not (folder / MANIFEST).is_file():
            run = (
                " The folder contains a run: give it as --workdir."
                * (folder / "config.json").exists()
            )
            raise UserError(
                f"there is no exported model in {folder}: it has no {MANIFEST}.{run} Export a run "
                "with bnjax export --workdir RUN --out DIR."
            )
        try:
            self.manifest = Manifest(**json.loads((folder / MANIFEST).read_text()))
            if self.manifest.format != FORMAT:
                raise ValueError(f"format {self.manifest.format}, not {FORMAT}")
            content = {name: (folder / name).read_bytes() for name in self.manifest.files}
            for name, data in content.items():
                if hashlib.sha256(data).hexdigest() != self.manifest.files[name]:
                    raise ValueError(f"the SHA-256 of {name} differs")
        except (OSError, ValueError, TypeError) as error:
            raise UserError(
                f"the exported model in {folder} is damaged or from a different version of bnjax "
                f"({error}). Export the run again."
            ) from error
        self.folder = folder
        self.weights = jax.device_put(safetensors.numpy.load(content[WEIGHTS]))
        try:
            self._program = export.deserialize(bytearray(content[PROGRAM]))
        except Exception as error:  # the type depends on the version of JAX
            raise self._does_not_load(error) from error
        here = export.default_export_platform()
        if here not in self._program.platforms:
            raise UserError(
                f"the program in {folder} is for {', '.join(self._program.platforms)}, but JAX "
                f"uses {here} here. Choose a different platform, for instance with "
                "JAX_PLATFORMS=cpu, or export the run for this platform."
            )

    def logits(self, images: Images, batch_size: int) -> np.ndarray:
        """Returns the logits of images, float32 [n, classes].

        Args:
            images: one or more images, uint8 [n, h, w, c], or floats from 0 to 1, which are rounded
                to 8 bits.
            batch_size: the batch size for which the program is compiled.

        Raises:
            UserError: if this version of JAX cannot compile the program.
        """
        call, pixels = self.compiled(batch_size), np.asarray(images)
        if pixels.dtype != np.uint8:
            pixels = np.round(pixels * 255).astype(np.uint8)
        batches = eval_batches(pixels, np.zeros(len(pixels)), batch_size)
        count = -(-len(pixels) // batch_size)
        found = [
            np.asarray(call(self.weights, batch["image"]), np.float32)
            for batch in progress(batches, "predictions", "batch", count)
        ]
        return np.concatenate(found)[: len(pixels)]

    def compiled(self, batch_size: int) -> Any:
        """Returns the program compiled for a batch size; raises the errors of `logits`."""
        shape = (batch_size, *self.manifest.image_shape)
        images = jax.ShapeDtypeStruct(shape, np.uint8)
        call = jax.jit(self._program.call, compiler_options=compiler_options())
        try:
            return call.lower(self.weights, images).compile()
        except Exception as error:  # the type depends on the version of JAX
            if "RESOURCE_EXHAUSTED" in str(error):
                raise
            raise self._does_not_load(error) from error

    def _does_not_load(self, error: Exception) -> UserError:
        reason, *_ = str(error).strip().splitlines() or [type(error).__name__]
        return UserError(
            f"JAX {versions()['jax']} cannot load the program in {self.folder}, written by JAX "
            f"{self.manifest.versions['jax']} on {self.manifest.exported}: "
            f"{reason.rstrip('.')}. JAX loads programs written by versions up to 6 months older or "
            "3 weeks newer. Use such a version of JAX, or export the run again with this version."
        )
