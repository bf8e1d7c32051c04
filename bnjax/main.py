"""The command `bnjax`; `python -m bnjax.main --config FILE` trains as well."""

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bnjax import commands, errors
from bnjax.commands import export, predict, serve

MAX_SEEDS = 100_000  # each is a run

# Whatever a command needs is imported in it, so that --help is quick.


def main(words: Sequence[str] | None = None) -> int:
    """Does what the words after `bnjax` say, by default this process's; returns the exit code."""
    words = sys.argv[1:] if words is None else list(words)
    if words and words[0].startswith("-") and words[0] not in ("-h", "--help"):
        words = ["train", *words]
    parser = _parser()
    args, overrides = parser.parse_known_args(words)
    if overrides and args.command not in ("train", "compare"):
        parser.error(f"unrecognized arguments: {shlex.join(overrides)}")
    args.overrides, args.again = overrides, shlex.join(["bnjax", *words])
    return COMMANDS[args.command](args)


def train(args: argparse.Namespace) -> int:
    """Trains and evaluates one config."""
    from bnjax.train import build, parsing

    config = parsing.load(args.config, args.overrides)
    if args.hosts or args.coordinator:
        _join_hosts(args)
    from bnjax.train.cpu import prepare

    prepare(training=True)  # before anything asks which backend there is
    build.check(config)

    from bnjax.train import rundir, summary
    from bnjax.train.loop import Stopped, train_and_evaluate

    dataset = build.dataset(config)
    if dataset.fallback_reason:
        config = build.stand_in(config, dataset, args.overrides)
        _warn_of_fallback(config.data.name, dataset, config.train.batch_size)
    workdir = args.workdir or Path("runs") / config.name
    if (workdir / "summary.json").exists():
        rundir.take(workdir, config, rundir.DataFacts.of(dataset))
        print(
            f"{workdir} is finished: {workdir / 'summary.json'} has the result. "
            "Train anew in another folder with --workdir."
        )
        return 0
    try:
        result = train_and_evaluate(config, workdir, dataset)
    except Stopped as stopped:
        print(f"\n{stopped}; everything is saved. To go on:\n    {args.again}")
        return 128 + stopped.signal
    if not result:  # the first process has it
        return 0
    print(summary.as_text(result))
    print(f"\npredict with:    bnjax predict --workdir {workdir} --split test")
    print(f"look at curves:  pip install tensorboard && tensorboard --logdir {workdir.parent}")
    return 0


def compare(args: argparse.Namespace) -> int:
    """Trains the runs that are missing and prints what they say; returns 1 if a run broke down."""
    from bnjax.compare import grid, report, runs, seeds, text
    from bnjax.train.cpu import prepare
    from bnjax.train.loop import Stopped

    if args.full and not args.claim:
        raise errors.UserError("--full is of a claim: give one with --claim.")
    prepare(training=True)
    if args.claim:
        comparison = grid.compare_claim(args.claim, args.overrides, full=args.full)
    else:
        comparison = grid.compare_configs(args.configs, args.overrides)
    count = args.seeds or comparison["seeds_needed"] or 5
    comparison |= {"seeds": list(range(count)), "command": args.again}
    folder = args.workdir or Path("runs") / (Path(args.claim).stem if args.claim else "compare")
    try:
        datasets = grid.load_datasets(comparison)
        failures = grid.run(comparison, datasets, folder, args.at_once or seeds.fast_way())
    except (Stopped, KeyboardInterrupt) as stopped:
        print(f"\n{str(stopped) or 'stopped'}; everything is saved. To go on:\n    {args.again}")
        return 128 + stopped.signal if isinstance(stopped, Stopped) else 130
    print(text.of_comparison(comparison, runs.finished_runs(folder, comparison)))
    try:
        print(f"\nreport: {report.write(folder)}")
    except errors.UserError as error:  # the results above stand without it
        print(f"\nno report: {error}")
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    return 1 if failures else 0


def report(args: argparse.Namespace) -> int:
    """Writes one report about several folders."""
    from bnjax.compare import report

    page, problems = report.write_all(args.folders, args.out or args.folders[0])
    for problem in problems:
        print(f"WARNING: {problem}", file=sys.stderr)
    print(f"written: {page}")
    return 0


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "train": train,
    "predict": predict.run,
    "compare": compare,
    "report": report,
    **commands.COMMANDS,
    "export": export.run,
    "serve": serve.run,
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bnjax", description="Batch normalization in JAX.", allow_abbrev=False
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str, epilog: str = "") -> argparse.ArgumentParser:
        help_text = text[0].lower() + text[1:].split(". ")[0].rstrip(".")
        return subparsers.add_parser(
            name, help=help_text, description=text, epilog=epilog, allow_abbrev=False
        )

    keys = "bnjax/train/config.py lists all keys."
    sub = command(
        "train",
        "Train and evaluate one config. The same command again goes on where an interrupted run "
        "stopped.",
        "Any key can be overridden: --config.model.momentum=0.9 --config.train.steps=200 "
        f"--config.data.dir=FOLDER. {keys}",
    )
    sub.add_argument(
        "--config", required=True, metavar="FILE", help="a config file or name, for instance bn"
    )
    sub.add_argument(
        "--workdir",
        type=Path,
        metavar="DIR",
        help="the run's folder (default: runs/ and the config's name)",
    )
    sub.add_argument(
        "--hosts",
        action="store_true",
        help="train with the processes that Slurm, Open MPI or a TPU pod started beside this one",
    )
    sub.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        help="train with other processes that get the same command: where process 0 is met",
    )
    sub.add_argument("--processes", type=int, metavar="N", help="how many, with --coordinator")
    sub.add_argument("--process", type=int, metavar="I", help="which of them this is, from 0 on")

    predict.add(command)

    sub = command(
        "compare",
        "Train several configs, or the variants of a claim, over the same seeds and compare them. "
        "The same command again goes on where it was stopped and repeats nothing; with more "
        "--seeds it adds runs.",
        "Any key can be overridden for all variants: --config.train.steps=200 "
        f"--config.data.dir=FOLDER. {keys}",
    )
    what = sub.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--configs",
        type=_files,
        metavar="FILE,FILE…",
        help="config files or names, for instance bn,no_bn",
    )
    what.add_argument("--claim", metavar="FILE", help="a claim file or name, for instance momentum")
    sub.add_argument(
        "--full",
        action="store_true",
        help="with --claim: take it at its full size, not its small one",
    )
    sub.add_argument(
        "--seeds",
        type=_seeds,
        metavar="N",
        help="how many seeds, from 0 on (default: what the claim asks for, or 5)",
    )
    sub.add_argument(
        "--workdir",
        type=Path,
        metavar="DIR",
        help="the comparison's folder (default: runs/ and the claim's name or compare)",
    )
    sub.add_argument(
        "--at-once",
        choices=("one", "vmap", "devices"),
        help="train the seeds of a variant one after the other, all in one program, or side by "
        "side, one on each device (default: what is fast here)",
    )

    sub = command(
        "report",
        "Report on runs and comparisons, from their folders alone. Writes report.html and "
        "report.md.",
    )
    sub.add_argument(
        "folders", nargs="+", type=Path, metavar="RUN", help="a run's or a comparison's folder"
    )
    sub.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="the folder to write into (default: that of the first run)",
    )
    commands.add_commands(command)
    export.add(command)
    serve.add(command)
    return parser


def _files(text: str) -> list[str]:
    files = [file.strip() for file in text.split(",")]
    if not all(files):
        raise argparse.ArgumentTypeError("an empty name: give files with a comma between them")
    return files


def _seeds(text: str) -> int:
    if not (text.isdecimal() and len(text) < 10 and 1 <= int(text) <= MAX_SEEDS):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to {MAX_SEEDS:,}")
    return int(text)


def _join_hosts(args: argparse.Namespace) -> None:
    """Meets the other processes; only the first one speaks, errors excepted."""
    import os

    import jax

    from bnjax.train.devices import join_processes

    join_processes(args.coordinator, args.processes, args.process)
    if jax.process_index() > 0:
        os.environ["TQDM_DISABLE"] = "1"
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 as long as the process


def _warn_of_fallback(wanted: str, dataset: Any, batch_size: int) -> None:
    bar = "!" * 100
    text = (
        f"{bar}\n!!  NOT {wanted.upper()}: this run uses the embedded set {dataset.name!r} "
        f"instead, in batches of {batch_size}.\n!!  {dataset.fallback_reason}\n{bar}"
    )
    print(text, file=sys.stderr, flush=True)


def command() -> None:
    """Is the console script."""
    errors.run(main)


if __name__ == "__main__":
    command()
