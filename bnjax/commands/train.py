"""`bnjax train`: trains and evaluates one config."""

import os
import sys
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Suppress, arg


def run(
    config: Annotated[
        str, arg(metavar="FILE", help="the path or name of a config, for instance bn")
    ],
    workdir: Annotated[
        Path | None,
        arg(
            metavar="DIR", help="the run's folder; default: runs/NAME, with the name of the config"
        ),
    ] = None,
    start: Annotated[
        Path | None,
        arg(
            name="from",
            metavar="DIR",
            help="start from the network in this folder, written by bnjax train, port, precise, "
            "fold or export",
        ),
    ] = None,
    hosts: Annotated[
        bool, arg(help="train with all processes that Slurm, Open MPI or a TPU pod started")
    ] = False,
    coordinator: Annotated[
        str | None,
        arg(metavar="HOST:PORT", help="the address of process 0, to train with several processes"),
    ] = None,
    processes: Annotated[
        int | None, arg(metavar="N", help="with --coordinator: the number of processes")
    ] = None,
    process: Annotated[
        int | None, arg(metavar="I", help="the index of this process, from 0")
    ] = None,
    overrides: Suppress[tuple[str, ...]] = (),
    again: Suppress[str] = "",
) -> int:
    """Train and evaluate one config.

    The same command resumes an interrupted run. Any key of the config can be set, for instance
    --config.model.momentum=0.9 --config.train.steps=200.
    """
    from bnjax.train import build, parsing

    overrides = (*overrides, *([f"--config.train.from={start}"] if start else []))
    settings = parsing.load(config, overrides)
    if hosts or coordinator:
        _join(coordinator, processes, process)
    from bnjax.train.cpu import prepare

    prepare(training=True)  # before JAX initialises its backend
    build.check(settings)

    from bnjax.train import rundir, summary
    from bnjax.train.interrupt import Stopped
    from bnjax.train.loop import train_and_evaluate

    dataset = build.dataset(settings)
    if dataset.fallback_reason:
        wanted = settings.data.name
        settings = build.stand_in(settings, dataset, overrides)
        _warn_of_fallback(wanted, dataset, settings.train.batch_size)
    folder = workdir or Path("runs") / settings.name
    if (folder / "summary.json").exists():
        rundir.take(folder, settings, rundir.DataFacts.of(dataset))
        print(
            f"{folder} is finished: {folder / 'summary.json'} contains the result. "
            "Use a different folder with --workdir to train again."
        )
        return 0
    try:
        result = train_and_evaluate(settings, folder, dataset)
    except Stopped as stopped:
        print(f"\n{stopped}; everything is saved. To resume:\n    {again}")
        return 128 + stopped.signal
    if result:  # empty except in the first of several processes
        print(summary.as_text(result))
        print(f"\npredict with:    bnjax predict --workdir {folder} --split test")
        print(f"audit with:      bnjax audit --workdir {folder}")
        print(f"view curves:     pip install tensorboard && tensorboard --logdir {folder.parent}")
    return 0


def _join(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Joins the other processes; only the first process prints anything except errors."""
    import jax

    from bnjax.train.devices import join_processes

    join_processes(coordinator, processes, process)
    if jax.process_index() > 0:
        os.environ["TQDM_DISABLE"] = "1"
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 open until the process ends


def _warn_of_fallback(wanted: str, dataset: Any, batch_size: int) -> None:
    bar = "!" * 100
    text = (
        f"{bar}\n!!  NOT {wanted.upper()}: this run uses the embedded data set {dataset.name!r} "
        f"instead, in batches of {batch_size}.\n!!  {dataset.fallback_reason}\n{bar}"
    )
    print(text, file=sys.stderr, flush=True)
