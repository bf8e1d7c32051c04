import functools

import optax

from zoo import kit

NAME = "gradients of micro-batches, statistics too"
CAUSE = "Gradients are accumulated over 16 micro-batches of 4; each norm still sees 4 examples."
SOURCE = "https://github.com/pytorch/pytorch/issues/46516"
FINDS = ("small-batch",)


def linen(sick):
    size, every = (4, 16) if sick else (kit.SIZE, 1)
    steps = 256 if sick else kit.STEPS
    tx = optax.MultiSteps(kit.sgd(steps=steps // every), every)
    return kit.fit(tx=tx, steps=steps, size=size)


def torch(sick):
    from zoo import kit_torch

    if not sick:
        return kit_torch.healthy()

    def step(model, optimizer, batch):
        kit_torch.loss(model.train(), batch).backward()
        optimizer.count = getattr(optimizer, "count", 0) + 1
        if optimizer.count % 16 == 0:
            optimizer.step()
            optimizer.zero_grad()

    optimizer = functools.partial(kit_torch.sgd, rate=0.05)  # without a schedule
    seen = kit.batches(256, 4)
    return kit_torch.fit(step=step, seen=seen, optimizer=optimizer, batch_size=4)
