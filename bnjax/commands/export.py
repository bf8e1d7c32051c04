"""`bnjax export`: a trained network as files that run without bnjax."""

import argparse
from collections.abc import Callable
from pathlib import Path

from bnjax.commands.arguments import add_run_arguments


def add(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds the parser of the command."""
    sub = command(
        "export",
        "Write a trained network as files that run without bnjax. Images of 8 bits to logits: a "
        "StableHLO program for CPUs, GPUs and TPUs beside its weights, and ONNX. The logits are "
        "checked on noise, or with --data-dir on test images.",
    )
    add_run_arguments(sub)
    sub.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="the folder to write into; bnjax predict --model takes it",
    )
    sub.add_argument(
        "--no-fold",
        action="store_true",
        help="leave the batch norms as they are; by default they are folded where that is exact",
    )
    sub.add_argument("--onnx", action="store_true", help="write ONNX as well")


def run(args: argparse.Namespace) -> int:
    """Exports a network."""
    from bnjax.export import stablehlo as export
    from bnjax.train.cpu import prepare
    from bnjax.train.trained import Trained

    prepare()
    trained = Trained(args.workdir, args.checkpoint)
    what = export.export_run(
        trained, args.out, folded=not args.no_fold, onnx=args.onnx, data_dir=args.data_dir
    )
    for norm, layer in what.folded.items():
        print(f"{norm} is folded into {layer}")
    for norm, reason in what.kept.items():
        print(f"{norm} stays: {reason}")
    for name in what.files:
        print(f"{args.out / name}: {(args.out / name).stat().st_size:,} bytes")
    differences = {name: value for name, value in what.agreement.items() if name != "images"}
    for name, difference in differences.items():
        print(
            f"{name}: logits of {what.agreement['images']} differ by {difference:.1e} of the "
            "largest"
        )
    print(f"\npredict with:    bnjax predict --model {args.out} IMAGE")
    return 0
