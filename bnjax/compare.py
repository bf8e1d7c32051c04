"""`python -m bnjax.compare`: variants over seeds, with intervals, and a verdict on each claim that was written down before."""

import argparse
import shlex
import sys
from pathlib import Path

from bnjax import errors

MOST_SEEDS = 100_000  # each is a run


def main() -> int:
    """Reads the command line, takes the runs that are missing, prints what they say, and returns the exit code: 1 if a run broke down."""
    parser = argparse.ArgumentParser(
        prog="python -m bnjax.compare",
        description="Train several configs, or the variants of a claim, over the same seeds and compare them. The same command again goes "
        "on where it was stopped and repeats nothing; with more --seeds it adds runs.",
        epilog="Any key can be overridden for all variants: --config.train.steps=200 --config.data.dir=FOLDER.",
        allow_abbrev=False,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--configs", metavar="FILE,FILE…", help="config files, for instance configs/bn.py,configs/no_bn.py")
    what.add_argument("--claim", metavar="FILE", help="a claim file, for instance configs/claims/momentum.py")
    parser.add_argument("--full", action="store_true", help="take the claim at its full size, not in its small version")
    parser.add_argument("--seeds", type=int, metavar="N", help="how many seeds, from 0 on (default: what the claim asks for, or 5)")
    parser.add_argument(
        "--workdir", type=Path, metavar="DIR", help="the comparison's folder (default: runs/ and the claim's name or compare)"
    )
    parser.add_argument(
        "--at-once",
        choices=("one", "vmap", "devices"),
        help="train the seeds of a variant one after the other, all in one program, or side by side, one on each device "
        "(default: what is fast here)",
    )
    args, words = parser.parse_known_args()
    if args.full and args.claim is None:
        parser.error("--full is about a claim: give one with --claim")
    if args.seeds is not None and not 1 <= args.seeds <= MOST_SEEDS:
        parser.error(f"--seeds has to be from 1 to {MOST_SEEDS:,}")
    files = [file.strip() for file in (args.configs or "").split(",")]
    if args.claim is None and not all(files):
        parser.error("--configs has an empty name: give files with a comma between them")

    from bnjax import grid, report, results, seeds, text  # late, so that --help is quick
    from bnjax.data import sources
    from bnjax.loop import Stopped
    from bnjax.platform import keep_compiled, keep_freed_memory

    keep_freed_memory()
    keep_compiled(sources.cache_dir() / "compiled")

    of_configs = args.claim is None
    comparison = grid.compare_configs(files, words) if of_configs else grid.compare_claim(args.claim, words, full=args.full)
    command = shlex.join(["python", "-m", "bnjax.compare", *sys.argv[1:]])
    comparison |= {"seeds": list(range(args.seeds or comparison["seeds_needed"] or 5)), "command": command}
    folder = args.workdir or Path("runs") / (Path(args.claim).stem if args.claim else "compare")
    try:
        failures = grid.run(comparison, grid.load_data(comparison), folder, args.at_once or seeds.fast_way())
    except (Stopped, KeyboardInterrupt) as stopped:
        print(f"\n{str(stopped) or 'stopped'}; everything is saved. To go on:\n    {command}")
        return 128 + stopped.signal if isinstance(stopped, Stopped) else 130
    print(text.of_comparison(comparison, results.read_runs(folder, comparison)))
    try:
        print(f"\nreport: {report.write(folder)}")
    except errors.UserError as error:  # the results above stand without it
        print(f"\nno report: {error}")
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    errors.run(main)
