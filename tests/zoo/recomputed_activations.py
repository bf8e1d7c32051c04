import functools

NAME = "activations computed again in the backward pass"
CAUSE = "Checkpointing runs the forward pass twice, and each time norms update their statistics."
SOURCE = "https://github.com/pytorch/pytorch/issues/96136"
FINDS = ("updated-twice",)


def torch(sick):
    from torch.nn.functional import cross_entropy
    from torch.utils.checkpoint import checkpoint

    from zoo import kit_torch

    def loss(model, batch):
        label = kit_torch.labels(batch)
        if not sick:
            return cross_entropy(model(kit_torch.images(batch)), label)
        return cross_entropy(checkpoint(model, kit_torch.images(batch), use_reentrant=False), label)

    return kit_torch.fit(step=functools.partial(kit_torch.step, loss=loss))
