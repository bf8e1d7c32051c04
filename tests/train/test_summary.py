"""Whose code and whose versions a summary names."""

import subprocess
from importlib import metadata

from bnjax.train import rundir


def git(folder, *words):
    name = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run(["git", "-C", str(folder), *name, *words], check=True, capture_output=True)


def test_the_revision_is_that_of_a_repository_which_tracks_the_package(tmp_path):
    git(tmp_path, "init")
    for name in ("bnjax", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("")
    git(tmp_path, "add", "other")
    git(tmp_path, "commit", "-m", "other")
    assert rundir._git_revision(tmp_path / "bnjax") is None
    git(tmp_path, "add", "bnjax")
    git(tmp_path, "commit", "-m", "own")
    assert rundir._git_revision(tmp_path / "bnjax")
    assert rundir._git_revision(tmp_path / "nowhere") is None


def test_a_clone_that_is_not_installed_has_versions_too(monkeypatch):
    installed = metadata.version

    def version(package):
        if package == "bnjax":
            raise metadata.PackageNotFoundError(package)
        return installed(package)

    monkeypatch.setattr(metadata, "version", version)
    assert rundir.versions()["bnjax"] == "not installed"
    assert rundir.versions()["jax"] == installed("jax")
