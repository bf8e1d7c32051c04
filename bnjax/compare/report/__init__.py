"""One report about many runs, rebuilt from their folders alone, without JAX."""

from pathlib import Path

from bnjax.errors import UserError

MARK = "<!-- made by bnjax.report -->"  # at the top of what is written


def write(folder: Path) -> Path:
    """Writes the report about a run or a comparison into its folder; returns report.html's path.

    Raises:
        UserError: if nothing there can be reported, or the extra `report` is not installed.
    """
    page, _ = write_all([folder], folder)
    return page


def write_all(folders: list[Path], out: Path) -> tuple[Path, list[str]]:
    """Writes `report.html`, one file that needs nothing else; returns its path, and its problems.

    Beside it are `report.md` and its pictures in `report_files`. Problems, of folders that could
    not be read for instance, are in the report too.

    Args:
        folders: of runs and of comparisons.
        out: the folder to write into, created if need be.

    Raises:
        UserError: if nothing there can be reported, `out` cannot be written or has a report of
            somebody else's, or the extra `report` is not installed.
    """
    from bnjax.compare.report.study import read_study

    study = read_study(folders)
    _check_ours(out)
    try:
        from bnjax.compare.report.page import write_page
    except ModuleNotFoundError as error:
        raise UserError(
            f"a report needs {error.name}, which is not installed. Install it with: "
            "pip install 'bnjax[report]'."
        ) from error
    return write_page(study, out), study.problems


def _check_ours(out: Path) -> None:
    """Checks that nothing but an earlier report will be overwritten."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        for file in (out / "report.html", out / "report.md"):
            if (
                file.exists()
                and MARK not in file.read_text(encoding="utf-8", errors="replace")[:200]
            ):
                raise UserError(
                    f"{file} was not made by bnjax.report, and is not overwritten. "
                    "Choose another folder with --out."
                )
    except OSError as error:
        raise UserError(
            f"{out} cannot be written: {error.strerror or error}. Choose another folder with --out."
        ) from error
