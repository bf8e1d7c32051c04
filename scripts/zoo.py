"""What the audit, or another tool, finds in the networks of tests/zoo.

    python scripts/zoo.py
    python scripts/zoo.py --library torch --tool torch-audit

Prints, for each case and library: what the sick network has, what was found in it, what was found
in its healthy twin, and the seconds of both. Then recall and false alarms, of the cases set aside
before any limit was tuned apart from the others. Libraries and tools that are not installed are
named.
"""

import argparse
import collections
import os
import sys
import time
from pathlib import Path

os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0 " + os.environ.get("XLA_FLAGS", "")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import tqdm
from zoo import LIBRARIES, SET_ASIDE, cases, kit, variants

from bnjax.text import text_table


def main():
    """Runs a tool on every case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", choices=LIBRARIES, action="append", help="default: all")
    libraries = parser.parse_args().library or LIBRARIES
    rows = [("case", "library", "has", "found", "in its twin", "seconds")]
    counts = collections.defaultdict(collections.Counter)
    missing = set()
    for name, library in tqdm.tqdm([one for one in variants() if one[1] in libraries]):
        case, start = cases()[name], time.perf_counter()
        try:
            sick, twin = (getattr(case, library)(is_sick) for is_sick in (True, False))
        except ModuleNotFoundError:
            missing.add(library)
            continue
        found, false = kit.ids(sick), kit.ids(twin)
        aside = "set aside" if name in SET_ASIDE else "tuned"
        for group in (f"{library}, {aside}", f"all, {aside}"):
            counts[group] += {
                "cases": 1,
                "found": {*case.FINDS} <= {*found},
                "false alarms": bool(false),
            }
        seconds = f"{time.perf_counter() - start:.1f}"
        mark = "*" * (name in SET_ASIDE)
        rows.append((name + mark, library, *map(", ".join, (case.FINDS, found, false)), seconds))
    print(text_table(rows))
    print("* set aside before any limit was tuned\n")
    head = ("cases", "found", "false alarms")
    sums = [(group, *(of[name] for name in head)) for group, of in sorted(counts.items())]
    print(text_table([("", *head), *sums]))
    for library in missing:
        print(f"{library} is not installed")


if __name__ == "__main__":
    main()
