"""`bnjax compare`: configs, or the variants of a claim, over the same seeds."""

import sys
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Suppress, arg

from bnjax.errors import UserError

MAX_SEEDS = 100_000  # each is a run


def run(
    configs: Annotated[
        str | None, arg(metavar="FILE,FILE…", help="config files or names, for instance bn,no_bn")
    ] = None,
    claim: Annotated[
        str | None, arg(metavar="FILE", help="a claim file or name, for instance momentum")
    ] = None,
    full: Annotated[bool, arg(help="with --claim: its full size, not its small one")] = False,
    seeds: Annotated[
        int | None, arg(metavar="N", help="how many seeds, from 0; as the claim says, or 5")
    ] = None,
    workdir: Annotated[
        Path | None,
        arg(metavar="DIR", help="the comparison's folder; runs/ and the claim's name or compare"),
    ] = None,
    at_once: Annotated[
        Literal["one", "vmap", "devices"] | None,
        arg(
            help="train the seeds one after another, in one program, or one on each device; what "
            "is fast here"
        ),
    ] = None,
    overrides: Suppress[tuple[str, ...]] = (),
    again: Suppress[str] = "",
) -> int:
    """Train several configs, or the variants of a claim, over the same seeds and compare them.

    The same command continues and repeats nothing; with more --seeds it adds runs. Any key can be
    set for all variants: --config.train.steps=200. Exits with 1 if a run broke down.
    """
    if bool(configs) == bool(claim):
        raise UserError("give either --configs or --claim.")
    if full and not claim:
        raise UserError("--full is of a claim: give one with --claim.")
    if seeds is not None and not 1 <= seeds <= MAX_SEEDS:
        raise UserError(f"--seeds {seeds} is not a number from 1 to {MAX_SEEDS:,}.")

    from bnjax.compare import grid, runs, text
    from bnjax.train.cpu import prepare
    from bnjax.train.loop import Stopped

    prepare(training=True)
    if claim:
        comparison = grid.compare_claim(claim, list(overrides), full=full)
    else:
        files = [file.strip() for file in str(configs).split(",")]
        if not all(files):
            raise UserError("--configs has an empty name: give files with a comma between them.")
        comparison = grid.compare_configs(files, list(overrides))
    count = seeds or comparison["seeds_needed"] or 5
    comparison |= {"seeds": list(range(count)), "command": again}
    folder = workdir or Path("runs") / (Path(claim).stem if claim else "compare")
    try:
        datasets = grid.load_datasets(comparison)
        failures = grid.run(comparison, datasets, folder, at_once or grid.fast_way())
    except (Stopped, KeyboardInterrupt) as stopped:
        print(f"\n{str(stopped) or 'stopped'}; everything is saved. To go on:\n    {again}")
        return 128 + stopped.signal if isinstance(stopped, Stopped) else 130
    print(text.of_comparison(comparison, runs.finished_runs(folder, comparison)))
    try:
        from bnjax.commands.report import reports

        print(f"\nreport: {reports().write(folder)}")
    except UserError as error:  # the results above stand without it
        print(f"\nno report: {error}")
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    return 1 if failures else 0
