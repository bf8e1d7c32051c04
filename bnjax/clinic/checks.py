"""The audit of a trained network: each check, with its limit and the text of its finding.

Sources of the limits: docs/evaluation.md.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from bnjax.clinic.freezing import moved
from bnjax.clinic.measure import DEAD, Case, Evidence, Run, distance, measure, real_examples, rms
from bnjax.clinic.network import Network
from bnjax.clinic.report import Finding, Findings, Illness, NotChecked, Row
from bnjax.types import Batch, Params, fingerprint

Found = tuple[Finding, ...]
Outcome = Iterator[Finding | NotChecked]
Check = Callable[[Case, Found], Outcome]  # (case, earlier findings) -> outcome
Leaves = dict[tuple[str, ...], Any]
ILLNESSES: dict[str, Illness] = {}
LAYER_CHECKS: list[Check] = []


def _illness(*words: str) -> Illness:
    illness = Illness(*words)
    return ILLNESSES.setdefault(illness.id, illness)


def _layer_check(*words: str) -> Callable[[Any], Any]:
    """Registers a check of one layer, which returns the evidence, or None for a healthy layer."""

    def register(check: Callable[[Case, Evidence], str | None]) -> Any:
        illness = _illness(*words)

        def check_all(case: Case, before: Found) -> Outcome:
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
    "the norms have nothing to normalise by in evaluation",
    "save batch_stats beside params; for these weights, recompute those of model.init with "
    "clinic.precise",
)
UNMATCHED_LEAVES = _illness(
    "unmatched-leaves",
    "leaves of the checkpoint and of the model do not match",
    "leaves are silently dropped, or keep their initial values",
    "restore into the trained model; rename or drop leaves explicitly",
)
REPLICAS_DIFFER = _illness(
    "replicas-differ",
    "the statistics differ between replicas",
    "an arbitrary replica is saved, with the statistics of a fraction of the data",
    "give the norms axis_name, or merge the statistics with clinic.merge_replicas before saving",
)
# Difference of replicas' means in standard deviations, or of their log variances. float32 sums over
# up to 1,000 values in a different order differ by 1,000 * 2^-24.
REPLICAS = 1e-4


def match(network: Network, batch: Batch) -> tuple[Network, list[Finding], bool]:
    """Returns the network with one replica's variables, arranged as the model expects them.

    Also returns the findings, and whether the model can run with these variables.

    Args:
        network: its variables may have a leading axis of devices; its statistics may be a list of
            one tree per replica, or replicated arrays whose copies differ.
        batch: a batch; only shape and dtype of `image` matter.
    """
    expected = network.shapes(np.asarray(batch["image"][:1]))
    params, stats = (flatten_dict(dict(tree)) for tree in expected)
    its_params, *_ = _replicas(network.params, params)
    replicas = _replicas(network.batch_stats, stats)
    if stats and not replicas[0]:
        text = f"the model has {len(stats)} leaves in batch_stats, the checkpoint has none"
        return network, [Finding(MISSING_STATISTICS, (), text)], False
    found, usable, mine = [], True, {}
    for name, leaves, wanted in (
        ("params", its_params, params),
        ("batch_stats", replicas[0], stats),
    ):
        shapes = {path: [*leaf.shape] for path, leaf in wanted.items()}
        its_shapes = {path: [*np.shape(leaf)] for path, leaf in leaves.items()}
        unmatched = [
            f"{name}.{'.'.join(path)} is {its_shapes.get(path, 'missing')}, but in the model "
            f"{shapes.get(path, 'missing')}"
            for path in sorted({*shapes, *its_shapes})
            if shapes.get(path) != its_shapes.get(path)
        ]
        if unmatched:
            more = f" and {len(unmatched) - 8} more" if len(unmatched) > 8 else ""
            found.append(Finding(UNMATCHED_LEAVES, (), "; ".join(unmatched[:8]) + more))
        usable &= all(its_shapes.get(path) == shape for path, shape in shapes.items())
        mine[name] = unflatten_dict({path: leaves[path] for path in leaves if path in wanted})
    if usable and len(replicas) > 1:
        found += _differing(replicas)
    return dataclasses.replace(network, **mine), found, usable


def _replicas(tree: Any, wanted: Leaves) -> list[Leaves]:
    """Returns the leaves of each replica, or one entry without replicas."""
    if isinstance(tree, list | tuple):
        return [flatten_dict(dict(one)) for one in tree]
    leaves: Leaves = flatten_dict(dict(tree)) if isinstance(tree, Mapping) else {}
    stacked = [
        path in wanted and np.shape(leaf)[1:] == wanted[path].shape != np.shape(leaf)
        for path, leaf in leaves.items()
    ]
    if stacked and all(stacked):
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
        f"{len(replicas)} replicas; their means differ by up to {of_mean:.3g} standard deviations, "
        f"their log variances by up to {of_var:.3g}; the first is audited below"
    )
    return [Finding(REPLICAS_DIFFER, tuple(apart), text)]


@_layer_check(
    "never-updated",
    "the averages are still 0 and 1",
    "evaluation does not normalise at all, while training does",
    "train in training mode and keep the new statistics (linen: mutable=['batch_stats'], as "
    "train_step does; NNX: model.train(); Equinox: the returned State); for these weights, "
    "recompute them with clinic.precise",
)
def never_updated(case: Case, one: Evidence) -> str | None:
    """Finds averages that equal their initial values."""
    return f"mean 0 and variance {one.var[0]:g} exactly" if is_initial(one) else None


def is_initial(one: Evidence) -> bool:
    """Returns whether the means are 0 and the variances 1, or 0, with which Equinox starts."""
    return not one.mean.any() and bool((one.var == 1).all() or (one.var == 0).all())


@_layer_check(
    "invalid-statistics",
    "a mean or variance is NaN or infinite, or a variance is negative, or 0 though the data vary",
    "all later values are NaN, or multiplied by 1 / sqrt(epsilon)",
    "skip non-finite steps (skip_nonfinite=True); look for a one-pass variance, a batch of padding "
    "only, or an update that extrapolates; recompute with clinic.precise",
)
def invalid_statistics(case: Case, one: Evidence) -> str | None:
    """Finds invalid statistics, and norms with non-finite inputs."""
    finite = np.isfinite(one.mean) & np.isfinite(one.var)
    counts = {
        "not finite": ~finite,
        "negative": finite & (one.var < 0),
        "0 where the data vary": (one.var == 0)
        & (one.train.var.mean(0) > 0)
        & (not is_initial(one)),
        "with inputs that are not finite": ~one.finite,
    }
    words = [f"{count.sum()} {word}" for word, count in counts.items() if count.any()]
    return f"{', '.join(words)} of {one.mean.size}" if words else None


ROUNDING = 0.01  # relative rounding error of a variance


@_layer_check(
    "low-precision",
    "the mean is too far from 0 to compute the variance accurately",
    "the batch is normalised by rounding errors",
    "subtract a constant from the input, drop a bias before the norm, or compute in float32 with a "
    "two-pass variance (bnjax's BatchNorm, or use_fast_variance=False); keep statistics in float32",
)
def low_precision(case: Case, one: Evidence) -> str | None:
    """Finds variances dominated by rounding errors, and averages stored with too few bits.

    The relative error is (mean / std)^2 eps^2 / 12 from rounded inputs, and (mean / std)^2 eps from
    E[x^2] - E[x]^2.
    """
    if jnp.finfo(one.dtype).bits < 32:
        return f"averages kept in {jnp.dtype(one.dtype).name}"
    ratio = float((np.abs(one.train.mean.mean(0)) / one.std)[one.live].max(initial=0))
    dtype, module = jnp.dtype(one.layer.dtype), one.layer.module
    eps = float(jnp.finfo(dtype).eps) if jnp.issubdtype(dtype, jnp.floating) else 0.0
    errors = [(ratio**2 * eps**2 / 12, f"inputs in {dtype.name}")]
    if getattr(module, "use_fast_variance", False):  # of Flax
        promotes = getattr(module, "force_float32_reductions", True)
        dtype = jnp.promote_types(dtype, jnp.float32) if promotes else dtype
        errors.append((ratio**2 * float(jnp.finfo(dtype).eps), f"E[x^2] - E[x]^2 in {dtype.name}"))
    error, how = max(errors)
    text = f"|mean| / std up to {ratio:.3g}, {how}: {error:.1%} rounding error"
    return text if error > ROUNDING else None


# Largest healthy fraction of a layer's channels that are dead or have a variance below epsilon:
# networks with ReLU have some units that are never active.
CHANNELS = 0.1


@_layer_check(
    "dead-channels",
    "channels with constant output",
    "they carry no information about the image, cost as much as others, and may never recover",
    "lower the learning rate; no weight decay on scale; prune them; look at the layer before",
)
def dead_channels(case: Case, one: Evidence) -> str | None:
    """Finds layers with many constant channels."""
    dead = ~one.live & one.finite.all()  # NaN is a different illness
    by_scale = (dead & (np.abs(one.scale) <= DEAD)).sum()
    text = f"{dead.sum()} of {dead.size} channels, {by_scale} because of their scale"
    return text if dead.mean() > CHANNELS else None


@_layer_check(
    "epsilon-large",
    "epsilon is above the variance",
    "the variance of the output is below 1 and depends on the scale of the inputs",
    "scale the inputs up, or lower epsilon to a hundredth of the smallest variance or less",
)
def epsilon_large(case: Case, one: Evidence) -> str | None:
    """Finds layers whose divisor is dominated by epsilon."""
    epsilon, var = one.layer.module.epsilon, one.batch.var.mean(0)[one.live]
    below = var < epsilon
    if not below.size or below.mean() <= CHANNELS:
        return None
    return (
        f"{below.sum()} of {var.size} channels have a variance below epsilon = {epsilon:.3g}; the "
        f"median is {np.median(var):.3g}"
    )


# Standard deviation of a training batch's mean, in standard deviations, for 16 independent values.
# Below 16 examples batch norm loses accuracy (Wu & He, 2018, figure 1).
NOISE = 0.25


@_layer_check(
    "small-batch",
    "too few values per channel and batch in training",
    "mean and variance of a batch are mostly noise, so the network differs between training and "
    "evaluation",
    "larger batches; statistics over several devices with axis_name; batch renormalization; a norm "
    "that needs no batch",
)
def small_batch(case: Case, one: Evidence) -> str | None:
    """Finds layers whose batch statistics are mostly noise."""
    if case.run.batch_size is None or case.whole < 2 or (noise := one.noise or 0.0) <= NOISE:
        return None
    return (
        f"a batch's mean varies by {noise:.2f} standard deviations, like the mean of "
        f"{noise**-2:.0f} independent values (n = {one.values:,})"
    )


SHIFT = 0.1  # absolute log ratio of the variances: the scale of the outputs is wrong by 5 %


@_layer_check(
    "variance-shift",
    "dropout before a norm: variances differ between training and evaluation",
    "the averages are over inputs with dropout, which evaluation does not have (Li et al., 2018)",
    "put dropout after the last norm, lower its rate, or recompute the statistics without it with "
    "clinic.precise",
)
def variance_shift(case: Case, one: Evidence) -> str | None:
    """Finds norms whose input variance changes when dropout is active."""
    if not one.random or case.whole < 2 or recomputed(one):
        return None
    mean, error = one.shifts.mean(), one.shifts.std(ddof=1) / len(one.shifts) ** 0.5
    text = f"variance in training / in evaluation {np.exp(mean):.3f}"
    return text if abs(mean) > max(SHIFT, STANDARD_ERRORS * error) else None


def recomputed(one: Evidence) -> bool:
    """Returns whether the averages are over inputs without dropout, as from `clinic.precise`."""
    in_evaluation = dataclasses.replace(one, train=one.batch)
    return one.random and max(in_evaluation.z_scores) <= STANDARD_ERRORS


def unknown(case: Case) -> Iterator[NotChecked]:
    """Yields the checks with a missing input, except those of `unfinished_or_stale`."""
    few = "a second batch, to measure the differences between batches"
    if case.run.batch_size is None:
        missing = "the number of examples that share statistics in training: Run(batch_size=…)"
        yield NotChecked("small-batch", missing)
    elif case.whole < 2:
        yield NotChecked("small-batch", few)
    if case.whole < 2 and any(one.random for one in case.layers):
        yield NotChecked("variance-shift", few)
    if case.run.tx is None:
        missing = "the optimizer: Run(tx=…); the weights do not show its effect"
        yield NotChecked("weight-decay", missing)
    if case.run.predict is None:
        missing = "your evaluation function: Run(predict=…); only train=False was tried"
        yield NotChecked("batch-dependent in your evaluation", missing)
    if not case.has_labels:
        yield NotChecked("loss and accuracy", "labels in the batches")


WEIGHT_DECAY = _illness(
    "weight-decay",
    "weight decay acts on scale and bias",
    "channels shrink without reason; weight decay is meant for kernels, where before a norm it "
    "only changes the learning rate (van Laarhoven, 2017)",
    "exclude them, for instance with optax.add_decayed_weights(…, mask=lambda params: jax.tree.map("
    "lambda leaf: leaf.ndim > 1, params))",
)
LAYERWISE_RATE = _illness(
    "layerwise-rate",
    "a layer-wise learning rate (as in LARS or LAMB) acts on scale and bias",
    "their norm is no measure of the right step: a bias near 0 hardly moves (You et al., 2017)",
    "exclude vectors from the trust ratio: optax.lars(…, trust_ratio_mask=…), or optax.masked",
)
MAX_UPDATES = 64  # a schedule may start at 0, and gradients may be accumulated over several steps


def decay(case: Case, before: Found) -> Outcome:
    """Finds weight decay, or a layer-wise rate, on scale and bias."""
    if case.run.tx is None:
        return
    try:
        decayed = depends(case.run.tx, case.network.params, gradient=0.0)
        scaled = depends(case.run.tx, case.network.params, gradient=1.0) - decayed
    except Exception as error:  # a user's optimizer may need other arguments
        missing = f"an optimizer that runs in a test ({type(error).__name__}: {str(error)[:100]})"
        yield NotChecked("weight-decay", missing)
        return
    for illness, how, found in (
        (WEIGHT_DECAY, "shrinks", decayed),
        (LAYERWISE_RATE, "scales with its norm the step of", scaled),
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
    """Returns the paths of the leaves whose update depends on their value, for the same gradient.

    With gradient 0 that is weight decay; otherwise it may be a layer-wise rate. Each leaf is
    replaced by one number of the same rank, so masks by path or rank work; masks by the size or the
    values of a leaf do not. `tx` has `init` and `update` as in Optax.

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
    "the prediction for an image depends on the other images in its batch, and for a single image "
    "is meaningless",
    "evaluate in evaluation mode (linen: train=False or use_running_average=True, without mutable; "
    "NNX: model.eval(); Equinox: eqx.nn.inference_mode(model))",
)
# Power of eps, relative to the largest logit: rounding keeps more than half of the digits.
DIGITS = 0.5


def batch_dependent(case: Case, before: Found) -> Outcome:
    """Evaluates half a batch with two different other halves: the original one, and zeros."""
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
            f"with {len(images) - half} different other images, the logits of {half} images "
            f"change by up to {apart:.3g}; the largest logit is {size:.3g}"
        )
        yield Finding(BATCH_DEPENDENT, names, text)


MOVED_WHILE_FROZEN = _illness(
    "moved-while-frozen",
    "frozen norms changed",
    "an optimizer that skips scale and bias does not freeze the averages: every pass in training "
    "mode updates them, and the other frozen layers no longer fit",
    "restore them from before; freeze the averages with freezing.freeze_statistics, or run these "
    "norms in evaluation mode; freeze scale and bias with freezing.without_frozen",
)


def moved_while_frozen(case: Case, before: Found) -> Outcome:
    """Compares frozen norms with those before the training."""
    run = case.run
    if run.frozen and run.before is None:
        yield NotChecked("moved-while-frozen", "the network before the training: Run(before=…)")
    elif run.before is not None and (
        names := moved(run.before, case.network, run.frozen or ("*",))
    ):
        layers, _, leaves = zip(*(name.rpartition(".") for name in names), strict=True)
        text = f"{', '.join(dict.fromkeys(leaves))} changed"
        yield Finding(MOVED_WHILE_FROZEN, tuple(dict.fromkeys(layers)), text)


UPDATED_TWICE = _illness(
    "updated-twice",
    "a step updates the averages of a norm more than once",
    "k updates keep momentum ** k of the old averages, so they forget faster; and they mix the "
    "inputs of all calls, while training normalises each call by its own",
    "give each call of a shared layer its own norm; of several passes in a step, keep the "
    "statistics of one",
)
FAR = 100.0  # standard deviations: dropout keys that differ between two steps have no effect


def updated_twice(case: Case, before: Found) -> Outcome:
    """Finds norms with several calls in a pass, or several updates in the training step."""
    texts = {
        one.layer.name: f"{one.calls} calls in one pass" for one in case.layers if one.calls > 1
    }
    if case.run.step is not None:
        found = updates(case.run.step, case)
        several = {name: round(times) for name, times in found.items() if times > 1.5}
        texts |= {name: f"{times} updates in a step" for name, times in several.items()}
        if other := [one.layer.name for one in case.layers if one.layer.name not in found]:
            missing = f"norms with a constant momentum or a count: not {', '.join(other)}"
            yield NotChecked("updated-twice in your step", missing)
    if texts:
        yield Finding(UPDATED_TWICE, tuple(texts), "; ".join(dict.fromkeys(texts.values())))


def updates(step: Callable[[Network, Batch], Network], case: Case) -> dict[str, float]:
    """Returns the number of updates of each norm in a step, for those where it can be measured.

    A norm with debias counts them. Otherwise, means that are shifted by 100 standard deviations
    stay shifted by momentum ** updates of that, whatever the data: batches alone determine what
    training adds.
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
        elif isinstance(one.momentum, float) and 0 < one.momentum < 1:
            kept = max(float(np.sum(far[mean] - near[mean]) / shift.sum()), 1e-12)
            found[one.layer.name] = math.log(kept) / math.log(one.momentum)
    return found


NOT_CONVERGED = _illness(
    "not-converged",
    "the averages still remember their starting values",
    "part of the running statistics is 0 and 1, not the data",
    "train longer, lower the momentum, use debias, or recompute with clinic.precise",
)
STALE = _illness(
    "stale",
    "the averages lag behind these weights, or belong to other weights",
    "evaluation normalises by statistics of different weights",
    "recompute them with clinic.precise: always after averaging or restoring weights; while "
    "weights change fast, before each evaluation, or lower the momentum or the learning rate",
)
INITIAL_SHARE = 0.01  # momentum ** updates, the weight of the starting values in the averages
INITIAL_SHIFT = 0.1  # this weight times |mean| / std: outputs shift by 0.1 standard deviations
# The limit of stored minus expected statistics, in standard errors (RMS over channels).
# The mean or the variance of a healthy layer is above it with probability 6e-5, if all channels are
# correlated, which is the worst case. That is one false finding in 80 networks with 100 norms.
STANDARD_ERRORS = 4.0
# Total variation distance of predictions under stored and expected statistics: a tolerance.
MOVED = 0.1
# RMS of drift, and of the log ratio of variances, for one batch of 16 independent values.
MISFIT_MEAN, MISFIT_VAR = 0.25, math.sqrt(2 / 16)
# Of the columns of a report; a layer is ill only if the check of the column finds it.
LIMITS = {
    "drift": MISFIT_MEAN,
    "log_ratio": MISFIT_VAR,
    "noise": NOISE,
    "shift": SHIFT,
    "dead": CHANNELS,
}
EXPLAINED = 0.5  # R^2 of the fit by a weight of the starting values


def unfinished_or_stale(case: Case, before: Found) -> Outcome:
    """Finds averages that have not converged or belong to other weights; at most one of the two.

    Skips each layer whose wrong statistics are already explained by an earlier finding.
    """
    names, explained = [one.layer.name for one in case.layers], set[str]()
    for one in before:
        if one.id in ("never-updated", "invalid-statistics", "low-precision"):
            explained |= {*one.layers}
        if one.id == "low-precision":  # the inputs of later layers are rounding errors
            explained |= {*names[names.index(one.layers[0]) :]}
            yield NotChecked("stale by fit", f"layers that do not follow {one.layers[0]}")
    layers = [one for one in case.layers if one.layer.name not in explained]
    if early := [one for one in layers if _is_early(one, one.initial_share)]:
        worst = max(early, key=lambda one: one.initial_share)
        share, after = worst.initial_share, f" after {worst.updates:,} updates"
        yield _not_converged(early, worst, share, "momentum ** updates", after)
        yield NotChecked("stale", "averages that have converged")
        return
    if case.run.weights is None:
        missing = "the fingerprint of the weights that belong to the statistics: Run(weights=…)"
        yield NotChecked("stale by fingerprint", missing)
    elif case.run.weights != (mine := fingerprint(case.network.params)):
        text = f"the statistics belong to weights {case.run.weights}, but these are {mine}"
        yield Finding(STALE, tuple(one.layer.name for one in layers), text)
        return
    if several := [one for one in layers if one.calls > 1]:
        calls = ", ".join(f"{one.layer.name} ({one.calls} calls per pass)" for one in several)
        missing = f"norms with one call per pass; these average over several: {calls}"
        yield NotChecked("stale by fit", missing)
    if case.whole < 2:
        yield NotChecked("stale by fit", "a second batch, to measure the differences of batches")
        return
    if case.run.steps is None and any(isinstance(one.momentum, float) for one in layers):
        missing = "the number of updates: Run(steps=…); judged by the values of the averages"
        yield NotChecked("not-converged by its updates", missing)
    judged = [one for one in layers if one.calls == 1 and not recomputed(one)]
    beyond = [one for one in judged if max(one.z_scores) > STANDARD_ERRORS]
    if beyond:
        yield from _of_poor_fit(case, judged, beyond)


def _of_poor_fit(case: Case, judged: list[Evidence], beyond: list[Evidence]) -> Outcome:
    """Finds statistics that are less accurate than a small batch's, or change predictions."""
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
    share = fitted_share(judged, beyond)
    if share is not None and any(_is_early(one, share) for one in judged):
        yield _not_converged(judged, judged[0], share, "by the best fit")
        return
    worst = max(beyond, key=lambda one: max(one.z_scores))
    cause = "the weights change faster than the averages follow"
    if case.run.weights is None:
        cause += ", or were averaged or restored"
    text = (
        f"up to {max(worst.z_scores):.0f} standard errors from the statistics of these "
        f"weights (in {worst.layer.name}: means by {rms(worst.drift):.2f} standard deviations, log "
        f"variances by {rms(worst.log_ratio):.2f}); this moves {moved:.0%} of the predicted "
        f"probability, batch statistics move {usual:.0%}: {cause}"
    )
    yield Finding(STALE, tuple(one.layer.name for one in beyond), text)


def fitted_share(judged: list[Evidence], beyond: list[Evidence]) -> float | None:
    """Returns the weight of the starting values that explains the stored statistics, or None.

    Least squares over all channels of stored = share * (0, 1) + (1 - share) * expected, means in
    standard deviations and variances in their squares. The fit has to explain more than half of the
    difference, over all layers together and in each layer of `beyond`, and has to predict no
    difference in the other layers.

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
    layers: list[Evidence], worst: Evidence, share: float, how: str, after: str = ""
) -> Finding:
    momentum, apart = worst.momentum, worst.distance_from_zero
    text = f"the starting values have a weight of {share:.1%} ({how}){after}"
    if isinstance(momentum, int | float) and 0 < momentum < 1:
        needed = math.ceil(math.log(INITIAL_SHARE) / math.log(momentum))
        text += (
            f" with momentum {momentum:g}; {needed:,} updates are needed for {INITIAL_SHARE:.0%}"
        )
    if share > 1:
        text += (
            "; above 100 %: debiased as if the variance had started from 0, but it starts from 1"
        )
    elif share * apart > INITIAL_SHIFT:
        text += (
            f"; the mean of {worst.layer.name} is {apart:.3g} standard deviations from 0, so this "
            f"shifts it by {share * apart:.2f}"
        )
    return Finding(NOT_CONVERGED, tuple(one.layer.name for one in layers), text)


def audit(
    network: Network,
    batches: Iterable[Batch],
    run: Run | None = None,
    *,
    jit: Callable[..., Any] = jax.jit,
) -> Findings:
    """Returns the faults of the batch norms of a trained network, with measurements.

    Runs the network on all batches as in training, and as in evaluation with the statistics of each
    batch, of all batches, and the stored ones. Print the result to see the report.

    Args:
        network: from `linen`, with norms of Flax or bnjax. Its variables may have a leading axis of
            devices, and its statistics may be a list of one tree per replica.
        batches: training images in random order, in batches of about the size of the training
            batches: `image` [n, h, w, c], optionally `label` int [n], and `mask` bool [n] if the
            model takes it. Two or more; four are better. All are kept in memory.
        run: facts about the training; checks with missing facts are in `not_checked`.
        jit: compiles a function.

    Raises:
        ValueError: if no batch has two or more examples, or batches have a mask that the model does
            not take.
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
        missing = "a batch norm of Flax or bnjax in the model"
    if missing:
        return Findings(tuple(found), (NotChecked("all other checks", missing),))
    case = measure(network, kept, run, jit)
    not_checked = [*unknown(case)]
    others = decay, batch_dependent, moved_while_frozen, updated_twice, unfinished_or_stale
    for check in (*LAYER_CHECKS, *others):
        for outcome in check(case, tuple(found)):
            if isinstance(outcome, NotChecked):
                not_checked.append(outcome)
            else:
                found.append(outcome)
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
    examples = sum(map(real_examples, kept))
    return Findings(tuple(found), tuple(not_checked), rows, evaluation, examples, LIMITS)
