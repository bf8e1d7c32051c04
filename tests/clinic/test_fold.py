"""Folded networks: the same logits, what was folded into what, and why the rest was not."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from foreign import NETWORKS, drawn, shapes
from jax import lax

from bnjax import norms
from bnjax.clinic.folding import difference, fold_pair, plan
from bnjax.clinic.linen import linen
from bnjax.models.convnet import ConvNet
from bnjax.train_step import forward

IMAGES = np.random.default_rng(0).random((6, 8, 8, 3), np.float32)
BATCH = {"image": IMAGES}


def trained(model, positive=False):
    return linen(model, *drawn(model, IMAGES, positive))


def logits(network):
    run = jax.jit(functools.partial(forward, model=network.model, train=False))
    return run(network.params, network.batch_stats, BATCH)[0]


def folding_of(model, positive=False, change=lambda stats: stats):
    """What became of each norm of a model, by name; the logits are those that it had."""
    network = trained(model, positive)
    network = network.replace(batch_stats=change(network.batch_stats))
    done, found = plan(network, IMAGES)
    if done.model is not model:
        assert difference(logits(network), logits(done)) < 1e-5
    # The leaves are those that the folded model itself would make.
    like = functools.partial(jax.tree.map, lambda leaf: (leaf.shape, str(leaf.dtype)))
    assert like(shapes(done.model, IMAGES)) == like((done.params, done.batch_stats))
    left = done.norms(BATCH)
    assert {layer.path for layer in left}.isdisjoint(one.norm for one in found if one.layer)
    return done, {
        ".".join(one.norm): one.reason if one.layer is None else (one.place, ".".join(one.layer))
        for one in found
    }


@pytest.mark.parametrize(
    ("placement", "pooling", "place", "layers"),
    [
        ("pre", "none", "before", "conv0 conv1 dense0 dense1 logits"),
        ("before", "max", "after", "conv0 conv1 dense0 dense1"),
        ("after", "max", "before", "conv1 dense0 dense1 logits"),
    ],
)
def test_the_convnet_wherever_its_norms_stand(placement, pooling, place, layers):
    layout = (4, 6), (3, 2), (2, 1), (7, 5)  # filters, kernels, strides, units
    options = {"placement": placement, "pooling": pooling, "norm_dense": (True, True)}
    model = ConvNet(*layout, norm=functools.partial(norms.BatchNorm, epsilon=1e-3), **options)
    done, found = folding_of(model, positive=True)
    names = ("conv0", "conv1", "dense0", "dense1", "logits")
    wanted = {f"{n}_norm": (place, of) for n, of in zip(names, layers.split(), strict=False)}
    assert found == wanted
    assert not done.batch_stats
    # The network without norms takes the parameters.
    plain = linen(model.clone(norm=None), done.params, {})
    np.testing.assert_array_equal(logits(plain), logits(done))


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_other_people(name):
    done, found = folding_of(NETWORKS[name])
    stay = {key: reason for key, reason in found.items() if isinstance(reason, str)}
    if name != "preact":
        assert found
        assert not stay
        assert not done.batch_stats
        return
    assert found["BatchNorm_1"] == ("after", "Conv_1")
    assert found["BatchNorm_3"] == ("after", "Conv_3")
    assert "Conv_0, which several operations read (BatchNorm_0, add)" in stay["BatchNorm_0"]
    assert all("single layer: it is read by relu" in reason for reason in stay.values())
    assert set(done.batch_stats) == set(stay) == {"BatchNorm_0", "BatchNorm_2", "last"}


class Net(nn.Module):
    """One norm and one layer, and what is between them.

    `order` lists "norm", "layer" and functions.
    """

    order: tuple
    norm: nn.Module = nn.BatchNorm(use_running_average=True)
    layer: nn.Module = nn.Conv(4, (1, 1))

    @nn.compact
    def __call__(self, x, train):
        for step in self.order:
            x = {"norm": self.norm, "layer": self.layer}.get(step, step)(x)
        return x.reshape(len(x), -1)


def channel_max(x):
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 1, 1, 2), (1, 1, 1, 1), "VALID")


def flat(x):
    return x.reshape(len(x), -1)


MAX = functools.partial(nn.max_pool, window_shape=(2, 2), strides=(2, 2))
AVG = functools.partial(nn.avg_pool, window_shape=(2, 2), strides=(2, 2))
PADDED_AVG = functools.partial(nn.avg_pool, window_shape=(3, 3), padding="SAME")
DENSE = nn.Dense(5)
TRANSPOSED = nn.Conv(4, (1, 1), padding=0, input_dilation=2)
PADDED = nn.Conv(4, (3, 3), padding=((1, 0), 0))
GROUPED = nn.Conv(6, (2, 2), padding="VALID", feature_group_count=3)
DILATED = nn.Conv(4, (3, 3), padding="VALID", kernel_dilation=2)
AFTER, BEFORE = ("after", "layer"), ("before", "layer")


@pytest.mark.parametrize(
    ("net", "wanted"),
    [
        (Net(("layer", "norm"), layer=nn.Conv(6, (3, 3), feature_group_count=3)), AFTER),
        (Net(("norm", "layer"), layer=GROUPED), BEFORE),
        (Net(("norm", "layer"), layer=nn.Conv(4, (3, 3), padding="CIRCULAR")), BEFORE),
        (Net(("norm", "layer"), layer=DILATED), BEFORE),
        # A maximum lets gains above 0 through.
        (Net(("norm", MAX, "layer"), nn.BatchNorm(True, use_scale=False)), BEFORE),
        (Net(("layer", MAX, "norm"), nn.BatchNorm(True, use_scale=False)), AFTER),
        (Net(("norm", AVG, "layer")), BEFORE),
        (Net(("norm", lambda x: 3 * x.sum(1), "layer"), layer=DENSE), BEFORE),
        (Net(("layer", lambda x: x.mean((1, 2)), "norm"), layer=nn.Conv(4, (3, 3))), AFTER),
        (Net(("norm", AVG, flat, "layer"), layer=nn.Dense(5, use_bias=False)), BEFORE),
        (Net(("norm", lambda x: x.transpose(0, 2, 1, 3), flat, "layer"), layer=DENSE), BEFORE),
        (Net(("layer", "norm"), nn.BatchNorm(True, axis=3)), AFTER),
        (Net(("layer", "norm"), norms.GhostBatchNorm(True, virtual_batch=2)), AFTER),
        (Net(("layer", "norm"), norms.BatchRenorm(True)), AFTER),
        (Net(("layer", "norm"), nn.remat(nn.BatchNorm)(True), nn.remat(nn.Conv)(4, (1, 1))), AFTER),
        (Net(("layer", "norm"), norms.BatchNorm(True, use_scale=False, debias=True)), AFTER),
        (Net(("layer", "norm"), norms.BatchNorm(True, statistics="running")), AFTER),
        (Net(("layer", "norm"), layer=norms.StandardizedConv(4, (3, 3))), AFTER),
        (Net(("norm", "layer"), layer=norms.StandardizedConv(4, (3, 3), padding="VALID")), BEFORE),
    ],
)  # fmt: skip
def test_what_is_exact_is_folded(net, wanted):
    done, found = folding_of(net)
    assert found == {"norm": wanted}
    assert not done.batch_stats


class SpecialConv(nn.Conv):
    def param(self, name, *args, **kwargs):
        value = super().param(name, *args, **kwargs)
        return jnp.abs(value) if name == "kernel" else value


class Doubled(nn.Module):
    """A convolution with twice the stored kernel."""

    @nn.compact
    def __call__(self, x):
        double = functools.partial(jax.tree.map, lambda leaf: 2 * leaf)
        conv = nn.map_variables(nn.Conv, "params", double, init=self.is_initializing())
        return conv(4, (1, 1))(x)


class SpecialNorm(nn.BatchNorm):
    def __call__(self, x):
        return nn.relu(super().__call__(x))


MASK = np.ones((1, 1, 3, 4), np.float32)


@pytest.mark.parametrize(
    ("net", "said"),
    [
        (Net(("layer", nn.relu, "norm")), "its input is the output of relu; its output"),
        (Net(("norm", nn.sigmoid, "layer")), "its input is the input of the network"),
        (Net(("norm", lambda x: 1 / x, "layer")), "single layer: it is read by div"),
        (Net(("norm", lambda x: x - 1, "layer")), "single layer: it is read by sub"),
        (Net(("norm", lambda x: -2 * x, "layer")), "single layer: it is read by mul"),
        (Net(("norm", lambda x: x * x, "layer")), "read by mul"),
        (Net(("layer", lambda x: x + nn.relu(x), "norm")), "is the output of add"),
        (Net(("norm", lambda x: x[..., ::-1], "layer")), "read by rev"),
        (Net(("norm", lambda x: x.transpose(0, 3, 1, 2), flat, "layer"), layer=DENSE), "transpose"),
        (Net(("norm", lambda x: x.mean(3), "layer")), "read by reduce_sum"),
        (Net(("norm", lambda x: x.reshape(6, 8, 3, 8), "layer")), "read by reshape"),
        (Net(("norm", channel_max, "layer")), "read by reduce_window_max"),
        (Net(("norm", PADDED_AVG, "layer")), "read by reduce_window_sum"),
        (Net(("layer", flat, "norm")), "the norm has 256 channels, but the layer has 4 outputs"),
        (Net(("norm", "layer"), layer=nn.Conv(4, (3, 3))), "adds zeros to its input"),
        (Net(("norm", "layer"), layer=PADDED), "adds zeros to its input"),
        (Net(("norm", "layer"), nn.BatchNorm(True, use_bias=False), PADDED), "adds zeros to its"),
        (Net(("norm", "layer"), layer=TRANSPOSED), "adds zeros to its input"),
        (Net(("norm", "layer"), layer=nn.Conv(4, (1, 1), mask=MASK)), "neighbour layer is a Conv"),
        (Net(("norm", MAX, "layer")), "there is a maximum between"),
        (Net(("layer", lambda x: x.max((1, 2)), "norm")), "there is a maximum between"),
        (Net(("layer", "norm"), layer=SpecialConv(4, (1, 1))), "neighbour layer is a SpecialConv"),
        (Net(("layer", "norm"), layer=Doubled()), "transforms its stored parameters"),
        (Net(("layer", "norm"), layer=nn.WeightNorm(nn.Conv(4, (1, 1)))), "transforms its stored"),
        (Net(("layer", "norm"), SpecialNorm(True)), "it is a SpecialNorm"),
        (Net(("layer", "norm"), nn.BatchNorm(True, axis=1)), "all axes except the last"),
        (Net(("layer", "norm"), norms.BatchNorm(True, statistics="batch")), "by batch statistics"),
    ],
)  # fmt: skip
def test_what_is_not_exact_stays_with_the_reason(net, said):
    found = plan(trained(net), IMAGES)
    assert said in found.norms[0].reason
    assert found.network.model is net


def test_zero_padding_lets_a_norm_without_shift_through():
    net = Net(("norm", "layer"), nn.BatchNorm(True, use_bias=False), nn.Conv(4, (3, 3)))
    zero = functools.partial(
        jax.tree_util.tree_map_with_path,
        lambda path, leaf: jnp.zeros_like(leaf) if path[-1].key == "mean" else leaf,
    )
    assert folding_of(net, change=zero)[1] == {"norm": BEFORE}


def test_statistics_that_are_wrong_are_left_alone():
    for var in (-1.0, np.nan):
        stats = {"norm": {"mean": np.zeros(4), "var": np.full(4, var)}}
        network = trained(Net(("layer", "norm"))).replace(batch_stats=stats)
        assert "not finite, or a variance is negative" in plan(network, IMAGES).norms[0].reason


class Several(nn.Module):
    """Calls modules in this order; `a+b` adds the outputs of both for the same input."""

    order: str

    @nn.compact
    def __call__(self, x, train):
        called = {"relu": nn.relu}
        called |= {name: nn.BatchNorm(True, name=name) for name in ("first", "second")}
        called |= {name: nn.Conv(3, (1, 1), name=name) for name in ("layer", "other")}
        for step in self.order.split():
            x = functools.reduce(jnp.add, [called[name](x) for name in step.split("+")])
        return x.reshape(len(x), -1)


@pytest.mark.parametrize(
    ("order", "folded"),
    [
        ("layer first second", {"first": AFTER}),
        ("first layer second", {"first": BEFORE, "second": AFTER}),
        ("layer first layer second", {}),
        ("layer first other first", {}),
        ("layer first other first layer other", {}),
        ("layer first relu layer", {}),
        ("layer first+second", {}),
    ],
)
def test_modules_that_meet_several_times(order, folded):
    done, found = folding_of(Several(order))
    assert {name: what for name, what in found.items() if not isinstance(what, str)} == folded
    if order == "layer first second":  # folding again folds what stood behind a folded norm
        twice = plan(done, IMAGES)
        assert [(one.norm, one.layer) for one in twice.norms] == [(("second",), ("layer",))]
        assert not twice.network.batch_stats
        assert difference(logits(done), logits(twice.network)) < 1e-5


def test_a_pair_is_folded_in_float64_and_returned_as_float32():
    """Sums of large numbers of both signs, whose digits float32 would lose."""
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(2000, 4)).astype(np.float32)
    scale, shift, mean = rng.normal(0, 2, (3, 2000)).astype(np.float32)
    mean, var = mean + 1000, rng.uniform(0, 2, 2000).astype(np.float32)
    folded = fold_pair(kernel, None, scale, shift, mean, var, 1e-3, norm="before")
    assert [leaf.dtype for leaf in folded] == [np.float32, np.float32]
    scale, shift, mean, var = map(np.float64, (scale, shift, mean, var))
    gain = scale / np.sqrt(var + 1e-3)
    np.testing.assert_allclose(folded[0], gain[:, None] * kernel, rtol=1e-6)
    np.testing.assert_allclose(folded[1], (shift - mean * gain) @ np.float64(kernel), rtol=1e-7)


def test_a_pair_with_another_number_of_channels_is_refused():
    one = np.ones(3)
    for place, said in (("after", "has 2 outputs"), ("before", "has 4 inputs")):
        with pytest.raises(ValueError, match=f"the norm has 3 channels, but the layer {said}"):
            fold_pair(np.ones((4, 2)), None, one, one, one, one, 1e-3, norm=place)
