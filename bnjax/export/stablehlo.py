"""A network as a StableHLO program with its weights beside it, written and read."""

import calendar
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
import safetensors
import safetensors.numpy
from jax import export

from bnjax.clinic.folding import Folded, Folding, NormFold, difference, plan
from bnjax.errors import UserError
from bnjax.train import rundir
from bnjax.train.cpu import compiler_options
from bnjax.train.rundir import versions, write_json
from bnjax.train.trained import Trained, check_folded, in_float32, logits, probe
from bnjax.train_step import forward
from bnjax.types import BatchStats, Images, Params

FILE = "manifest.json"
FORMAT = 1
# docs.jax.dev, "Exporting and serializing", compatibility guarantees.
MONTHS_NEWER, WEEKS_OLDER = 6, 3


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The facts of an exported model.

    Attributes:
        name: of the run's config.
        step: of its checkpoint.
        dataset: that it was trained on.
        classes: their names, in the order of the logits.
        image_shape: of one image, [h, w, c].
        image_dtype: of the images; the program divides uint8 by 255.
        arithmetic: the dtype of the layers' arithmetic.
        folded: the folded norms and the layers that have them, by path.
        kept: the other norms, and why they stay.
        exported: the day.
        versions: of Python and the packages that wrote it.
        platforms: that the StableHLO program is for.
        window: the versions of JAX that load it, see `window`.
        onnx: opset, version of the format, and arithmetic of the ONNX model; None without one.
        agreement: the images, and the differences of the logits from the run's.
        files: the SHA-256 of each.
    """

    name: str
    step: int
    dataset: str
    classes: list[str]
    image_shape: list[int]
    image_dtype: str
    arithmetic: str
    folded: dict[str, str]
    kept: dict[str, str]
    exported: str
    versions: dict[str, str]
    platforms: list[str]
    window: dict[str, Any]
    onnx: dict[str, Any] | None
    agreement: dict[str, Any]
    files: dict[str, str]
    format: int = FORMAT

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Returns the manifest of a folder.

        Raises:
            UserError: if it has none, or one that is damaged or of another version of bnjax.
        """
        file = folder / FILE
        if not file.is_file():
            run = " It holds a run: give it with --workdir." * (folder / "config.json").exists()
            raise UserError(
                f"there is no exported model in {folder}: it has no {FILE}.{run} Write one with "
                "bnjax export --workdir RUN --out DIR."
            )
        try:
            found = cls(**json.loads(file.read_text()))
            if found.format != FORMAT:
                raise ValueError(f"its format is {found.format}, and this bnjax reads {FORMAT}")
        except (OSError, ValueError, TypeError) as error:
            raise UserError(
                f"{file} is damaged, or from another version of bnjax ({error}). Export the run "
                "again."
            ) from error
        return found

    def check(self, folder: Path, name: str) -> Path:
        """Returns a file of the model whose checksum is right.

        Raises:
            UserError: if it is missing or damaged.
        """
        file = folder / name
        if not file.is_file():
            raise UserError(f"{file} is missing. Copy the folder again, or export the run again.")
        if checksum(file.read_bytes()) != self.files.get(name):
            raise UserError(
                f"{file} is damaged: its SHA-256 differs from the one in {FILE}. Copy the folder "
                "again, or export the run again."
            )
        return file


def window(exported: datetime.date, jax_version: str) -> dict[str, Any]:
    """Returns the versions of JAX that are promised to load an exported program.

    The promise counts from the build of the version that writes to the build of the version that
    reads; no version built more than six months after the export is within it.

    >>> window(datetime.date(2026, 8, 31), "0.10.2")["not_if_built_after"]
    '2027-02-28'
    """
    years, month = divmod(exported.month - 1 + MONTHS_NEWER, 12)
    year, month = exported.year + years, month + 1
    day = min(exported.day, calendar.monthrange(year, month)[1])
    return {
        "written_with_jax": jax_version,
        "months_newer": MONTHS_NEWER,
        "weeks_older": WEEKS_OLDER,
        "not_if_built_after": datetime.date(year, month, day).isoformat(),
    }


def checksum(content: bytes) -> str:
    """Returns the SHA-256 of a file's content, in hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


PROGRAM, WEIGHTS, ONNX = "model.stablehlo", "weights.safetensors", "model.onnx"
PLATFORMS = ("cpu", "cuda", "tpu")
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
    """Writes a run's network into a new folder, after comparing its logits; returns the manifest.

    Args:
        trained: the network.
        out: the folder, new or empty.
        folded: whether batch norms are folded where that is exact.
        onnx: whether to write ONNX as well.
        data_dir: the folder of the data whose test images the logits are compared on; None: noise.
        platforms: of the StableHLO program, of those that `jax.export` knows.

    Raises:
        UserError: if the folder is neither new nor empty, the logits differ, a package is missing,
            or ONNX has no operator for the network.
    """
    rundir.check_is_free(out)
    shape, classes = trained.data.image_shape, [*trained.data.classes]
    like = np.zeros((1, *shape), np.uint8)
    if folded:
        folding = plan(trained.network, like)
        if folding.pairs and folding.pairs != trained.folded:
            check_folded(trained, folding, data_dir)
    else:
        norms = trained.network.norms({"image": like})
        reason = "folding was not asked for"
        folding = Folding(
            trained.network, tuple(NormFold(one.path, reason=reason) for one in norms)
        )
    network = folding.network
    variables = (network.params, network.batch_stats)
    images, probed = probe(trained, data_dir)
    content = {
        PROGRAM: program(network.model, *variables, shape, platforms),
        WEIGHTS: safetensors.numpy.save(named(*variables)),
    }
    agreement: dict[str, Any] = {"images": probed}
    # The rounding of bfloat16 differs from one program to the next.
    is_low = "bfloat16" in (trained.config.model.dtype, trained.config.model.dense_product)
    if export.default_export_platform() in platforms:
        call = jax.jit(export.deserialize(bytearray(content[PROGRAM])).call)
        found = call(named(*variables), images)
        own = logits(trained.network, images)
        agreement["stablehlo"] = _agreement("StableHLO program", found, own, not is_low)
    about_onnx = None
    if onnx:
        exact = in_float32(trained)
        plain = exact.unfolded if isinstance(exact, Folded) else exact
        model = Folded(plain, folding.pairs) if folding.pairs else plain
        content[ONNX], about_onnx = _onnx(model, variables, shape, trained.config.name, classes)
        own = logits(dataclasses.replace(trained.network, model=exact), images)
        agreement["onnx"] = _agreement("ONNX model", _run_onnx(content[ONNX], images), own, True)
    today, found_versions = datetime.datetime.now(datetime.UTC).date(), versions()
    manifest = Manifest(
        name=trained.config.name,
        step=int(trained.step),
        dataset=trained.data.label,
        classes=classes,
        image_shape=[*shape],
        image_dtype="uint8",
        arithmetic=trained.config.model.dtype,
        folded={".".join(norm): ".".join(layer) for norm, layer in folding.pairs},
        kept={".".join(one.norm): one.reason for one in folding.norms if one.layer is None},
        exported=today.isoformat(),
        versions=found_versions,
        platforms=[*platforms],
        window=window(today, found_versions["jax"]),
        onnx=about_onnx,
        agreement=agreement,
        files={name: checksum(data) for name, data in content.items()},
    )
    out.mkdir(parents=True, exist_ok=True)
    for name, data in content.items():
        (out / name).write_bytes(data)
    write_json(out / FILE, vars(manifest))  # last, since it makes the folder a model's
    return manifest


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
    image_dtype: Any = np.uint8,
) -> bytes:
    """Returns the evaluation of a network as `jax.export.deserialize` takes it.

    Its `call(weights, images)` takes the arrays of `named` and images [n, h, w, c], and returns the
    logits [n, classes], for any n.

    Args:
        model: any linen module with `__call__(x, train=...)`.
        params, batch_stats: its variables, or their shapes.
        image_shape: of one image.
        platforms: that it is for.
        image_dtype: of the images; uint8 is divided by 255, floats pass unchanged.
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
    images = jax.ShapeDtypeStruct((batch, *image_shape), image_dtype)
    return bytes(export.export(jax.jit(logits), platforms=[*platforms])(like, images).serialize())


def _name(path: Sequence[Any]) -> str:
    return ".".join(str(key.key) for key in path)


def _onnx(
    model: nn.Module, variables: Any, shape: tuple[int, int, int], name: str, classes: list[str]
) -> tuple[bytes, dict[str, Any]]:
    try:
        from bnjax.export.onnx import IR_VERSION, OPSET, onnx_model
    except ModuleNotFoundError as error:
        raise _missing(error) from error
    notes = {"name": name, "classes": classes}
    made = onnx_model(model, variables[0], variables[1], shape, notes)
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
    """Returns the difference of logits from the run's, in units of the largest.

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


class Exported:
    """A model that `export_run` wrote, read back.

    Attributes:
        folder: its folder.
        manifest: its facts.
    """

    def __init__(self, folder: Path):
        """Reads and checks the files.

        Raises:
            UserError: if they are damaged or for another platform, or if this version of JAX does
                not load the program.
        """
        self.folder, self.manifest = folder, Manifest.read(folder)
        program, weights = (self.manifest.check(folder, name) for name in (PROGRAM, WEIGHTS))
        try:
            self._weights = jax.device_put(safetensors.numpy.load(weights.read_bytes()))
        except (safetensors.SafetensorError, ValueError, TypeError) as error:
            raise UserError(f"{weights} is no safetensors file: {error}.") from error
        try:
            self._program = export.deserialize(bytearray(program.read_bytes()))
        except Exception as error:  # of several types, by version
            raise self._does_not_load(error) from error
        here = export.default_export_platform()
        if here not in self._program.platforms:
            raise UserError(
                f"the program in {folder} is for {', '.join(self._program.platforms)}, and JAX "
                f"computes on {here} here. Choose another with JAX_PLATFORMS, for instance "
                "JAX_PLATFORMS=cpu, or export the run for this one."
            )

    def logits(self, images: Images, batch_size: int) -> np.ndarray:
        """Returns the logits, float32 [n, classes], of images uint8 [n, h, w, c], n > 0.

        Args:
            images: the images.
            batch_size: of the compiled program.

        Raises:
            UserError: if this version of JAX cannot compile the program.
        """
        call = self.compiled(batch_size)
        found = []
        for start in range(0, len(images), batch_size):
            batch = images[start : start + batch_size]
            filling = np.zeros((batch_size - len(batch), *images.shape[1:]), np.uint8)
            out = call(self._weights, np.concatenate([batch, filling]))
            found.append(np.asarray(out, np.float32)[: len(batch)])
        return np.concatenate(found)

    def compiled(self, batch_size: int) -> Any:
        """Returns the program compiled for a batch size; errors as for `logits`."""
        shape = (batch_size, *self.manifest.image_shape)
        images = jax.ShapeDtypeStruct(shape, np.uint8)
        call = jax.jit(self._program.call, compiler_options=compiler_options(batch_size))
        try:
            return call.lower(self._weights, images).compile()
        except Exception as error:  # likewise
            if "RESOURCE_EXHAUSTED" in str(error):
                raise
            raise self._does_not_load(error) from error

    @property
    def weights(self) -> dict[str, jax.Array]:
        """The first argument of the program."""
        return self._weights

    def _does_not_load(self, error: Exception) -> UserError:
        window = self.manifest.window
        reason, *_ = str(error).strip().splitlines() or [type(error).__name__]
        return UserError(
            f"JAX {versions()['jax']} does not load the program in {self.folder}, which was "
            f"written on {self.manifest.exported} with JAX {window.get('written_with_jax')}: "
            f"{reason.rstrip('.')}. JAX promises to load what was written with versions up to "
            f"{window.get('months_newer')} months older and {window.get('weeks_older')} weeks "
            "newer than itself. Use such a version, or export the run again with this one."
        )
