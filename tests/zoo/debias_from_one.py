import functools

NAME = "an average that starts at 1 and is debiased as if it had started at 0"
CAUSE = "The variance starts at 1 and is divided by 1 - momentum ** steps: far too large at first."
SOURCE = "https://github.com/patrick-kidger/equinox/pull/948"
FINDS = ("not-converged",)


def equinox(sick):
    from equinox.nn import make_with_state

    from zoo import kit_equinox

    norm = functools.partial(kit_equinox.norm, momentum=0.99 if sick else 0.9)
    return kit_equinox.fit(make_with_state(kit_equinox.Net)(norm))
