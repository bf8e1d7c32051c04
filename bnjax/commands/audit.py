"""`bnjax audit`: what is wrong with the running statistics of a trained network."""

import argparse
import functools
import sys
from collections.abc import Callable
from pathlib import Path

from bnjax.commands.arguments import add_run_arguments, count
from bnjax.errors import UserError

LEAST_IMAGES = 8  # four batches of two


def add(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds the parser of the command."""
    sub = command(
        "audit",
        "Check the running statistics of a trained network. Says what is wrong with its batch "
        "norms, why it matters and how to mend it; exits with 0 if nothing is, with 1 if something "
        "is, and with 2 if that cannot be said: without a run, or without a batch norm in it.",
    )
    add_run_arguments(sub)
    sub.add_argument(
        "--images",
        type=functools.partial(count, least=LEAST_IMAGES),
        metavar="N",
        help="how many training images to look at (default: 4 batches, and 2,048 at least)",
    )
    sub.add_argument("--json", action="store_true", help="print one JSON object, not tables")
    sub.add_argument(
        "--out", type=Path, metavar="DIR", help="also write audit.html there, with charts"
    )


def run(args: argparse.Namespace) -> int:
    """Prints what is wrong with a network's running statistics; returns the exit code."""
    import json

    from bnjax.compare.report import audit as page
    from bnjax.train.audit import of_run
    from bnjax.train.cpu import prepare

    prepare()
    try:
        if args.out:
            page.check(args.out)
        about, findings = of_run(args.workdir, args.checkpoint, args.data_dir, args.images)
        if args.json:
            print(json.dumps(about | findings.as_json()))
        else:
            step, data = about["step"], about["dataset"]
            print(f"{args.workdir}, checkpoint of step {step}, {data}\n\n{findings}")
        if args.out:
            path = page.write(findings, f"{args.workdir}, step {about['step']}", args.out)
            print(f"\nwritten: {path}", file=sys.stderr)
    except OSError as error:  # an exit code of 1 would say that something is wrong with the network
        where = error.filename or "a file"
        raise UserError(f"{where} cannot be read: {error.strerror or error}.") from error
    return 0 if findings.healthy else 1 if findings.found else 2
