"""The commands of the BN clinic: `bnjax audit | precise | fold | port`.

Each is a thin layer over a function in `bnjax.stats`, for the networks in run folders.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

from bnjax.errors import UserError

# Whatever a command needs is imported in it, so that --help is quick.


def add_run_arguments(parser: argparse.ArgumentParser, *, data: bool = True) -> None:
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
    if data:
        parser.add_argument(
            "--data-dir",
            metavar="DIR",
            help="where the data lie, if not where they lay in training",
        )


def add_commands(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds the parsers of the commands; `command(name, text)` makes one."""
    _add_port(command)


def port(args: argparse.Namespace) -> int:
    """Takes weights to another framework or from it."""
    from bnjax.train import ported
    from bnjax.train.trained import Trained
    from bnjax.train.xla import prepare

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


def _add_port(command: Callable[..., argparse.ArgumentParser]) -> None:
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
        type=_count,
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


def _count(text: str) -> int:
    if not (text.isdecimal() and len(text) < 10 and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return int(text)


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {"port": port}
