"""Kills training runs at random moments and checks that the resumed runs lose nothing.

    python scripts/kill_test.py --kills 200

Trains a small network on the embedded digits, once without interruption and once with repeated
SIGKILLs at random moments (during imports, steps, evaluations and saves), each followed by the same
command. At the end, the parameters, the running statistics, the optimizer state and metrics.jsonl
must be bitwise identical. The exit status is 1 if they are not.
"""

import argparse
import functools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bnjax.data import datasets
from bnjax.train import build, parsing
from bnjax.train.checkpoint import Checkpoints
from bnjax.train_step import init_state

CONFIG = Path(__file__).parents[1] / "configs" / "digits.py"
OVERRIDES = {
    "model.filters": "4,4,4",
    "model.dense": "8,8",
    "model.dropout": "0.3,0.3",
    "train.steps": "60",
    "train.epochs": "0",
    "eval.every_steps": "10",
    "eval.every_epochs": "0",
    "checkpoint.every_steps": "3",
    "eval.histograms": "0",
    "eval.pictures": "0",
}
FLAGS = [f"--config.{name}={value}" for name, value in OVERRIDES.items()]


def start(workdir: Path) -> subprocess.Popen[str]:
    """Starts or resumes the training in a folder."""
    command = [
        sys.executable,
        "-u",
        "-m",
        "bnjax.main",
        "--config",
        str(CONFIG),
        "--workdir",
        str(workdir),
        *FLAGS,
    ]
    env = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(workdir.parent / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env
    )


def finish(workdir: Path) -> float:
    """Runs the training in a folder to its end and returns the time in seconds."""
    began = time.monotonic()
    with start(workdir) as process:
        out, _ = process.communicate()
    if process.returncode != 0:
        sys.exit(f"the run in {workdir} did not finish:\n{out}")
    return time.monotonic() - began


def kill_somewhere(workdir: Path, seconds: float) -> bool:
    """Starts the run and kills it after some seconds; returns False if it finished before."""
    with start(workdir) as process:
        try:
            process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
    return process.returncode == -signal.SIGKILL


def leaves(workdir: Path) -> dict[str, np.ndarray]:
    """Returns the leaves of the last checkpoint, keyed by path."""
    config = parsing.load(str(CONFIG), FLAGS)
    dataset = datasets.load("digits")
    experiment = build.experiment(config, dataset)
    init = functools.partial(init_state, experiment.model, experiment.tx)
    with Checkpoints(workdir / "checkpoints", read_only=True) as checkpoints:
        state, stats = checkpoints.restore(
            checkpoints.step("last"),
            jax.eval_shape(init, jax.random.key(0), dataset.train.image[:1]),
        )
    tree: Any = {
        "params": state.params,
        "opt_state": state.opt_state,
        "step": state.step,
        "rng": jax.random.key_data(state.rng),
        "batch_stats": stats,
    }
    return {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def differing_bits(ours: dict[str, np.ndarray], its: dict[str, np.ndarray]) -> int:
    """Returns the number of bits that differ between two dicts of leaves."""
    if ours.keys() != its.keys():
        sys.exit(f"the leaves differ: {sorted(ours.keys() ^ its.keys())}")
    return sum(
        int(
            np.unpackbits(
                np.frombuffer(ours[n].tobytes(), np.uint8)
                ^ np.frombuffer(its[n].tobytes(), np.uint8)
            ).sum()
        )
        for n in ours
    )


def main() -> int:
    """Runs the test and prints the figures as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="how many (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    chance = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole"
        finish(whole)  # compiles
        duration = finish(Path(folder) / "warm")
        wanted, metrics = leaves(whole), (whole / "metrics.jsonl").read_bytes()
        kills = runs = bits = lines_differing = 0
        while kills < args.kills:
            workdir = Path(folder) / f"killed{runs}"
            here = 0
            while kills < args.kills and not (workdir / "summary.json").exists():
                killed = kill_somewhere(workdir, chance.uniform(0, duration))
                kills, here = kills + killed, here + killed
            finish(workdir)
            runs += 1
            bits += differing_bits(leaves(workdir), wanted)
            found = (workdir / "metrics.jsonl").read_bytes()
            lines_differing += sum(
                a != b for a, b in zip(found.splitlines(), metrics.splitlines(), strict=False)
            ) + (found.count(b"\n") != metrics.count(b"\n"))
            print(
                f"run {runs}: {here} kills, {kills} in all, {bits} differing bits, "
                f"{lines_differing} differing lines",
                file=sys.stderr,
                flush=True,
            )
    print(
        json.dumps(
            {
                "kills": kills,
                "resumed_runs": runs,
                "differing_bits": bits,
                "differing_lines": lines_differing,
            }
        )
    )
    return int(bits + lines_differing > 0)


if __name__ == "__main__":
    sys.exit(main())
