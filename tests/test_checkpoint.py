import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bnjax.checkpoint import CheckpointError, Checkpoints
from bnjax.train_step import TrainState


def make(step=3, statistics=True):
    params = {"layer": {"kernel": jnp.arange(6.0).reshape(2, 3) + step}}
    opt_state = optax.adam(0.1).init(params)
    stats = {"norm": {"mean": jnp.full(3, float(step)), "var": jnp.ones(3)}} if statistics else {}
    return TrainState(jnp.int32(step), params, opt_state, jax.random.key(5)), stats


def plain(tree):
    state, stats = tree
    return state.params, state.opt_state, state.step, jax.random.key_data(state.rng), stats


@pytest.mark.parametrize("statistics", [True, False])
def test_everything_comes_back(tmp_path, statistics):
    saved = make(statistics=statistics)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(*saved, 0.5)
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        restored = checkpoints.restore(3, jax.eval_shape(lambda: make(statistics=statistics)))
        params, stats = checkpoints.restore_variables(3, jax.eval_shape(lambda: (saved[0].params, saved[1])))
    jax.tree.map(np.testing.assert_array_equal, plain(restored), plain(saved))
    jax.tree.map(np.testing.assert_array_equal, (params, stats), (saved[0].params, saved[1]))


def test_the_newest_two_and_the_best_stay_across_processes(tmp_path):
    for step, accuracy in ((1, 0.2), (2, 0.9), (3, 0.5), (4, None), (5, 0.4)):
        with Checkpoints(tmp_path) as checkpoints:  # opened anew each time, as after an interruption
            checkpoints.save(*make(step), accuracy)
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.steps() == [2, 4, 5]
        assert [checkpoints.step(which) for which in ("best", "last", "4")] == [2, 5, 4]
        with pytest.raises(CheckpointError, match="Allowed: best, last, 2, 4, 5"):
            checkpoints.step("3")


def test_no_checkpoint_is_an_error_that_says_when_there_will_be_one(tmp_path):
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(CheckpointError, match="first evaluation"):
        checkpoints.step("last")


@pytest.mark.parametrize(
    ("params", "said"),
    [
        (
            {"layer": {"kernel": jnp.zeros((2, 4))}},
            r"params\.layer\.kernel \(float32 \[2, 3\] in the checkpoint, float32 \[2, 4\] in the model",
        ),
        ({"layer": {"kernel": jnp.zeros((2, 3), jnp.bfloat16)}}, r"params\.layer\.kernel \(float32 .*, bfloat16"),
        ({"layer": {"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros(3)}}, r"params\.layer\.bias \(nothing in the checkpoint"),
        ({}, r"params\.layer\.kernel \(float32 .* in the checkpoint, nothing in the model"),
    ],
)
def test_a_checkpoint_of_another_network_is_refused_by_leaf(tmp_path, params, said):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(*make(), 0.5)
    with Checkpoints(tmp_path, read_only=True) as checkpoints, pytest.raises(CheckpointError, match=said):
        checkpoints.restore_variables(3, jax.eval_shape(lambda: (params, make()[1])))


def test_a_checkpoint_without_statistics_is_refused_for_a_network_that_has_some(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(*make(statistics=False), 0.5)
    said = r"batch_stats\.norm\.mean \(nothing in the checkpoint"
    with Checkpoints(tmp_path, read_only=True) as checkpoints, pytest.raises(CheckpointError, match=said):
        checkpoints.restore(3, jax.eval_shape(make))
