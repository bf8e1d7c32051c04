"""`bnjax fold`: the norms of a trained network into the layers beside them."""

import argparse
from collections.abc import Callable
from pathlib import Path

from bnjax.commands.arguments import add_run_arguments


def add(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds the parser of the command."""
    sub = command(
        "fold",
        "Fold the batch norms of a trained network into its layers. What is folded gives the same "
        "logits, which is checked on noise, or with --data-dir on test images; the rest stays, "
        "with the reason.",
    )
    add_run_arguments(sub)
    sub.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="the folder to write the folded network into; bnjax predict --workdir takes it",
    )
    sub.add_argument(
        "--latency", action="store_true", help="time predictions before and after; half a minute"
    )


def run(args: argparse.Namespace) -> int:
    """Folds a network, checks it and writes it; returns 1 if no norm can be folded."""
    import numpy as np

    from bnjax.clinic.fold import fold
    from bnjax.train import fold_run, rundir
    from bnjax.train.cpu import prepare
    from bnjax.train.trained import Trained

    prepare()
    if args.out:
        rundir.check_is_free(args.out)
    trained = Trained(args.workdir, args.checkpoint)
    network = (trained.params, trained.batch_stats)
    like = {"image": np.zeros((1, *trained.data.image_shape), np.uint8)}
    folding = fold(trained.model, *network, like)
    print(fold_run.table(folding) or "the network has no norm")
    if not any(one.layer for one in folding.norms):
        print("nothing was folded, and nothing is written")
        return 1
    about = fold_run.check(trained, folding, args.data_dir)
    print(
        f"\n{fold_run.numbers(*network):,} numbers before, "
        f"{fold_run.numbers(folding.params, folding.batch_stats):,} after\n"
        f"logits of {about['probe']} differ by {about['difference']:.1e} of the largest"
    )
    for size, before, after in fold_run.latencies(trained, folding) if args.latency else ():
        print(f"batch {size:5,}: {before * 1e3:9.3f} ms before, {after * 1e3:9.3f} ms after")
    if args.out:
        made = (folding.params, folding.batch_stats)
        trained.write(args.out, *made, about, folding.model.pairs)
        print(f"\npredict with:    bnjax predict --workdir {args.out} --split test")
    return 0
