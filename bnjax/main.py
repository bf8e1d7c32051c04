"""`python -m bnjax.main --config configs/bn.py`: trains and evaluates one config."""

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from bnjax import errors


def main() -> int:
    """Reads the command line, trains, and returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m bnjax.main",
        description="Train and evaluate one config. The same command again goes on where an interrupted run stopped.",
        epilog="Any key can be overridden: --config.model.momentum=0.9 --config.train.steps=200 --config.data.dir=FOLDER. "
        "bnjax/defaults.py lists all keys.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="a config file, for instance configs/bn.py")
    parser.add_argument("--workdir", type=Path, metavar="DIR", help="the run's folder (default: runs/ and the config's name)")
    args, overrides = parser.parse_known_args()

    from bnjax import config as configs  # late, so that --help is quick
    from bnjax import configfile

    config = configfile.load(args.config, overrides)
    configs.check_choices(config)

    from bnjax import workdir as workdirs
    from bnjax.data import sources
    from bnjax.loop import Stopped, train_and_evaluate
    from bnjax.platform import keep_compiled, keep_freed_memory

    keep_freed_memory()
    keep_compiled(sources.cache_dir() / "compiled")
    dataset = configs.load_data(config)
    if dataset.fallback_reason:
        config.name = f"{config.name}-{dataset.name}"
        _warn_of_fallback(config.data.name, dataset.name, dataset.fallback_reason)
    workdir = args.workdir or Path("runs") / config.name
    if (workdir / "summary.json").exists():
        workdirs.claim(workdir, config, workdirs.DataFacts.of(dataset))
        print(f"{workdir} is finished: {(workdir / 'summary.json')} has the result. Train anew in another folder with --workdir.")
        return 0
    try:
        summary = train_and_evaluate(config, workdir, dataset)
    except Stopped as stopped:
        again = shlex.join(["python", "-m", "bnjax.main", *sys.argv[1:]])
        print(f"\n{stopped}; everything is saved. To go on:\n    {again}")
        return 128 + stopped.signal
    print(report(summary))
    print(f"\npredict with:    python -m bnjax.predict --workdir {workdir} --split test")
    print(f"look at curves:  pip install tensorboard && tensorboard --logdir {workdir.parent}")
    return 0


def report(summary: dict[str, Any]) -> str:
    """Returns the result of a run as a few lines of text."""
    target, reached = next(iter(summary["steps_to_loss"].items()))
    best, last = summary["best_test"], summary["final_test"]
    return "\n".join(
        [
            f"\n{summary['name']} on {summary['dataset']}, {summary['steps']} steps of {summary['batch_size']} images:",
            f"  training loss at or below {target}: {'not reached' if reached is None else f'first at step {reached}'}",
            f"  test accuracy {last['accuracy']:.4f}, loss {last['loss']:.4f} at the end; all {last['count']:,} test images",
            f"  best test accuracy {best['accuracy']:.4f}, loss {best['loss']:.4f} at step {best['step']}",
            f"  {summary['seconds']:,.0f} s of training, {summary['images_per_s']:,.0f} images/s on {summary['device']}",
        ]
    )


def _warn_of_fallback(wanted: str, name: str, reason: str) -> None:
    bar = "!" * 100
    text = f"{bar}\n!!  NOT {wanted.upper()}: this run uses the embedded set {name!r} instead.\n!!  {reason}\n{bar}"
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    errors.run(main)
