"""`bnjax compare`: compares configs, or the variants of a claim, over the same seeds."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Suppress, arg

from bnjax.errors import UserError, needs

if TYPE_CHECKING:
    from bnjax.compare.runs import Run

MAX_SEEDS = 100_000  # one run per seed
SEEDS = 5  # the number of seeds of a comparison without a claim


def run(
    configs: Annotated[
        str | None,
        arg(metavar="FILE,FILE…", help="paths or names of configs, for instance bn,no_bn"),
    ] = None,
    claim: Annotated[
        str | None, arg(metavar="FILE", help="the path or name of a claim, for instance momentum")
    ] = None,
    full: Annotated[
        bool, arg(help="with --claim: run the claim at its full size, not its small size")
    ] = False,
    seeds: Annotated[
        int | None,
        arg(
            metavar="N",
            help="the number of seeds, counted from 0; default: the claim's number, or 5",
        ),
    ] = None,
    workdir: Annotated[
        Path | None,
        arg(metavar="DIR", help="the output folder; default: runs/CLAIM or runs/compare"),
    ] = None,
    at_once: Annotated[
        Literal["one", "vmap", "devices"] | None,
        arg(
            help="train the seeds one after another, all in one program, or one on each device; "
            "default: the fastest way on this machine"
        ),
    ] = None,
    overrides: Suppress[tuple[str, ...]] = (),
    again: Suppress[str] = "",
) -> int:
    """Train several configs, or the variants of a claim, with the same seeds and compare them.

    The same command resumes an interrupted comparison; a larger --seeds adds runs. Any key of the
    config can be set for all variants, for instance --config.train.steps=200. The exit status is 1
    if a run failed.
    """
    if bool(configs) == bool(claim):
        raise UserError("give either --configs or --claim.")
    if full and not claim:
        raise UserError("--full needs a claim: give it with --claim.")
    if seeds is not None and not 1 <= seeds <= MAX_SEEDS:
        raise UserError(f"--seeds {seeds} is not a number from 1 to {MAX_SEEDS:,}.")

    from bnjax.compare import claims, grid, runs
    from bnjax.train.cpu import prepare
    from bnjax.train.interrupt import Stopped

    prepare(training=True)
    files = [file.strip() for file in (configs or "").split(",")]
    compared = claims.load(claim) if claim else claims.of_configs(files)
    comparison = grid.plan(compared, list(overrides), full=full)
    count = seeds or comparison["seeds_needed"] or SEEDS
    comparison |= {"seeds": list(range(count)), "command": again}
    folder = workdir or Path("runs") / (Path(claim).stem if claim else "compare")
    try:
        datasets = grid.load_datasets(comparison)
        failures = grid.run(comparison, datasets, folder, at_once or grid.fast_way())
    except (Stopped, KeyboardInterrupt) as stopped:
        print(f"\n{str(stopped) or 'stopped'}; everything is saved. To resume:\n    {again}")
        return 128 + stopped.signal if isinstance(stopped, Stopped) else 130
    print(as_text(comparison, runs.finished_runs(folder, comparison)))
    try:
        with needs("report", "a report"):
            from bnjax.compare import report

        print(f"\nreport: {report.write([folder], folder)[0]}")
    except (UserError, OSError) as error:  # the results printed above need no report
        print(f"\nno report: {error}")
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    return 1 if failures else 0


def as_text(comparison: dict[str, Any], finished: "list[Run]") -> str:
    """Returns text with the intervals of each variant, followed by the verdicts.

    If the claim makes no statements, each variant is compared with the first.
    """
    from bnjax.compare import claims, intervals, runs

    title, seeds = comparison["question"] or "Comparison", comparison["seeds"]
    lines = [f"\n{title} (seeds: {len(seeds)}; 95 % intervals in brackets)"]
    for name, variant in comparison["variants"].items():
        mine = [run for run in finished if run.variant == name]
        head = f"{name} on {variant['dataset']}: {len(mine)} of {len(seeds)} runs finished"
        lines += ["", head]
        if mine:
            last = intervals.mean_accuracy([run.curve("test").accuracy[-1] for run in mine])
            best = intervals.mean_accuracy([run.curve("judged").accuracy.max() for run in mine])
            taken = intervals.mean([run.seconds[run.last_step] for run in mine])
            target = variant["config"]["train"]["target_loss"]
            times = runs.times(mine, "steps_to_loss", target)
            there = f"{sum(times.reached)} of {len(mine)} runs reached it"
            lines += [
                f"  test accuracy {last} at the end, {mine[0].chosen_by} accuracy {best} at its "
                f"best, in {taken} s of training per run",
                f"  steps to training loss {target:g}: median {intervals.median(times)}; {there} "
                f"in {max(times.values):g} steps",
            ]
    if comparison["statements"]:
        return "\n".join([*lines, "", claims.as_text(claims.verdicts(comparison, finished))])
    lines.append("")
    for name, effect in claims.effects(comparison, finished).items():
        lines.append(
            f"test accuracy at the end, {name}: {effect} ({effect.n} pairs of runs; "
            f"{effect.method})"
        )
    if len(seeds) < SEEDS:
        lines.append(f"With fewer than {SEEDS} seeds, intervals are wide: give --seeds {SEEDS}.")
    return "\n".join(lines)
