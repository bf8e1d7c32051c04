"""An exported model, read back: its StableHLO program, compiled for the machine at hand."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy
from jax import export

from bnjax.errors import UserError
from bnjax.export.manifest import FILE, Manifest
from bnjax.export.stablehlo import PROGRAM, WEIGHTS
from bnjax.train.cpu import compiler_options
from bnjax.train.summary import versions
from bnjax.types import Images


class Exported:
    """A model that `export.export_run` wrote; nothing of the run is needed.

    Attributes:
        folder: that it lies in.
        manifest: what it says about itself.
    """

    def __init__(self, folder: Path):
        """Reads a folder, and checks that its files are whole and for this platform.

        Raises:
            UserError: if they are not, or this version of JAX does not load the program.
        """
        self.folder, self.manifest = folder, Manifest.read(folder)
        program, weights = (self.manifest.check(folder, name) for name in (PROGRAM, WEIGHTS))
        try:
            self._weights = jax.device_put(safetensors.numpy.load(weights.read_bytes()))
        except (safetensors.SafetensorError, ValueError, TypeError) as error:
            raise UserError(f"{weights} is not a file of safetensors: {error}.") from error
        try:
            self._program = export.deserialize(bytearray(program.read_bytes()))
        except Exception as error:  # of several types; which, depends on what has changed
            raise self._does_not_load(error) from error
        (_, images), (logits,) = (
            jax.tree.unflatten(self._program.in_tree, self._program.in_avals)[0],
            self._program.out_avals,
        )
        if ([*images.shape[1:]], logits.shape[1]) != (
            self.manifest.image_shape,
            len(self.manifest.classes),
        ):
            raise UserError(
                f"{folder / FILE} is damaged: its classes or its image_shape are not those of the "
                f"program, which takes images {list(images.shape[1:])} and returns "
                f"{logits.shape[1]} logits. Export the run again."
            )
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
            batch_size: how many are computed at once; the program is compiled for as many.

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
        """Returns the program for as many images; errors as for `logits`."""
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
