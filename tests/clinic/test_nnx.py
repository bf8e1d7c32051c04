"""A model of NNX under `ToLinen`: it trains, and the audit says that it sees no norm."""

import jax
import numpy as np
import optax
from flax import nnx

from bnjax.clinic import Network, audit
from bnjax.train_step import init_state, train_step


class Net(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(48, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.logits = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x, train):
        x = self.norm(self.hidden(x.reshape(len(x), -1)), use_running_average=not train)
        return self.logits(nnx.relu(x))


def test_it_trains_and_what_cannot_be_checked_is_said():
    model, tx = nnx.bridge.ToLinen(Net), optax.sgd(0.1)
    image = np.random.default_rng(0).random((8, 4, 4, 3), np.float32)
    batch = {"image": image, "label": np.arange(8) % 3}
    state, stats = init_state(model, tx, jax.random.key(0), image)
    _, new, _ = train_step(state, stats, batch, model=model, tx=tx)
    assert (np.asarray(new["norm"]["mean"]) != 0).all()
    findings = audit(Network(state.params, new, model), [batch] * 4)
    (entry,) = findings.not_checked
    assert not findings.healthy
    assert not findings.as_json()["healthy"]
    assert str(findings).endswith("there was nothing to audit")
    assert "a batch norm of Flax's or bnjax's in the model" in entry.missing
