import functools

NAME = "training normalised by the running averages"
CAUSE = "Averages with momentum 0.99 lag behind the weights, and training normalises by them."
SOURCE = "https://github.com/patrick-kidger/equinox/issues/659"
FINDS = ("stale",)


def equinox(sick):
    from equinox.nn import make_with_state

    from zoo import kit_equinox

    norm = functools.partial(kit_equinox.norm, mode="ema", momentum=0.99) if sick else None
    return kit_equinox.fit(make_with_state(kit_equinox.Net)(norm or kit_equinox.norm))
