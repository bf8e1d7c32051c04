"""The configs and claims that come with bnjax, by their names."""

from pathlib import Path

from bnjax.errors import UserError


def find(path: str, kind: str) -> Path:
    """Returns a file, or the one of that name among those that come with bnjax.

    Args:
        path: of the file, or the bare name of a config or a claim, "bn" for instance.
        kind: "config" or "claim".

    Raises:
        UserError: if there is none.
    """
    if Path(path).is_file():
        return Path(path)
    package = Path(__file__).parents[1]
    # As installed they lie in the package, in a checkout beside it.
    homes = [home for home in (package / "configs", package.parent / "configs") if home.is_dir()]
    found = {
        file.stem: file
        for home in homes
        for file in sorted((home if kind == "config" else home / "claims").glob("*.py"))
    }
    if path in found:
        return found[path]
    raise UserError(
        f"there is no {kind} file {path}. Give the path of one, or a name of those that come with "
        f"bnjax: {', '.join(found) or 'there are none here'}."
    )
