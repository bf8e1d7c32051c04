"""Measures bnjax on one accelerator and prints a Markdown page.

    python scripts/accelerator.py --minutes 12 --data FOLDER --torch PYTHON --out page.md

Without CIFAR-10 in FOLDER or the cache of bnjax, the images are random, and accuracies are omitted.
PYTHON is an interpreter with torch. Each measurement runs in a separate process, so that it has the
card to itself. A measurement that fails or takes too long becomes a line with the reason.
"""

import argparse
import contextlib
import datetime
import itertools
import json
import math
import os
import platform
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import tqdm

from bnjax.compare.intervals import mean_accuracy
from bnjax.data import cifar
from bnjax.data.datasets import cache_dir

HERE = Path(__file__).parent
# The name of each precision, JAX's matmul precision, the dtype and the options of the torch peers.
PRECISIONS = (
    ("float32", "highest", "float32", ()),
    ("TF32", "tensorfloat32", "float32", ("--tf32",)),
    ("bfloat16", "default", "bfloat16", ("--autocast",)),
)
SMALL = ("data.name=digits", "model.filters=4,4,4")  # for --tiny
SMALL_STEP = (*SMALL, "model.dense=16,16")
SMALL_RACE = (*SMALL, "train.batch_size=32", "train.steps=4")
STEP = ("batch", "precision", "program", "ms", "images/s", "of the product", "peak memory")
Found = list[dict[str, Any]]


class Bench:
    """Runs each measurement in a separate process, and writes a Markdown page as it grows."""

    def __init__(self, args: argparse.Namespace, parts: int, folder: Path):
        """Starts the clock; `folder` is for temporary files."""
        self.args, self.tiny, self.temporary = args, args.tiny, folder
        self.end = time.monotonic() + 60 * args.minutes
        self.lines, self.notes = list[str](), list[str]()
        self.about: dict[str, Any] = {"platform": "unknown", "device": "an unknown device"}
        self.products: dict[str, float] = {}  # FLOP/s by precision
        self.with_norms: dict[tuple[int, int], float] = {}  # seconds of a step
        self.batches = [32] if args.tiny else args.batch
        self.progress = tqdm.tqdm(total=parts, unit="part", disable=None, dynamic_ncols=True)
        self.find_data()

    def find_data(self) -> None:
        """Finds CIFAR-10 or writes random images, in either case as a folder of binary files."""
        version, self.folder = cifar.VERSIONS["cifar10"], self.temporary
        homes = [Path(home).expanduser() for home in (self.args.data, cache_dir()) if home]
        found = [one for home in homes if (one := cifar.find(version, home)) and not self.tiny]
        self.is_cifar, self.data = bool(found), f"CIFAR-10 in {found[0]}" if found else ""
        if found and found[0].is_dir():
            self.folder = found[0].parent
        elif found:
            with tarfile.open(found[0]) as archive:
                archive.extractall(self.temporary, filter="data")
        else:
            self.data = "random images, for times only; accuracies are omitted"
            (self.temporary / version.folder).mkdir()
            rng = np.random.default_rng(0)
            for name, images in (version.train_files | version.test_files).items():
                rows = rng.integers(0, 256, (64 if self.tiny else images, 3073), np.uint8)
                rows[:, 0] %= 10
                rows.tofile(self.temporary / version.folder / name)
            names = self.temporary / version.folder / version.class_file
            names.write_text("\n".join("abcdefghij"))

    def add(self, *lines: str) -> None:
        """Adds lines to the page."""
        self.lines += lines
        tqdm.tqdm.write("\n".join(lines), file=sys.stdout)
        sys.stdout.flush()
        if self.args.out:
            self.args.out.write_text("\n".join(self.lines) + "\n")

    def row(self, *cells: object) -> None:
        """Adds a row to a table."""
        self.add(f"| {' | '.join(map(str, cells))} |")

    @contextlib.contextmanager
    def section(self, title: str, *columns: str) -> Iterator[None]:
        """Adds a title, the head of a table and, at the end, the reasons of failures."""
        self.add("", f"## {title}", "")
        self.add(f"| {' | '.join(columns)} |", "|---" * len(columns) + "|")
        yield
        while self.notes:
            self.add("", self.notes.pop(0))

    def run(self, name: str, command: Sequence[object], most: float = 120, **env: str) -> Found:
        """Runs a command, at most `most` seconds, and returns the JSON lines that it prints.

        After a failure, the lines printed before it are returned, and the reason is noted.
        """
        self.progress.set_postfix_str(name)
        seconds, reason = min(most, self.end - time.monotonic()), ""
        if seconds < 1:
            self.notes.append(f"Not measured: {name}: no time was left.")
            return []
        variables = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} | env
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
            options = {"stdout": out, "stderr": errors, "env": variables}
            with subprocess.Popen(
                [*map(str, command)], start_new_session=True, **options
            ) as process:
                try:
                    code = process.wait(seconds)
                except subprocess.TimeoutExpired:
                    code, reason = 0, f"stopped after {seconds:.0f} s"
                finally:  # ends the workers of torch.compile too
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
            out.seek(0)
            errors.seek(0)
            found = [json.loads(line) for line in out if line.startswith("{")]
            if code:
                last = ["no message", *filter(str.strip, errors)][-1].strip()
                reason = f"exit status {code}: {last[:200]}"
        if reason or not found:
            self.notes.append(f"Not measured: {name}: {reason or 'no result'}.")
        return found

    def part(self, name: str, env: dict[str, str] | None = None, **options: Any) -> Found:
        """Runs a function of accelerator_part.py, like `run`."""
        command = [sys.executable, HERE / "accelerator_part.py", name, json.dumps(options)]
        return self.run(name, command, 150, **(env or {}))

    def train(self, batch: int, precision: int, *words: str, steps: int = 0, **env: str) -> Found:
        """Measures the tutorial's step with bnjax."""
        name, matmul, dtype, _ = PRECISIONS[precision]
        steps = steps or (5 if self.is_slow else 500)  # an accelerator takes 100 steps at once
        command = [sys.executable, HERE / "bench_step.py", "train", self.folder, batch, steps]
        settings = [f"--set={word}" for word in SMALL_STEP] if self.tiny else []
        env = {"JAX_DEFAULT_MATMUL_PRECISION": matmul} | env
        title = " ".join([f"the step, batch {batch}, {name}", *words])
        return self.run(title, [*command, "--dtype", dtype, *settings, *words], **env)

    @property
    def is_slow(self) -> bool:
        """Whether only few steps are measured."""
        return self.tiny or self.about["platform"] == "cpu"

    def step_row(self, batch: int, precision: int, program: str, found: Found) -> None:
        """Adds a row about the tutorial's step."""
        name = PRECISIONS[precision][0]
        for one in found:
            known = "flop_per_s" in one and name in self.products
            share = f"{one['flop_per_s'] / self.products[name]:.0%}" if known else ""
            rate, peak = f"{one['images_per_s']:,.0f}", gib(one.get("peak_bytes"))
            self.row(batch, name, program, milliseconds(one["step_s"]), rate, share, peak)

    def torch_row(self, batch: int, precision: int, *words: str) -> None:
        """Measures the tutorial's step with torch and adds a row."""
        name, *_, options = PRECISIONS[precision]
        program = " ".join(["torch", *(word.removeprefix("--") for word in words)])
        command = [self.args.torch, HERE / "peers" / "step_torch.py", self.folder, batch]
        command += [5 if self.is_slow else 50, *options, *words]
        found = self.run(f"{program}, batch {batch}, {name}", command)
        self.step_row(batch, precision, program, found)


def gib(size: float | None) -> str:
    """Returns a size in bytes as text in GiB; an unknown size as an empty text."""
    return f"{size / 2**30:.1f} GiB" if size else ""


def milliseconds(seconds: float) -> str:
    """Returns seconds as text in milliseconds."""
    return f"{1000 * seconds:.2f}"


def product(bench: Bench) -> None:
    """Describes the card, the software and the data, and measures a matrix product."""
    batch, times = (64, 3) if bench.is_slow else (5000, 10)
    precisions = [precision[:3] for precision in PRECISIONS]
    found = bench.part("products", batch=batch, steps=times, precisions=precisions)
    bench.about, *found = found or [bench.about]
    query, card = "--query-gpu=name,memory.total,driver_version", "nvidia-smi is not available"
    with contextlib.suppress(OSError):
        command = ["nvidia-smi", query, "--format=csv,noheader"]
        card = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    versions = [f"Python {platform.python_version()}"]
    for name in ("jax", "jaxlib", "flax", "optax", "jax-cuda12-plugin", "jax-cuda13-plugin"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions.append(f"{name} {metadata.version(name)}")
    bench.add(f"# bnjax on {bench.about['device']}", "", "| | |", "|---|---|")
    bench.row("card, memory, driver", card.replace("\n", "; "))
    bench.row("memory that JAX may use", gib(bench.about.get("memory")) or "not limited")
    bench.row("versions", ", ".join(versions))
    bench.row("data", "the digits of bnjax (--tiny)" if bench.tiny else bench.data)
    bench.row("date", datetime.date.today().isoformat())
    title = f"A matrix product, [{batch:,}, 7,260] x [7,260, 3,500]"
    with bench.section(title, "precision", "ms", "TFLOP/s"):
        for one in found:
            bench.products[one["precision"]] = one["flop_per_s"]
            rate = one["flop_per_s"] / 1e12
            bench.row(one["precision"], milliseconds(one["step_s"]), f"{rate:.3g}")


def step(bench: Bench) -> None:
    """Measures the tutorial's step with bnjax and torch."""
    with bench.section("The tutorial's training step", *STEP):
        for batch, i in itertools.product(bench.batches, range(len(PRECISIONS))):
            found = bench.train(batch, i)
            bench.with_norms[batch, i] = found[0]["step_s"] if found else math.nan
            bench.step_row(batch, i, "bnjax", found)
            bench.torch_row(batch, i)


def races(bench: Bench) -> None:
    """Trains airbench94 and speed94 to the end, and torch's airbench94."""
    columns = ("recipe", "seeds at once", "test accuracy, several views", "s per seed", "images/s")
    title = "Time to 94 % on CIFAR-10, training without compilation"
    with bench.section(title, *columns, "compilation, s", "peak memory"):

        def add(recipe: str, found: Found) -> None:
            for one in found:
                values = one.get("accuracies") or [one["accuracy_views"]]
                accuracy = mean_accuracy(values) if bench.is_cifar else "omitted"
                compiling = f"{one['compile_s']:.1f}" if "compile_s" in one else ""
                each, rate = one["seconds"] / len(values), one["images"] / one["seconds"]
                cells = (f"{each:.2f}", f"{rate:,.0f}", compiling, gib(one.get("peak_bytes")))
                bench.row(recipe, len(values), accuracy, *cells)

        def train(config: str) -> None:
            options = {"words": SMALL_RACE if bench.tiny else (), "folder": str(bench.folder)}
            options |= {"config": config, "most_seconds": 6 * bench.args.minutes}
            env = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.9"}
            add(f"bnjax {config}", bench.part("race", env, **options))

        train("airbench94")
        for recipe in ("muon", "sgd"):
            small = ("--images", 64, "--epochs", 1, "--batch", 32) if bench.tiny else ()
            script = HERE / "peers" / "airbench94_torch.py"
            command = [bench.args.torch, script, bench.folder, "--recipe", recipe, *small]
            add(f"torch airbench94, {recipe}", bench.run(f"airbench94_torch, {recipe}", command))
        train("speed94")


def agreement(bench: Bench) -> None:
    """Compares parameters and statistics after some steps with those on the CPU."""
    count, batch = 5, 32 if bench.tiny else 512
    title = f"Agreement with the CPU after {count} steps of {batch} images (SGD, float32)"
    columns = ("values", "largest difference / largest value", "array", "at most 1e-5")
    with bench.section(title, *columns):
        files = []
        for platforms in ({"JAX_PLATFORMS": "cpu"}, {}):
            files.append(bench.temporary / f"state{len(files)}.npz")
            options = {"file": str(files[-1]), "folder": str(bench.folder), "batch": batch}
            options |= {"words": SMALL_STEP if bench.tiny else (), "steps": count}
            bench.part("state", {"JAX_DEFAULT_MATMUL_PRECISION": "highest", **platforms}, **options)
        if all(file.exists() for file in files):
            cpu, other = (np.load(file) for file in files)
            for kind in ("batch_stats", "params"):
                errors = {
                    name: float(np.abs(cpu[name] - other[name]).max() / np.abs(cpu[name]).max())
                    for name in cpu
                    if name.startswith(kind)
                }
                worst = max(errors, key=lambda name: (np.isnan(errors[name]), errors[name]))
                error = errors[worst]
                bench.row(kind, f"{error:.1e}", worst, "yes" if error <= 1e-5 else "no")


def kernels(bench: Bench) -> None:
    """Lists the longest kernels of the tutorial's step."""
    batch, words = bench.batches[0], SMALL_STEP if bench.tiny else ()
    title = f"The ten longest kernels of the step, batch {batch}, bfloat16"
    with bench.section(title, "kernel", "operation", "ms per step", "share"):
        options = {"folder": str(bench.folder), "batch": batch, "steps": 2 if bench.is_slow else 20}
        for one in bench.part("kernels", words=(*words, "model.dtype=bfloat16"), **options):
            name = one["name"].replace("|", "/")[:60]
            bench.row(f"`{name}`", one["operation"], f"{one['ms']:.3f}", f"{one['share']:.1%}")


def norms(bench: Bench) -> None:
    """Measures the step without norms."""
    columns = ("batch", "precision", "ms with BN", "ms without norms", "share of BN")
    with bench.section("The share of batch norm in the step", *columns):
        for batch, i in itertools.product(bench.batches, (0, 2)):
            for one in bench.train(batch, i, "--norm", "none"):
                whole = bench.with_norms.get((batch, i), math.nan)
                times = (milliseconds(whole), milliseconds(one["step_s"]))
                bench.row(batch, PRECISIONS[i][0], *times, f"{1 - one['step_s'] / whole:.0%}")


def first_step(bench: Bench) -> None:
    """Measures a process that takes the first three steps, without and with compiled programs."""
    batch, cache = bench.batches[0], str(bench.temporary / "compiled")
    env = {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    title = f"A whole process with three steps, batch {batch}, bfloat16"
    with bench.section(title, "compilation cache", "s"):
        for state in ("empty", "filled"):
            began = time.perf_counter()
            if bench.train(batch, 2, "--together", "1", steps=3, **env):
                bench.row(state, f"{time.perf_counter() - began:.1f}")


def compiled(bench: Bench) -> None:
    """Measures the tutorial's step with torch.compile."""
    with bench.section("The same step with torch.compile", *STEP):
        for batch, i in itertools.product(bench.batches, range(len(PRECISIONS))):
            bench.torch_row(batch, i, "--compile")


PARTS = (product, step, races, agreement, kernels, norms, first_step, compiled)


def main() -> None:
    """Measures all parts, the most important first."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8, help="stop after so many minutes (8)")
    parser.add_argument("--data", help="a folder with CIFAR-10 (default: the cache of bnjax)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the page to a file")
    parser.add_argument("--torch", default=sys.executable, metavar="PYTHON", help="has torch")
    parser.add_argument("--batch", type=int, nargs="+", default=[512, 5000], help="of the step")
    names = [part.__name__ for part in PARTS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="only these parts")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to test this script")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the measurement too
    parts = [part for part in PARTS if part is product or part.__name__ in args.only]
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, len(parts), Path(folder))
        for part in parts:
            part(bench)
            bench.progress.update()


if __name__ == "__main__":
    main()
