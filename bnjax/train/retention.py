"""Which checkpoints of a run are kept."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

from orbax.checkpoint.checkpoint_managers import preservation_policy

from bnjax.train.integrity import read_records


@dataclasses.dataclass
class NewestTwoAndBest(preservation_policy.PreservationPolicy):
    """Keeps the newest two checkpoints and the best, by their records."""

    records: dict[int, dict[str, Any]]

    def should_preserve(self, checkpoints: Any, *, context: Any) -> list[bool]:
        """Returns which of them stay."""
        steps = [checkpoint.step for checkpoint in checkpoints]
        return [step in (*steps[-2:], best(self.records, steps)) for step in steps]


def best(records: dict[int, dict[str, Any]], steps: list[int]) -> int | None:
    """Returns the step with the highest accuracy, the earliest if several have it.

    None if none was evaluated.
    """
    accuracies = {step: records.get(step, {}).get("accuracy") for step in steps}
    known = {step: accuracy for step, accuracy in accuracies.items() if accuracy is not None}
    return max(known, key=lambda step: (known[step], -step)) if known else None


def keep_best_and_last(folder: Path) -> None:
    """Removes the other checkpoints of a run that has ended; its folder has to be locked."""
    records = read_records(folder)
    steps = sorted(records)
    for step in {*steps[:-1]} - {best(records, steps)}:
        shutil.rmtree(folder / str(step))
