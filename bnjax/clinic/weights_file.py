"""Arrays by name in files that hold nothing else: safetensors and .npz. Nothing is unpickled."""

import zipfile
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

from bnjax.errors import UserError

Arrays = dict[str, np.ndarray]
_HOW_TORCH = (
    "Save it without: from safetensors.torch import save_file; "
    "save_file(model.state_dict(), 'net.safetensors')."
)
_HOW_KERAS = (
    "Save its arrays by name: "
    "np.savez('net.npz', **{v.path: np.asarray(v.numpy()) for v in model.weights})."
)


def read(file: Path) -> tuple[Arrays, dict[str, str]]:
    """Returns the arrays of a file by name, and its notes, which only safetensors has.

    Raises:
        UserError: if it is of another format, damaged, or missing.
    """
    if not file.is_file():
        raise UserError(f"there is no file {file}.")
    with file.open("rb") as stream:
        start = stream.read(8)
    if start.startswith(b"\x80"):
        raise UserError(f"{file} is a pickle, which may run any code when it is read. {_HOW_TORCH}")
    if start.startswith(b"\x89HDF"):
        raise UserError(
            f"{file} is an HDF5 file, whose names depend on the version of Keras. {_HOW_KERAS}"
        )
    try:
        if zipfile.is_zipfile(file):
            return _read_zip(file), {}
        with safetensors.safe_open(file, "np") as content:
            arrays = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
            return arrays, dict(content.metadata() or {})
    except (
        safetensors.SafetensorError,
        ValueError,
        TypeError,
        OSError,
        zipfile.BadZipFile,
    ) as error:
        raise UserError(
            f"{file} is neither safetensors nor .npz, or damaged: {' '.join(str(error).split())}"
        ) from error


def write(file: Path, arrays: Arrays, notes: dict[str, str]) -> None:
    """Writes arrays by name; .npz if the file is called so, which has no notes, or safetensors.

    Raises:
        UserError: if it cannot be written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".npz":
            with file.open("wb") as stream:
                np.savez(stream, **arrays)  # type: ignore[arg-type]
        else:
            # It writes memory as it lies, whatever the strides say.
            solid = {name: np.asarray(value, order="C") for name, value in arrays.items()}
            safetensors.numpy.save_file(solid, file, notes)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{file} cannot be written: {error}") from error


def _read_zip(file: Path) -> Arrays:
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
    if any(name.endswith("data.pkl") for name in names):
        raise UserError(
            f"{file} is torch's format, a pickle, which may run any code when it is read. "
            f"{_HOW_TORCH}"
        )
    if any(name.endswith(".h5") for name in names):
        raise UserError(f"{file} is Keras' own format, with an HDF5 file in it. {_HOW_KERAS}")
    with np.load(file, allow_pickle=False) as content:
        return dict(content)
