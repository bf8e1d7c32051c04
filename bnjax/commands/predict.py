"""`bnjax predict`: what a run's network, or an exported one, says of images."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bnjax.commands.arguments import add_run_arguments
from bnjax.errors import UserError


def add(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds the parser of the command."""
    sub = command("predict", "Classify images, or a whole split, with a trained network.")
    what = sub.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "images",
        nargs="*",
        type=Path,
        default=[],
        metavar="IMAGE",
        help="PNG, JPEG or .npy ([h, w, c] or [n, h, w, c]; uint8, or float from 0 to 1)",
    )
    what.add_argument(
        "--split",
        choices=("train", "test"),
        help="classify this split; ends with loss, accuracy and accuracy per class",
    )
    network = sub.add_mutually_exclusive_group(required=True)
    add_run_arguments(sub, among=network)
    network.add_argument(
        "--model",
        type=Path,
        metavar="DIR",
        help="the folder of an exported network, which is given pixels of 8 bits: what has to be "
        "resized to fit is rounded",
    )
    sub.add_argument(
        "--views",
        type=int,
        metavar="N",
        help="of each image, whose logits are averaged: 2, with the mirror; 6, with shifts by a "
        "pixel besides; as the run was evaluated if not given",
    )
    sub.add_argument("--json", action="store_true", help="print one JSON object, not a table")


def run(args: argparse.Namespace) -> int:
    """Prints predictions; returns 1 if an image could not be read."""
    import json

    from bnjax.train.cpu import prepare
    from bnjax.train.predict import table

    prepare()
    result = _of_model(args) if args.model else _of_run(args)
    if text := json.dumps(result) if args.json else table(result):
        print(text)
    for failure in result["errors"]:
        print(f"error: {failure}", file=sys.stderr)
    return 1 if result["errors"] else 0


def _of_run(args: argparse.Namespace) -> dict[str, Any]:
    from bnjax.models.layers import VIEWS
    from bnjax.train import predict
    from bnjax.train.trained import Trained

    if args.views not in (None, *VIEWS):
        raise UserError(f"--views {args.views}: there are {', '.join(map(str, VIEWS))}.")
    trained = Trained(args.workdir, args.checkpoint)
    if args.split:
        return predict.of_split(trained, args.split, args.data_dir, args.views)
    return predict.of_images(trained, args.images, args.views)


def _of_model(args: argparse.Namespace) -> dict[str, Any]:
    if args.split or args.data_dir or args.views or args.checkpoint != "last":
        raise UserError(
            "--split, --data-dir, --views and --checkpoint are of a run: give its folder with "
            "--workdir. An exported network knows no data, and has one set of weights."
        )
    from bnjax.export.exported import Exported
    from bnjax.export.pictures import of_images

    return of_images(Exported(args.model), args.images)
