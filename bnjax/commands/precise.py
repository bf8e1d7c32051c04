"""`bnjax precise`: statistics of many images at a trained network's weights."""

import argparse
import functools
from collections.abc import Callable
from pathlib import Path

from bnjax.commands.arguments import add_run_arguments, count

USUAL_IMAGES = 10_000


def add(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds the parser of the command."""
    sub = command(
        "precise",
        "Recompute the running statistics of a trained network from training images. Prints test "
        "loss and accuracy under the stored and under the recomputed ones.",
    )
    add_run_arguments(sub)
    sub.add_argument(
        "--images",
        type=functools.partial(count, least=2),
        default=USUAL_IMAGES,
        metavar="N",
        help=f"how many training images (default: {USUAL_IMAGES:,})",
    )
    sub.add_argument(
        "--by",
        choices=("batch", "population"),
        default="batch",
        help="what normalises the layers before the one whose statistics are taken: each batch's "
        "own, in one pass (default), or the recomputed ones, in several",
    )
    sub.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="the folder to write the network into with these statistics; the run stays as it is",
    )
    sub.add_argument("--json", action="store_true", help="print one JSON object, not a table")


def run(args: argparse.Namespace) -> int:
    """Recomputes, evaluates and, if asked to, writes."""
    import json

    from bnjax.train import precise_run, rundir
    from bnjax.train.cpu import prepare
    from bnjax.train.trained import Trained

    prepare()
    if args.out:
        rundir.check_is_free(args.out)
    trained = Trained(args.workdir, args.checkpoint)
    result, found = precise_run.of_run(trained, args.data_dir, args.images, args.by)
    print(json.dumps(result) if args.json else precise_run.table(result))
    if args.out:
        trained.write(args.out, trained.params, found, result, trained.folded)
        if not args.json:
            print(f"\npredict with:    bnjax predict --workdir {args.out} --split test")
    return 0
