"""What goes wrong with batch normalization: for each case a sick network and its healthy twin.

Each file is a case: NAME, CAUSE, SOURCE, the ids that the audit has to find (FINDS), and for each
library in which it exists a function of `sick` that returns a `kit.Patient`. MISSED says, by
library, why the audit does not find it.
"""

import importlib
from pathlib import Path

# No limit of the audit is tuned on these. Chosen before the first case was written: of 38 names,
# the ten whose SHA-256 comes first.
SET_ASIDE = (
    "replicas_not_synced",
    "swa",
    "scaled_twice",
    "statistics_not_saved",
    "two_passes",
    "training_flag_left_out",
    "correlated_batches",
    "unbiased_in_depth",
    "eval_not_propagated",
    "recomputed_activations",
)

LIBRARIES = ("linen", "nnx", "equinox", "torch")


def cases():
    """Returns the modules of all cases by name."""
    names = sorted(path.stem for path in Path(__file__).parent.glob("[!_]*.py"))
    return {name: importlib.import_module(f"zoo.{name}") for name in names if "kit" not in name}


def variants():
    """Returns (name of the case, library) of each function."""
    return [
        (name, library)
        for name, case in cases().items()
        for library in LIBRARIES
        if hasattr(case, library)
    ]
