"""What a norm computes and averages, or what it is given."""

import collections

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bnjax.norms import BatchNorm
from zoo import case, kit


@case(
    "stale",
    "eriklindernoren/PyTorch-YOLOv3/issues/230",
    "linen torch",
    missed="a batch of 64 is as good as a small batch may be, and predictions move by 4 %",
)
def momentum_reversed(lib, sick):
    """The fraction to keep is replaced: the averages are hardly more than the last batch."""
    return lib.fit(lib.net(momentum=0.1 if sick else 0.9))


@case("not-converged", "patrick-kidger/equinox/pull/948", "equinox")
def debias_from_one(lib, sick):
    """The variance starts at 1, and is debiased as if it had started at 0."""
    return lib.fit(lib.net(momentum=0.99 if sick else 0.9))


@case("stale", "patrick-kidger/equinox/issues/659", "equinox")
def ema_in_training(lib, sick):
    """Averages with momentum 0.99 lag behind the weights, and training normalises by them."""
    return lib.fit(lib.net(mode="ema", momentum=0.99) if sick else None)


IN_DEPTH = "each layer stores what its norm promises; the audit does not add up n / (n - 1)"


class Chain(nn.Module):
    variance: str

    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(2)(x.reshape(len(x), -1))
        options = {"epsilon": 0.0, "use_scale": False, "use_bias": False, "momentum": 0.9}
        for _ in range(20):
            norm = BatchNorm(variance=self.variance, **options)
            x = norm(x, use_running_average=not train)
        return nn.Dense(kit.CLASSES)(x)


@case("stale", "pytorch/pytorch/issues/100048", "linen", missed=IN_DEPTH, slow=True, aside=True)
def unbiased_in_depth(lib, sick):
    """Training uses the biased variance and stores the unbiased one: outputs shrink with depth."""
    return lib.fit(Chain("unbiased" if sick else "biased"), seen=kit.batches(120, 32))


@unbiased_in_depth.of("torch", missed=IN_DEPTH)
def _(lib, sick):
    """The twin stores biased variances, as other libraries do."""
    from torch import nn

    class Biased(nn.BatchNorm1d):
        def forward(self, x):
            y = super().forward(x)
            if self.training:
                self.running_var.data -= self.momentum * x.var(0).detach() / len(x)
            return y

    kind = nn.BatchNorm1d if sick else Biased
    layers = {"flat": nn.Flatten(), "Dense_0": nn.Linear(64, 2)}
    layers |= {f"BatchNorm_{i}": kind(2, eps=1e-12, affine=False) for i in range(20)}
    layers |= {"Dense_1": nn.Linear(2, kit.CLASSES)}
    model = nn.Sequential(collections.OrderedDict(layers))
    patient = lib.fit(model, seen=kit.batches(120, 32))
    return patient.having(like=Chain("unbiased" if sick else "biased"))


def fit_far_from_zero(lib, **options):
    seen = kit.batches(200, of=kit.examples(100.0))
    patient = lib.fit(lib.net(**options), seen=seen, tx=kit.sgd(0.01, 200))
    return patient.having(batches=seen[:6])


@case("low-precision", "google/flax/issues/1491", "linen nnx")
def one_pass_variance(lib, sick):
    """E[x^2] - E[x]^2 loses its digits, and may be negative, where the mean is large."""
    return fit_far_from_zero(lib, use_fast_variance=sick)


@case("low-precision", "NVIDIA/apex/pull/144", "linen")
def half_precision_statistics(lib, sick):
    """Converting the whole network to half precision rounds its statistics too."""
    patient = lib.healthy()
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), patient.network.batch_stats)
    return patient.but(batch_stats=half) if sick else patient


@half_precision_statistics.of("nnx")
def _(lib, sick):
    """NNX casts the averages to `dtype` before evaluation, whatever they are kept in."""
    dtype = jnp.bfloat16 if sick else jnp.float32
    return fit_far_from_zero(lib, dtype=dtype, use_fast_variance=False)


@case("epsilon-large", "tensorflow/tensorflow/issues/33027", "linen")
def epsilon_above_variance(lib, sick):
    """Features of standard deviation 1e-3 or less are hardly normalised: epsilon is 1e-3."""
    of = kit.examples()
    of = of | {"image": of["image"] * np.float32(0.01 if sick else 1)}
    patient = lib.fit(lib.net(epsilon=1e-3), seen=kit.batches(150, of=of))
    return patient.having(batches=kit.audited(of=of))


@case("variance-shift", "https://arxiv.org/abs/1801.05134", "linen nnx equinox torch")
def dropout_before_norm(lib, sick):
    """Dropout raises the variance of a later norm's input in training only."""
    return lib.fit(lib.net(dropout=(0.5, 0.0) if sick else (0.0, 0.5)))


@case("stale", "keras-team/keras/pull/20815", "linen")
def padding_counted(lib, sick):
    """The mask of padded batches does not reach the norm: rows of zeros enter the statistics."""
    mask = np.arange(kit.SIZE) < 40

    def loss(params, stats, batch, key, model):
        padded = batch | {"image": batch["image"] * mask[:, None, None, None]}
        options = {"mask": None if sick else mask, "weight": mask / mask.mean()}
        return lib.loss(params, stats, padded, key, model=model, **options)

    return lib.fit(loss=loss)


@case(
    "stale",
    "google/flax/issues/2417",
    "linen",
    missed="training normalises by the same means; a shift of 0.14 standard deviations is "
    "less than a small batch's noise",
)
def mean_of_shard_means(lib, sick):
    """Shards hold different numbers of real examples, and the mean over shards counts all alike."""
    # One shard has a third of the images, all with the same label, and half of the weight.

    def loss(params, stats, batch, key, model):
        def of_shard(shard, mask, weight):
            options = {"model": model, "mask": mask, "weight": weight}
            return lib.loss(params, stats, shard, key, **options)

        first = jnp.argsort(batch["label"] != 0, stable=True)  # label 0 first: its own shard
        shards = jax.tree.map(lambda leaf: leaf[first].reshape(2, 32, *leaf.shape[1:]), batch)
        mask = np.arange(32) < np.array([[16 if sick else 32], [32]])
        each = jax.vmap(of_shard, axis_name="shards")
        losses, stats = each(shards, mask, mask / mask.mean())
        return losses.mean(), jax.tree.map(lambda leaf: leaf[0], stats)

    return lib.fit(lib.net(axis_name="shards"), loss)


@case("replicas-differ", "huggingface/pytorch-image-models/issues/110", "linen", aside=True)
def replicas_not_synced(lib, sick):
    """Replicas share gradients but not statistics; what is saved depends on the replica."""
    model = lib.net(axis_name=None if sick else "replicas")

    def loss(params, stats, batch, key, model):
        def of_replica(stats, batch):
            return lib.loss(params, stats, batch, key, model=model)

        parts = jax.tree.map(lambda leaf: leaf.reshape(2, -1, *leaf.shape[1:]), batch)
        losses, stats = jax.vmap(of_replica, axis_name="replicas")(stats, parts)
        return losses.mean(), stats

    start = lib.fit(model, seen=[])
    stats = jax.tree.map(lambda leaf: np.stack([leaf, leaf]), start.network.batch_stats)
    return lib.fit(model, loss, start=start.but(batch_stats=stats))
