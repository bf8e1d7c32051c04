"""Times an exported model: the StableHLO program and, if it exists, the ONNX file.

    bnjax export --workdir RUN --out DIR --onnx
    python scripts/bench_export.py DIR --workdir RUN

The programs take turns; `--workdir` adds the prediction of the original run. Prints, for batches of
1, 32 and 1,024 images, the median, minimum and maximum time in milliseconds, and images per second.
"""

import argparse
import functools
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from bnjax.export.stablehlo import ONNX, Exported
from bnjax.train.cpu import compiler_options, prepare
from bnjax.train.summary import versions
from bnjax.train.trained import Trained
from bnjax.train_step import forward

BATCHES = (1, 32, 1024)


def calls(model: Exported, workdir: Path | None, images: np.ndarray) -> dict[str, Callable]:
    """Returns compiled functions that compute the logits of these images, keyed by name."""
    found: dict[str, Callable] = {}
    if workdir is not None:
        trained = Trained(workdir, str(model.manifest.step))
        run = jax.jit(
            functools.partial(forward, model=trained.model, train=False),
            compiler_options=compiler_options(),
        )
        batch = {"image": images}
        found["the run"] = functools.partial(run, trained.params, trained.batch_stats, batch)
    found["StableHLO"] = functools.partial(model.compiled(len(images)), model.weights, images)
    if ONNX in model.manifest.files:
        import onnxruntime

        session = onnxruntime.InferenceSession(model.folder / ONNX)
        found["ONNX"] = functools.partial(session.run, ["logits"], {"images": images})
    return found


def times(computed: dict[str, Callable], seconds: float) -> dict[str, list[float]]:
    """Calls the functions in turn for some seconds; returns the times of at least five calls."""
    found: dict[str, list[float]] = {name: [] for name in computed}
    for call in computed.values():
        jax.block_until_ready(call())
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or min(map(len, found.values())) < 5:
        for name, call in computed.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            found[name].append(time.perf_counter() - start)
    return found


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, help="a folder that bnjax export wrote")
    parser.add_argument("--workdir", type=Path, help="the run that it is of")
    parser.add_argument("--seconds", type=float, default=10.0, help="for each size of batch")
    args = parser.parse_args()
    prepare()
    model = Exported(args.model)
    print(f"{platform.machine()}, {jax.default_backend()}, JAX {versions()['jax']}")
    print(f"{'batch':>6}  {'':10}{'ms':>10}{'least':>10}{'largest':>10}{'images/s':>10}")
    for size in BATCHES:
        shape = (size, *model.manifest.image_shape)
        images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
        for name, own in times(calls(model, args.workdir, images), args.seconds).items():
            middle = statistics.median(own)
            cells = [middle * 1e3, min(own) * 1e3, max(own) * 1e3]
            text = "".join(f"{cell:10.3f}" for cell in cells)
            print(f"{size:6,}  {name:10}{text}{size / middle:10,.0f}")


if __name__ == "__main__":
    main()
