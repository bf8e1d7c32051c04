"""The commands of the BN clinic: `bnjax audit | precise | fold | port`.

Each is a thin layer over a function in `bnjax.stats`, for the networks in run folders.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

LEAST_IMAGES = 8  # four batches of two

# Whatever a command needs is imported in it, so that --help is quick.


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say which trained network, and where its data lie."""
    parser.add_argument(
        "--workdir", type=Path, required=True, metavar="DIR", help="the folder of the run"
    )
    parser.add_argument(
        "--checkpoint",
        default="last",
        metavar="best|last|STEP",
        help="which of its checkpoints (default: last)",
    )
    parser.add_argument(
        "--data-dir", metavar="DIR", help="where the data lie, if not where they lay in training"
    )


def add_commands(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds the parsers of the commands; `command(name, text)` makes one."""
    sub = command(
        "audit",
        "Check the running statistics of a trained network. Says what is wrong with its batch "
        "norms, why it matters and how to mend it; exits with 0 if nothing is, and with 1 if "
        "something is.",
    )
    add_run_arguments(sub)
    sub.add_argument(
        "--images",
        type=_images,
        metavar="N",
        help="how many training images to look at (default: 4 batches, and 2,048 at least)",
    )
    sub.add_argument("--json", action="store_true", help="print one JSON object, not tables")
    sub.add_argument(
        "--out", type=Path, metavar="DIR", help="also write audit.html there, with charts"
    )


def audit(args: argparse.Namespace) -> int:
    """Prints what is wrong with a network's running statistics; returns 1 if anything is."""
    import json

    from bnjax.errors import UserError
    from bnjax.train.audit import of_run
    from bnjax.train.xla import prepare

    prepare()
    try:
        about, findings = of_run(args.workdir, args.checkpoint, args.data_dir, args.images)
        if args.json:
            print(json.dumps(about | findings.as_json()))
        else:
            step, data = about["step"], about["dataset"]
            print(f"{args.workdir}, checkpoint of step {step}, {data}\n\n{findings}")
        if args.out:
            from bnjax.compare.report import audit as page

            path = page.write(findings, f"{args.workdir}, step {about['step']}", args.out)
            print(f"\nwritten: {path}", file=sys.stderr)
    except OSError as error:  # an exit code of 1 would say that something is wrong with the network
        where = error.filename or "a file"
        raise UserError(f"{where} cannot be read: {error.strerror or error}.") from error
    return 1 if findings.found else 0


def _images(text: str) -> int:
    if not (text.isdecimal() and len(text) < 10 and int(text) >= LEAST_IMAGES):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, {LEAST_IMAGES} or above")
    return int(text)


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {"audit": audit}
