"""Counts missed and false findings of the audit in the networks of tests/patients.py.

    python scripts/audit_table.py --seeds 3

Prints, for every network, its faults and the findings, and, for every fault, how often the audit
missed it and how often the audit reported it in a network without it.
"""

import argparse
import collections
import os
import sys
from pathlib import Path

os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0 " + os.environ.get("XLA_FLAGS", "")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import tqdm
from patients import HEALTHY, ILL
from zoo.kit import shared_jit

from bnjax.clinic import audit
from bnjax.clinic.checks import ILLNESSES


def main():
    """Trains and audits every network with every seed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--seeds", type=int, default=3, metavar="N", help="number of seeds (default: 3)"
    )
    seeds = parser.parse_args().seeds
    networks = {
        name: ("", lambda seed, make=make: make(seed=seed)) for name, make in HEALTHY.items()
    }
    networks |= ILL
    missed, false = collections.Counter(), collections.Counter()
    rows = []
    for name, (has, make) in tqdm.tqdm(networks.items(), disable=None):
        found = collections.Counter()
        for seed in range(seeds):
            it = make(seed)
            ids = audit(it.network, it.batches, it.run, jit=shared_jit).ids
            found.update(ids or ["nothing"])
            missed.update({has} - {*ids, ""})
            false.update({*ids} - {has})
        rows.append((name, has or "nothing", ", ".join(f"{id} {n}" for id, n in found.items())))
    print(f"| network | has | found, of {seeds} seeds |\n|---|---|---|")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    print("\n| finding | missed | found where absent |\n|---|---|---|")
    for id in ILLNESSES:
        ill = sum(has == id for has, _ in networks.values())
        others = (len(networks) - ill) * seeds
        print(f"| {id} | {missed[id]} of {ill * seeds} | {false[id]} of {others} |")


if __name__ == "__main__":
    main()
