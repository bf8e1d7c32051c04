"""Files of arrays: what is read, and what is refused because reading would run it."""

import pickle
import zipfile

import numpy as np
import pytest
import safetensors.numpy

from bnjax.clinic import porting
from bnjax.errors import UserError

ARRAYS = {
    "a.weight": np.arange(6, dtype=np.float32).reshape(2, 3).T,
    "layer/kernel": np.float64([1.5]),
    "count": np.array(7),
}


def test_there_and_back(tmp_path):
    name = "new/net.safetensors"
    porting.write(tmp_path / name, ARRAYS, {"norms": "{}"})
    found, notes = porting.read(tmp_path / name)
    assert notes == {"norms": "{}"}
    assert found.keys() == ARRAYS.keys()
    for key, value in ARRAYS.items():
        np.testing.assert_array_equal(found[key], value, strict=True)


def test_bfloat16_is_read(tmp_path):
    file = tmp_path / "net.safetensors"
    header = b'{"x":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]}}'
    # The upper half of a float32: 1.5 is 3fc0, -2 is c000.
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes.fromhex("c03f00c0"))
    found, _ = porting.read(file)
    np.testing.assert_array_equal(found["x"].astype(np.float32), [1.5, -2])


class _Trap:
    """Leaves a file behind where it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


def test_pickles_are_refused_and_never_run(tmp_path):
    ran, file = tmp_path / "ran", tmp_path / "net.pt"
    content = pickle.dumps(_Trap(ran))
    file.write_bytes(content)  # as old versions of torch
    with pytest.raises(UserError, match=r"is a pickle.*save_file\(model\.state_dict\(\)"):
        porting.read(file)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("net/data.pkl", content)
    with pytest.raises(UserError, match=r"is a pickle, an archive of one.*save_file"):
        porting.read(file)
    assert not ran.exists()


def test_other_formats_are_refused(tmp_path):
    file = tmp_path / "net"
    file.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    with pytest.raises(UserError, match=r"HDF5.*v\.numpy\(\)"):
        porting.read(file)
    safetensors.numpy.save_file(ARRAYS, file)
    for damaged in (file.read_bytes()[:-3], b"hello", b""):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match="or damaged"):
            porting.read(file)
    with pytest.raises(UserError, match="there is no file"):
        porting.read(tmp_path / "none")
