"""Networks of NNX: twins of linen networks, transformed modules, and three of today's kind."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict
from foreign import NETWORKS, drawn
from nnx_networks import (
    DenseNetLike,
    EfficientNetLike,
    LayerNnx,
    ResNet50Like,
    stacked,
    twin,
)
from patients import HEALTHY, ILL, shared_jit
from test_precise import UNEVEN, Net, as_batches, assert_are, padded, truth, variables_of

from bnjax import clinic
from bnjax.clinic.folding import difference, plan
from bnjax.clinic.statistics import drift

# NNX has no norms of bnjax: these are trained with ghost batches, renormalisation, debiasing.
OURS = {"convnet, ghost", "convnet, renorm", "convnet, debias, unbiased"}
# Of one training, so that they take no time.
QUICK = {
    "plain",
    "a leaf of another shape",
    "replicas in a list",
    "never updated",
    "evaluated by the batch",
    "NaN",
    "scales of 0",
    "AdamW on all",
}
PATIENTS = [
    name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
    for name in (*HEALTHY, *ILL)
    if name not in OURS
]


def as_nnx(name):
    """Returns a patient as a network of NNX, with what is known about its training, in NNX."""
    wanted, make = ILL.get(name) or ((), HEALTHY[name])
    patient = make(0)
    moved = functools.partial(twin, patient.model)
    network, run = moved(patient.params, patient.batch_stats), patient.run
    if run is None or wanted in ("missing-statistics", "unmatched-leaves", "replicas-differ"):
        return network, patient, run
    in_training = name == "evaluated by the batch"
    predict = shared_jit(functools.partial(type(network).run, train=in_training))
    before = run.before and moved(run.before.params, run.before.batch_stats)
    run = dataclasses.replace(
        run,
        predict=lambda images: predict(network, {"image": images})[0],
        before=before,
        step=run.step and step(2 if name == "two passes in a step" else 1),
    )
    return network, patient, run


def step(passes):
    """A step as in `patients.step`."""

    @jax.jit
    def run(network, batch):
        model = network.model
        model.train()
        for i in range(passes):
            model(batch["image"][:: 1 - 2 * i] / np.float32(255 * (1 + i)))
        return clinic.nnx(model)

    return run


# The averages in bfloat16 are updated by NNX with float32.
@pytest.mark.filterwarnings("ignore:scatter inputs have incompatible types")
@pytest.mark.parametrize("name", PATIENTS)
def test_a_patient_has_the_findings_of_its_linen_twin(name):
    network, patient, run = as_nnx(name)
    findings = clinic.audit(network, patient.batches, run, jit=shared_jit)
    wanted = (ILL[name][0],) if name in ILL else ()
    assert findings.ids == wanted, f"{name}\nlinen: {wanted}\nNNX:   {findings.ids}\n{findings}"
    if name in HEALTHY:
        assert findings.not_checked == ()


class NetNnx(nnx.Module):
    """The twin of `test_precise.Net`."""

    def __init__(self, rngs):
        norm = functools.partial(nnx.BatchNorm, epsilon=1e-3, rngs=rngs)
        self.conv = nnx.Conv(2, 4, (3, 3), padding="VALID", rngs=rngs)
        self.first, self.second, self.third = norm(4), norm(7), norm(5)
        self.dense = nnx.Linear(36, 7, rngs=rngs)
        self.logits = nnx.Linear(7, 5, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.first(self.conv(x)))
        x = nnx.relu(self.dense(x.reshape(len(x), -1)))
        return self.third(self.logits(self.second(x)))


@pytest.mark.parametrize(("form", "by"), [(padded, "batch"), (as_batches, "population")])
def test_precise_against_numpy(form, by):
    params, stats = variables_of(Net())
    network = clinic.nnx(NetNnx(nnx.Rngs(0))).replace(params=params, batch_stats=stats)
    mended = clinic.precise(network, form(UNEVEN), by=by, jit=shared_jit)
    assert_are(mended.batch_stats, truth(params, UNEVEN, by))


SMALL = np.random.default_rng(1).random((6, 8, 8, 3)).astype(np.float32)
SLOW = {*NETWORKS} - {"scan"}


def close(found, wanted, tolerance=1e-6):
    """Means in standard deviations and variances relative, as they enter a norm's output."""
    found, wanted = flatten_dict(found), flatten_dict(wanted)
    assert found.keys() == wanted.keys()
    for *path, name in found:
        if name == "mean":
            scale = np.asarray(wanted[*path, "var"], np.float64) + 1e-3
            mean, var = (found[*path, of] - wanted[*path, of] for of in ("mean", "var"))
            assert np.max(np.abs(mean) / np.sqrt(scale)) < tolerance, path
            assert np.max(np.abs(var) / scale) < tolerance, path


@pytest.mark.parametrize(
    "name", [pytest.param(of, marks=pytest.mark.slow) if of in SLOW else of for of in NETWORKS]
)
def test_precise_statistics_are_those_of_the_linen_twin(name):
    model = NETWORKS[name]
    variables = drawn(model, SMALL[:1])
    batches = padded(np.split(SMALL, [4]), 4)
    networks = clinic.linen(model, *variables), twin(model, *variables)
    ours, its = (clinic.precise(network, batches).batch_stats for network in networks)
    close(ours, its)
    norms, other = ([norm.name for norm in of.norms(batches[0])] for of in networks)
    assert norms == other


class Doubled(nnx.BatchNorm):
    """A norm with another signature that calls its superclass."""

    def __call__(self, inputs, *, train):
        return 2 * super().__call__(inputs + 1, use_running_average=not train)


class Renamed(nnx.BatchNorm):
    """One with the same signature, which changes what it gives its superclass."""

    def __call__(self, x, use_running_average=None, *, mask=None):
        return super().__call__(x + 1, use_running_average, mask=mask)


class Rewritten(nnx.BatchNorm):
    """One that computes everything itself."""

    def __call__(self, x, use_running_average=None, *, mask=None):
        if not (self.use_running_average if use_running_average is None else use_running_average):
            mean, var = x.mean(0), x.var(0)
            self.mean[...] = self.momentum * self.mean[...] + (1 - self.momentum) * mean
            self.var[...] = self.momentum * self.var[...] + (1 - self.momentum) * var
        else:
            mean, var = self.mean[...], self.var[...]
        return (x - mean[None]) / jnp.sqrt(var[None] + self.epsilon) * self.scale[None]


class Wrapped(nnx.Module):
    """A dense layer and a norm, called by a function of (model, x)."""

    def __init__(self, kind, through, rngs):
        self.dense = nnx.Linear(48, 5, rngs=rngs)
        self.norm = kind(5, rngs=rngs)
        self.through = through

    def __call__(self, x):
        return self.through(self, x.reshape(len(x), -1))


def normal(model, x):
    return model.norm(model.dense(x))


# Each: the class of the norm, how it is called, and what the norm adds to its input.
CALLS = {
    "plain": (nnx.BatchNorm, normal, 0),
    "axis_name": (functools.partial(nnx.BatchNorm, axis_name="devices"), normal, 0),
    "in evaluation": (functools.partial(nnx.BatchNorm, use_running_average=True), normal, 0),
    "remat": (nnx.BatchNorm, nnx.remat(normal), 0),
    "jit": (nnx.BatchNorm, nnx.jit(normal), 0),
    "cond": (
        nnx.BatchNorm,
        lambda model, x: nnx.cond(x[0, 0] < 1e9, normal, lambda model, x: -x[:, :5], model, x),
        0,
    ),
    "own signature": (Doubled, lambda model, x: model.norm(model.dense(x), train=False), 1),
    "calls its superclass": (Renamed, normal, 1),
    "rewritten": (Rewritten, normal, 0),
    "on another axis": (
        functools.partial(nnx.BatchNorm, axis=0),
        lambda model, x: model.norm(model.dense(x).T).T,
        0,
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_norm_is_seen_however_it_is_called(name):
    kind, through, added = CALLS[name]
    model = Wrapped(kind, through, nnx.Rngs(0))
    network = clinic.nnx(model)
    batches = [{"image": image} for image in (SMALL[:2, :4, :4], SMALL[2:, :4, :4])]
    (layer,) = network.norms(batches[0])
    assert (layer.name, layer.by_batch) == ("norm", False)
    (in_training,) = network.norms(batches[0], train=True)
    assert in_training.by_batch is (kind is not Doubled)  # which is told to be in evaluation
    assert layer.axes == ((1,) if name == "on another axis" else (0,))
    x = np.float64(SMALL[:, :4, :4].reshape(6, -1)) @ np.float64(model.dense.kernel[...]) + added
    found = clinic.precise(network, batches).batch_stats["norm"]
    close({"norm": found}, {"norm": {"mean": x.mean(0), "var": x.var(0)}})
    logits, _ = clinic.precise(network, batches).run({"image": SMALL[:, :4, :4]}, train=False)
    wanted = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)
    np.testing.assert_allclose(logits, wanted * (2 if kind is Doubled else 1), atol=1e-4)


class Everything(nnx.Module):
    """A network with what NNX keeps in a model: counts of random keys, flags, lists, a cache."""

    def __init__(self, rngs):
        self.layers = stacked(2, 48, _Width(48), rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.norm = nnx.BatchNorm(48, use_running_average=True, axis_name="devices", rngs=rngs)
        self.head = nnx.Linear(48, 4, rngs=rngs)
        self.calls = nnx.Variable(jnp.zeros((), jnp.int32))

    def __call__(self, x):
        self.calls[...] += 1
        scanned = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        x = self.dropout(scanned(x.reshape(len(x), -1), self.layers))
        return self.head(self.norm(x))


@dataclasses.dataclass(frozen=True)
class _Width:
    width: int


def bits(model):
    """Returns the structure of a model, and each variable in bytes."""
    graphdef, state = nnx.split(model)
    found = {}
    for path, leaf in flatten_dict(nnx.to_pure_dict(state)).items():
        is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        raw = np.asarray(jax.random.key_data(leaf) if is_key else leaf)
        found[path] = str(leaf.dtype), raw.tobytes()
    return graphdef, found


def test_the_users_model_stays_as_it_is_to_the_bit():
    model = Everything(nnx.Rngs(0))
    before, identity = bits(model), [type(one) for _, one in nnx.iter_graph(model)]
    image = SMALL[:, :4, :4]
    batches = [{"image": image, "label": np.arange(6) % 4}] * 2
    network = clinic.nnx(model)
    clinic.audit(network, batches, jit=shared_jit)
    mended = clinic.precise(network, batches, jit=shared_jit)
    shared_jit(functools.partial(clinic.gap))(network, batches[0])
    clinic.tent(network, batches, tx=optax.sgd(0.1), jit=shared_jit)
    clinic.fold(network, image)
    network.run(batches[0], train=True, dropout=jax.random.key(0))
    assert bits(model) == before
    assert [type(one) for _, one in nnx.iter_graph(model)] == identity
    # The new model differs in its statistics alone.
    graphdef, after = bits(mended.model)
    assert graphdef == before[0]
    changed = [path[-1] for path in after if after[path] != before[1][path]]
    assert sorted(changed) == ["mean", "mean", "var", "var"]
    assert (mended.model.calls[...], mended.model.norm.axis_name) == (0, "devices")


def test_the_key_of_dropout_decides_and_evaluation_has_none():
    network = clinic.nnx(Everything(nnx.Rngs(0)))
    batch = {"image": SMALL[:, :4, :4]}
    run = jax.jit(functools.partial(type(network).run, train=True))
    first, again, other = (run(network, batch, dropout=jax.random.key(i))[0] for i in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    one, two = (
        network.run(batch, train=False, dropout=key)[0] for key in (None, jax.random.key(1))
    )
    np.testing.assert_array_equal(one, two)


class Phased(nnx.Module):
    """A network that is not called, and takes a mask."""

    def __init__(self, rngs):
        self.norm, self.head = nnx.BatchNorm(3, rngs=rngs), nnx.Linear(3, 4, rngs=rngs)

    def __call__(self, x, mask=None):
        whole = None if mask is None else mask[:, None, None, None]
        return self.head(self.norm(x, mask=whole).mean((1, 2)))

    def predict(self, x, phase):
        return self.head(self.norm(x, use_running_average=phase == "test").mean((1, 2)))


def test_a_model_with_a_call_of_its_own_and_one_that_takes_masks():
    model, batches = Phased(nnx.Rngs(0)), padded(np.split(SMALL, [4]), 4)

    def call(model, x, train):
        return model.predict(x, "train" if train else "test")

    called, masked = clinic.nnx(model, call), clinic.nnx(model)
    wanted = {"mean": SMALL.mean((0, 1, 2), np.float64), "var": SMALL.var((0, 1, 2), np.float64)}
    for network in (called, masked):
        close(clinic.precise(network, batches).batch_stats, {"norm": wanted})
    for train in (False, True):
        assert [norm.by_batch for norm in called.norms(batches[0], train=train)] == [train]
    assert clinic.audit(clinic.precise(masked, batches), batches).ids == ()
    with pytest.raises(ValueError, match="takes no `mask`"):
        clinic.audit(called, batches)


class SharedAverages(nnx.Module):
    """Scanned layers with weights of their own and one pair of averages."""

    axes = nnx.StateAxes({nnx.BatchStat: None, ...: 0})
    carried = nnx.StateAxes({nnx.BatchStat: nnx.Carry, ...: 0})

    def __init__(self, rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(axis_size=3, out_axes=self.axes)
        def make(rngs):
            return LayerNnx(48, _Width(48), rngs)

        self.layers = make(rngs)

    def __call__(self, x):
        scanned = nnx.scan(
            lambda x, layer: layer(x), in_axes=(nnx.Carry, self.carried), out_axes=nnx.Carry
        )
        return scanned(x.reshape(len(x), -1), self.layers)


def test_averages_that_scanned_layers_share_are_one_entry():
    network, image = clinic.nnx(SharedAverages(nnx.Rngs(0))), SMALL[:, :4, :4]
    x, given = np.float64(image.reshape(6, -1)), []
    for kernel in np.float64(network.params["layers"]["Dense_0"]["kernel"]):
        given.append(x @ kernel)
        x = np.maximum((given[-1] - given[-1].mean(0)) / np.sqrt(given[-1].var(0) + 1e-5), 0)
    given = np.concatenate(given)
    found = clinic.precise(network, [{"image": image}])
    close(
        found.batch_stats["layers"],
        {"BatchNorm_0": {"mean": given.mean(0), "var": given.var(0)}},
        1e-5,
    )
    findings = clinic.audit(network, [{"image": image}] * 2)
    assert findings.ids == ("never-updated", "updated-twice")
    assert [row.name for row in findings.layers] == ["layers.BatchNorm_0"]


class OfLinen(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        return nn.BatchNorm(not train)(x).mean((1, 2))


def dropping(model, x):
    """Runs a copy, whose updates are lost."""
    return normal(nnx.clone(model), x)


def test_what_cannot_be_done_is_said():
    with pytest.raises(ValueError, match=r"needs a flax\.nnx\.Module, not OfLinen"):
        clinic.nnx(OfLinen())
    tied = nnx.Sequential(nnx.BatchNorm(3, rngs=nnx.Rngs(0)), nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
    tied.layers[1].scale = tied.layers[0].scale
    with pytest.raises(ValueError, match=r"layers\.1 shares scale with another module"):
        clinic.nnx(tied)
    bridged = nnx.bridge.ToNNX(OfLinen(), rngs=nnx.Rngs(0)).lazy_init(SMALL)
    with pytest.raises(ValueError, match=r"BatchNorm_0 are not NNX modules.*clinic\.linen"):
        clinic.nnx(bridged)
    network, batches = clinic.nnx(Wrapped(nnx.BatchNorm, dropping, nnx.Rngs(0))), [SMALL[:, :4, :4]]
    with pytest.raises(ValueError, match=r"norm has no unmasked inputs.*keeps the updates"):
        clinic.precise(network, as_batches(batches))


class Tied(nnx.Module):
    """Layers that share a kernel; the second is followed by a norm."""

    def __init__(self, rngs):
        self.first, self.second = (nnx.Linear(48, 48, rngs=rngs) for _ in range(2))
        self.second.kernel = self.first.kernel
        self.norm = nnx.BatchNorm(48, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.second(nnx.relu(self.first(x.reshape(len(x), -1)))))


def test_a_norm_behind_a_layer_that_shares_its_kernel_stays():
    network, batch = clinic.nnx(Tied(nnx.Rngs(0))), {"image": SMALL[:, :4, :4]}
    mended = clinic.precise(network, [batch])
    assert [one.layer for one in plan(mended, batch["image"]).norms] == [None]
    x = network.model.second(nnx.relu(network.model.first(batch["image"].reshape(6, -1))))
    np.testing.assert_allclose(mended.batch_stats["norm"]["mean"], x.mean(0), atol=1e-5)


def test_a_norm_in_bfloat16_casts_its_input():
    """NNX casts inputs and averages to the dtype of the output: 0 where 1.999 is right."""
    rng = np.random.default_rng(0)
    x = (1000 + rng.normal(0, 1, (64, 1, 1, 48))).astype(np.float32)
    norm = functools.partial(nnx.BatchNorm, dtype=jnp.bfloat16, use_fast_variance=False)
    model = Wrapped(norm, lambda model, x: model.norm(x[:, :5]), nnx.Rngs(0))
    network = clinic.precise(clinic.nnx(model), [{"image": x}])
    (layer,) = network.norms({"image": x})
    assert layer.dtype == jnp.bfloat16
    assert "low-precision" in clinic.audit(network, [{"image": x[:32]}, {"image": x[32:]}]).ids


BLOCK = ("norm0", "norm1", "norm2")
TODAYS = {
    ResNet50Like: [
        "stem.layers.1",
        *(f"blocks.{i}.{name}" for i in (0, 1) for name in (*BLOCK, "downsample.layers.1")),
    ],
    EfficientNetLike: [
        "stem_norm",
        *(f"blocks.{i}.{name}" for i in (0, 1) for name in BLOCK),
        "top_norm",
    ],
    DenseNetLike: [
        "stem_norm",
        *(f"dense0.{i}.{name}" for i in (0, 1) for name in BLOCK[:2]),
        "transition_norm",
        *(f"dense1.{i}.{name}" for i in (0, 1) for name in BLOCK[:2]),
        "last",
    ],
}
# Behind each there is an addition, a concatenation or an activation, and in front no layer.
UNFOLDED = {
    ResNet50Like: [],
    EfficientNetLike: [],
    DenseNetLike: [
        "dense0.0.norm0",
        "dense0.1.norm0",
        "transition_norm",
        "dense1.0.norm0",
        "dense1.1.norm0",
        "last",
    ],
}


ALL_OF_TODAY = [
    kind if kind is EfficientNetLike else pytest.param(kind, marks=pytest.mark.slow)
    for kind in TODAYS
]


@functools.cache
def todays(kind):
    """A network with scales and biases as after training, and images in two batches."""
    network = clinic.nnx(kind(nnx.Rngs(0)))
    rng = np.random.default_rng(2)
    params = jax.tree.map(
        lambda leaf: (
            leaf + 0.3 * rng.normal(size=leaf.shape).astype(np.float32) if leaf.ndim == 1 else leaf
        ),
        network.params,
    )
    image = rng.normal(0, 1, (64, 16, 16, 3)).astype(np.float32)
    return network.replace(params=params), image


@pytest.mark.slow
@pytest.mark.parametrize("kind", ALL_OF_TODAY)
def test_a_network_of_today_has_the_statistics_that_nnx_computes(kind):
    """With momentum 0 the averages after one pass are the statistics of the batch."""
    network, image = todays(kind)
    assert sorted(norm.name for norm in network.norms({"image": image})) == sorted(TODAYS[kind])
    # Also with norms that were built for evaluation.
    assert all(norm.by_batch for norm in network.norms({"image": image}, train=True))
    model = network.model
    model.train(momentum=0.0, use_fast_variance=False)
    model.set_attributes(nnx.Dropout, deterministic=True, raise_if_not_found=False)
    for _, one in nnx.iter_graph(model):
        if isinstance(one, nnx.Dropout):
            one.rate = 0.0
    run = nnx.jit(lambda model, x: model(x, True) if kind is EfficientNetLike else model(x))
    run(model, image)
    mended = clinic.precise(network, [{"image": image}], jit=shared_jit)
    close(mended.batch_stats, clinic.nnx(model).batch_stats, 1e-4)
    names = {f"{name}.{leaf}" for name in TODAYS[kind] for leaf in ("mean", "var")}
    assert {*clinic.moved(network, mended)} == names
    assert clinic.moved(mended, clinic.nnx(mended.model)) == ()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ALL_OF_TODAY)
def test_a_network_of_today_folds(kind):
    network, image = todays(kind)
    mended = clinic.precise(network, [{"image": image}], jit=shared_jit)
    found = plan(mended, image[:2])
    assert [".".join(one.norm) for one in found.norms if one.layer is None] == UNFOLDED[kind]
    run = shared_jit(functools.partial(type(network).run, train=False))
    logits, folded = (run(one, {"image": image})[0] for one in (mended, found.network))
    assert difference(logits, folded) < 1e-5
    model = found.network.model
    model.eval()
    options = {"training": False} if kind is EfficientNetLike else {}
    np.testing.assert_allclose(model(image[:2], **options), logits[:2], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", TODAYS)
def test_a_network_of_today_is_healthy_once_it_is_precise(kind):
    network, image = todays(kind)
    batches = [{"image": one, "label": np.arange(16) % 10} for one in np.split(image, 4)]
    assert clinic.audit(network, batches).ids[0] == "never-updated"
    mended = clinic.precise(network, batches, by="population")
    findings = clinic.audit(mended, batches, clinic.Run(batch_size=16))
    assert findings.ids == (), str(findings)
    # Precise statistics of the population are a fixed point.
    seen = clinic.gap(mended, {"image": image, "label": np.arange(64) % 10}).seen
    assert seen.keys() == {norm.path for norm in mended.norms(batches[0])}
    again = clinic.precise(mended, [{"image": image}], by="population")
    layers = mended.norms(batches[0])
    for of in drift(mended.batch_stats, again.batch_stats, layers).values():
        np.testing.assert_allclose(of, 0, atol=1e-4)
