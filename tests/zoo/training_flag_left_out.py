import functools

from zoo import kit

NAME = "training flag left out of a custom loop"
CAUSE = "The loop calls the network without training=True, so nothing updates the statistics."
SOURCE = "https://github.com/keras-team/keras/issues/20378"
FINDS = ("never-updated",)


def linen(sick):
    return kit.fit(loss=functools.partial(kit.loss, train=False)) if sick else kit.healthy()


def nnx(sick):
    from zoo import kit_nnx

    model = kit_nnx.Net()
    model.eval() if sick else model.train()
    return kit_nnx.fit(model)


def equinox(sick):
    from equinox.nn import inference_mode, make_with_state

    from zoo import kit_equinox

    model, state = make_with_state(kit_equinox.Net)()
    return kit_equinox.fit((inference_mode(model, sick), state))


def torch(sick):
    from zoo import kit_torch

    return kit_torch.fit(step=functools.partial(kit_torch.step, train=not sick))
