import copy

import jax
from flax import nnx as flax_nnx

from bnjax.clinic.freezing import freeze_statistics, without_frozen
from zoo import kit

NAME = "a backbone that is frozen for the optimizer only"
CAUSE = "The optimizer leaves the norm alone, but each pass in training updates its statistics."
SOURCE = "https://github.com/pytorch/pytorch/issues/86590"
FINDS = ("moved-while-frozen",)


def other_task():
    return kit.batches(20, of=kit.examples() | {"label": kit.examples()["label"][::-1]})


def is_head(path, variable):
    return isinstance(variable, flax_nnx.Param) and path[0] not in ("dense0", "norm0")


def linen(sick):
    before = kit.healthy()
    frozen = {
        name: jax.tree.map(lambda _, name=name: name in ("dense0", "norm0"), leaves)
        for name, leaves in before.network.params.items()
    }
    model = kit.NET if sick else freeze_statistics(kit.NET, "norm0")
    patient = kit.fit(model, start=before, seen=other_task(), tx=without_frozen(kit.sgd(), frozen))
    return patient.knowing(before=before.network, frozen=("norm0",))


def nnx(sick):

    from zoo import kit_nnx

    before = kit_nnx.healthy()
    model = kit_nnx.of(before)
    if not sick:
        model.norm0.eval()
    patient = kit_nnx.fit(model, wrt=is_head, seen=other_task(), steps=80)
    return patient.knowing(before=before.network, frozen=("norm0",))


def torch(sick):
    from zoo import kit_torch

    before = kit_torch.healthy().network
    model = copy.deepcopy(before)
    for layer in (model.dense0, model.norm0):
        layer.requires_grad_(False)

    def step(model, optimizer, batch):
        model.train()
        if not sick:
            model.norm0.eval()
        optimizer.zero_grad()
        kit_torch.loss(model, batch).backward()
        optimizer.step()

    return kit_torch.fit(model, step, seen=other_task(), steps=80, before=before, frozen=("norm0",))
