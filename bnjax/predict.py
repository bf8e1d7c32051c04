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
from bnjax.data.pictures import read_pictures

def main() -> int:
    """Reads the command line, prints predictions, and returns the exit code: 1 if an image could not be read."""
    parser = argparse.ArgumentParser(prog="python -m bnjax.predict", description="Classify images, or a whole split, with a trained network.", allow_abbrev=False)
    parser.add_argument("images", nargs="*", type=Path, metavar="IMAGE", help="PNG, JPEG or .npy ([h, w, c] or [n, h, w, c]; uint8, or float from 0 to 1)")
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
    from bnjax.platform import compiler_options
    from bnjax.train_step import init_variables, predict_step

    config, data = workdir.read(args.workdir)
    model = configs.build_model(config.model, len(data.classes), data.image_shape)
    with Checkpoints(args.workdir / "checkpoints", read_only=True) as checkpoints:
        step = checkpoints.step(args.checkpoint)
        like = jax.eval_shape(functools.partial(init_variables, model, jax.random.key(0)), np.zeros((1, *data.image_shape), np.uint8))
        variables = checkpoints.restore_variables(step, like)
    predict_fn = jax.jit(functools.partial(predict_step, model=model), compiler_options=compiler_options())
    predict = functools.partial(evaluate.predict, predict_fn, *variables)

    if args.split:
        result = _split(config, args, model, variables, predict, data.label)
    else:
        result = _images(args.images, data, predict)
    result = {"workdir": str(args.workdir), "step": step, "dataset": data.label, **result}
    print(json.dumps(result) if args.json else "\n".join(_table(result)))
    for error in result["errors"]:
        print(f"error: {error}", file=sys.stderr)
    return 1 if result["errors"] else 0


def _images(paths: list[Path], data: Any, predict: Any) -> dict[str, Any]:
    pictures, failures = [], []
    for path in paths:
        try:
            pictures.extend(read_pictures(path, data.image_shape))
        except errors.DataError as error:
            failures.append(str(error))
    rows = []
    if pictures:
        found = predict(np.stack([picture.image for picture in pictures]), min(len(pictures), 256))
        for picture, index, score in zip(pictures, found["class"], found["score"], strict=True):
            row = {"image": picture.name, "class": data.classes[index], "score": float(score[index])}
            rows.append(row | {"scores": dict(zip(data.classes, map(float, score), strict=True))} | ({"note": picture.note} if picture.note else {}))
    return {"predictions": rows, "errors": failures}


def _split(config: Any, args: argparse.Namespace, model: Any, variables: Any, predict: Any, label: str) -> dict[str, Any]:
    import jax

    from bnjax import evaluate
    from bnjax.data import batches, sources
    from bnjax.platform import compiler_options
    from bnjax.train_step import eval_step

    dataset = sources.load(config.data.name, args.data_dir or config.data.dir, fallback=config.data.fallback, label=config.data.label)
    if dataset.label != label:
        raise errors.UserError(f"the run was trained on {label}, and what is found now is {dataset.label}. Say where its data lie with --data-dir.")
    split = dataset.train if args.split == "train" else dataset.test
    size = min(config.eval.batch_size, len(split.label))
    found = predict(split.image, size)
    rows = [
        {"image": f"{args.split}[{i}]", "class": dataset.classes[index], "score": float(score[index]), "label": dataset.classes[truth]}
        for i, (index, score, truth) in enumerate(zip(found["class"], found["score"], split.label, strict=True))
    ]
    eval_fn = jax.jit(functools.partial(eval_step, model=model), compiler_options=compiler_options())
    metrics = evaluate.evaluate(eval_fn, *variables, batches.eval_batches(split.image, split.label, size))
    right = found["class"] == split.label
    per_class = {name: float(right[split.label == i].mean()) for i, name in enumerate(dataset.classes) if (split.label == i).any()}
    return {"predictions": rows, **metrics.means(), "count": int(metrics.count), "accuracy_per_class": per_class, "errors": []}


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
