"""What stands in for newer versions of JAX does what they do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnjax.compat import vmap

pytestmark = pytest.mark.lane


@pytest.mark.parametrize("is_there", [True, False])
def test_vmap_where_there_is_none_is_one_call_after_another(is_there):
    def scaled(x, by, state):
        if not is_there and isinstance(x, jax.core.Tracer):
            raise NotImplementedError
        return {"y": x * by, "sum": x.sum() + state["n"]}

    x, n = np.arange(6.0).reshape(3, 2), np.array([10.0, 20.0, 30.0])
    found = vmap(scaled, (0, None, 0))(x, jnp.array([1.0, -1.0]), {"n": n})
    np.testing.assert_array_equal(found["y"], x * [1, -1])
    np.testing.assert_array_equal(found["sum"], x.sum(1) + n)
