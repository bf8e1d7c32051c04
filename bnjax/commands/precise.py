"""`bnjax precise`: recomputes the running statistics of a trained network."""

import functools
import json as json_
from typing import Annotated, Literal

from tyro.conf import arg

from bnjax.commands import Checkpoint, DataDir, Json, Out, Workdir
from bnjax.errors import UserError


def run(
    workdir: Workdir,
    checkpoint: Checkpoint = "last",
    data_dir: DataDir = None,
    images: Annotated[int, arg(metavar="N", help="the number of training images")] = 10_000,
    by: Annotated[
        Literal["batch", "population"],
        arg(
            help="the statistics that normalise the layers before a norm: batch statistics (one "
            "pass) or the recomputed statistics (several passes)"
        ),
    ] = "batch",
    out: Out = None,
    json: Json = False,
) -> int:
    """Recompute the running statistics of a trained network from training images.

    Prints the test loss and accuracy under the stored and under the recomputed statistics. The run
    itself does not change.
    """
    if images < 2:
        raise UserError(f"--images {images} is too few: give 2 or above.")
    import jax

    from bnjax.clinic import precise
    from bnjax.clinic.network import norm_paths
    from bnjax.text import counted, progress, text_table
    from bnjax.train import rundir
    from bnjax.train.cpu import compiler_options, prepare
    from bnjax.train.steps import precise_batches
    from bnjax.train.trained import Trained, logits_and_labels, loss_and_accuracy

    prepare()
    if out:
        rundir.check_is_free(out)
    trained = Trained(workdir, checkpoint)
    norms = norm_paths(trained.batch_stats)
    if not norms:
        raise UserError(f"the network in {workdir} has no running statistics.")
    dataset = trained.dataset(data_dir)
    images = min(images, len(dataset.train))
    batches = [*precise_batches(dataset.train, images, trained.config.train.batch_size)]
    jit = functools.partial(jax.jit, compiler_options=compiler_options())
    passes = 1 if by == "batch" else len(norms) + 1  # in a chain of norms
    with progress((), "statistics", "batch", passes * len(batches)) as bar:
        network = precise(trained.network, batches, by=by, jit=counted(jit, bar))
    result = {
        "workdir": str(workdir),
        "step": trained.step,
        "dataset": dataset.label,
        "images": images,
        "by": by,
        "test_images": len(dataset.test),
    }
    size = trained.config.eval.batch_size
    tests = {
        name: loss_and_accuracy(*logits_and_labels(one, dataset.test, size))
        for name, one in (("stored", trained.network), ("precise", network))
    }
    if json:
        print(json_.dumps(result | tests))
    else:
        rows = [
            [name, f"{means['loss']:.4f}", f"{means['accuracy']:.4f}"]
            for name, means in tests.items()
        ]
        how = "batch statistics" if by == "batch" else "the precise statistics"
        print(
            f"{workdir}, checkpoint of step {trained.step}: {len(dataset.test):,} test images of "
            f"{dataset.label}"
        )
        print(text_table([["statistics", "loss", "accuracy"], *rows], right=(1, 2)))
        print(
            f"precise: statistics of {images:,} training images; the layers before each norm were "
            f"normalised by {how}"
        )
    if out:
        trained.write(out, network, result | tests)
        if not json:
            print(f"\npredict with:    bnjax predict --workdir {out} --split test")
    return 0
