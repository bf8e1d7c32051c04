"""Whether what an image yields in evaluation depends on which others share the batch."""

import jax.numpy as jnp
import numpy as np

from bnjax.clinic.case import Case, Outcome
from bnjax.clinic.findings import Finding, NotChecked
from bnjax.clinic.limits import limit


def batch_dependent(case: Case) -> Outcome:
    """Evaluates half of a batch in two companies: its own other half, and black images."""
    network, batch = case.network, case.network.batches[0]
    if case.run.predict is None:
        missing = "the function that evaluates: Run(predict=…); train=False alone was tried"
        yield NotChecked("batch-dependent in your evaluation", missing)
    predict = case.run.predict or (lambda images: network.one({"image": images}))
    images, half = np.asarray(batch["image"]), (len(batch["image"]) + 1) // 2
    others = images.copy()
    others[half:] = 0
    one, other = (np.asarray(predict(given)[:half], np.float64) for given in (images, others))
    names = tuple(layer.name for layer in network.layers if layer.by_batch)
    size, apart = np.nan_to_num(np.abs(one)).max(), np.nan_to_num(np.abs(one - other)).max()
    coarsest = max(
        [float(jnp.finfo(layer.dtype).eps) for layer in network.layers], default=2.0**-23
    )
    if names or apart > coarsest ** limit("digits") * size:
        text = (
            f"with {len(images) - half} other images beside them, the logits of {half} images "
            f"move by up to {apart:.3g}; the largest is {size:.3g}"
        )
        yield Finding("batch-dependent", names, text)
