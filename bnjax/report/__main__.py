"""`python -m bnjax.report RUN…`: one report about run folders and comparison folders."""

import argparse
from pathlib import Path

from bnjax import errors
from bnjax.report import write_all


def main() -> int:
    """Reads the command line, writes the report, and returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m bnjax.report",
        description="A report about runs and comparisons, from their folders alone: report.html and report.md.",
        allow_abbrev=False,
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="RUN", help="the folder of a run or of a comparison")
    parser.add_argument("--out", type=Path, metavar="DIR", help="the folder to write into (default: that of the first run)")
    args = parser.parse_args()
    print(f"written: {write_all(args.folders, args.out or args.folders[0])}")
    return 0


if __name__ == "__main__":
    errors.run(main)
