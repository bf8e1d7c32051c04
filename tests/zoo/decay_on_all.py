import jax
import optax

from zoo import kit

NAME = "weight decay on scale and bias"
CAUSE = "The optimizer decays all parameters, those of the norms too."
SOURCE = "https://github.com/Eric-mingjie/rethinking-network-pruning/issues/27"
FINDS = ("weight-decay",)
MISSED = {"torch": "the audit takes optimizers with the interface of Optax; the report says so"}


def matrices(params):
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def linen(sick):
    return kit.fit(tx=optax.adamw(3e-3, weight_decay=1e-2, mask=None if sick else matrices))


def nnx(sick):
    from zoo import kit_nnx

    return kit_nnx.fit(tx=optax.adamw(3e-3, weight_decay=1e-2, mask=None if sick else matrices))


def torch(sick):
    from torch.optim import AdamW

    from zoo import kit_torch

    def optimizer(model):
        matrices = [one for one in model.parameters() if one.ndim > 1]
        vectors = [one for one in model.parameters() if one.ndim == 1]
        groups = [{"params": matrices}, {"params": vectors, "weight_decay": 1e-2 * sick}]
        return AdamW(groups, 3e-3, weight_decay=1e-2)

    return kit_torch.fit(optimizer=optimizer)
