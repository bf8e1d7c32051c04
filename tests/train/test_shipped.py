import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from bnjax.errors import UserError
from bnjax.train import parsing
from bnjax.train.shipped import find

ROOT = Path(__file__).parents[2]


def test_a_config_and_a_claim_are_found_by_name_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find("bn", "config").samefile(ROOT / "configs/bn.py")
    assert find("momentum", "claim").samefile(ROOT / "configs/claims/momentum.py")
    assert parsing.load("digits", []).name == "digits"
    own = tmp_path / "bn"
    own.write_text("")
    assert find("bn", "config").samefile(own)


def test_what_is_nowhere_says_what_there_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"no config file configs/bn\.py.*: airbench94, bn,"):
        find("configs/bn.py", "config")
    with pytest.raises(UserError, match=r"no claim file bn\..*five_times"):
        find("bn", "claim")


@pytest.mark.slow
def test_an_installed_package_has_the_configs(tmp_path):
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-q", "-w", tmp_path, ROOT]
    subprocess.run(build, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(tmp_path / "installed")
    code = (
        "from bnjax.train.shipped import find; print(find('bn', 'config'), find('ghost', 'claim'))"
    )
    found = subprocess.run(
        [sys.executable, "-P", "-c", code],
        env={"PYTHONPATH": str(tmp_path / "installed")},
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    assert [Path(file).relative_to(tmp_path / "installed/bnjax/configs") for file in found] == [
        Path("bn.py"),
        Path("claims/ghost.py"),
    ]
