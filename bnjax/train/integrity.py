"""What a checkpoint has to hold, and whether it still does."""

import json
import zlib
from pathlib import Path
from typing import Any

import jax

from bnjax.errors import UserError
from bnjax.train_step import TrainState
from bnjax.types import BatchStats, Params, named_leaves

ITEMS = ("variables", "training")
# Beside what Orbax writes, and in place before a checkpoint gets its final name: it is intact while
# it agrees with this.
RECORD = "bnjax.json"


class CheckpointError(UserError):
    """A checkpoint is missing, damaged, or does not fit the model."""


def items(
    state: TrainState, batch_stats: BatchStats, evaluated: tuple[Params, BatchStats] | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns what a checkpoint holds as "variables" and as "training"."""
    training = {"opt_state": state.opt_state, "step": state.step, "rng": state.rng}
    own = {"params": state.params, "batch_stats": batch_stats}
    if evaluated is None:
        return own, training
    return dict(zip(own, evaluated, strict=True)), training | own


def read_records(folder: Path) -> dict[int, dict[str, Any]]:
    """Returns the record of each checkpoint by its step."""
    steps = (path for path in folder.glob("*") if path.name.isdecimal())
    return {int(path.name): _read_record(path) for path in steps}


def _read_record(folder: Path) -> dict[str, Any]:
    """Returns the record of a checkpoint, or an empty one if it is damaged."""
    try:
        record = json.loads((folder / RECORD).read_bytes())
        sound = isinstance(record["files"], dict) and isinstance(record["accuracy"], float | None)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}
    return record if sound else {}


def checksums(folder: Path) -> dict[str, list[int]]:
    """Returns size and CRC-32 of every file that Orbax keeps arrays in, by its path."""
    found = {}
    for path in sorted(path for item in ITEMS for path in (folder / item).rglob("*")):
        if (
            path.is_file() and path.name != "commit_success.txt"
        ):  # comes and goes with the final name
            size = checksum = 0
            with path.open("rb") as file:
                while chunk := file.read(1 << 22):
                    size, checksum = size + len(chunk), zlib.crc32(chunk, checksum)
            found[path.relative_to(folder).as_posix()] = [size, checksum]
    return found


Leaves = dict[str, tuple[tuple[int, ...], str]]


def leaves_of(tree: Any) -> Leaves:
    """Returns name, shape and dtype of the leaves of a tree as Orbax stores them."""

    def stored(leaf: Any) -> Any:  # Orbax keeps a random key as the integers that it is made of
        return (
            jax.eval_shape(jax.random.key_data, leaf)
            if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
            else leaf
        )

    leaves = named_leaves(jax.tree.map(stored, tree))
    return {name: (leaf.shape, str(leaf.dtype)) for name, leaf in leaves.items()}


def leaves_of_metadata(metadata: Any) -> Leaves:
    """Returns the same of what is stored, from Orbax's metadata."""
    return {
        leaf.name: (tuple(leaf.shape), str(leaf.dtype)) for leaf in jax.tree.leaves(metadata.tree)
    }


def check_leaves(folder: Path, saved: Leaves, wanted: Leaves) -> None:
    """Raises `CheckpointError` naming every leaf that one side lacks or has in another form."""
    differences = []
    for name in sorted({*saved, *wanted}):
        there, here = (
            "nothing" if leaf is None else f"{leaf[1]} {list(leaf[0])}"
            for leaf in (saved.get(name), wanted.get(name))
        )
        if there != here:
            differences.append(f"{name} ({there} in the checkpoint, {here} in the model)")
    if differences:
        more = f" and {len(differences) - 8} more" if len(differences) > 8 else ""
        raise CheckpointError(
            f"the checkpoint {folder} is of another network or optimizer: "
            f"{'; '.join(differences[:8])}{more}. "
            "Restore it with the config that it was trained with."
        )
