r"""Trains from files that are larger than memory, and measures time and memory.

    python scripts/bench_stream.py make FOLDER --gigabytes 20
    python scripts/bench_stream.py feed FOLDER --workers 2 --batches 20
    python scripts/bench_stream.py train FOLDER --workers 2 --steps 100 --workdir RUN

    python scripts/bench_stream.py make IMAGES --kind folder --gigabytes 0.1
    python scripts/bench_stream.py feed IMAGES --image-size 224 --shorter-side 256 \
        --crop random_resized --batch-size 32
    python scripts/bench_stream.py train IMAGES --image-size 224 --shorter-side 256 \
        --crop random_resized --batch-size 4 --steps 20 --config imagenet_resnet50 --workdir RUN

`make` writes images of different sizes in ten classes that differ in colour and pattern: PNG files
without compression (`--kind png`: many bytes, little work) or JPEG files (`--kind jpeg`: the work
of photographs) as array_record files, or JPEG files in a folder for each class (`--kind folder`).
`feed` measures images per second without training. `train` runs `bnjax train` with the tutorial's
network, or that of `--config`, and reads the private memory of the process and its workers every
second; it prints images per second, the time of a step, the time of a step with images in memory,
and the share of the feed. Each prints one JSON object.
"""

import argparse
import io
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import tqdm
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from bnjax.data import datasets
from bnjax.data.feed import host_feed
from bnjax.data.pictures import Reading
from bnjax.data.stream import LABELS
from bnjax.data.tfds import example
from bnjax.train import parsing
from bnjax.train.cpu import prepare
from bnjax.train.loop import train_and_evaluate

CLASSES = 10
SHARD_BYTES = 1 << 30
DISTINCT = 20  # images of each class
SIDES = (240, 680)
TESTED = 500
ALONE_STEPS = 30


def picture(rng: np.random.Generator, label: int) -> Image.Image:
    """Returns an image of a class: stripes in the colour and direction of the class, with noise."""
    height, width = rng.integers(*SIDES, 2)
    y, x = np.mgrid[:height, :width] / min(height, width)
    angle = np.pi * label / CLASSES
    stripes = np.sin(20 * (x * np.cos(angle) + y * np.sin(angle)) + rng.uniform(0, 6))
    colour = np.random.default_rng(label).uniform(60, 190, 3)
    image = colour + 30 * stripes[..., None] + rng.normal(0, 25, (height, width, 3))
    return Image.fromarray(image.clip(0, 255).astype(np.uint8))


def encode(image: Image.Image, kind: str) -> bytes:
    """Returns an image as a file."""
    file = io.BytesIO()
    if kind == "png":
        image.save(file, "png", compress_level=0)
    else:
        image.save(file, "jpeg", quality=90)
    return file.getvalue()


def as_record(image: bytes, label: int) -> bytes:
    """Returns an image file and its label as a record."""
    record = example()()
    record.features.feature["image"].bytes_list.value.append(image)
    record.features.feature["label"].int64_list.value.append(label)
    return record.SerializeToString()


def make(args: argparse.Namespace) -> dict[str, Any]:
    """Writes the files."""
    args.folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(CLASSES), DISTINCT)
    images = [encode(picture(rng, i), args.kind) for i in labels]
    wanted, total, written = int(args.gigabytes * 1e9), 0, 0
    is_folder = args.kind == "folder"
    if not is_folder:
        (args.folder / LABELS).write_text("".join(f"class {i}\n" for i in range(CLASSES)))
    shards = 1 if is_folder else -(-wanted // SHARD_BYTES)
    with tqdm.tqdm(total=wanted, unit="B", unit_scale=True, leave=False) as progress:
        for split, parts in (("test", 1), ("train", shards)):
            for part in range(parts):
                name = f"{split}-{part:05d}-of-{parts:05d}.array_record"
                path, options = str(args.folder / name), "group_size:1,uncompressed"
                writer = None if is_folder else ArrayRecordWriter(path, options)
                size = count = 0
                while count < TESTED if split == "test" else size < wanted / shards:
                    i = rng.integers(len(images))
                    if writer is None:
                        of_class = args.folder / split / f"class {labels[i]}"
                        of_class.mkdir(parents=True, exist_ok=True)
                        (of_class / f"{count}.jpg").write_bytes(images[i])
                    else:
                        writer.write(as_record(images[i], labels[i]))
                    size, count = size + len(images[i]), count + 1
                    progress.update(len(images[i]))
                if writer:
                    writer.close()
                total, written = total + size, written + count
    return {"bytes": total, "images": written, "mean_bytes": total / written}


def memory(process: int) -> dict[str, int]:
    """Returns the private and the shared memory of a process in bytes."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    kib = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.endswith(" kB")}
    return {"own": kib["RssAnon"] << 10, "shared": kib["RssShmem"] << 10}


def children(process: int) -> list[int]:
    """Returns the child processes of a process, started in any of its threads."""
    tasks = Path(f"/proc/{process}/task").glob("*/children")
    return [int(one) for task in tasks for one in task.read_text().split()]


def kind_of(folder: Path) -> str:
    """Returns the name of the data set."""
    return "records" if (folder / LABELS).exists() else "folder"


def feed(args: argparse.Namespace) -> dict[str, Any]:
    """Measures the feed alone, once its workers run."""
    reading = Reading(args.image_size, args.shorter_side, args.crop, args.workers)
    records: Any = datasets.load(kind_of(args.folder), str(args.folder), stream=reading).train
    items = host_feed(records, args.batch_size, shuffle=True).items(0, 0)
    for _ in range(2 * max(1, args.workers)):  # what was read ahead
        next(items)
    began = time.perf_counter()
    for _ in tqdm.tqdm(range(args.batches), unit="batch", leave=False):
        next(items)
    seconds = time.perf_counter() - began
    items.close()  # type: ignore[attr-defined]
    rate = args.batches * args.batch_size / seconds
    return {"workers": args.workers, "images_per_s": rate, "batch_s": seconds / args.batches}


def overrides(flags: dict[str, Any]) -> list[str]:
    """Returns config keys and their values as command-line arguments."""
    return [f"--config.{key}={value}" for key, value in flags.items()]


def training(args: argparse.Namespace, steps: int) -> list[str]:
    """Returns the arguments for a number of steps and an evaluation at the end."""
    flags = {
        "train.steps": steps,
        "train.batch_size": args.batch_size,
        "train.shuffle": True,
        "eval.every_steps": steps,
        "eval.every_epochs": 0.0,
        "eval.batch_size": args.batch_size,
        "eval.precise_images": args.batch_size,
        "eval.histograms": 0,
        "eval.gap_images": 0,
    }
    return overrides(flags)


def step_seconds(workdir: Path) -> float:
    """Returns the median time of a run's steps."""
    lines = [json.loads(line) for line in (workdir / "timing.jsonl").open()]
    return float(np.median(np.diff([line["seconds"] for line in lines])))


def network_alone(args: argparse.Namespace) -> float:
    """Returns the time of a training step on images of the same size, all in memory."""
    prepare(training=True)
    rng = np.random.default_rng(0)
    count = 2 * args.batch_size
    images = rng.integers(0, 256, (count, args.image_size, args.image_size, 3), np.uint8)
    split = datasets.Split(images, rng.integers(0, CLASSES, count).astype(np.int32))
    names = tuple(f"class {i}" for i in range(CLASSES))
    data = datasets.Dataset("noise", "noise", None, split, split.first(TESTED), names)
    with tempfile.TemporaryDirectory() as folder:
        config = parsing.load(args.config, training(args, ALONE_STEPS))
        train_and_evaluate(config, Path(folder), data)
        return step_seconds(Path(folder))


def train(args: argparse.Namespace) -> dict[str, Any]:
    """Trains and measures memory use."""
    flags = {
        "data.name": kind_of(args.folder),
        "data.dir": args.folder,
        "data.pipeline": "stream",
        "data.image_size": args.image_size,
        "data.shorter_side": args.shorter_side,
        "data.crop": args.crop,
        "data.workers": args.workers,
    }
    words = [*overrides(flags), *training(args, args.steps)]
    command = ["train", "--config", args.config, "--workdir", str(args.workdir), *words]
    began, seen = time.monotonic(), []
    with subprocess.Popen([sys.executable, "-m", "bnjax.main", *command]) as process:
        while process.poll() is None:
            time.sleep(1)
            try:
                of = {one: memory(one) for one in (process.pid, *children(process.pid))}
            except (OSError, KeyError):  # one has just ended
                continue
            main, *others = of.values()
            entry = {"s": time.monotonic() - began, "main": main["own"]}
            shared = sum(one["shared"] for one in of.values())
            workers = sum(one["own"] for one in others)
            seen.append(entry | {"workers": workers, "shared": shared})
    step_s, alone_s = step_seconds(args.workdir), network_alone(args)
    tenths = [part[-1] for part in np.array_split(np.array(seen), 10) if len(part)]
    summary = json.loads((args.workdir / "summary.json").read_text())
    return {
        "workers": args.workers,
        "step_s": step_s,
        "images_per_s": args.batch_size / step_s,
        "network_alone_s": alone_s,
        "share_of_feed": 1 - alone_s / step_s,
        "memory": [{key: round(value) for key, value in one.items()} for one in tenths],
        "final_test": summary["final_test"],
        "exit": process.returncode,
    }


def main() -> None:
    """Runs the subcommand given on the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, function in (("make", make), ("feed", feed), ("train", train)):
        sub = commands.add_parser(name, help=(function.__doc__ or "").lower().rstrip("."))
        sub.set_defaults(function=function)
        sub.add_argument("folder", type=Path)
        if name == "make":
            sub.add_argument("--gigabytes", type=float, default=20.0)
            sub.add_argument("--kind", choices=("png", "jpeg", "folder"), default="png")
            continue
        sub.add_argument("--workers", type=int, default=0)
        sub.add_argument("--batch-size", type=int, default=256)
        sub.add_argument("--image-size", type=int, default=32)
        sub.add_argument("--shorter-side", type=int, default=40)
        sub.add_argument("--crop", choices=("centre", "random", "random_resized"), default="random")
        if name == "feed":
            sub.add_argument("--batches", type=int, default=20)
        else:
            sub.add_argument("--steps", type=int, default=100)
            sub.add_argument("--config", default="bn", help="file or name of the training (bn)")
            sub.add_argument("--workdir", type=Path, required=True)
    args = parser.parse_args()
    print(json.dumps(args.function(args), indent=1))


if __name__ == "__main__":
    main()
