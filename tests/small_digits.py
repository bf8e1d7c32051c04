"""The words of a command that trains a small network on the digits, for a few steps."""

from pathlib import Path

CONFIG = str(Path(__file__).parents[1] / "configs" / "digits.py")
# Nothing that costs a compilation of its own is observed.
UNOBSERVED = {"eval.histograms": 0, "eval.pictures": 0, "eval.gap_images": 0}


def words(**flags):
    """`--config.key=value` for each; `__` in a name stands for the dot."""
    named = {key.replace("__", "."): value for key, value in flags.items()}
    return [f"--config.{key}={value}" for key, value in (UNOBSERVED | named).items()]


def steps(count, every=None, **flags):
    """The words for so many steps, with an evaluation each `every`, or at the end."""
    durations = {"train__epochs": 0.0, "eval__every_epochs": 0.0}
    return words(**durations, train__steps=count, eval__every_steps=every or count, **flags)


TINY = steps(2, model__filters="2,2,2", model__dense="4,4")
# What streams are tested with: a checkpoint every few steps.
STREAMED = {"data__name": "records", "data__pipeline": "stream", "train__batch_size": 100}
STREAMED |= {"checkpoint__every_steps": 5, "model__filters": "4,4,4", "model__dense": "8,8"}
