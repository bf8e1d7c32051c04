"""The folded network of a run, compared with the trained one."""

import functools
from typing import Any

import jax
import numpy as np

from bnjax.clinic.folding import Folded, Folding, difference
from bnjax.clinic.linen import Network
from bnjax.errors import UserError
from bnjax.train import build
from bnjax.train.cpu import compiler_options
from bnjax.train.rundir import Trained
from bnjax.train_step import forward
from bnjax.types import Images

TOLERANCE = 1e-5  # in units of the largest logit
PROBE = 256  # images


def probe(trained: Trained, data_dir: str | None) -> tuple[Images, str]:
    """Returns images to compare networks on, uint8 [n, h, w, c], and their description.

    Test images if the folder of the data is given; else noise, each image with its own mean and
    contrast.
    """
    if data_dir is not None:
        images = trained.dataset(data_dir).test.select(slice(PROBE)).image
        return images, f"{len(images)} test images"
    rng = np.random.default_rng(0)
    each = (PROBE, 1, 1, 1)
    noise = rng.uniform(-1, 1, (PROBE, *trained.data.image_shape)) * rng.uniform(0, 128, each)
    images = np.clip(rng.uniform(0, 255, each) + noise, 0, 255).astype(np.uint8)
    return images, f"{PROBE} images of noise"


def check_folded(trained: Trained, folding: Folding, data_dir: str | None) -> dict[str, Any]:
    """Returns the difference between the logits of the folded and of the trained network.

    As "difference", and as "difference_in_bfloat16" with the arithmetic of a run in bfloat16.

    Raises:
        UserError: if it is more than `TOLERANCE` with all arithmetic in float32.
    """
    images, about = probe(trained, data_dir)
    is_low = "bfloat16" in (trained.config.model.dtype, trained.config.model.dense_product)
    found = []
    for model in [in_float32(trained), *([trained.model] if is_low else [])]:
        plain = model.unfolded if isinstance(model, Folded) else model
        after = Folded(plain, folding.pairs)
        own = logits(Network(trained.params, trained.batch_stats, model), images)
        variables = (folding.network.params, folding.network.batch_stats)
        found.append(difference(own, logits(Network(*variables, after), images)))
    if not found[0] <= TOLERANCE:
        raise UserError(
            f"the logits of the folded network differ on {about} by {found[0]:.1e} of the largest, "
            f"more than {TOLERANCE}, and nothing is written. A mean that is large compared with "
            "its standard deviation, or statistics that were never updated, can cause it: see "
            "bnjax audit."
        )
    low = {"difference_in_bfloat16": found[1]} if is_low else {}
    return {"probe": about, "difference": found[0]} | low


def in_float32(trained: Trained) -> Any:
    """Returns the model of a run with arithmetic in float32."""
    config = trained.config.model.copy_and_resolve_references()
    config.dtype = config.dense_product = "float32"
    model = build.network(config, len(trained.data.classes), trained.data.image_shape)
    return Folded(model, trained.folded) if trained.folded else model


def logits(network: Network, images: Images) -> jax.Array:
    """Returns the logits of a network in evaluation, all images at once."""
    run = jax.jit(
        functools.partial(forward, model=network.model, train=False),
        compiler_options=compiler_options(),
    )
    return run(network.params, network.batch_stats, {"image": images})[0]
