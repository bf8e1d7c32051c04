"""`bnjax port`: weights to another framework or from it."""

import argparse
from collections.abc import Callable
from pathlib import Path

from bnjax.commands.arguments import add_run_arguments, count
from bnjax.errors import UserError


def add(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds the parser of the command."""
    sub = command(
        "port",
        "Take a run's weights and running statistics to PyTorch or Keras, or from there into a new "
        "run. Files are safetensors, or .npz; nothing is unpickled.",
        "--to torch prints the network in PyTorch, with layers called as here; it takes images "
        "[n, c, h, w], from 0 to 1. --from makes a run folder that can be evaluated, and not "
        "trained on; the network has to have the layers of that in --workdir, and every key has to "
        "have a counterpart. In torch: save_file(network.state_dict(), FILE) and "
        "network.load_state_dict(load_file(FILE)) of safetensors.torch. In Keras 3: "
        "np.savez(FILE, **{v.path: v.numpy() for v in network.weights}), and v.assign(np.load(FILE)"
        '[v.path]) for each. A table of names is JSON: {"names": {"conv{i}": '
        '"features.{i}", "{layer}": "{layer}"}}, our layers first.',
    )
    add_run_arguments(sub, data=False)
    way = sub.add_mutually_exclusive_group(required=True)
    frameworks = ("torch", "keras")
    way.add_argument("--to", choices=frameworks, help="write FILE, from the run")
    way.add_argument("--from", dest="source", choices=frameworks, help="read FILE, into --out")
    sub.add_argument("file", type=Path, metavar="FILE", help="the weights there")
    sub.add_argument("--out", type=Path, metavar="DIR", help="--from: the folder of the new run")
    sub.add_argument(
        "--table",
        type=Path,
        metavar="JSON",
        help="what the layers are called there (default: as here)",
    )
    sub.add_argument(
        "--probe",
        type=Path,
        metavar="FILE",
        help="a file with `image`, as the network there takes them, and `logits`: --to writes one, "
        "--from reads it, and refuses weights whose logits differ by more than 1e-4",
    )
    sub.add_argument(
        "--examples",
        type=count,
        metavar="N",
        help="the images of a training batch, to convert stored variances: torch's are divided by "
        "n - 1, those of Keras by n, n being N times the positions. Default: they stay as they "
        "are, so that the logits are equal, and a new run's config.model.variance says what they "
        "are",
    )
    sub.add_argument(
        "--epsilon",
        type=float,
        metavar="X",
        help="--from: of the norms there (default: what FILE says if bnjax wrote it, or the run's)",
    )
    sub.add_argument(
        "--momentum",
        type=float,
        metavar="X",
        help="--from: likewise, as the framework means it: torch's is one minus the fraction kept",
    )


def run(args: argparse.Namespace) -> int:
    """Takes weights to another framework or from it."""
    from bnjax.train import ported
    from bnjax.train.cpu import prepare
    from bnjax.train.trained import Trained

    if args.source and args.out is None:
        raise UserError("--from makes a new run: say in which folder with --out.")
    if args.to and any(value is not None for value in (args.out, args.epsilon, args.momentum)):
        raise UserError("--out, --epsilon and --momentum are of --from.")
    prepare()
    trained = Trained(args.workdir, args.checkpoint)
    options = {"table": args.table, "probe": args.probe, "examples": args.examples}
    if args.to:
        print(ported.export_run(trained, args.to, args.file, **options))
    else:
        options |= {"epsilon": args.epsilon, "momentum": args.momentum}
        print(ported.import_run(trained, args.source, args.file, args.out, **options))
    return 0
