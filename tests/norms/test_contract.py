"""What every norm has to do, whatever its name."""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from equations import start, train
from wrappers import WRAPPERS, run

from bnjax import norms

pytestmark = pytest.mark.lane

SHAPE = (16, 3, 3, 10)
EVERY_NORM = pytest.mark.parametrize("name", norms.NORMS)
UNEVEN = np.arange(16) < 11  # the last shards hold padding only


@functools.cache
def make(name, axis_name=None):
    averages = {"momentum": 0.8, "debias": True, "axis_name": axis_name}
    own = {"virtual_batch": 4, "groups": 5, "renorm_steps": 8}
    return norms.build(name, epsilon=1e-3, **averages, **own)(name="norm")


def images(seed=0):
    return jax.random.normal(jax.random.key(seed), SHAPE) * 2 + 1


@functools.cache
def trained(name):
    """Returns a norm and variables that are not the initial ones."""
    norm = make(name)
    variables = start(norm, images())
    variables["params"] = jax.tree.map(
        lambda leaf: leaf + 0.5 * jnp.arange(leaf.size).reshape(leaf.shape) / leaf.size,
        variables["params"],
    )
    for seed in range(3):
        _, variables = train(norm, variables, images(seed))
    return norm, variables


def close(actual, expected, rtol=1e-5, atol=1e-5):
    jax.tree.map(partial(np.testing.assert_allclose, rtol=rtol, atol=atol), actual, expected)


@EVERY_NORM
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_shapes_and_dtypes(name, dtype):
    norm, variables = trained(name)
    x = images().astype(dtype)
    y, updated = jax.eval_shape(partial(train, norm), variables, x)
    evaluated = jax.eval_shape(partial(norm.apply, use_running_average=True), variables, x)
    assert y.shape == evaluated.shape == SHAPE
    assert y.dtype == evaluated.dtype == jnp.float32
    assert jax.tree.map(jnp.shape, updated) == jax.tree.map(jnp.shape, variables)
    assert all(leaf.dtype in (jnp.float32, jnp.int32) for leaf in jax.tree.leaves(updated))


@EVERY_NORM
def test_gradients_are_finite_even_of_constant_images_and_padding(name):
    norm, variables = trained(name)
    x = images().at[..., :3].set(3.0).at[..., 3].set(0.0)

    @jax.jit
    @partial(jax.grad, argnums=(0, 1))
    def gradient(params, x, mask):
        return jnp.sum(jnp.sin(train(norm, variables | {"params": params}, x, mask)[0]))

    for real in (16, 11, 1, 0):
        found = gradient(variables["params"], x, np.arange(16) < real)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))


@EVERY_NORM
def test_masking_equals_dropping_the_rows(name):
    """Padding of NaN reaches neither statistics nor gradients."""
    norm, variables = trained(name)
    real = np.array([1, 0, 1, 1, 0, 1, 1, 1, 0, 1, 1, 0, 1, 1, 1, 0], bool)
    x = images(7).at[~real].set(np.nan if name in norms.BATCH_NORMS else 1e3)

    def results(x, mask):
        kept = slice(None) if mask is None else mask

        @jax.jit
        @partial(jax.grad, argnums=(0, 1), has_aux=True)
        def gradient(params, x):
            y, updated = train(norm, variables | {"params": params}, x, mask)
            return jnp.sum(jnp.sin(y[kept])), (y[kept], updated["batch_stats"])

        (dparams, dx), found = gradient(variables["params"], x)
        return dparams, dx[kept], found

    close(results(x, real), results(x[real], None))


@EVERY_NORM
def test_fewer_than_two_real_values_leave_the_statistics_alone(name):
    norm, variables = trained(name)
    for real in (0, 1):
        mask = np.arange(16 * 9).reshape(16, 3, 3, 1) < real
        y, updated = train(norm, variables, images(), mask)
        assert np.isfinite(y).all()
        close(updated, variables, rtol=0, atol=0)


@EVERY_NORM
def test_positions_can_be_masked(name):
    norm, variables = trained(name)
    mask = np.ones((16, 3, 3, 1), bool)
    mask[:, 2] = False
    y, updated = train(norm, variables, images(), mask)
    close((y[:, :2], updated), train(norm, variables, images()[:, :2]))


@EVERY_NORM
def test_evaluation_does_not_depend_on_the_other_images(name):
    norm, variables = trained(name)
    x, other = images(8), images(9)
    evaluate = jax.jit(lambda x: norm.apply(variables, x, use_running_average=True))
    mixed = evaluate(other.at[3].set(x[12]).at[7].set(x[1]))
    np.testing.assert_allclose(mixed[jnp.array([3, 7])], evaluate(x)[jnp.array([12, 1])], atol=1e-6)
    np.testing.assert_allclose(evaluate(x[:1]), evaluate(x)[:1], rtol=1e-6, atol=1e-6)


# Those without statistics of the batch have nothing to sum over devices; one wrapper shows that
# they run.
ACROSS_DEVICES = [
    (name, wrapper)
    for name in norms.NORMS
    for wrapper in (WRAPPERS if name in norms.BATCH_NORMS else ("shard_map",))
]


@functools.cache
def across(name, wrapper):
    def layer(axis_name):
        def apply(variables, batch):
            y, updated = train(make(name, axis_name), variables, *batch)
            return updated["batch_stats"], y

        return apply

    return run(wrapper, layer, trained(name)[1], (images(9), UNEVEN))


@pytest.mark.parametrize(("name", "wrapper"), ACROSS_DEVICES)
def test_eight_devices_have_the_statistics_of_one(name, wrapper):
    stats, y = across(name, wrapper)
    stats_of_one, y_of_one = across(name, "one device")
    close(stats, stats_of_one)
    if name != "ghost":  # its virtual batches stay on their device
        close(y[UNEVEN], y_of_one[UNEVEN])


@pytest.mark.parametrize(
    ("option", "value", "names"),
    [
        ("momentum", 0.5, norms.BATCH_NORMS),
        ("virtual_batch", 7, ("ghost",)),
        ("renorm_steps", 9, ("renorm",)),
        ("groups", 3, ("group",)),
        ("use_bias", False, norms.NORMS),
    ],
)
def test_an_option_reaches_the_norms_that_have_it(option, value, names):
    for name, kind in norms.NORMS.items():  # all other options keep their defaults
        own = {option: value} if name in names else {}
        assert norms.build(name, **{option: value})() == kind(**own)


def test_unknown_names_and_options_are_refused():
    with pytest.raises(ValueError, match="no norm named 'bach'; the norms are batch, ghost"):
        norms.build("bach")
    with pytest.raises(TypeError, match=r"no norm has the options \['momentun'\]; .*momentum"):
        norms.build("layer", momentun=0.9)
