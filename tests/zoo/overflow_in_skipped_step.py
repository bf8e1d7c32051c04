import copy

import jax
import jax.numpy as jnp
import numpy as np
import optax

from zoo import kit

NAME = "a skipped step that leaves its statistics"
CAUSE = (
    "The optimizer skips a step that overflowed, but the forward pass has already updated the "
    "statistics."
)
SOURCE = "https://github.com/pytorch/pytorch/issues/88474"
FINDS = ("invalid-statistics",)


def linen(sick):
    seen = kit.batches(kit.STEPS)
    seen[30] = seen[30] | {"image": seen[30]["image"] * np.float32(np.inf)}

    def loss(params, stats, batch, key, model):
        value, new = kit.loss(params, stats, batch, key, model=model)
        keep = jnp.isfinite(value) | sick
        return value, jax.tree.map(lambda new, old: jnp.where(keep, new, old), new, stats)

    return kit.fit(loss=loss, seen=seen, tx=optax.apply_if_finite(kit.sgd(), 5))


def torch(sick):
    from zoo import kit_torch

    seen = kit.batches(kit.STEPS)
    seen[30] = seen[30] | {"image": seen[30]["image"] * np.float32(np.inf)}

    def step(model, optimizer, batch):
        before = copy.deepcopy(model.state_dict())
        optimizer.zero_grad()
        loss = kit_torch.loss(model.train(), batch)
        if loss.isfinite():
            loss.backward()
            optimizer.step()
        elif not sick:
            model.load_state_dict(before)

    return kit_torch.fit(step=step, seen=seen)
