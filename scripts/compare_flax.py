"""Prints, as Markdown, what flax.linen.BatchNorm and bnjax.norms.BatchNorm make of the same inputs.

    python scripts/compare_flax.py

`measurements` returns the numbers; the tests check them.
"""

import os

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bnjax.norms import BatchNorm

NORMS = {"flax": nn.BatchNorm, "ours": BatchNorm}
DEVICES = 8

# feature | Flax | ours, then the test that shows it; what is measured comes after these.
FEATURES = """
constructor, call, leaf names, shapes, defaults | yes | the same
    test_against_flax.py::test_drop_in
its checkpoint in the other layer | yes | the same results, both ways
    test_against_flax.py::test_checkpoints_are_interchangeable
bfloat16 averages in a checkpoint | evaluates in bfloat16 | at least float32
    test_against_flax.py::test_low_precision_averages
mask of one value an example, [n] | error | yes
    test_against_flax.py::test_masks
NaN in padding | NaN gradient of scale | no effect
    test_against_flax.py::test_nan_in_padding
fewer than 2 values per channel | silent, output 0 | error that says what to do
    test_batch_norm.py::test_errors_say_what_to_do
unbound axis name | NameError of JAX | names the axis and the wrapper
    test_batch_norm.py::test_errors_say_what_to_do
axis_index_groups | pmap, unchecked shard_map | also vmap and checked shard_map
    test_devices.py::test_groups_have_their_own_statistics
stored variance | biased | biased or unbiased, by the true count
    test_batch_norm.py::test_conventions_of_other_frameworks
momentum | a number | a number, a schedule, None for the mean
    test_batch_norm.py::test_momentum_may_follow_the_steps
averages without their initial values | no | debias=True
    test_batch_norm.py::test_debias_gives_powers_of_the_momentum_as_weights
normalise by / update / train affine | one switch | three
    test_batch_norm.py::test_which_statistics_normalise_and_whether_they_are_updated
forward mode, second derivatives | not tested here | yes
    test_batch_norm.py::test_forward_mode_and_second_derivatives
gradient = closed form, float64, 1e-10 | not tested here | yes
    test_batch_norm.py::test_gradients_are_the_closed_form
"""


def measurements():
    """Returns {name: {"truth": float, "flax": float, "ours": float}}."""
    return {
        "masked shards": _masked_shards(),
        "empty shard": _empty_shard(),
        "unequal groups": _unequal_groups(),
        **_large_means(),
        **_stored_variances(),
    }


def _update(norm, x, mask=None, **options):
    variables = nn.BatchNorm().init(jax.random.key(0), x[:1], use_running_average=True)
    _, updated = norm(momentum=0.0, **options).apply(
        variables, x, use_running_average=False, mask=mask, mutable=["batch_stats"]
    )
    return updated["batch_stats"]


def _over_shards(norm, x, mask):
    """Returns the mean that eight devices find, [c]."""
    shards = (leaf.reshape(DEVICES, -1, leaf.shape[1]) for leaf in (x, mask))
    means = jax.vmap(
        lambda x, mask: _update(norm, x, mask, axis_name="devices")["mean"], axis_name="devices"
    )(*shards)
    return float(means[0, 0])


def _masked_shards():
    """Eight shards of four, the last with one real value: its mean counts too much.

    The values grow, so that this shows.
    """
    x = jnp.arange(32.0)[:, None] ** 2
    mask = jnp.arange(32)[:, None] < 29
    truth = float(np.mean(np.arange(29.0) ** 2))
    return {"truth": truth} | {name: _over_shards(norm, x, mask) for name, norm in NORMS.items()}


def _empty_shard():
    x = jnp.arange(32.0)[:, None]
    mask = jnp.arange(32)[:, None] < 28
    return {"truth": 13.5} | {name: _over_shards(norm, x, mask) for name, norm in NORMS.items()}


def _unequal_groups():
    """The mean of the second group of devices, which is larger than the first."""
    x = jnp.arange(16.0).reshape(DEVICES, 2, 1)
    groups = [[0, 7], [1, 2, 3, 4, 5, 6]]

    def mean(norm):
        means = jax.pmap(
            lambda x: _update(norm, x, axis_name="devices", axis_index_groups=groups)["mean"],
            axis_name="devices",
        )(x)
        return float(means[1, 0])

    return {"truth": 7.5} | {name: mean(norm) for name, norm in NORMS.items()}


def _large_means():
    result = {}
    for mean in (1e3, 1e4):
        x = (np.random.default_rng(0).normal(size=(512, 1)) + mean).astype(np.float32)
        found = {name: float(_update(norm, x)["var"][0]) for name, norm in NORMS.items()}
        result[f"variance at mean {mean:g}"] = {"truth": float(x.var(dtype=np.float64))} | found
    return result


def _stored_variances():
    """What PyTorch stores for n values is their unbiased variance."""
    result = {}
    for n in (2, 8, 32):
        x = np.sin(np.arange(n, dtype=np.float32))[:, None]
        flax = float(_update(nn.BatchNorm, x)["var"][0])
        ours = float(_update(BatchNorm, x, variance="unbiased")["var"][0])
        result[f"stored variance, n = {n}"] = {
            "truth": float(x.var(dtype=np.float64, ddof=1)),
            "flax": flax,
            "ours": ours,
        }
    return result


def main():
    """Prints the table."""
    print("| | Flax linen | bnjax | shown by |\n|---|---|---|---|")
    rows = FEATURES.strip().splitlines()
    for feature, test in zip(rows[::2], rows[1::2], strict=True):
        print(f"| {feature} | `norms/{test.strip()}` |")
    titles = {
        "masked shards": "mean over 8 masked shards of unequal size",
        "empty shard": "mean with one shard all padding",
    }
    titles["unequal groups"] = "mean of six devices, the other two being another group"
    for name, row in measurements().items():
        title = titles.get(name, name) + (" (as PyTorch)" if name.startswith("stored") else "")
        numbers = " | ".join(f"{row[key]:.6g}" for key in ("flax", "ours"))
        test = f"norms/test_against_flax.py::test_measured[{name}]"
        print(f"| {title}: right is {row['truth']:.6g} | {numbers} | `{test}` |")


if __name__ == "__main__":
    main()
