"""The command `bnjax`. If the name of a command is omitted, the command is `train`."""

import difflib
import functools
import importlib
import inspect
import shlex
import sys
from collections.abc import Sequence

from bnjax import errors

COMMANDS = {
    "train": "train and evaluate a network as described by a config",
    "predict": "classify images or a whole split",
    "compare": "train several configs, or the variants of a claim, with the same seeds",
    "report": "write a report on runs and comparisons",
    "audit": "find faults in the running statistics of a trained network",
    "precise": "recompute the running statistics from training images",
    "fold": "fold the batch norms of a trained network into its layers",
    "port": "convert weights and statistics to or from PyTorch or Keras",
    "export": "write a network as files that run without bnjax",
    "serve": "score images with a network in the browser",
    "info": "print versions and devices, for a bug report",
}
OVERRIDDEN = ("train", "compare")  # these accept --config.KEY=VALUE


def main(words: Sequence[str] | None = None) -> int:
    """Runs the command given by the arguments (default: `sys.argv`) and returns its exit code."""
    words = sys.argv[1:] if words is None else list(words)
    if words == ["--version"]:
        from importlib.metadata import version

        print(f"bnjax {version('bnjax')}")
        return 0
    if words and words[0].startswith("-") and words[0] not in ("-h", "--help"):
        words = ["train", *words]
    if not words or words[0] in ("-h", "--help"):
        print(_usage(), file=sys.stdout if words else sys.stderr)
        return 0 if words else 2
    name, *rest = words
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise errors.UserError(
            f"there is no command {name}.{hint} The commands are {', '.join(COMMANDS)}."
        )
    import tyro

    # Commands import their dependencies when they run, so that --help is fast.
    command = importlib.import_module(f"bnjax.commands.{name}").run
    if name in OVERRIDDEN:
        rest, overrides = _split(rest)
        again = shlex.join(["bnjax", *words])
        command = functools.partial(command, overrides=overrides, again=again)
    about = None
    if name in OVERRIDDEN and {"-h", "--help"} & {*rest}:
        from bnjax.train.config import keys_as_text

        about = f"{inspect.cleandoc(command.func.__doc__)}\n\n{keys_as_text()}"
    options = (tyro.conf.FlagCreatePairsOff,)
    return tyro.cli(command, args=rest, prog=f"bnjax {name}", description=about, config=options)


def _usage() -> str:
    lines = [f"    {name:9}{text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "usage: bnjax COMMAND …",
            "",
            "Batch normalization in JAX.",
            "",
            *lines,
            "",
            "bnjax COMMAND --help shows the options; bnjax --version shows the version.",
            "bnjax COMMAND --tyro-print-completion SHELL prints completions (bash, zsh, tcsh).",
        ]
    )


def _split(words: list[str]) -> tuple[list[str], tuple[str, ...]]:
    """Separates the options of a command from arguments of the form --config.KEY=VALUE."""
    own, overrides = [], []
    rest = iter(words)
    for word in rest:
        if not word.startswith("--config."):
            own.append(word)
            continue
        overrides.append(word if "=" in word else f"{word}={next(rest, '')}")
    return own, tuple(overrides)


def command() -> None:
    """Runs the console script `bnjax`."""
    errors.run(main)


if __name__ == "__main__":
    command()
