"""Compares the speed of training with a plain Flax loop and with other frameworks.

    python scripts/bench.py --data-dir FOLDER --quick
    python scripts/bench.py --data-dir FOLDER --json bench.json --peer COMMAND --peer COMMAND

FOLDER holds CIFAR-10. The programs take turns, each in a separate process. A peer is any command
that trains the same network and prints a JSON line with `peer`, `step_s` and `images_per_s`, for
instance 'python step_torch.py FOLDER {batch} {steps}'; {batch} and {steps} are filled in. Run it on
an otherwise idle machine: `--quick` takes some minutes, the full benchmark two hours on two cores.

Prints Markdown tables: images a second (median, minimum and maximum of the rounds), the ratio to
bnjax in the same round (median), FLOP/s relative to the best available float32 matrix product
(XLA's or NumPy's BLAS), and peak memory; then the speed of evaluation, the overhead of the training
loop, and the time from the command to the first step.
"""

import argparse
import json
import os
import pty
import re
import shlex
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tqdm

from bnjax.data.datasets import cache_dir
from bnjax.train.cpu import processor
from bnjax.train.summary import versions

ROOT = Path(__file__).parents[1]
STEP = [sys.executable, str(ROOT / "scripts" / "bench_step.py")]
# The settings of `keep_freed_memory`, so that other frameworks use the same malloc as bnjax.
KEPT = {
    "GLIBC_TUNABLES": "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=18446744073709551615:"
    "glibc.malloc.arena_max=1:glibc.malloc.hugetlb=1"
}
# NumPy's BLAS is to choose its kernels by the processor, whatever was chosen for other programs.
BLAS_BY_ITSELF = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")
Results = dict[tuple[int, str], list[dict[str, Any]]]


def measure(command: list[str], env: dict[str, str] | None = None) -> dict[str, Any]:
    """Runs a command and returns the JSON object on the last line that it prints."""
    kept = {name: value for name, value in os.environ.items() if name not in BLAS_BY_ITSELF}
    done = subprocess.run(command, capture_output=True, text=True, env=kept | (env or {}))
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        sys.exit(f"{shlex.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(lines[-1])


def contenders(
    args: argparse.Namespace, batch: int, steps: int
) -> Iterator[tuple[str, list[str], dict[str, str]]]:
    """Yields the name, command and environment of each training program, bnjax first."""
    train = [*STEP, "train", args.data_dir, str(batch), str(steps)]
    yield "bnjax", train, {}
    yield "bnjax, memory released", [*train, "--release"], {}
    yield "bnjax without BN", [*train, "--norm", "none"], {}
    if args.bfloat16:
        yield "bnjax, bfloat16 dense products", [*train, "--dense-product", "bfloat16"], {}
        yield "bnjax, bfloat16", [*train, "--dtype", "bfloat16"], {}
    textbook = [*train, "--model", "textbook"]
    yield "textbook Flax loop", [*textbook, "--release"], {}
    yield "textbook Flax loop, memory kept", textbook, {}
    yield "textbook without BN, memory kept", [*textbook, "--norm", "none"], {}
    for together in args.together:
        yield f"bnjax, {together} steps a dispatch", [*train, "--together", str(together)], {}
    for peer in args.peer:
        yield peer, shlex.split(peer.format(batch=batch, steps=steps)), KEPT


def race(args: argparse.Namespace) -> Results:
    """Runs all contenders in turn, round after round."""
    results: Results = {}
    todo = []
    for batch in args.batch:
        # About a minute of steps at 500 images a second, and enough of them for a median.
        steps = min(20, max(5, 30_000 // batch))
        wanted = [
            found
            for found in contenders(args, batch, steps)
            if not any(word in found[0] for word in args.skip)
        ]
        todo += [(batch, *contender) for _ in range(args.rounds) for contender in wanted]
    progress = tqdm.tqdm(todo, unit="measurement")
    for batch, name, command, env in progress:
        progress.set_postfix_str(f"batch {batch}: {name}")
        results.setdefault((batch, name), []).append(measure(command, env))
    return results


def table(results: Results, product: float) -> str:
    """Returns the table of the race; `product` is the FLOP/s of the best large float32 product."""
    titles = "batch|what|images/s|min to max|bnjax / it|TFLOP/s|of a matrix product|peak memory"
    lines = ["| " + titles.replace("|", " | ") + " |", "|---" * 8 + "|"]
    for (batch, name), runs in results.items():
        rates = [run["images_per_s"] for run in runs]
        ratio = np.median(
            [
                ours["images_per_s"] / its
                for ours, its in zip(results[batch, "bnjax"], rates, strict=True)
            ]
        )
        flops = np.median([run.get("flop_per_s", np.nan) for run in runs])
        peak = np.median([run.get("peak_bytes", np.nan) for run in runs]) / 2**30
        columns = [
            batch,
            runs[0]["peer"] if runs[0]["peer"] not in ("bnjax", "textbook") else name,
            f"{np.median(rates):,.0f}",
        ]
        columns += [f"{min(rates):,.0f} to {max(rates):,.0f}", f"{ratio:.2f}"]
        columns += (
            ["", "", ""]
            if np.isnan(flops)
            else [f"{flops / 1e12:.3f}", f"{flops / product:.0%}", f"{peak:.1f} GiB"]
        )
        lines.append("| " + " | ".join(map(str, columns)) + " |")
    return "\n".join(lines)


def train_command(config: str, workdir: Path, *overrides: str) -> list[str]:
    """Returns the command line of a training."""
    flags = [f"--config.{override}" for override in overrides]
    return [
        sys.executable,
        "-m",
        "bnjax.main",
        "--config",
        str(ROOT / "configs" / f"{config}.py"),
        "--workdir",
        str(workdir),
        *flags,
    ]


def overhead(args: argparse.Namespace, bare: float) -> float:
    """Returns how much longer a step takes in `bnjax train` than alone, with batches of 512."""
    with tempfile.TemporaryDirectory() as folder:
        steps = [
            "train.steps=40",
            "train.batch_size=512",
            "eval.every_steps=20",
            "eval.every_epochs=0.0",
            f"data.dir={args.data_dir}",
        ]
        subprocess.run(
            train_command("bn", Path(folder) / "run", *steps), check=True, capture_output=True
        )
        lines = [
            json.loads(line)
            for line in (Path(folder) / "run" / "timing.jsonl").read_text().splitlines()
        ]
    seconds = np.diff([line["seconds"] for line in lines])
    return float(np.median(seconds) / bare - 1)


def first_step(env: dict[str, str]) -> float:
    """Returns the seconds from the command to the first training step shown, on the digits."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        leader, follower = pty.openpty()
        termios.tcsetwinsize(follower, (24, 120))  # without a size tqdm shows nothing
        command = train_command("digits", Path(folder) / "run", "train.epochs=1.0")
        with subprocess.Popen(
            command, stdin=follower, stdout=follower, stderr=follower, env=os.environ | env
        ) as process:
            os.close(follower)
            shown = b""
            while not re.search(rb" [1-9]\d*/\d+ \[", shown):  # tqdm's count of steps
                shown += os.read(leader, 4096)
            seconds = time.perf_counter() - began
            process.kill()
        os.close(leader)
    return seconds


def start_up() -> dict[str, float]:
    """Returns the seconds of --help and to the first step, without and with a compiled cache."""
    with tempfile.TemporaryDirectory() as compiled:
        env = {"BNJAX_CACHE": compiled, "TQDM_MININTERVAL": "0"}
        cold = first_step(env)
        warm = first_step(env)
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "bnjax.main", "--help"], check=True, capture_output=True)
    return {
        "help_s": time.perf_counter() - began,
        "first_step_cold_s": cold,
        "first_step_warm_s": warm,
    }


def main() -> None:
    """Measures everything and prints it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--data-dir",
        default=str(cache_dir()),
        help="a folder with CIFAR-10 (default: the cache of bnjax)",
    )
    parser.add_argument(
        "--peer",
        action="append",
        default=[],
        metavar="COMMAND",
        help="a command that times the step of another framework, with {batch} and {steps}",
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[512, 5000])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--together",
        type=int,
        nargs="*",
        default=[],
        help="numbers of steps per dispatch to try, for accelerators",
    )
    parser.add_argument(
        "--skip",
        nargs="*",
        default=[],
        metavar="WORDS",
        help="skip programs with these words in their names",
    )
    parser.add_argument("--quick", action="store_true", help="one round with batches of 512")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write all measurements to a file"
    )
    args = parser.parse_args()
    if args.quick:
        args.batch, args.rounds = [512], 1
    products = [
        measure([*STEP, "matmul", "-", "5000", "5"]),
        measure([*STEP, "matmul", "-", "5000", "5", "--dtype", "bfloat16"]),
        measure([*STEP, "blas", "-", "5000", "5"]),
    ]
    product, bfloat16, _ = products
    args.bfloat16 = (
        bfloat16["flop_per_s"] > product["flop_per_s"]
    )  # otherwise bfloat16 is not faster on this machine
    best = max(
        (found for found in products if found["dtype"] == "float32"),
        key=lambda found: found["flop_per_s"],
    )
    results = race(args)
    bare = next(
        (runs for (batch, name), runs in results.items() if (batch, name) == (512, "bnjax")), None
    )
    single: dict[str, Any] = {
        "evaluation": measure([*STEP, "evaluate", args.data_dir, "1000", "3"]),
        **start_up(),
    }
    if bare:
        single["loop_overhead"] = overhead(args, float(np.median([run["step_s"] for run in bare])))
    about = {
        "machine": f"{processor()}, {os.cpu_count()} cores",
        "device": product["device"],
        **versions(),
    }
    print(f"{about}\n\n{table(results, best['flop_per_s'])}\n")
    rates = "; ".join(
        f"{found['flop_per_s'] / 1e12:.3f} TFLOP/s in {found['dtype']} by {found['by']}"
        for found in products
    )
    print(f"A large matrix product: {rates}. The percentages are of {best['by']}'s in float32.")
    print(f"Evaluation: {single['evaluation']['images_per_s']:,.0f} images/s.")
    cold, warm = single["first_step_cold_s"], single["first_step_warm_s"]
    print(
        f"From the command to the first step on the digits: {cold:.1f} s; "
        f"{warm:.1f} s once compiled."
    )
    print(f"--help: {single['help_s']:.2f} s.")
    if bare:
        print(f"The training loop adds {single['loop_overhead']:.1%} to a bare step.")
    if args.json:
        rows = [
            {"batch": batch, "what": name, "runs": runs} for (batch, name), runs in results.items()
        ]
        args.json.write_text(
            json.dumps(
                {"about": about, "matrix_products": products, "race": rows, **single}, indent=1
            )
            + "\n"
        )


if __name__ == "__main__":
    main()
