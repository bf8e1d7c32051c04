"""The audit: are the running statistics of a trained network right, and if not, why?

Each check stands beside its limit and the words of what it finds. Sources of the limits:
docs/evaluation.md.
"""

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from bnjax.clinic.linen import Network
from bnjax.clinic.measure import (
    DEAD,
    Case,
    Evidence,
    Progress,
    Run,
    distance,
    measure,
    real_examples,
    rms,
)
from bnjax.clinic.report import Finding, Findings, Illness, NotChecked, Row
from bnjax.train_step import init_variables
from bnjax.types import Batch, Params, fingerprint

Outcome = Iterator[Finding | NotChecked]
Leaves = dict[tuple[str, ...], Any]

MISSING_STATISTICS = Illness(
    "missing-statistics",
    "the checkpoint has no running statistics",
    "the norms have nothing to normalise by in evaluation",
    "save the collection batch_stats beside params; for these weights, recompute it with "
    "clinic.precise",
)
UNMATCHED_LEAVES = Illness(
    "unmatched-leaves",
    "leaves of the checkpoint and of the model do not match",
    "leaves that are left out, or stay at their initial values, are lost silently",
    "restore with the model that was trained; rename or drop leaves explicitly",
)
REPLICAS_DIFFER = Illness(
    "replicas-differ",
    "each replica has statistics of its own",
    "it is chance which ones are saved, and each set is of a fraction of the data",
    "give the norms axis_name, so that replicas share their statistics, or merge them with "
    "clinic.merge_replicas before evaluating and saving",
)
# Difference of replicas' means in standard deviations, or of their log variances. float32 sums over
# up to 1,000 values in another order differ by 1,000 * 2^-24.
REPLICAS = 1e-4


def match(network: Network, batch: Batch) -> tuple[Network, list[Finding], bool]:
    """Returns the network with the variables of one replica that its model wants.

    Also what was wrong with them, and whether the model can be run with them.

    Args:
        network: its variables may have a leading axis of devices; its statistics may be a list of
            one tree for each replica, or replicated arrays whose copies differ.
        batch: only shape and dtype of `image` matter.
    """
    images = np.asarray(batch["image"][:1])
    init = functools.partial(init_variables, network.model, jax.random.key(0))
    params, stats = (flatten_dict(dict(tree)) for tree in jax.eval_shape(init, images))
    its_params = _replicas(network.params, params)[0]
    replicas = _replicas(network.batch_stats, stats)
    its_stats = replicas[0]
    if stats and not its_stats:
        text = f"the model has {len(stats)} leaves in batch_stats, the checkpoint none"
        return network, [Finding(MISSING_STATISTICS, (), text)], False
    found = []
    collections = {"params": (its_params, params), "batch_stats": (its_stats, stats)}
    lines = [line for name, pair in collections.items() for line in _unmatched(name, *pair)]
    if lines:
        more = f" and {len(lines) - 8} more" if len(lines) > 8 else ""
        found.append(Finding(UNMATCHED_LEAVES, (), "; ".join(lines[:8]) + more))
    usable = all(
        path in leaves and np.shape(leaves[path]) == leaf.shape
        for leaves, wanted in collections.values()
        for path, leaf in wanted.items()
    )
    if usable and len(replicas) > 1:
        found += _differing(replicas)
    mine = {
        name: unflatten_dict({path: leaves[path] for path in leaves if path in wanted})
        for name, (leaves, wanted) in collections.items()
    }
    return dataclasses.replace(network, **mine), found, usable


def _replicas(tree: Any, wanted: Leaves) -> list[Leaves]:
    """Returns the leaves of each replica."""
    if isinstance(tree, list | tuple):
        return [_replicas(one, wanted)[0] for one in tree] or [{}]
    leaves: Leaves = flatten_dict(dict(tree)) if isinstance(tree, Mapping) else {}
    stacked = all(
        path in wanted and np.ndim(leaf) > 0 and np.shape(leaf)[1:] == wanted[path].shape
        for path, leaf in leaves.items()
    ) and any(np.shape(leaf) != wanted[path].shape for path, leaf in leaves.items())
    if stacked and len({np.shape(leaf)[0] for leaf in leaves.values()}) == 1:
        copies: dict[Any, Any] = jax.device_get(leaves)
    else:  # copies of a replicated array may differ after `shard_map`
        copies = {
            path: [np.asarray(shard.data) for shard in leaf.addressable_shards]
            if isinstance(leaf, jax.Array) and leaf.sharding.is_fully_replicated
            else [leaf]
            for path, leaf in leaves.items()
        }
    count = min(map(len, copies.values()), default=1)
    return [{path: of_leaf[i] for path, of_leaf in copies.items()} for i in range(count)]


def _unmatched(collection: str, leaves: Leaves, wanted: Leaves) -> Iterator[str]:
    for path in sorted({*leaves, *wanted}):
        name = f"{collection}.{'.'.join(path)}"
        if path not in leaves:
            yield f"{name} is missing"
        elif path not in wanted:
            yield f"{name} is not in the model"
        elif np.shape(leaves[path]) != wanted[path].shape:
            there, here = np.shape(leaves[path]), wanted[path].shape
            yield f"{name} is {[*there]} where the model has {[*here]}"


def _differing(replicas: list[Leaves]) -> list[Finding]:
    layers: list[str] = []
    most = np.zeros(2)
    for *path, name in replicas[0]:
        if name != "mean" or (*path, "var") not in replicas[0]:
            continue
        mean, var = (
            np.stack([np.asarray(leaves[*path, leaf], np.float64) for leaves in replicas])
            for leaf in ("mean", "var")
        )
        var = np.maximum(var, 1e-12)
        apart = [np.ptp(mean, axis=0) / np.sqrt(var.mean(0)), np.ptp(np.log(var), axis=0)]
        worst = np.array([np.nan_to_num(one, nan=np.inf).max() for one in apart])
        if worst.max() > REPLICAS:
            layers.append(".".join(path))
            most = np.maximum(most, worst)
    text = (
        f"{len(replicas)} replicas, whose means are up to {most[0]:.3g} standard deviations apart "
        f"and whose log variances up to {most[1]:.3g}; the first is audited below"
    )
    return [Finding(REPLICAS_DIFFER, tuple(layers), text)] if layers else []


NEVER_UPDATED = Illness(
    "never-updated",
    "the averages are still 0 and 1",
    "evaluation does not normalise at all, while training does",
    "make batch_stats mutable in training and carry on the new ones, as train_step does; for these "
    "weights, recompute them with clinic.precise",
)


def never_updated(case: Case) -> Outcome:
    """Finds averages that are exactly their initial values."""
    names = [one.layer.name for one in case.layers if not one.mean.any() and (one.var == 1).all()]
    if names:
        text = f"mean 0 and variance 1 exactly, in {len(names)} of {len(case.layers)} norms"
        yield Finding(NEVER_UPDATED, tuple(names), text)


def _of_layers(illness: Illness, found: Iterable[tuple[Evidence, str]]) -> Outcome:
    """Yields one finding for all layers with a measurement."""
    pairs = [*found]
    if pairs:
        names = tuple(one.layer.name for one, _ in pairs)
        yield Finding(illness, names, "; ".join(text for _, text in pairs[:6]))


INVALID_STATISTICS = Illness(
    "invalid-statistics",
    "a mean or variance is NaN or infinite, or a variance negative or 0 where the data vary",
    "everything after it is NaN, or multiplied by 1 / sqrt(epsilon)",
    "skip steps that are not finite together with their statistics (skip_nonfinite=True); look for "
    "a one-pass variance, a batch of padding only, an update that extrapolates; recompute with "
    "clinic.precise",
)


def invalid_statistics(case: Case) -> Outcome:
    """Finds impossible statistics, and norms whose inputs are not finite."""

    def found() -> Iterator[tuple[Evidence, str]]:
        for one in case.layers:
            finite = np.isfinite(one.mean) & np.isfinite(one.var)
            counts = {
                "not finite": ~finite,
                "negative": finite & (one.var < 0),
                "0 where the data vary": finite & (one.var == 0) & (one.train.var.mean(0) > 0),
                "with inputs that are not finite": ~_finite_inputs(one),
            }
            words = [f"{count.sum()} {word}" for word, count in counts.items() if count.any()]
            if words:
                yield one, f"{', '.join(words)} of {one.mean.size}"

    return _of_layers(INVALID_STATISTICS, found())


def _finite_inputs(one: Evidence) -> np.ndarray:
    """Returns the channels whose inputs are finite, bool [c]."""
    return np.isfinite(one.batch.mean + one.batch.var).all(0)


LOW_PRECISION = Illness(
    "low-precision",
    "the mean is so far from 0 that the variance is rounding error",
    "the batch is normalised by rounding errors",
    "subtract a constant from the input, drop a bias before the norm, or compute in float32 with a "
    "two-pass variance (use_fast_variance=False, or bnjax's BatchNorm) and keep statistics in "
    "float32",
)
ROUNDING = 0.01  # relative rounding error of a variance


def low_precision(case: Case) -> Outcome:
    """Finds variances of rounding errors, and averages stored with too few bits."""

    def found() -> Iterator[tuple[Evidence, str]]:
        for one in case.layers:
            ratio = float((np.abs(one.train.mean.mean(0)) / one.std)[one.live].max(initial=0))
            error, how = max(_rounding(one, ratio))
            if jnp.finfo(one.dtype).bits < 32:
                yield one, f"averages kept in {jnp.dtype(one.dtype).name}"
            elif error > ROUNDING:
                yield one, f"|mean| / std up to {ratio:.3g}, {how}: {error:.1%} rounding error"

    return _of_layers(LOW_PRECISION, found())


def _rounding(one: Evidence, ratio: float) -> list[tuple[float, str]]:
    """Returns relative errors of the variance and their causes.

    (mean / std)^2 eps^2 / 12 of rounded inputs, and (mean / std)^2 eps of E[x^2] - E[x]^2.
    """
    dtype, module = jnp.dtype(one.layer.dtype), one.layer.module
    eps = float(jnp.finfo(dtype).eps) if jnp.issubdtype(dtype, jnp.floating) else 0.0
    errors = [(ratio**2 * eps**2 / 12, f"inputs in {dtype.name}")]
    if isinstance(module, nn.BatchNorm) and module.use_fast_variance:
        dtype = jnp.promote_types(dtype, jnp.float32) if module.force_float32_reductions else dtype
        errors.append((ratio**2 * float(jnp.finfo(dtype).eps), f"E[x^2] - E[x]^2 in {dtype.name}"))
    return errors


DEAD_CHANNELS = Illness(
    "dead-channels",
    "channels whose output does not vary",
    "they carry nothing of the image, cost as much as others, and may never recover",
    "lower the learning rate; no weight decay on scale; prune them; look at the units before",
)
# Share of a layer's channels that may be dead, or have a variance below epsilon: networks with ReLU
# have some units that are never active.
CHANNELS = 0.1


def dead_channels(case: Case) -> Outcome:
    """Finds layers with many constant channels."""

    def found() -> Iterator[tuple[Evidence, str]]:
        for one in case.layers:
            dead = ~one.live & _finite_inputs(one).all()  # NaN is another illness
            if dead.mean() > CHANNELS:
                by_scale = int((dead & (np.abs(one.scale) <= DEAD)).sum())
                yield one, f"{dead.sum()} of {dead.size} channels, {by_scale} by their scale"

    return _of_layers(DEAD_CHANNELS, found())


EPSILON_LARGE = Illness(
    "epsilon-large",
    "epsilon is above the variance",
    "the output is smaller than normalised, and depends on the size of the inputs",
    "scale the inputs up, or lower epsilon to a hundredth of the smallest variance or less",
)


def epsilon_large(case: Case) -> Outcome:
    """Finds layers whose divisor is mostly epsilon."""

    def found() -> Iterator[tuple[Evidence, str]]:
        for one in case.layers:
            epsilon, var = one.layer.module.epsilon, one.batch.var.mean(0)[one.live]
            below = var < epsilon
            if below.size and below.mean() > CHANNELS:
                yield (
                    one,
                    f"{below.sum()} of {var.size} channels have a variance below epsilon = "
                    f"{epsilon:.3g}, the median is {np.median(var):.3g}",
                )

    return _of_layers(EPSILON_LARGE, found())


SMALL_BATCH = Illness(
    "small-batch",
    "too few values for each channel and batch in training",
    "mean and variance of a batch are mostly chance, so training and evaluation see different "
    "networks",
    "larger batches; statistics over several devices with axis_name; batch renormalization; a norm "
    "that needs no batch",
)
# Standard deviation of a training batch's mean, in standard deviations: that of 16 independent
# values. Below 16 examples batch norm loses accuracy (Wu & He, 2018, figure 1).
NOISE = 0.25


def small_batch(case: Case) -> Outcome:
    """Finds layers whose batch statistics are mostly chance."""
    size = case.run.batch_size
    if size is None:
        missing = "the examples that share statistics in training: Run(batch_size=…)"
        yield NotChecked("small-batch", missing)
        return
    if case.whole < 2:
        yield NotChecked("small-batch", "a second batch, to see how much batches differ")
        return
    noisy = ((one, one.noise(size)) for one in case.layers)
    yield from _of_layers(
        SMALL_BATCH,
        (
            (
                one,
                f"a batch's mean varies by {noise:.2f} standard deviations, as that of "
                f"{noise**-2:.0f} independent values (n = {one.values(size):,})",
            )
            for one, noise in noisy
            if noise is not None and noise > NOISE
        ),
    )


VARIANCE_SHIFT = Illness(
    "variance-shift",
    "dropout before a norm: variances differ between training and evaluation",
    "the averages are of inputs with dropped units, which evaluation never sees (Li et al., 2018)",
    "put dropout after the last norm, lower its rate, or recompute the statistics without it with "
    "clinic.precise",
)
SHIFT = 0.1  # absolute log ratio of the variances: outputs are scaled wrongly by 5 %


def variance_shift(case: Case) -> Outcome:
    """Finds norms whose inputs have another variance while units are dropped."""
    random = [one for one in case.layers if one.random]
    if random and case.whole < 2:
        yield NotChecked("variance-shift", "a second batch, to see how much chance is in it")
        return
    found = []
    for one in random:
        ratios = one.shifts()
        error = ratios.std(ddof=1) / len(ratios) ** 0.5
        if abs(ratios.mean()) > max(SHIFT, STANDARD_ERRORS * error):
            found.append((one.layer.name, f"{np.exp(ratios.mean()):.3f}"))
    if found:
        names, ratios_ = zip(*found, strict=True)
        text = f"variance in training / in evaluation: {', '.join(ratios_)}"
        yield Finding(VARIANCE_SHIFT, names, text)


WEIGHT_DECAY = Illness(
    "weight-decay",
    "weight decay acts on scale and bias",
    "channels shrink without reason; decay that only sets the learning rate of layers before a "
    "norm is meant for kernels (van Laarhoven, 2017)",
    "leave them out, for instance optax.add_decayed_weights(…, mask=lambda params: jax.tree.map("
    "lambda leaf: leaf.ndim > 1, params))",
)
LAYERWISE_RATE = Illness(
    "layerwise-rate",
    "a layer-wise learning rate (as in LARS or LAMB) acts on scale and bias",
    "their norm is no measure of the right step: a bias near 0 hardly moves (You et al., 2017)",
    "leave vectors out of the trust ratio: optax.lars(…, trust_ratio_mask=…), or optax.masked",
)
MAX_UPDATES = 64  # a schedule may start at 0, and gradients may be accumulated over several steps


def decay(case: Case) -> Outcome:
    """Finds weight decay, or a layer-wise rate, on scale and bias."""
    if case.run.tx is None:
        missing = "the optimizer: Run(tx=…); the weights do not show what it did to them"
        yield NotChecked("weight-decay", missing)
        return
    try:
        decayed = depends(case.run.tx, case.network.params, gradient=0.0)
        scaled = depends(case.run.tx, case.network.params, gradient=1.0) - decayed
    except Exception as error:  # a user's optimizer may want other arguments
        missing = f"an optimizer that can be tried ({type(error).__name__}: {str(error)[:100]})"
        yield NotChecked("weight-decay", missing)
        return
    for illness, how, found in (
        (WEIGHT_DECAY, "shrinks", decayed),
        (LAYERWISE_RATE, "scales with its norm the step of", scaled),
    ):
        hit = [
            (one.layer.name, name)
            for one in case.layers
            for name in ("scale", "bias")
            if (*one.layer.path, name) in found
        ]
        if hit:
            layers = tuple(dict.fromkeys(layer for layer, _ in hit))
            kinds = " and ".join(sorted({name for _, name in hit}))
            yield Finding(illness, layers, f"the optimizer {how} {kinds}, {len(hit)} leaves")


def depends(tx: Any, params: Params, *, gradient: float) -> set[tuple[str, ...]]:
    """Returns the leaves whose update depends on their value, for the same gradient.

    With gradient 0 that is weight decay; otherwise it may be a layer-wise rate. Each leaf is
    replaced by one number with as many axes, so masks by path or rank hold; a mask by the size or
    the values of a leaf is not seen. `tx` has `init` and `update` as in Optax.

    >>> import optax
    >>> params = {"norm": {"scale": np.ones(3)}}
    >>> depends(optax.adamw(1e-3), params, gradient=0.0)
    {('norm', 'scale')}
    >>> depends(optax.sgd(1e-3, momentum=0.9), params, gradient=0.0)
    set()
    """

    def filled(value: float) -> Any:
        return jax.tree.map(lambda leaf: jnp.full((1,) * np.ndim(leaf), value), params)

    values, grads, update = (filled(1.0), filled(2.0)), filled(gradient), jax.jit(tx.update)
    states = [tx.init(value) for value in values]
    for _ in range(MAX_UPDATES):
        results = [update(grads, state, value) for state, value in zip(states, values, strict=True)]
        states = [state for _, state in results]
        one, other = (flatten_dict(jax.device_get(updates)) for updates, _ in results)
        if found := {path for path in one if not np.allclose(one[path], other[path], 1e-5, 0.0)}:
            return found
    return set()


BATCH_DEPENDENT = Illness(
    "batch-dependent",
    "predictions depend on the rest of the batch",
    "the prediction for an image depends on the other images in its batch; alone it is worthless",
    "evaluate with train=False (use_running_average=True), without making batch_stats mutable",
)
# Power of eps, relative to the largest logit: rounding keeps more than half of the digits.
DIGITS = 0.5


def batch_dependent(case: Case) -> Outcome:
    """Evaluates half a batch with two different other halves: its own, and black images."""
    images = np.asarray(case.batches[0]["image"])
    if case.run.predict is None:
        missing = "the function that evaluates: Run(predict=…); train=False alone was tried"
        yield NotChecked("batch-dependent in your evaluation", missing)
    half = (len(images) + 1) // 2
    others = images.copy()
    others[half:] = 0
    predict = case.run.predict or case.predict
    found = [predict(given) for given in (images, others)]
    one, other = (np.asarray(logits, np.float64)[:half] for logits in found)
    norms = [evidence.layer for evidence in case.layers]
    names = tuple(layer.name for layer in norms if layer.by_batch)
    size, apart = np.nan_to_num(np.abs(one)).max(), np.nan_to_num(np.abs(one - other)).max()
    coarsest = max((float(jnp.finfo(layer.dtype).eps) for layer in norms), default=2.0**-23)
    if names or apart > coarsest**DIGITS * size:
        text = (
            f"with {len(images) - half} other images beside them, the logits of {half} images "
            f"move by up to {apart:.3g}; the largest is {size:.3g}"
        )
        yield Finding(BATCH_DEPENDENT, names, text)


NOT_CONVERGED = Illness(
    "not-converged",
    "the averages still remember their starting values",
    "a part of the statistics that evaluation uses is 0 and 1, not the data",
    "train longer, lower the momentum, use debias, or recompute with clinic.precise",
)
STALE = Illness(
    "stale",
    "the averages lag behind these weights, or belong to others",
    "evaluation normalises by statistics that these weights do not produce",
    "recompute them with clinic.precise: always after averaging or restoring weights; while "
    "weights move fast, before each evaluation, or lower momentum or learning rate",
)
INITIAL_SHARE = 0.01  # momentum ** updates, the share of the starting values in the averages
INITIAL_SHIFT = 0.1  # that share times |mean| / std: outputs move by a tenth of their deviation
# Stored minus expected statistics in standard errors, RMS over channels. Of healthy layers 6e-5 are
# beyond it even if all channels of a layer move as one: one network of 100 norms in 80.
STANDARD_ERRORS = 4.0
# Total variation distance of predictions under stored and expected statistics: a tolerance.
MOVED = 0.1
# RMS of drift, and of the log ratio of variances, of one batch of 16 independent values.
MISFIT_MEAN, MISFIT_VAR = 0.25, math.sqrt(2 / 16)
EXPLAINED = 0.5  # R^2 of the fit by a share of the starting values
ROUNDED = 1e-6  # of two statistics that agree except for rounding


def unfinished_or_stale(case: Case) -> Outcome:
    """Finds averages that are not ready, or not of these weights; at most one of the two."""
    layers = [one for one in case.layers if one.layer.name not in case.explained]
    shares = [(one, _initial_share(case, one)) for one in layers]
    early = [(one, share) for one, share in shares if _is_early(one, share)]
    if early:
        yield _not_converged(early, "momentum ** updates is", _updates(case, early[0][0]))
        yield NotChecked("stale", "averages that have converged")
        return
    if case.run.weights is None:
        missing = "the fingerprint of the weights that the statistics belong to: Run(weights=…)"
        yield NotChecked("stale by fingerprint", missing)
    elif case.run.weights != (mine := fingerprint(case.network.params)):
        text = f"the statistics belong to weights {case.run.weights}, and these are {mine}"
        yield Finding(STALE, tuple(one.layer.name for one in layers), text)
        return
    if several := [one for one in layers if one.calls > 1]:
        names = ", ".join(f"{one.layer.name} ({one.calls} calls a pass)" for one in several)
        missing = f"norms that are called once; their averages mix their calls: {names}"
        yield NotChecked("stale by fit", missing)
    judged = [one for one in layers if one.calls == 1]
    if case.whole < 2:
        yield NotChecked("stale by fit", "a second batch, to see how much batches differ")
        return
    momenta = [one.layer.module.momentum for one in layers]
    if case.run.steps is None and any(isinstance(one, float) for one in momenta):
        missing = "the number of updates: Run(steps=…); judged by how the averages look"
        yield NotChecked("not-converged by its updates", missing)
    beyond = [one for one in judged if max(z_scores(case, one)) > STANDARD_ERRORS]
    if beyond:
        yield from _of_poor_fit(case, judged, beyond)


def z_scores(case: Case, one: Evidence) -> tuple[float, float]:
    """Returns stored minus expected mean and log variance, in standard errors, RMS over channels.

    Exponential averages of independent values of variance s^2 have the variance (1-m) / (1+m) s^2.
    The expected value is the mean of k batches and has the variance s^2 / k.
    """
    given, size, momentum = (
        one.train,
        case.run.batch_size or one.examples,
        one.layer.module.momentum,
    )
    left = 1.0 if callable(momentum) else 0.0
    if isinstance(momentum, int | float):
        left = (1 - momentum) / (1 + momentum)
    factor = math.sqrt(left * one.examples / size + 1 / len(given.mean))
    of_mean = rms((given.mean.std(0, ddof=1) / one.std)[one.live]) * factor
    of_var = rms((given.var.std(0, ddof=1) / one.std**2)[one.live]) * factor
    return rms(one.drift) / max(of_mean, ROUNDED), rms(one.log_ratio) / max(of_var, ROUNDED)


def _is_misfit(one: Evidence) -> bool:
    return rms(one.drift) > MISFIT_MEAN or rms(one.log_ratio) > MISFIT_VAR


def _of_poor_fit(case: Case, judged: list[Evidence], beyond: list[Evidence]) -> Outcome:
    """Finds statistics that are worse than a small batch's, or whose misfit predictions show."""
    mixed = flatten_dict(dict(case.expected))
    stored = flatten_dict(dict(case.network.batch_stats))
    for one in judged:
        for name in ("mean", "var"):
            mixed[*one.layer.path, name] = stored[*one.layer.path, name]
    right = case.logits_under(case.expected, "expected statistics")
    moved = distance(right, case.logits_under(unflatten_dict(mixed), "stored statistics"))
    # The noise of a batch moves predictions in proportion to 1 / sqrt(examples).
    scale = judged[0].examples / (case.run.batch_size or judged[0].examples)
    usual = distance(right, case.batch_logits) * math.sqrt(scale)
    if not any(map(_is_misfit, beyond)) and moved <= max(MOVED, usual):
        return
    share = fitted_share(judged, beyond)
    if share is not None and any(_is_early(one, share) for one in judged):
        yield _not_converged([(one, share) for one in judged], "they fit best for", None)
        return
    worst = max(beyond, key=lambda one: max(z_scores(case, one)))
    cause = (
        "their fingerprint is right, so the weights move faster than the averages follow"
        if case.run.weights is not None
        else "weights that move faster than averages follow, or averaged or restored weights"
    )
    text = (
        f"up to {max(z_scores(case, worst)):.0f} standard errors from the statistics of these "
        f"weights (in {worst.layer.name}: means by {rms(worst.drift):.2f} standard deviations, log "
        f"variances by {rms(worst.log_ratio):.2f}); {moved:.0%} of the predicted probability "
        f"moves by it, {usual:.0%} by a batch's own statistics: {cause}"
    )
    yield Finding(STALE, tuple(one.layer.name for one in beyond), text)


def fitted_share(judged: list[Evidence], beyond: list[Evidence]) -> float | None:
    """Returns the share of the starting values that explains the stored statistics, or None.

    Least squares over all channels of stored = share * (0, 1) + (1 - share) * expected, means in
    standard deviations and variances in their squares. It has to explain more than half of the
    difference of all layers together and of each layer that is beyond, and to predict none in the
    others.

    Args:
        judged: the layers that share their number of updates.
        beyond: those whose statistics are wrong.
    """

    def pair(one: Evidence) -> tuple[np.ndarray, np.ndarray]:
        mean, var, std = one.train.mean.mean(0), one.train.var.mean(0), one.std
        initial = [(-mean / std)[one.live], ((1 - var) / std**2)[one.live]]
        found = [((one.mean - mean) / std)[one.live], ((one.var - var) / std**2)[one.live]]
        return np.concatenate(initial), np.concatenate(found)

    def explained(share: float, initial: np.ndarray, found: np.ndarray) -> float:
        rest = found - share * initial
        return 1 - float(rest @ rest / max(found @ found, 1e-12))

    pairs = {one.layer.name: pair(one) for one in judged}
    initial, found = (np.concatenate(arrays) for arrays in zip(*pairs.values(), strict=True))
    share = float(initial @ found / max(initial @ initial, 1e-12))
    wrong = {one.layer.name for one in beyond}
    agree = all(
        explained(share, *pairs[name]) > EXPLAINED
        if name in wrong
        else rms(share * pairs[name][0]) < MISFIT_MEAN
        for name in pairs
    )
    return share if agree and explained(share, initial, found) > EXPLAINED else None


def _updates(case: Case, one: Evidence) -> int | None:
    """Returns the number of updates of a norm's averages, if it is known."""
    stored = flatten_dict(dict(case.network.batch_stats))
    if (*one.layer.path, "count") in stored:
        return int(np.min(stored[*one.layer.path, "count"]))
    return None if case.run.steps is None else case.run.steps * one.calls


def _initial_share(case: Case, one: Evidence) -> float:
    """Returns the share of the starting values in the averages; 0 if it is not known."""
    momentum, updates = one.layer.module.momentum, _updates(case, one)
    if updates is None or getattr(one.layer.module, "debias", False):
        return 0.0
    return float(momentum) ** updates if isinstance(momentum, int | float) else 0.0


def _is_early(one: Evidence, share: float) -> bool:
    return share > INITIAL_SHARE or share * one.distance_from_zero > INITIAL_SHIFT


def _not_converged(shares: list[tuple[Evidence, float]], how: str, updates: int | None) -> Finding:
    worst, share = max(shares, key=lambda pair: pair[1])
    momentum, text = (
        worst.layer.module.momentum,
        f"{how} a share of {share:.1%} of the starting values",
    )
    if isinstance(momentum, int | float) and 0 < momentum < 1:
        needed = math.ceil(math.log(INITIAL_SHARE) / math.log(momentum))
        after = "" if updates is None else f" after {updates:,} updates"
        text += (
            f"{after} with momentum {momentum:g}; {needed:,} updates are needed for "
            f"{INITIAL_SHARE:.0%}"
        )
    apart = worst.distance_from_zero
    if share * apart > INITIAL_SHIFT:
        text += (
            f"; the mean of {worst.layer.name} is {apart:.3g} standard deviations from 0, so this "
            f"moves it by {share * apart:.2f}"
        )
    return Finding(NOT_CONVERGED, tuple(one.layer.name for one, _ in shares), text)


# In this order: the first ones explain what the last would find again.
CHECKS: tuple[Callable[[Case], Outcome], ...] = (
    never_updated,
    invalid_statistics,
    low_precision,
    dead_channels,
    epsilon_large,
    small_batch,
    variance_shift,
    decay,
    batch_dependent,
    unfinished_or_stale,
)
EXPLAINING = (NEVER_UPDATED, INVALID_STATISTICS, LOW_PRECISION)
ILLNESSES = {
    one.id: one
    for one in (
        MISSING_STATISTICS,
        UNMATCHED_LEAVES,
        REPLICAS_DIFFER,
        NEVER_UPDATED,
        NOT_CONVERGED,
        STALE,
        BATCH_DEPENDENT,
        INVALID_STATISTICS,
        DEAD_CHANNELS,
        LOW_PRECISION,
        EPSILON_LARGE,
        WEIGHT_DECAY,
        LAYERWISE_RATE,
        VARIANCE_SHIFT,
        SMALL_BATCH,
    )
}


def audit(
    network: Network,
    batches: Iterable[Batch],
    run: Run | None = None,
    *,
    jit: Callable[..., Any] = jax.jit,
    progress: Progress = lambda batches, title: batches,
) -> Findings:
    """Returns what is wrong with the batch norms of a trained network, and the measurements.

    The network is run on all batches as in training, and as in evaluation under the statistics of
    each batch, of all of them, and the stored ones. Print the result.

    Args:
        network: from `linen`; its norms are Flax's or bnjax's. Its variables may have a leading
            axis of devices, and its statistics may be a list of one tree for each replica.
        batches: training images in random order, in batches about as large as training's: `image`
            [n, h, w, c], optionally `label` int [n], and `mask` bool [n] if the model takes it. Two
            or more; four are better. All are kept in memory.
        run: the facts of the training; checks that need an unknown one are in `not_checked`.
        jit: compiles a function.
        progress: shows the progress of a pass over the batches.

    Raises:
        ValueError: if there is no batch of two or more examples, or a mask that the model does not
            take.
    """
    kept, run = sorted(batches, key=real_examples, reverse=True), run or Run()
    if not kept or len(kept[0]["image"]) < 2:
        raise ValueError("there is nothing to audit with: give a batch of at least two examples")
    model = type(network.model)
    if "mask" in kept[0] and "mask" not in inspect.signature(model.__call__).parameters:
        raise ValueError(
            f"the batches are padded, and {model.__name__}.__call__ takes no `mask`, so its norms "
            "would count the padding in training. Give batches without padding."
        )
    network, found, usable = match(network, kept[0])
    if not usable:
        other = [name for name in ILLNESSES if name not in {one.id for one in found}]
        missing = "a checkpoint that fits the model; not looked at: " + ", ".join(other)
        return Findings(tuple(found), (NotChecked("all else", missing),))
    if not network.norms(kept[0]):
        missing = "a batch norm of Flax's or bnjax's in the model"
        return Findings(tuple(found), (NotChecked("all else", missing),))
    case = measure(network, kept, run, jit, progress)
    not_checked = []
    for check in CHECKS:
        for outcome in check(case):
            if isinstance(outcome, NotChecked):
                not_checked.append(outcome)
                continue
            found.append(outcome)
            if outcome.illness in EXPLAINING:
                explained = case.explained | {*outcome.layers}
                if outcome.illness is LOW_PRECISION:  # later layers are given rounding errors
                    names = [one.layer.name for one in case.layers]
                    explained |= {*names[names.index(outcome.layers[0]) :]}
                    missing = f"layers that do not follow {outcome.layers[0]}"
                    not_checked.append(NotChecked("stale by fit", missing))
                case = dataclasses.replace(case, explained=explained)
    if case.labels is None:
        not_checked.append(NotChecked("loss and accuracy", "labels in the batches"))
    rows = tuple(_row(one, run) for one in case.layers)
    examples = sum(map(real_examples, kept))
    return Findings(tuple(found), tuple(not_checked), rows, _evaluation(case), examples)


def _evaluation(case: Case) -> dict[str, dict[str, float]]:
    precise = case.logits_under(case.precise, "precise statistics")
    logits = {
        "stored": case.logits_under(case.network.batch_stats, "stored statistics"),
        "precise": precise,
        "batch": case.batch_logits,
    }
    return {name: case.means(of) | {"moved": distance(precise, of)} for name, of in logits.items()}


def _row(one: Evidence, run: Run) -> Row:
    drift, log_ratio = one.drift, one.log_ratio
    return Row(
        name=one.layer.name,
        shape=tuple(one.shape),
        drift=rms(drift),
        log_ratio=float(log_ratio.mean()) if log_ratio.size else None,
        noise=one.noise(run.batch_size),
        shift=float(one.shifts().mean()) if one.random else None,
        dead=int((~one.live).sum()),
        count=one.values(run.batch_size),
        drifts=_quantiles(drift),
        log_ratios=_quantiles(log_ratio),
    )


def _quantiles(values: np.ndarray) -> tuple[float, ...]:
    found = np.quantile(values, (0.05, 0.25, 0.5, 0.75, 0.95)) if values.size else ()
    return tuple(map(float, found))
