"""Audits a trained network. Each check is defined next to its limit and the text of its finding.

docs/findings.md gives the sources of the limits.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from bnjax.clinic.freezing import moved
from bnjax.clinic.measure import DEAD, Case, Evidence, Run, distance, measure, real_examples, rms
from bnjax.clinic.network import SUPPORTED, Network
from bnjax.clinic.report import Finding, Findings, Illness, NotChecked, Row
from bnjax.norms import BatchNorm
from bnjax.norms.moments import Moments
from bnjax.norms.running_average import momentum_for, updates_for
from bnjax.types import Batch, Params, fingerprint

Outcome = Iterator[Finding | NotChecked]
Leaves = dict[tuple[str, ...], Any]
ILLNESSES: dict[str, Illness] = {}
LAYER_CHECKS: list[Callable[[Case], Outcome]] = []


def _illness(*words: str) -> Illness:
    illness = Illness(*words)
    return ILLNESSES.setdefault(illness.id, illness)


def _layer_check(*words: str) -> Callable[[Any], Any]:
    """Registers a check of one layer that returns the measurements, or None for a healthy layer."""

    def register(check: Callable[[Case, Evidence], str | None]) -> Any:
        illness = _illness(*words)

        def check_all(case: Case) -> Outcome:
            texts = {one.layer.name: text for one in case.layers if (text := check(case, one))}
            if texts:
                different = [*dict.fromkeys(texts.values())]
                yield Finding(illness, tuple(texts), "; ".join(different[:6]))

        LAYER_CHECKS.append(check_all)
        return check

    return register


MISSING_STATISTICS = _illness(
    "missing-statistics",
    "the checkpoint has no running statistics",
    "the norms have no mean and variance by which to normalise in evaluation",
    "save batch_stats together with params; for these weights, take batch_stats from model.init "
    "and recompute them with clinic.precise",
)
UNMATCHED_LEAVES = _illness(
    "unmatched-leaves",
    "the leaves of the checkpoint and the model do not match",
    "some trained values are silently dropped, or some leaves keep their initial values",
    "restore the checkpoint into the model it was saved from; rename or drop leaves explicitly",
)
REPLICAS_DIFFER = _illness(
    "replicas-differ",
    "the running statistics differ between replicas",
    "the checkpoint has the statistics of one replica, computed from a fraction of the data",
    "set axis_name on the norms, or merge the statistics with clinic.merge_replicas before saving",
)
# The limit for differences between replicas: of means (in standard deviations) and log variances.
# Two float32 sums of 1,000 values in different orders have a relative difference of at most
# 1,000 * 2^-24.
REPLICAS = 1e-4


def match(network: Network, batch: Batch) -> tuple[Network, list[Finding], bool]:
    """Returns the network with the variables of one replica, in the structure of the model.

    Also returns the findings, and whether the model can run with these variables.

    Args:
        network: a network whose variables may have a leading axis of devices; its statistics may
            be a list of one tree per replica, or replicated arrays whose copies differ.
        batch: a batch; only the shape and dtype of `image` matter.
    """
    expected = network.shapes(np.asarray(batch["image"][:1]))
    params, stats = (flatten_dict(dict(tree)) for tree in expected)
    its_params, *_ = _replicas(network.params, params)
    replicas = _replicas(network.batch_stats, stats)
    if stats and not replicas[0]:
        text = f"the model has {len(stats)} leaves in batch_stats, but the checkpoint has none"
        return network, [Finding(MISSING_STATISTICS, (), text)], False
    found, usable, mine = [], True, {}
    for name, leaves, wanted in (
        ("params", its_params, params),
        ("batch_stats", replicas[0], stats),
    ):
        shapes = {path: [*leaf.shape] for path, leaf in wanted.items()}
        its_shapes = {path: [*np.shape(leaf)] for path, leaf in leaves.items()}
        unmatched = [
            f"{name}.{'.'.join(path)} is {its_shapes.get(path, 'missing')} in the checkpoint, "
            f"{shapes.get(path, 'missing')} in the model"
            for path in sorted({*shapes, *its_shapes})
            if shapes.get(path) != its_shapes.get(path)
        ]
        if unmatched:
            more = f"; and {len(unmatched) - 8} more" if len(unmatched) > 8 else ""
            if any(its_shapes.get(path, shape) != shape for path, shape in shapes.items()):
                more += f". The model's shapes are for images {[*np.shape(batch['image'])[1:]]}"
            found.append(Finding(UNMATCHED_LEAVES, (), "; ".join(unmatched[:8]) + more))
        usable &= all(its_shapes.get(path) == shape for path, shape in shapes.items())
        mine[name] = unflatten_dict({path: leaves[path] for path in leaves if path in wanted})
    if usable and len(replicas) > 1:
        found += _differing(replicas)
    return dataclasses.replace(network, **mine), found, usable


def _replicas(tree: Any, wanted: Leaves) -> list[Leaves]:
    """Returns the leaves of each replica; without replicas, a list with one entry."""
    if isinstance(tree, list | tuple):
        return [flatten_dict(dict(one)) for one in tree]
    leaves: Leaves = flatten_dict(dict(tree)) if isinstance(tree, Mapping) else {}
    stacked = [
        path in wanted and np.shape(leaf)[1:] == wanted[path].shape != np.shape(leaf)
        for path, leaf in leaves.items()
    ]
    if stacked and all(stacked):
        copies: dict[Any, Any] = jax.device_get(leaves)
    else:  # the copies of a replicated array may differ after `shard_map`
        copies = {
            path: [np.asarray(shard.data) for shard in leaf.addressable_shards]
            if isinstance(leaf, jax.Array) and leaf.sharding.is_fully_replicated
            else [leaf]
            for path, leaf in leaves.items()
        }
    count = min(map(len, copies.values()), default=1)
    return [{path: of_leaf[i] for path, of_leaf in copies.items()} for i in range(count)]


def _differing(replicas: list[Leaves]) -> list[Finding]:
    apart = {}
    for *path, name in replicas[0]:
        if name == "mean" and (*path, "var") in replicas[0]:
            mean, var = (
                np.stack([np.asarray(leaves[*path, leaf], np.float64) for leaves in replicas])
                for leaf in ("mean", "var")
            )
            var = np.maximum(var, 1e-12)
            both = np.ptp(mean, axis=0) / np.sqrt(var.mean(0)), np.ptp(np.log(var), axis=0)
            worst = [np.nan_to_num(one, nan=np.inf).max() for one in both]
            if max(worst) > REPLICAS:
                apart[".".join(path)] = worst
    if not apart:
        return []
    of_mean, of_var = np.max([*apart.values()], axis=0)
    text = (
        f"between the {len(replicas)} replicas, means differ by up to {of_mean:.3g} standard "
        f"deviations and log variances by up to {of_var:.3g}; the first replica is audited below"
    )
    return [Finding(REPLICAS_DIFFER, tuple(apart), text)]


@_layer_check(
    "never-updated",
    "the running averages still have their initial values",
    "the norms normalise in training, but not in evaluation",
    "train in training mode and keep the new statistics (linen: mutable=['batch_stats'], as in "
    "train_step; NNX: model.train(); Equinox: the returned State); for these weights, recompute "
    "the statistics with clinic.precise",
)
def never_updated(case: Case, one: Evidence) -> str | None:
    """Finds averages that equal their initial values."""
    return f"all means are 0 and all variances are {one.var[0]:g}" if is_initial(one) else None


def is_initial(one: Evidence) -> bool:
    """Returns whether all means are 0 and all variances are 1, or 0 as initially in Equinox."""
    return not one.mean.any() and bool((one.var == 1).all() or (one.var == 0).all())


@_layer_check(
    "invalid-statistics",
    "a mean or variance is not finite, or a variance is negative or wrongly 0",
    "the outputs of the norm are NaN, or too large by a factor of up to 1 / sqrt(epsilon)",
    "skip non-finite steps (skip_nonfinite=True); look for a one-pass variance, a batch of only "
    "padding, or a momentum that is not between 0 and 1; recompute the statistics with "
    "clinic.precise",
)
def invalid_statistics(case: Case, one: Evidence) -> str | None:
    """Finds invalid statistics, and norms with non-finite inputs."""
    finite = np.isfinite(one.mean) & np.isfinite(one.var)
    counts = {
        "with non-finite statistics": ~finite,
        "with a negative variance": finite & (one.var < 0),
        "with variance 0 although the inputs vary": (one.var == 0)
        & (one.train.var.mean(0) > 0)
        & (not is_initial(one)),
        "with non-finite inputs": ~one.finite,
    }
    words = [f"{count.sum()} {word}" for word, count in counts.items() if count.any()]
    return f"{', '.join(words)} (of {one.mean.size} channels)" if words else None


ROUNDING = 0.01  # the limit for the relative rounding error of a variance


@_layer_check(
    "low-precision",
    "the mean is too far from 0 for an accurate variance, or the averages have too few bits",
    "the norm amplifies rounding errors",
    "subtract a constant from the input, remove the bias before the norm, or compute in float32 "
    "with a two-pass variance (bnjax's BatchNorm, or use_fast_variance=False); keep statistics in "
    "float32",
)
def low_precision(case: Case, one: Evidence) -> str | None:
    """Finds inaccurate variances, and averages stored with too few bits.

    The relative error of the variance is (mean / std)^2 eps^2 / 12 for rounded inputs, and
    (mean / std)^2 eps for a variance computed as E[x^2] - E[x]^2.
    """
    if jnp.finfo(one.dtype).bits < 32:
        return f"the averages are stored in {jnp.dtype(one.dtype).name}"
    ratio = float((np.abs(one.train.mean.mean(0)) / one.std)[one.live].max(initial=0))
    dtype, module = jnp.dtype(one.layer.dtype), one.layer.module
    eps = float(jnp.finfo(dtype).eps) if jnp.issubdtype(dtype, jnp.floating) else 0.0
    errors = [(ratio**2 * eps**2 / 12, f"the variance of inputs in {dtype.name}")]
    # Only Flax's norms use this field; bnjax's norms accept it, but always use two passes.
    if getattr(module, "use_fast_variance", False) and not isinstance(module, BatchNorm):
        promotes = getattr(module, "force_float32_reductions", True)
        dtype = jnp.promote_types(dtype, jnp.float32) if promotes else dtype
        errors.append((ratio**2 * float(jnp.finfo(dtype).eps), f"E[x^2] - E[x]^2 in {dtype.name}"))
    error, how = max(errors)
    text = f"|mean| / std is up to {ratio:.3g}; {how} has a rounding error of {error:.1%}"
    return text if error > ROUNDING else None


# The largest acceptable fraction of channels that are dead or have a variance below epsilon. The
# limit is above 0 because networks with ReLU have some units that are never active.
CHANNELS = 0.1


@_layer_check(
    "dead-channels",
    "channels with constant output",
    "these channels carry no information about the image, cost as much as others, and may never "
    "recover",
    "lower the learning rate, exclude scale from weight decay, or prune the channels; check the "
    "layer before the norm",
)
def dead_channels(case: Case, one: Evidence) -> str | None:
    """Finds layers with many constant channels."""
    dead = ~one.live & one.finite.all()  # NaN is found by a different check
    by_scale = (dead & (np.abs(one.scale) <= DEAD)).sum()
    text = f"{dead.sum()} of {dead.size} channels ({by_scale} of them because of their scale)"
    return text if dead.mean() > CHANNELS else None


@_layer_check(
    "epsilon-large",
    "epsilon is larger than the variance",
    "the output varies too little, by an amount that depends on the scale of the inputs",
    "scale up the inputs, or lower epsilon to at most a hundredth of the smallest variance",
)
def epsilon_large(case: Case, one: Evidence) -> str | None:
    """Finds layers in which epsilon dominates the divisor."""
    epsilon, var = one.layer.module.epsilon, one.batch.var.mean(0)[one.live]
    below = var < epsilon
    if not below.size or below.mean() <= CHANNELS:
        return None
    return (
        f"{below.sum()} of {var.size} channels have a variance below epsilon = {epsilon:.3g}; the "
        f"median is {np.median(var):.3g}"
    )


# The standard error of the mean of 16 independent values, in standard deviations. Batch norm loses
# accuracy with fewer than 16 examples (Wu & He, 2018, figure 1).
NOISE = 0.25


@_layer_check(
    "small-batch",
    "training batches have too few values per channel",
    "the statistics of a batch are noisy, so training and evaluation compute different functions",
    "use larger batches, statistics over several devices (axis_name), batch renormalization, or a "
    "norm without batch statistics",
)
def small_batch(case: Case, one: Evidence) -> str | None:
    """Finds layers with noisy batch statistics."""
    if case.run.batch_size is None or case.whole < 2 or (noise := one.noise or 0.0) <= NOISE:
        return None
    return (
        f"the mean of a batch varies by {noise:.2f} standard deviations, like the mean of "
        f"{noise**-2:.0f} independent values (n = {one.values:,})"
    )


SHIFT = 0.1  # the limit for |log ratio of the variances|: outputs 5 % too large or too small


@_layer_check(
    "variance-shift",
    "dropout before a norm changes the variance of its inputs",
    "the averages are computed with dropout, but evaluation has no dropout (Li et al., 2018)",
    "put dropout after the last norm, lower the dropout rate, or recompute the statistics with "
    "clinic.precise, which turns dropout off",
)
def variance_shift(case: Case, one: Evidence) -> str | None:
    """Finds norms whose input variance changes when dropout is active."""
    if not one.random or case.whole < 2 or recomputed(one):
        return None
    mean, error = one.shifts.mean(), one.shifts.std(ddof=1) / len(one.shifts) ** 0.5
    text = f"variance in training / variance in evaluation = {np.exp(mean):.3f}"
    return text if abs(mean) > max(SHIFT, STANDARD_ERRORS * error) else None


def recomputed(one: Evidence) -> bool:
    """Returns whether the averages were computed without dropout although training has dropout."""
    return one.random and _fits(dataclasses.replace(one, train=one.batch))


def without_initial_values(one: Evidence) -> bool:
    """Returns whether the averages are free of their initial values, whatever `Run.steps` says.

    This is true if `clinic.precise` has recomputed the averages after training: they agree with
    these weights, and disagree with a mixture of the initial values and correct averages.
    """
    share, (mean, var, count) = one.initial_share or 0.0, one.train
    mixture = Moments((1 - share) * mean, share + (1 - share) * var, count)
    fits = len(mean) > 1 and (_fits(one) or recomputed(one))
    return fits and not _fits(dataclasses.replace(one, train=mixture))


def _fits(one: Evidence) -> bool:
    """Returns whether the stored averages agree with those that these weights give."""
    return max(one.z_scores) <= STANDARD_ERRORS


SECOND_BATCH = "a second batch, at least half as large, to measure the differences between batches"


def unknown(case: Case) -> Iterator[NotChecked]:
    """Yields the checks of layers that lack an input, and the skipped evaluations."""
    if case.run.batch_size is None:
        missing = "the number of examples that share statistics in training: Run(batch_size=…)"
        yield NotChecked("small-batch", missing)
    elif case.whole < 2:
        yield NotChecked("small-batch", SECOND_BATCH)
    if case.whole < 2 and any(one.random for one in case.layers):
        yield NotChecked("variance-shift", SECOND_BATCH)
    if case.run.predict is None:
        missing = "your evaluation function: Run(predict=…); only evaluation mode was checked"
        yield NotChecked("batch-dependent in your evaluation", missing)
    if not case.has_labels:
        yield NotChecked("loss and accuracy", "labels in the batches")


WEIGHT_DECAY = _illness(
    "weight-decay",
    "weight decay acts on scale and bias",
    "scales and biases shrink without benefit; weight decay is meant for kernels, and on a kernel "
    "before a norm it only changes the effective learning rate (van Laarhoven, 2017)",
    "exclude both from weight decay, for instance with optax.add_decayed_weights(…, "
    "mask=lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params))",
)
LAYERWISE_RATE = _illness(
    "layerwise-rate",
    "a layer-wise learning rate (as in LARS or LAMB) acts on scale and bias",
    "updates are proportional to the L2 norm of a parameter, so a bias near 0 hardly changes (You "
    "et al., 2017)",
    "exclude both from the trust ratio with optax.lars(…, trust_ratio_mask=…) or optax.masked",
)
MAX_UPDATES = 64  # a schedule may start at 0, and gradients may be accumulated over several steps


def decay(case: Case) -> Outcome:
    """Finds weight decay or a layer-wise learning rate that acts on scale or bias."""
    if case.run.tx is None:
        missing = "the optimizer: Run(tx=…); the weights do not show which parameters were decayed"
        yield NotChecked("weight-decay", missing)
        return
    try:
        decayed = depends(case.run.tx, case.network.params, gradient=0.0)
        scaled = depends(case.run.tx, case.network.params, gradient=1.0) - decayed
    except Exception as error:  # the user's optimizer may need other arguments
        text = f"{type(error).__name__}: {str(error)[:100]}"
        missing = f"an optimizer that runs on small arrays ({text})"
        yield NotChecked("weight-decay", missing)
        return
    for illness, how, found in (
        (WEIGHT_DECAY, "applies weight decay to", decayed),
        (LAYERWISE_RATE, "uses a layer-wise learning rate for", scaled),
    ):
        paths = {one.layer.name: one.layer.path for one in case.layers}
        hit = {
            layer: {"scale", "bias"} & {leaf for *norm, leaf in found if (*norm,) == path}
            for layer, path in paths.items()
        }
        if kinds := sorted(set().union(*hit.values())):
            layers = tuple(layer for layer in hit if hit[layer])
            yield Finding(illness, layers, f"the optimizer {how} {' and '.join(kinds)}")


def depends(tx: Any, params: Params, *, gradient: float) -> set[tuple[str, ...]]:
    """Returns the paths of leaves whose update, for a fixed gradient, depends on their value.

    With a gradient of 0 the cause is weight decay; otherwise it may be a layer-wise learning rate.
    Each leaf is replaced by an array of the same rank with one element, so masks based on paths or
    ranks work, but masks based on sizes or values of leaves do not. `tx` has `init` and `update` as
    in Optax.

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


BATCH_DEPENDENT = _illness(
    "batch-dependent",
    "predictions depend on the rest of the batch",
    "the prediction for an image depends on the other images in its batch, and is meaningless for "
    "a batch of one image",
    "evaluate in evaluation mode (linen: train=False or use_running_average=True, without mutable; "
    "NNX: model.eval(); Equinox: eqx.nn.inference_mode(model))",
)
# The tolerance, relative to the largest logit, is eps ** DIGITS: half of the digits.
DIGITS = 0.5


def batch_dependent(case: Case) -> Outcome:
    """Evaluates half of a batch twice: once with the other half, and once with zeros instead."""
    images = np.asarray(case.batches[0]["image"])
    half = (len(images) + 1) // 2
    others = images.copy()
    others[half:] = 0
    predict = case.run.predict or (
        lambda images: case.evaluate(case.network.batch_stats, {"image": images})
    )
    one, other = (np.asarray(predict(of), np.float64)[:half] for of in (images, others))
    norms = [evidence.layer for evidence in case.layers]
    names = tuple(layer.name for layer in norms if layer.by_batch)
    size, apart = np.nan_to_num(np.abs(one)).max(), np.nan_to_num(np.abs(one - other)).max()
    coarsest = max((float(jnp.finfo(layer.dtype).eps) for layer in norms), default=2.0**-23)
    if names or apart > coarsest**DIGITS * size:
        text = (
            f"replacing {len(images) - half} images in a batch changes the logits of the other "
            f"{half} by up to {apart:.3g}; the largest logit is {size:.3g}"
        )
        yield Finding(BATCH_DEPENDENT, names, text)


MOVED_WHILE_FROZEN = _illness(
    "moved-while-frozen",
    "frozen norms have changed",
    "an optimizer that skips scale and bias does not freeze the averages: every pass in training "
    "mode updates the averages, which then no longer fit the other frozen layers",
    "restore the original norms; run them in evaluation mode, or freeze them with clinic.freezing "
    "(freeze_statistics for the averages, without_frozen for scale and bias)",
)


def moved_while_frozen(case: Case) -> Outcome:
    """Compares the frozen norms with the same norms before training."""
    run = case.run
    if run.frozen and run.before is None:
        yield NotChecked("moved-while-frozen", "the network before training: Run(before=…)")
    elif run.before is not None and (
        names := moved(run.before, case.network, run.frozen or ("*",))
    ):
        layers, _, leaves = zip(*(name.rpartition(".") for name in names), strict=True)
        text = f"{', '.join(dict.fromkeys(leaves))} changed"
        yield Finding(MOVED_WHILE_FROZEN, tuple(dict.fromkeys(layers)), text)


UPDATED_TWICE = _illness(
    "updated-twice",
    "a step updates the averages of a norm more than once",
    "k updates keep only momentum ** k of the old averages; the averages also mix the inputs of "
    "all calls, while training normalises each call by its own statistics",
    "use a separate norm for each call of a shared layer; if a step has several passes, keep the "
    "statistics of only one",
)
FAR = 100.0  # standard deviations; far more than the effect of different dropout keys


def updated_twice(case: Case) -> Outcome:
    """Finds norms with several calls in a pass, or several updates in the training step."""
    texts = {one.layer.name: f"{one.calls} calls per pass" for one in case.layers if one.calls > 1}
    if case.run.step is not None:
        found = updates(case.run.step, case)
        several = {name: round(times) for name, times in found.items() if times > 1.5}
        texts |= {name: f"{times} updates per step" for name, times in several.items()}
        if other := [one.layer.name for one in case.layers if one.layer.name not in found]:
            missing = f"a constant momentum or an update count, for {', '.join(other)}"
            yield NotChecked("updated-twice in your step", missing)
    if texts:
        yield Finding(UPDATED_TWICE, tuple(texts), "; ".join(dict.fromkeys(texts.values())))


def updates(step: Callable[[Network, Batch], Network], case: Case) -> dict[str, float]:
    """Returns the number of updates per step for each norm where the number can be measured.

    A norm with a `count` counts its updates. For other norms, the step is run twice: with the
    stored means, and with means shifted by 100 standard deviations. The results differ by the shift
    times momentum ** updates, because the inputs in training do not depend on the stored means.
    """
    stored = flatten_dict(dict(case.network.batch_stats))
    shifts = {(*one.layer.path, "mean"): FAR * one.std.reshape(one.shape) for one in case.layers}

    def after(far: bool) -> Leaves:
        moved = {path: stored[path] + far * shift for path, shift in shifts.items()}
        moved = {path: jnp.asarray(leaf, stored[path].dtype) for path, leaf in moved.items()}
        start = dataclasses.replace(case.network, batch_stats=unflatten_dict(stored | moved))
        # A step may donate its arguments.
        return flatten_dict(dict(step(jax.tree.map(jnp.copy, start), case.batches[0]).batch_stats))

    near, far, found = after(False), after(True), {}
    for one, (mean, shift) in zip(case.layers, shifts.items(), strict=True):
        count = (*one.layer.path, "count")
        if count in stored:
            found[one.layer.name] = float(np.max(near[count] - stored[count]))
        elif one.momentum and one.momentum < 1:
            kept = max(float(np.sum(far[mean] - near[mean]) / shift.sum()), 1e-12)
            found[one.layer.name] = math.log(kept) / math.log(one.momentum)
    return found


NOT_CONVERGED = _illness(
    "not-converged",
    "the averages have not converged from their initial values",
    "the running statistics are a mixture of correct statistics and the initial values 0 and 1",
    "train longer, lower the momentum, use bnjax.norms.BatchNorm with debias, or recompute the "
    "statistics with clinic.precise",
)
STALE = _illness(
    "stale",
    "the averages lag behind these weights, or belong to other weights",
    "evaluation normalises by statistics that were computed with different weights",
    "recompute the statistics with clinic.precise, in particular after averaging or restoring "
    "weights; if the weights change fast, recompute them before each evaluation, or lower the "
    "momentum or the learning rate",
)
# The limits for the weight of the initial values in the averages (momentum ** updates), and for
# the resulting shift of the outputs (this weight times |mean| / std).
INITIAL_SHARE, INITIAL_SHIFT = 0.01, 0.1
# The limit for stored minus expected statistics, in standard errors (RMS over channels). In the
# worst case, fully correlated channels, the mean and the variance of a healthy layer each exceed
# the limit with a probability of 6e-5, once in 80 networks of 100 norms. Then `_of_poor_fit`
# decides.
STANDARD_ERRORS = 4.0
# The tolerated total variation distance between predictions under stored and expected statistics.
MOVED = 0.1
# The RMS errors of the mean and of the log variance of a batch of 16 independent values.
MISFIT_MEAN, MISFIT_VAR = 0.25, math.sqrt(2 / 16)
# The limits for the colours in a report. A value beyond its limit is not by itself a finding.
LIMITS = {
    "drift": MISFIT_MEAN,
    "log_ratio": MISFIT_VAR,
    "noise": NOISE,
    "shift": SHIFT,
    "dead": CHANNELS,
}
EXPLAINED = 0.5  # the lowest accepted R^2 of the fit in `fitted_share`


def unfinished_or_stale(case: Case, before: Sequence[Finding]) -> Outcome:
    """Finds averages that have not converged or belong to other weights (at most one finding).

    Skips layers whose wrong statistics are explained by an earlier finding.
    """
    names, explained = [one.layer.name for one in case.layers], set[str]()
    for one in before:
        if one.id in ("never-updated", "invalid-statistics", "low-precision"):
            explained |= {*one.layers}
        if one.id == "low-precision":  # the inputs of later layers are wrong, too
            explained |= {*names[names.index(one.layers[0]) :]}
            yield NotChecked("stale by fit", f"accurate inputs to all layers after {one.layers[0]}")
    layers = [one for one in case.layers if one.layer.name not in explained]
    early = [one for one in layers if _is_early(one, one.initial_share or 0.0)]
    if early := [one for one in early if not without_initial_values(one)]:
        worst = max(early, key=lambda one: one.initial_share or 0.0)
        share = worst.initial_share or 0.0
        yield _not_converged(early, worst, share, "momentum ** updates", worst.updates)
        yield NotChecked("stale", "averages that have converged")
        return
    if case.run.weights is None:
        missing = "the fingerprint of the weights to which the statistics belong: Run(weights=…)"
        yield NotChecked("stale by fingerprint", missing)
    elif case.run.weights != (mine := fingerprint(case.network.params)):
        text = f"the statistics belong to the weights {case.run.weights}, not to the weights {mine}"
        yield Finding(STALE, tuple(one.layer.name for one in layers), text)
        return
    if several := [one for one in layers if one.calls > 1]:
        calls = ", ".join(f"{one.layer.name} ({one.calls} calls per pass)" for one in several)
        missing = f"norms with only one call per pass, unlike {calls}"
        yield NotChecked("stale by fit", missing)
    if case.whole < 2:
        yield NotChecked("stale by fit", SECOND_BATCH)
        return
    if case.run.steps is None and any(one.momentum is not None for one in layers):
        missing = "the number of updates: Run(steps=…); only the averages themselves were checked"
        yield NotChecked("not-converged by the number of updates", missing)
    judged = [one for one in layers if one.calls == 1 and not recomputed(one)]
    beyond = [one for one in judged if not _fits(one)]
    if beyond:
        yield from _of_poor_fit(case, judged, beyond)


def _of_poor_fit(case: Case, judged: list[Evidence], beyond: list[Evidence]) -> Outcome:
    """Finds statistics that are worse than those of a small batch, or change predictions."""
    mixed = flatten_dict(dict(case.expected))
    stored = flatten_dict(dict(case.network.batch_stats))
    own = {(*one.layer.path, name) for one in judged for name in ("mean", "var")}
    mixed |= {path: stored[path] for path in own}
    right = case.logits_under(case.expected)
    moved = distance(right, case.logits_under(unflatten_dict(mixed)))
    # The noise of a batch moves predictions in proportion to 1 / sqrt(examples).
    usual = distance(right, case.batch_logits) * math.sqrt(judged[0].examples / judged[0].size)
    misfit = any(rms(one.drift) > MISFIT_MEAN or rms(one.log_ratio) > MISFIT_VAR for one in beyond)
    if not misfit and moved <= max(MOVED, usual):
        return
    cause = _other_units(judged[0])
    # If the weights of the initial values are known, `unfinished_or_stale` has checked them.
    known = all(one.initial_share is not None for one in judged)
    share = None if known or cause else fitted_share(judged, beyond)
    if share is not None and any(_is_early(one, share) for one in judged):
        yield _not_converged(judged, judged[0], share, "found by least squares")
        return
    worst = max(beyond, key=lambda one: max(one.z_scores))
    if not cause:
        cause = "the weights changed too fast for the averages"
        cause += ", the weights were averaged or restored" if case.run.weights is None else ""
        cause += ", or these images were not preprocessed as in training"
    text = (
        f"up to {max(worst.z_scores):.0f} standard errors from the statistics of these weights (in "
        f"{worst.layer.name}, means differ by {rms(worst.drift):.2f} standard deviations and log "
        f"variances by {rms(worst.log_ratio):.2f}). The error moves {moved:.0%} of the predicted "
        f"probability; the noise of batch statistics moves {usual:.0%}. Possible cause: {cause}"
    )
    yield Finding(STALE, tuple(one.layer.name for one in beyond), text)


def _other_units(first: Evidence) -> str:
    """Describes the error if pixels are from 0 to 255 instead of 0 to 1, or the reverse; else "".

    Such pixels change the variances in the first norm by a factor of 255^2. Ratios within a factor
    of 1.6 of 255^2 count, because the averages may be wrong for another reason as well.
    """
    found = first.train.var.mean(0)
    ratios = (found / np.maximum(first.var, 1e-30))[first.live & (found > 0)]
    log_ratio = math.log(np.median(ratios)) if ratios.size else 0.0
    if abs(abs(log_ratio) - 2 * math.log(255)) > 0.5:
        return ""
    units = ("0 to 255", "0 to 1") if log_ratio > 0 else ("0 to 1", "0 to 255")
    return (
        f"these images have pixels from {units[0]}, and those in training from {units[1]}. In that "
        "case, convert the images and keep the statistics"
    )


def fitted_share(judged: list[Evidence], beyond: list[Evidence]) -> float | None:
    """Returns the weight of the initial values that explains the stored statistics, or None.

    Fits stored = share * (0, 1) + (1 - share) * expected by least squares over all channels, in
    units of the standard deviation for means and of its square for variances. The fit must explain
    more than half of the difference, over all layers and in each layer of `beyond`. In the other
    layers it must predict almost no difference. Otherwise the result is None.

    Args:
        judged: layers with the same number of updates.
        beyond: the layers with wrong statistics.
    """

    def pair(one: Evidence) -> tuple[np.ndarray, np.ndarray]:
        mean, var, std = one.train.mean.mean(0), one.train.var.mean(0), one.std
        initial = [(-mean / std)[one.live], ((1 - var) / std**2)[one.live]]
        found = [((one.mean - mean) / std)[one.live], ((one.var - var) / std**2)[one.live]]
        return np.concatenate(initial), np.concatenate(found)

    def explains(initial: np.ndarray, found: np.ndarray) -> bool:
        rest = found - share * initial
        return 1 - float(rest @ rest / max(found @ found, 1e-12)) > EXPLAINED

    pairs = {one.layer.name: pair(one) for one in judged}
    initial, found = map(np.concatenate, zip(*pairs.values(), strict=True))
    share = float(initial @ found / max(initial @ initial, 1e-12))
    wrong = {one.layer.name for one in beyond}
    agree = all(
        explains(*pairs[name]) if name in wrong else rms(share * pairs[name][0]) < MISFIT_MEAN
        for name in pairs
    )
    return share if agree and explains(initial, found) else None


def _is_early(one: Evidence, share: float) -> bool:
    return share > INITIAL_SHARE or share * one.distance_from_zero > INITIAL_SHIFT


def _not_converged(
    layers: list[Evidence], worst: Evidence, share: float, how: str, updates: int | None = None
) -> Finding:
    momentum, apart = worst.momentum, worst.distance_from_zero
    text = f"the initial values have a weight of {share:.1%} ({how})"
    text += "" if updates is None else f" after {updates:,} updates"
    if momentum and momentum < 1:
        needed = updates_for(momentum, INITIAL_SHARE)
        text += (
            f" with a momentum of {momentum:g}; a weight of {INITIAL_SHARE:.0%} takes {needed:,} "
            "updates"
        )
        if updates:
            text += f" or a momentum of at most {momentum_for(updates, INITIAL_SHARE):g}"
    if share > 1:
        text += (
            "; a weight above 100 % comes from debiasing a variance that starts from 1 instead of "
            "0, or from images that were not preprocessed as in training"
        )
    elif share * apart > INITIAL_SHIFT:
        text += (
            f"; the mean of {worst.layer.name} is {apart:.3g} standard deviations from 0, so its "
            f"error is {share * apart:.2f} standard deviations"
        )
    return Finding(NOT_CONVERGED, tuple(one.layer.name for one in layers), text)


def audit(
    network: Network,
    batches: Iterable[Batch],
    run: Run | None = None,
    *,
    jit: Callable[..., Any] = jax.jit,
) -> Findings:
    """Returns the faults found in the batch norms of a trained network, with measurements.

    Runs the network on all batches as in training. Also runs the network as in evaluation, with
    three kinds of statistics: the statistics of each batch, those of all batches, and the stored
    statistics. Print the result to see the report.

    Args:
        network: a network from `linen`, `nnx` or `equinox`. For linen, variables may have a leading
            axis of devices, and statistics may be a list of one tree per replica.
        batches: training images in random order, in batches of about the size of the training
            batches: `image` [n, h, w, c], as the model receives them in training (uint8 is divided
            by 255), optionally `label` int [n], and `mask` bool [n] if the model takes a mask. Give
            at least two batches, preferably four. All batches are kept in memory.
        run: facts about the training run; `not_checked` lists the checks that need missing facts.
        jit: the function used for compilation.

    Raises:
        ValueError: if a batch is not a dict with `image`, no batch has two or more examples, or the
            batches have a mask but the model takes none.
    """
    kept, run = sorted(batches, key=real_examples, reverse=True), run or Run()
    if not kept or len(kept[0]["image"]) < 2:
        raise ValueError("the audit needs a batch of at least two examples")
    if "mask" in kept[0] and not network.takes_mask:
        raise ValueError(
            "the batches are padded, but the model takes no `mask`, so its norms would include the "
            "padding in training. Give batches without padding."
        )
    network, found, usable = match(network, kept[0])
    missing = "a checkpoint that fits the model" if not usable else ""
    if usable and not network.norms(kept[0]):
        missing = f"{SUPPORTED} in the model"
    if missing:
        return Findings(tuple(found), (NotChecked("all other checks", missing),))
    case = measure(network, kept, run, jit)
    others = decay, batch_dependent, moved_while_frozen, updated_twice
    checks = [unknown, *LAYER_CHECKS, *others]
    outcomes = [*found, *(one for check in checks for one in check(case))]
    outcomes += [*unfinished_or_stale(case, [one for one in outcomes if isinstance(one, Finding)])]
    precise = case.logits_under(case.precise)
    stored = case.logits_under(case.network.batch_stats)
    evaluation = {
        name: case.means(logits) | {"moved": distance(precise, logits)}
        for name, logits in (("stored", stored), ("precise", precise), ("batch", case.batch_logits))
    }
    rows = tuple(
        Row(
            name=one.layer.name,
            shape=one.shape,
            drift=rms(one.drift),
            log_ratio=float(one.log_ratio.mean()) if one.live.any() else None,
            noise=one.noise,
            shift=float(one.shifts.mean()) if one.random else None,
            dead=int((~one.live).sum()),
            count=one.values,
        )
        for one in case.layers
    )
    return Findings(
        found=tuple(one for one in outcomes if isinstance(one, Finding)),
        not_checked=tuple(one for one in outcomes if isinstance(one, NotChecked)),
        layers=rows,
        evaluation=evaluation,
        examples=sum(map(real_examples, kept)),
        limits=LIMITS,
    )
