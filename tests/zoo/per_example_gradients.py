import jax

from zoo import kit

NAME = "gradients of single examples"
CAUSE = "Private training takes the gradient of each example alone, so each is a batch of one."
SOURCE = "https://github.com/meta-pytorch/opacus/issues/319"
FINDS = ("small-batch",)


def linen(sick):
    def loss(params, stats, batch, key, model):
        ones = jax.tree.map(lambda leaf: leaf[:, None], batch)
        each = jax.vmap(lambda one: kit.loss(params, stats, one, key, model=model))
        losses, stats = each(ones)
        return losses.mean(), jax.tree.map(lambda leaf: leaf.mean(0), stats)

    if not sick:
        return kit.healthy()
    return kit.fit(loss=loss).knowing(batch_size=1)
