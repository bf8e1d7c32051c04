"""`python -m bnjax.predict --workdir runs/bn IMAGE…`: what a trained network says of images, or of a whole split."""

import argparse
import functools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bnjax import errors
from bnjax.data.pictures import Picture, read_pictures


def main() -> int:
    """Reads the command line, prints predictions, and returns the exit code: 1 if an image could not be read."""
    parser = argparse.ArgumentParser(
        prog="python -m bnjax.predict", description="Classify images, or a whole split, with a trained network.", allow_abbrev=False
    )
    parser.add_argument(
        "images", nargs="*", type=Path, metavar="IMAGE", help="PNG, JPEG or .npy ([h, w, c] or [n, h, w, c]; uint8, or float from 0 to 1)"
    )
    parser.add_argument("--workdir", type=Path, required=True, metavar="DIR", help="the folder of the run")
    parser.add_argument("--checkpoint", default="last", metavar="best|last|STEP", help="which of its checkpoints (default: last)")
    parser.add_argument("--split", choices=("train", "test"), help="classify this split; ends with loss, accuracy and accuracy per class")
    parser.add_argument("--data-dir", metavar="DIR", help="where the data lie, if not where they lay in training")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    args = parser.parse_args()
    if bool(args.images) == bool(args.split):
        parser.error("give either images or --split")

    import jax  # late, so that --help is quick

    from bnjax import config as configs
    from bnjax import evaluate, workdir
    from bnjax.checkpoint import Checkpoints
    from bnjax.data import sources
    from bnjax.data.batches import eval_batches
    from bnjax.platform import compiler_options, keep_compiled, keep_freed_memory
    from bnjax.train_step import eval_step, init_variables, predict_step

    keep_freed_memory()
    keep_compiled(sources.cache_dir() / "compiled")
    config, data = workdir.read(args.workdir)
    model = configs.build_model(config.model, len(data.classes), data.image_shape)
    with Checkpoints(args.workdir / "checkpoints", read_only=True) as checkpoints:
        step = checkpoints.step(args.checkpoint)
        like = jax.eval_shape(functools.partial(init_variables, model, jax.random.key(0)), np.zeros((1, *data.image_shape), np.uint8))
        params, batch_stats = checkpoints.restore_variables(step, like)

    def bind(step_fn: Any) -> Any:
        return jax.jit(functools.partial(step_fn, model=model), compiler_options=compiler_options())

    if args.split:
        config.data.dir = args.data_dir or config.data.dir
        dataset = configs.load_data(config)
        if dataset.label != data.label:
            found = f"the run was trained on {data.label}, and what is found now is {dataset.label}"
            raise errors.UserError(f"{found}. Say where its data lie with --data-dir.")
        split = dataset.train if args.split == "train" else dataset.test
        size = min(config.eval.batch_size, len(split.label))
        predicted = evaluate.predict(bind(predict_step), params, batch_stats, split.image, size)
        batches = eval_batches(split.image, split.label, size)
        metrics = evaluate.evaluate(bind(eval_step), params, batch_stats, batches)
        names = [f"{args.split}[{i}]" for i in range(len(split.label))]
        failures: list[str] = []
        rows = _rows(names, data.classes, predicted)
        for row, truth in zip(rows, split.label, strict=True):
            row["label"] = data.classes[truth]
        right = predicted["class"] == split.label
        per_class = {name: float(right[split.label == i].mean()) for i, name in enumerate(data.classes) if (split.label == i).any()}
        sums = {**metrics.means(), "count": int(metrics.count), "accuracy_per_class": per_class}
    else:
        pictures, failures = _read(args.images, data.image_shape)
        rows, sums = [], {}
        if pictures:
            images = np.stack([picture.image for picture in pictures])
            predicted = evaluate.predict(bind(predict_step), params, batch_stats, images, min(len(pictures), 256))
            rows = _rows([picture.name for picture in pictures], data.classes, predicted)
        for row, picture in zip(rows, pictures, strict=True):
            row |= {"note": picture.note} if picture.note else {}

    result = {"workdir": str(args.workdir), "step": step, "dataset": data.label, "predictions": rows, **sums, "errors": failures}
    print(json.dumps(result) if args.json else "\n".join(_table(result)))
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    return 1 if failures else 0


def _read(paths: list[Path], shape: tuple[int, int, int]) -> tuple[list[Picture], list[str]]:
    """Returns the pictures that can be read, and what is wrong with the others."""
    pictures: list[Picture] = []
    failures: list[str] = []
    for path in paths:
        try:
            pictures.extend(read_pictures(path, shape))
        except errors.DataError as error:
            failures.append(str(error))
    return pictures, failures


def _rows(names: list[str], classes: tuple[str, ...], predicted: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    return [
        {"image": name, "class": classes[index], "score": float(score[index]), "scores": dict(zip(classes, map(float, score), strict=True))}
        for name, index, score in zip(names, predicted["class"], predicted["score"], strict=True)
    ]


def _table(result: dict[str, Any]) -> Iterator[str]:
    rows = result["predictions"]
    if rows:
        columns = [column for column in ("image", "label", "class", "score", "note") if any(column in row for row in rows)]
        cells = [columns, *([f"{row[c]:.4f}" if c == "score" else str(row.get(c, "")) for c in columns] for row in rows)]
        widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
        yield from ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells)
    if "accuracy" in result:
        yield f"\n{result['dataset']}, {result['count']:,} images, checkpoint of step {result['step']}"
        yield from (f"  accuracy of {name}: {accuracy:.4f}" for name, accuracy in result["accuracy_per_class"].items())
        yield f"loss {result['loss']:.4f}, accuracy {result['accuracy']:.4f}"


if __name__ == "__main__":
    errors.run(main)
