"""What an optimizer does to scale and bias, found by trying it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from bnjax.clinic.case import Case, Outcome
from bnjax.clinic.findings import Finding, NotChecked
from bnjax.types import Params

# A schedule may begin at 0, and gradients may be gathered over several steps.
MAX_UPDATES = 64


def decay(case: Case) -> Outcome:
    """Finds weight decay, or a layer-wise rate, on scale and bias."""
    if case.run.tx is None:
        missing = "the optimizer: Run(tx=…); what it did to the weights does not show in them"
        yield NotChecked("weight-decay", missing)
        return
    leaves = [
        (one.layer.name, (*one.layer.path, name))
        for one in case.layers
        for name in ("scale", "bias")
    ]
    try:
        decayed = depends(case.run.tx, case.network.params, gradient=0.0)
        scaled = depends(case.run.tx, case.network.params, gradient=1.0) - decayed
    except Exception as error:  # whatever an optimizer of somebody's raises that wants more
        missing = f"an optimizer that can be tried ({type(error).__name__}: {str(error)[:100]})"
        yield NotChecked("weight-decay", missing)
        return
    for name, how, found in (
        ("weight-decay", "shrinks", decayed),
        ("layerwise-rate", "scales with its norm the step of", scaled),
    ):
        hit = [(layer, path) for layer, path in leaves if path in found]
        if hit:
            layers = tuple(dict.fromkeys(layer for layer, _ in hit))
            kinds = " and ".join(sorted({path[-1] for _, path in hit}))
            yield Finding(name, layers, f"the optimizer {how} {kinds}, {len(hit)} leaves")


def depends(tx: Any, params: Params, *, gradient: float) -> set[tuple[str, ...]]:
    """Returns the leaves whose update depends on their value, for one and the same gradient.

    With gradient 0 that is weight decay; otherwise it may be a layer-wise rate. Each leaf is
    replaced by one number with as many axes, so that masks by path or rank hold and it costs
    nothing; a mask by the size of a leaf, or by its values, is not seen. `tx` has `init` and
    `update`, as Optax's have.

    >>> import optax
    >>> params = {"norm": {"scale": np.ones(3)}}
    >>> depends(optax.adamw(1e-3), params, gradient=0.0)
    {('norm', 'scale')}
    >>> depends(optax.sgd(1e-3, momentum=0.9), params, gradient=0.0)
    set()
    """

    def filled(value: float) -> Any:
        return jax.tree.map(lambda leaf: jnp.full((1,) * np.ndim(leaf), value), params)

    values, grads, update = (filled(1.0), filled(2.0)), filled(gradient), jax.jit(tx.update)
    states = [tx.init(value) for value in values]
    for _ in range(MAX_UPDATES):
        results = [update(grads, state, value) for state, value in zip(states, values, strict=True)]
        states = [state for _, state in results]
        one, other = (flatten_dict(jax.device_get(updates)) for updates, _ in results)
        if found := {path for path in one if not np.allclose(one[path], other[path], 1e-5, 0.0)}:
            return found
    return set()
