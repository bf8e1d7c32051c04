"""What a training loop does wrong."""

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx as flax_nnx

from bnjax import clinic
from bnjax.clinic.freezing import freeze_statistics, without_frozen
from zoo import case, kit


@case("stale", "pytorch/pytorch/issues/4741", "linen", aside=True)
def correlated_batches(lib, sick):
    """Each batch is of one recording: its variance lacks the differences between recordings."""
    of, rng = kit.examples(), np.random.default_rng(3)  # eight recordings of 64 images
    light = np.repeat(rng.uniform(0, 2, 8), 64).reshape(-1, 1, 1, 1).astype(np.float32)
    mixed = of | {"image": of["image"] + light}
    starts = 64 * rng.integers(0, 8, kit.STEPS)
    alike = [{name: leaf[i : i + 64] for name, leaf in mixed.items()} for i in starts]
    patient = lib.fit(seen=alike if sick else kit.batches(of=mixed))
    return patient.having(batches=kit.audited(of=mixed))


@case("stale", "filaPro/visda2019/issues/1", "linen")
def domains_in_turn(lib, sick):
    """Two domains in turn: the averaged variance lacks the difference of their means."""
    both = [kit.examples(offset) for offset in (0.0, 0.5)]
    mixed = {name: np.concatenate([of[name] for of in both]) for name in both[0]}
    in_turn = [*zip(*(kit.batches(30, of=of) for of in both), strict=True)]
    patient = lib.fit(seen=sum(in_turn, ()) if sick else kit.batches(of=mixed))
    return patient.having(batches=kit.audited(of=mixed))


@case("stale", "https://arxiv.org/abs/2105.07576", "linen")
def lagging_averages(lib, sick):
    """With a high learning rate, slow averages are of weights long gone."""
    patient = lib.fit(start=lib.healthy(), tx=optax.sgd(2.0), seen=kit.batches(40))
    return patient if sick else patient.recomputed()


@case("not-converged", "tensorflow/tensorflow/issues/1122", "linen nnx torch")
def too_few_steps(lib, sick):
    """Momentum 0.99 keeps half of the initial statistics over 60 steps."""
    return lib.fit(lib.net(momentum=0.99 if sick else 0.9))


@case("never-updated", "pytorch/pytorch/issues/5406", "linen nnx equinox torch")
def never_trained(lib, sick):
    """The network was built and evaluated: its statistics are the initial ones."""
    return lib.fit(seen=[] if sick else None)


@case("never-updated", "keras-team/keras/issues/20378", "linen", aside=True)
def training_flag_left_out(lib, sick):
    """The loop calls the network without training=True, so nothing updates the statistics."""
    return lib.fit(loss=functools.partial(lib.loss, train=not sick))


@training_flag_left_out.of("nnx")
def _(lib, sick):
    model = lib.net()
    model.eval() if sick else model.train()
    return lib.fit(model)


@training_flag_left_out.of("equinox")
def _(lib, sick):
    model, state = lib.net()
    return lib.fit((lib.eqx.nn.inference_mode(model, sick), state))


@training_flag_left_out.of("torch")
def _(lib, sick):
    mode = lib.nn.Module.eval if sick else lib.nn.Module.train
    return lib.fit(step=functools.partial(lib.step, mode=mode))


@case("small-batch", "pytorch/pytorch/issues/46516", "linen")
def gradient_accumulation(lib, sick):
    """Gradients are accumulated over 16 micro-batches of 4; each norm still sees 4 examples."""
    steps, size, every = (256, 4, 16) if sick else (kit.STEPS, kit.SIZE, 1)
    tx = optax.MultiSteps(kit.sgd(steps=steps // every), every)
    return lib.fit(tx=tx, seen=kit.batches(steps, size))


@gradient_accumulation.of("torch")
def _(lib, sick):
    if not sick:
        return lib.healthy()

    def step(model, optimizer, batch):
        lib.loss(model.train(), batch).backward()
        optimizer.count = getattr(optimizer, "count", 0) + 1
        if optimizer.count % 16 == 0:
            optimizer.step()
            optimizer.zero_grad()

    without_schedule = functools.partial(lib.sgd, rate=0.05)
    return lib.fit(step=step, seen=kit.batches(256, 4), optimizer=without_schedule)


@case("small-batch", "meta-pytorch/opacus/issues/319", "linen")
def per_example_gradients(lib, sick):
    """Private training takes the gradient of each example alone, so each is a batch of one."""

    def loss(params, stats, batch, key, model):
        ones = jax.tree.map(lambda leaf: leaf[:, None], batch)
        each = jax.vmap(lambda one: lib.loss(params, stats, one, key, model=model))
        losses, stats = each(ones)
        return losses.mean(), jax.tree.map(lambda leaf: leaf.mean(0), stats)

    return lib.fit(loss=loss).knowing(batch_size=1) if sick else lib.healthy()


def noisy(batch):
    return batch | {"image": batch["image"] + 0.2}


@case("updated-twice", "m2lines/Samudra/issues/572", "linen", aside=True)
def two_passes(lib, sick):
    """A second pass in training mode, of noisy images, updates the statistics once more."""

    def loss(params, stats, batch, key, model):
        value, new = lib.loss(params, stats, batch, key, model=model)
        other, again = lib.loss(params, new, noisy(batch), key, model=model)
        return value + other, again if sick else new

    @jax.jit
    def step(network, batch):
        key = jax.random.key(0)
        _, stats = loss(network.params, network.batch_stats, batch, key, network.model)
        return network.replace(batch_stats=stats)

    return lib.fit(loss=loss).knowing(step=step)


@two_passes.of("nnx")
def _(lib, sick):
    def loss(model, batch):
        value = lib.loss(model, batch)
        return value + lib.loss(model if sick else flax_nnx.clone(model), noisy(batch))

    def step(network, batch):
        model = network.model
        loss(model, batch)
        return clinic.nnx(model)

    return lib.fit(loss=loss, step=step)


@two_passes.of("torch")
def _(lib, sick):
    def loss(model, batch):
        value = lib.loss(model, batch)
        model.norm0.momentum = model.norm1.momentum = 0.1 if sick else 0.0
        value = value + lib.loss(model, noisy(batch))
        model.norm0.momentum = model.norm1.momentum = 0.1
        return value

    return lib.fit(step=functools.partial(lib.step, loss=loss))


@case("updated-twice", "pytorch/pytorch/issues/96136", "torch", aside=True)
def recomputed_activations(lib, sick):
    """Checkpointing runs the forward pass twice, and each pass updates the statistics."""
    from torch.utils.checkpoint import checkpoint

    def loss(model, batch):
        recomputed = functools.partial(checkpoint, model, use_reentrant=False)
        return lib.loss(recomputed if sick else model, batch)

    return lib.fit(step=functools.partial(lib.step, loss=loss))


def with_overflow():
    seen = kit.batches()
    seen[30] = seen[30] | {"image": seen[30]["image"] * np.float32(np.inf)}
    return seen


@case("invalid-statistics", "pytorch/pytorch/issues/88474", "linen")
def overflow_in_skipped_step(lib, sick):
    """The optimizer skips a step that overflowed; its forward pass has updated the statistics."""

    def loss(params, stats, batch, key, model):
        value, new = lib.loss(params, stats, batch, key, model=model)
        keep = jnp.isfinite(value) | sick
        return value, jax.tree.map(lambda new, old: jnp.where(keep, new, old), new, stats)

    return lib.fit(loss=loss, seen=with_overflow(), tx=optax.apply_if_finite(kit.sgd(), 5))


@overflow_in_skipped_step.of("torch")
def _(lib, sick):
    def step(model, optimizer, batch):
        before = copy.deepcopy(model.state_dict())
        optimizer.zero_grad()
        loss = lib.loss(model.train(), batch)
        if loss.isfinite():
            loss.backward()
            optimizer.step()
        elif not sick:
            model.load_state_dict(before)

    return lib.fit(step=step, seen=with_overflow())


@case("weight-decay", "Eric-mingjie/rethinking-network-pruning/issues/27", "linen nnx")
def decay_on_all(lib, sick):
    """The optimizer decays all parameters, those of the norms too."""
    mask = None if sick else kit.matrices
    return lib.fit(tx=optax.adamw(3e-3, weight_decay=1e-2, mask=mask))


@decay_on_all.of(
    "torch", missed="the audit takes optimizers with the interface of Optax; the report says so"
)
def _(lib, sick):
    def optimizer(model):
        matrices = [one for one in model.parameters() if one.ndim > 1]
        vectors = [one for one in model.parameters() if one.ndim == 1]
        groups = [{"params": matrices}, {"params": vectors, "weight_decay": 1e-2 * sick}]
        return lib.torch.optim.AdamW(groups, 3e-3, weight_decay=1e-2)

    return lib.fit(optimizer=optimizer)


@case("layerwise-rate", "Spijkervet/SimCLR/issues/27", "linen")
def lars_on_vectors(lib, sick):
    """LARS scales the step of a bias by its norm; one that starts at 0 hardly moves."""
    ratio = True if sick else kit.matrices
    tx = optax.lars(1.0, weight_decay_mask=kit.matrices, trust_ratio_mask=ratio)
    return lib.fit(tx=tx)


def other_task():
    return kit.batches(20, of=kit.examples() | {"label": kit.examples()["label"][::-1]})


def is_head(path, variable):
    return isinstance(variable, flax_nnx.Param) and path[0] not in ("dense0", "norm0")


def tuned_nnx(lib, set_mode):
    """Trains the head for another task; `set_mode` is called with the model before."""
    before = lib.healthy()
    model = lib.model_of(before)
    set_mode(model)
    known = {"steps": 80, "before": before.network, "frozen": ("norm0",)}
    return lib.fit(model, wrt=is_head, seen=other_task(), **known)


def tuned_torch(lib, set_mode):
    """Trains the head for another task; `set_mode` is called with the model in each step."""
    before = lib.healthy().network
    model = copy.deepcopy(before).train()
    for layer in (model.dense0, model.norm0):
        layer.requires_grad_(False)
    step = functools.partial(lib.step, mode=set_mode)
    return lib.fit(model, step, seen=other_task(), steps=80, before=before, frozen=("norm0",))


@case("moved-while-frozen", "pytorch/pytorch/issues/86590", "linen")
def frozen_by_gradient(lib, sick):
    """The optimizer leaves a norm alone, but each pass in training updates its statistics."""
    before = lib.healthy()
    frozen = {
        name: jax.tree.map(lambda _, name=name: name in ("dense0", "norm0"), leaves)
        for name, leaves in before.network.params.items()
    }
    model = lib.net() if sick else freeze_statistics(lib.net(), "norm0")
    tx = without_frozen(kit.sgd(), frozen)
    patient = lib.fit(model, start=before, seen=other_task(), tx=tx)
    return patient.knowing(before=before.network, frozen=("norm0",))


@frozen_by_gradient.of("nnx")
def _(lib, sick):
    return tuned_nnx(lib, lambda model: None if sick else model.norm0.eval())


@frozen_by_gradient.of("torch")
def _(lib, sick):
    return tuned_torch(lib, lambda model: model.train().norm0.train(sick))


@case("moved-while-frozen", "pytorch/pytorch/issues/66073", "nnx")
def freeze_undone(lib, sick):
    """A norm is set to evaluation mode once; model.train() of the next epoch sets it back."""

    def mode(model):
        model.norm0.eval()
        if sick:
            model.train()

    return tuned_nnx(lib, mode)


@freeze_undone.of("torch")
def _(lib, sick):
    def mode(model):
        if not hasattr(model, "is_frozen"):
            model.is_frozen = True
            model.norm0.eval()
        if sick:
            model.train()

    return tuned_torch(lib, mode)
