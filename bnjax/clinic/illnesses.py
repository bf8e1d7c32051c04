"""What the audit looks for: every finding's stable id, why it matters and how to mend it."""

from typing import NamedTuple


class Illness(NamedTuple):
    """What goes wrong with batch norm.

    Attributes:
        title: in a few words.
        why: it matters.
        cure: how to mend it.
    """

    title: str
    why: str
    cure: str


ILLNESSES = {
    "missing-statistics": Illness(
        "the checkpoint has no running statistics",
        "the norms have nothing to normalise by in evaluation",
        "save the collection batch_stats beside params; for these weights, recompute it with "
        "bnjax.clinic.precise",
    ),
    "unmatched-leaves": Illness(
        "leaves that the model lacks, or that lack in the checkpoint, or have another shape",
        "what is left out or stays at its initial value is lost silently",
        "restore with the model that was trained; rename or drop leaves explicitly, one by one",
    ),
    "replicas-differ": Illness(
        "each replica has statistics of its own",
        "which ones are saved is chance, and each is of a fraction of the data",
        "give the norms axis_name, so that replicas share their statistics, or average these over "
        "the replicas before evaluating and saving",
    ),
    "never-updated": Illness(
        "the averages are still 0 and 1",
        "evaluation does not normalise at all, while training does",
        "make batch_stats mutable in training and carry on what comes back, as train_step does; "
        "for these weights, recompute it with bnjax.clinic.precise",
    ),
    "not-converged": Illness(
        "the averages still remember their starting values",
        "a part of what evaluation uses is 0 and 1 and not the data",
        "train longer, lower the momentum, use debias, or recompute with bnjax.clinic.precise",
    ),
    "stale": Illness(
        "the averages are of other weights",
        "evaluation normalises by what these weights do not produce",
        "recompute them with bnjax.clinic.precise: after averaging or restoring weights always; "
        "while weights move fast, before each evaluation, or lower momentum or learning rate",
    ),
    "batch-dependent": Illness(
        "evaluation depends on which images share the batch",
        "an image's prediction changes with its company; alone it is worthless",
        "evaluate with train=False (use_running_average=True), without making batch_stats mutable",
    ),
    "invalid-statistics": Illness(
        "a mean or variance is NaN or infinite, or a variance negative or 0 where the data vary",
        "all that follows is NaN, or blown up by 1 / sqrt(epsilon)",
        "skip steps that are not finite with their statistics (skip_nonfinite=True); look for a "
        "one-pass variance, a batch that was all padding, an update that extrapolates; recompute "
        "with bnjax.clinic.precise",
    ),
    "dead-channels": Illness(
        "channels whose output does not vary",
        "they say nothing of the image, cost as much as others, and may never recover",
        "lower the learning rate; no weight decay on scale; prune them; look at the units before",
    ),
    "low-precision": Illness(
        "the mean is so far from 0 that the variance drowns in rounding",
        "the batch is normalised by rounding errors",
        "subtract a constant from the input, drop a bias before the norm, or compute in float32 "
        "with a two-pass variance (use_fast_variance=False, or bnjax's BatchNorm) and keep "
        "statistics in float32",
    ),
    "epsilon-large": Illness(
        "epsilon is above the variance",
        "the output is far smaller than normalised, and the less so the larger the inputs are: "
        "scale invariance is lost",
        "scale the inputs up, or lower epsilon to a hundredth of the smallest variance or less",
    ),
    "weight-decay": Illness(
        "weight decay pulls on scale and bias",
        "channels are shut down without reason; decay that only steers the learning rate of "
        "layers before a norm is meant for kernels (van Laarhoven, 2017)",
        "leave them out, for instance optax.add_decayed_weights(…, mask=lambda params: "
        "jax.tree.map(lambda leaf: leaf.ndim > 1, params))",
    ),
    "layerwise-rate": Illness(
        "a layer-wise learning rate (as LARS's or LAMB's) is applied to scale and bias",
        "their norm says nothing of the right step: a bias near 0 hardly moves (You et al., 2017)",
        "leave vectors out of the trust ratio: optax.lars(…, trust_ratio_mask=…), or optax.masked",
    ),
    "variance-shift": Illness(
        "dropout before a norm: variances differ between training and evaluation",
        "the averages are of inputs with dropped units, which evaluation never sees "
        "(Li et al., 2018)",
        "put dropout behind the last norm, lower its rate, or recompute the statistics without it "
        "with bnjax.clinic.precise",
    ),
    "small-batch": Illness(
        "too few values for each channel and batch in training",
        "the batch's mean and variance are mostly chance, and training sees another network than "
        "evaluation",
        "larger batches; statistics over several devices with axis_name; batch renormalization; "
        "a norm that needs no batch",
    ),
}
