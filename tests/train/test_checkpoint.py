import json
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bnjax.train.checkpoint import CheckpointError, Checkpoints
from bnjax.train_step import TrainState
from bnjax.types import fingerprint


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
        checkpoints.save(*saved, 0.5, {"norm": "batch"})
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        restored = checkpoints.restore(3, jax.eval_shape(lambda: make(statistics=statistics)))
        params, stats = checkpoints.restore_variables(
            3, jax.eval_shape(lambda: (saved[0].params, saved[1]))
        )
    jax.tree.map(np.testing.assert_array_equal, plain(restored), plain(saved))
    jax.tree.map(np.testing.assert_array_equal, (params, stats), (saved[0].params, saved[1]))


def test_the_newest_two_and_the_best_stay_across_processes(tmp_path):
    for step, accuracy in ((1, 0.2), (2, 0.9), (3, 0.5), (4, None), (5, 0.4)):
        with Checkpoints(
            tmp_path
        ) as checkpoints:  # opened anew each time, as after an interruption
            checkpoints.save(*make(step), accuracy, {})
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.steps() == [2, 4, 5]
        assert [checkpoints.step(which) for which in ("best", "last", "4")] == [2, 5, 4]
        with pytest.raises(CheckpointError, match="Allowed: best, last, 2, 4, 5"):
            checkpoints.step("3")


def test_no_checkpoint_is_an_error_that_says_when_there_will_be_one(tmp_path):
    with (
        Checkpoints(tmp_path) as checkpoints,
        pytest.raises(CheckpointError, match="first evaluation"),
    ):
        checkpoints.step("last")


@pytest.mark.parametrize(
    ("params", "said"),
    [
        (
            {"layer": {"kernel": jnp.zeros((2, 4))}},
            r"params\.layer\.kernel \(float32 \[2, 3\] in the checkpoint, float32 \[2, 4\] in the "
            r"model",
        ),
        (
            {"layer": {"kernel": jnp.zeros((2, 3), jnp.bfloat16)}},
            r"params\.layer\.kernel \(float32 .*, bfloat16",
        ),
        (
            {"layer": {"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros(3)}},
            r"params\.layer\.bias \(nothing in the checkpoint",
        ),
        ({}, r"params\.layer\.kernel \(float32 .* in the checkpoint, nothing in the model"),
    ],
)
def test_a_checkpoint_of_another_network_is_refused_by_leaf(tmp_path, params, said):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(*make(), 0.5, {})
    with (
        Checkpoints(tmp_path, read_only=True) as checkpoints,
        pytest.raises(CheckpointError, match=said),
    ):
        checkpoints.restore_variables(3, jax.eval_shape(lambda: (params, make()[1])))


def test_a_checkpoint_without_statistics_is_refused_for_a_network_that_has_some(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(*make(statistics=False), 0.5, {})
    said = r"batch_stats\.norm\.mean \(nothing in the checkpoint"
    with (
        Checkpoints(tmp_path, read_only=True) as checkpoints,
        pytest.raises(CheckpointError, match=said),
    ):
        checkpoints.restore(3, jax.eval_shape(make))


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """A folder with the checkpoints of steps 1, 2 and 3."""
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    with Checkpoints(folder) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(*make(step), 0.1 * (4 - step), {})
    return folder


def damage(path, how):
    content = path.read_bytes()
    if how == "deleted":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    else:
        path.write_bytes(
            content[: len(content) // 3] + os.urandom(40) + content[len(content) // 3 + 40 :]
        )


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "how",
    ["overwritten", pytest.param("truncated", marks=SLOW), pytest.param("deleted", marks=SLOW)],
)
def test_whatever_is_damaged_is_noticed_or_does_not_matter(three, tmp_path, how):
    """Every file of the newest checkpoint in turn.

    TensorStore itself gives back changed bytes without a word.
    """
    files = [path.relative_to(three) for path in sorted((three / "3").rglob("*")) if path.is_file()]
    noticed = 0
    for name in files:
        folder = tmp_path / "checkpoints"
        shutil.copytree(three, folder)
        damage(folder / name, how)
        with Checkpoints(folder) as checkpoints:
            step, notes = checkpoints.newest_intact()
            restored = checkpoints.restore(step, jax.eval_shape(make))
        jax.tree.map(np.testing.assert_array_equal, plain(restored), plain(make(step)))
        assert (step, len(notes)) in ((3, 0), (2, 1)), name
        assert (tmp_path / "damaged" / "3").exists() == (step == 2)
        noticed += step == 2
        shutil.rmtree(folder)
        shutil.rmtree(tmp_path / "damaged", ignore_errors=True)
    assert noticed > len(files) / 3  # the rest are Orbax's notes to itself


def test_after_damage_the_same_step_can_be_saved_again(three, tmp_path):
    folder = tmp_path / "checkpoints"
    shutil.copytree(three, folder)
    damage(folder / "3" / "variables" / "manifest.ocdbt", "truncated")
    with Checkpoints(folder) as checkpoints:
        assert checkpoints.newest_intact()[0] == 2
        checkpoints.save(*make(3), 0.9, {})
    with Checkpoints(folder, read_only=True) as checkpoints:
        checkpoints.verify(3)
        assert checkpoints.step("best") == 3


def test_when_all_are_damaged_nothing_is_touched(three, tmp_path):
    folder = tmp_path / "checkpoints"
    shutil.copytree(three, folder)
    for step in (1, 2, 3):
        damage(folder / str(step) / "training" / "_METADATA", "overwritten")
    before = sorted(path for path in tmp_path.rglob("*"))
    with (
        Checkpoints(folder) as checkpoints,
        pytest.raises(CheckpointError, match="No other checkpoint is left"),
    ):
        checkpoints.newest_intact()
    assert sorted(path for path in tmp_path.rglob("*")) == before


def test_nothing_saved_is_no_damage(tmp_path):
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.newest_intact() == (None, [])


def test_a_draft_that_a_killed_process_left_is_removed(three, tmp_path):
    folder = tmp_path / "checkpoints"
    shutil.copytree(three, folder)
    os.rename(folder / "3", folder / "3.orbax-checkpoint-tmp")
    with Checkpoints(folder) as checkpoints:
        assert checkpoints.newest_intact() == (2, [])
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2"]


def test_what_is_said_about_it_is_kept_beside_it(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        state, batch_stats = make()
        checkpoints.save(state, batch_stats, 0.5, {"versions": {"jax": "1"}})
    record = json.loads((tmp_path / "3" / "bnjax.json").read_text())
    about = {"versions": {"jax": "1"}, "weights": fingerprint(state.params)}
    assert (record["step"], record["accuracy"], record["about"]) == (3, 0.5, about)
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.about(3) == about


def test_a_full_disk_is_a_clear_error_and_the_earlier_checkpoints_stay(tmp_path):
    """The limit on the size of a file stands for the disk: Orbax's thread fails in the same way."""
    code = f"""
import resource, signal, sys
sys.path.insert(0, {os.path.dirname(__file__)!r})
from pathlib import Path
import jax.numpy as jnp
from bnjax.types import fingerprint
from bnjax.train.checkpoint import CheckpointError, Checkpoints
from test_checkpoint import make
folder = Path({str(tmp_path)!r})
with Checkpoints(folder) as checkpoints:
    checkpoints.save(*make(1), 0.5, {{}})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
state, stats = make(2)
try:
    with Checkpoints(folder) as checkpoints:
        big = state.replace(params={{"big": jnp.arange(100_000.0) ** 1.5}})
        checkpoints.save(big, stats, 0.6, {{}})
except CheckpointError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "could not be saved" in done.stdout, done.stderr
    assert "The earlier ones are intact" in done.stdout
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.newest_intact() == (1, [])


@pytest.mark.slow
def test_a_checkpoint_of_eight_devices_is_read_on_one(tmp_path):
    """Saved sharded over simulated devices, restored in a process that has one."""
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("d"))
    kernel = jax.device_put(jnp.arange(16.0), sharding)
    params = {"kernel": kernel}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(TrainState(jnp.int32(1), params, (), jax.random.key(0)), {}, None, {})
    code = f"""
from pathlib import Path
import jax, jax.numpy as jnp
from bnjax.train.checkpoint import Checkpoints
with Checkpoints(Path({str(tmp_path)!r}), read_only=True) as checkpoints:
    like = jax.eval_shape(lambda: ({{"kernel": jnp.zeros(16)}}, {{}}))
    params, _ = checkpoints.restore_variables(1, like)
print(jax.device_count(), params["kernel"].tolist() == list(range(16)))
"""
    env = {**os.environ, "XLA_FLAGS": ""}
    assert subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env
    ).stdout.split() == ["1", "True"]


def test_a_checkpoint_is_restored_on_the_default_device(three):
    """As where each device trains a seed of its own."""
    third = jax.devices()[3]
    with jax.default_device(third), Checkpoints(three, read_only=True) as checkpoints:
        restored = checkpoints.restore(3, jax.eval_shape(make))
    assert {device for leaf in jax.tree.leaves(restored) for device in leaf.devices()} == {third}
