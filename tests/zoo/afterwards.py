"""What happens to a network after its training: averages, cuts, checkpoints, evaluation."""

import functools

import jax
import numpy as np
import optax

from bnjax import clinic
from zoo import case, kit


@case("stale", "timgaripov/swa/issues/7", "linen nnx equinox", aside=True)
def swa(lib, sick):
    """Averaged weights were never run, so the stored statistics are those of other weights."""
    start, weights = lib.healthy(), []
    lib.fit(start=start, tx=optax.sgd(1.0), watch=weights.append)
    patient = start.but(params=kit.mean_of(weights[9::10]))
    return patient if sick else patient.recomputed()


@swa.of("torch", missed="the loss is a third higher, but predictions move by 2 % only")
def _(lib, sick):
    start, models = lib.healthy(), []
    lib.fit(
        start.network,
        optimizer=lambda model: lib.torch.optim.SGD(model.parameters(), 1.0),
        watch=lambda model: models.append(lib.copy.deepcopy(model)),
    )
    return lib.averaged([start.network, *models[9::10]], start, sick)


@case("stale", "huggingface/pytorch-image-models/issues/102", "linen")
def ema_weights_only(lib, sick):
    """The trainable variables are averaged; the statistics are those of the raw weights."""
    weights = []
    patient = lib.fit(tx=optax.sgd(0.5), watch=weights.append)

    def update(old, new):
        return jax.tree.map(lambda one, other: 0.98 * one + 0.02 * other, old, new)

    patient = patient.but(params=jax.device_get(functools.reduce(update, weights)))
    return patient if sick else patient.recomputed()


@ema_weights_only.of("torch")
def _(lib, sick):
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

    model = lib.net()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.98))
    patient = lib.fit(
        model,
        optimizer=lambda model: lib.torch.optim.SGD(model.parameters(), 0.5),
        watch=average.update_parameters,
    )
    average.module.load_state_dict(dict(model.named_buffers()), strict=False)
    if not sick:
        update_bn(map(lib.images, patient.batches), average)
    return patient.having(network=average.module.eval())


def batches_of_clients():
    """Of two clients, each with half of the labels."""
    of = kit.examples()
    for mine in (of["label"] < 2, of["label"] >= 2):
        yield kit.batches(20, of={name: leaf[mine] for name, leaf in of.items()})


@case("stale", "TsingZ0/PFLlib/issues/260", "linen equinox")
def federated_average(lib, sick):
    """Only parameters are averaged on the server; the statistics are those of the first client."""
    start = lib.healthy()
    clients = [lib.fit(start=start, seen=seen).network for seen in batches_of_clients()]
    params = kit.mean_of([one.params for one in clients])
    patient = start.but(params=params, batch_stats=clients[0].batch_stats)
    return patient if sick else patient.recomputed()


@federated_average.of("torch")
def _(lib, sick):
    start, copied = lib.healthy(), lib.copy.deepcopy
    clients = [lib.fit(copied(start.network), seen=seen) for seen in batches_of_clients()]
    return lib.averaged([client.network for client in clients], start, sick)


@case("stale", "mit-han-lab/once-for-all/issues/15", "linen")
def subnetwork(lib, sick):
    """A part of a wide network has other activations, and the statistics of the wide one."""
    whole = lib.healthy()
    trees = whole.network.params, whole.network.batch_stats
    params, stats = jax.tree.map(np.copy, trees)
    for of in (params["dense0"], params["norm0"], stats["norm0"]):
        for name, leaf in of.items():
            of[name] = leaf[..., :8]
    params["dense1"]["kernel"] = params["dense1"]["kernel"][:8]
    patient = whole.having(network=clinic.linen(lib.net(width=8), params, stats))
    return patient if sick else patient.recomputed()


@case("never-updated", "Lightning-AI/pytorch-lightning/issues/14866", "linen")
def recalibrated_with_momentum_zero(lib, sick):
    """Statistics are reset, then updated with a momentum that keeps all of the old value."""
    patient = lib.healthy()
    if not sick:
        return patient.recomputed()
    stats, keeping = lib.fit(seen=[]).network.batch_stats, lib.net(momentum=1.0)
    for batch in patient.batches:
        key = jax.random.key(0)
        _, stats = lib.loss(patient.network.params, stats, batch, key, model=keeping)
    return patient.but(batch_stats=jax.device_get(stats))


@recalibrated_with_momentum_zero.of("torch")
def _(lib, sick):
    patient = lib.healthy()
    norms = patient.network.norm0, patient.network.norm1
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = 0.0 if sick else None
    patient.network.train()
    for batch in patient.batches:
        patient.network(lib.images(batch))
    for norm in norms:
        norm.momentum = 0.1
    patient.network.eval()
    return patient


@case("missing-statistics", "hiwonjoon/tf-frrn/issues/2", "linen", aside=True)
def statistics_not_saved(lib, sick):
    """The running statistics are not among the variables that are saved."""
    return lib.healthy().but(batch_stats={}) if sick else lib.healthy()


@case("unmatched-leaves", "pytorch/pytorch/pull/6086", "linen")
def renamed_layer(lib, sick):
    """The statistics of a renamed layer match no layer: they are dropped and the layer has none."""
    patient = lib.healthy()
    stats = dict(patient.network.batch_stats)
    stats["bn2" if sick else "norm1"] = stats.pop("norm1")
    return patient.but(batch_stats=stats)


@case("invalid-statistics", "hufu6371/DORN/issues/25", "linen")
def wrong_order_in_conversion(lib, sick):
    """Scale, bias, mean and variance are read as mean, variance, scale and bias."""
    patient = lib.healthy()
    params, stats = dict(patient.network.params), dict(patient.network.batch_stats)
    for name in stats if sick else ():
        affine, average = params[name], stats[name]
        params[name] = {"scale": average["mean"], "bias": average["var"]}
        stats[name] = {"mean": affine["scale"], "var": affine["bias"]}
    return patient.but(params=params, batch_stats=stats)


@case("dead-channels", "Cadene/pretrained-models.pytorch/issues/99", "linen")
def dead_in_checkpoint(lib, sick):
    """Kernels that have decayed to 0 leave channels with a variance of 1e-14."""
    patient = lib.healthy()
    params = jax.tree.map(np.copy, patient.network.params)
    params["dense1"]["kernel"][:, :4] *= 1e-7 if sick else 1
    return patient.but(params=params).recomputed()


@case("stale", "Priyanshu-byte-coder/devtrack/issues/927", "linen", aside=True)
def scaled_twice(lib, sick):
    """The evaluation divides pixels by 255, and the network does it again."""
    patient, scale = lib.healthy(), np.float32(255 if sick else 1)
    seen = [batch | {"image": batch["image"] / scale} for batch in patient.batches]
    return patient.having(batches=seen)


@case("batch-dependent", "chrischoy/SpatioTemporalSegmentation/issues/11", "linen nnx equinox")
def eval_forgotten(lib, sick):
    """model.eval() is missing: evaluation normalises by its own batch."""
    patient = lib.healthy()
    return patient.knowing(predict=kit.predicting(patient.network, train=sick))


@eval_forgotten.of("torch")
def _(lib, sick):
    patient = lib.healthy()
    patient.network.train(sick)
    return patient.knowing(predict=lib.predicting(patient.network, train=sick))


@case("batch-dependent", "pytorch/pytorch/issues/20875", "linen nnx", aside=True)
def eval_not_propagated(lib, sick):
    """One norm stays in training mode whatever the network is set to."""
    return lib.fit(lib.net(lib.stuck)) if sick else lib.healthy()


@eval_not_propagated.of("torch")
def _(lib, sick):
    class Stuck(lib.nn.BatchNorm1d):
        def train(self, mode=True):
            return super().train(True)

    patient = lib.fit(lib.net(Stuck if sick else lib.nn.BatchNorm1d))
    return patient.knowing(predict=lib.predicting(patient.network))
