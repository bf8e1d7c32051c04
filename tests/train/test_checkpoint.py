import gc
import os
import shutil
import signal
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import synthetic
from hypothesis import given
from hypothesis import strategies as st

from bnjax.errors import UserError
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
def test_everything_comes_back_on_the_default_device(tmp_path, statistics):
    saved, third = make(statistics=statistics), jax.devices()[3]
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(*saved, 0.5, {"norm": "batch"})
    with jax.default_device(third), Checkpoints(tmp_path, read_only=True) as checkpoints:
        restored = checkpoints.restore(3, jax.eval_shape(lambda: make(statistics=statistics)))
        like = jax.eval_shape(lambda: (saved[0].params, saved[1]))
        variables = checkpoints.restore_variables(3, like)
    jax.tree.map(np.testing.assert_array_equal, plain(restored), plain(saved))
    jax.tree.map(np.testing.assert_array_equal, variables, (saved[0].params, saved[1]))
    assert {device for leaf in jax.tree.leaves(restored) for device in leaf.devices()} == {third}


def test_the_newest_two_and_the_best_stay_across_processes(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.newest_intact() == (None, [])
        with pytest.raises(CheckpointError, match="first evaluation"):
            checkpoints.step("last")
    for step, accuracy in ((1, 0.2), (2, 0.9), (3, 0.5), (4, None), (5, 0.4)):
        with Checkpoints(tmp_path) as checkpoints:  # anew, as after an interruption
            checkpoints.save(*make(step), accuracy, {"step": step})
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.steps() == [2, 4, 5]
        assert [checkpoints.step(which) for which in ("best", "last", "4")] == [2, 5, 4]
        assert checkpoints.about(4) == {"step": 4, "weights": fingerprint(make(4)[0].params)}
        with pytest.raises(CheckpointError, match="Allowed: best, last, 2, 4, 5"):
            checkpoints.step("3")


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """A folder with the checkpoints of steps 1, 2 and 3."""
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    with Checkpoints(folder) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(*make(step), 0.1 * (4 - step), {})
    return folder


KERNEL, STATS = jnp.zeros((2, 3)), make()[1]


@pytest.mark.parametrize(
    ("layer", "stats", "said"),
    [
        (
            {"kernel": jnp.zeros((2, 4))},
            STATS,
            r"32 \[2, 3\] in the checkpoint, float32 \[2, 4\] in",
        ),
        ({"kernel": KERNEL.astype("bfloat16")}, STATS, r"kernel \(float32 .*, bfloat16"),
        ({"kernel": KERNEL, "bias": jnp.zeros(3)}, STATS, r"bias \(nothing in the c"),
        ({"kernel": KERNEL}, {}, r"batch_stats\.norm\.var .*nothing in the model"),
    ],
)
def test_a_checkpoint_of_another_network_is_refused_by_leaf(three, layer, stats, said):
    like = jax.eval_shape(lambda: ({"layer": layer}, stats))
    refused = pytest.raises(CheckpointError, match=said)
    with Checkpoints(three, read_only=True) as checkpoints, refused:
        checkpoints.restore_variables(3, like)


def damage(file, how, share=0.4):
    content = file.read_bytes()
    at = int(share * len(content))
    file.unlink()
    if how == "folder":
        file.mkdir()
    elif how != "gone":
        new = {"cut": b"", "overwritten": os.urandom(40) + content[at + 40 :]}
        new["flipped"] = bytes(byte ^ 1 for byte in content[at : at + 1]) + content[at + 1 :]
        file.write_bytes(content[:at] + new[how])


def test_whatever_is_damaged_is_noticed_or_does_not_matter(three, tmp_path):
    """Every fourth file of the newest checkpoint in turn.

    TensorStore itself gives back changed bytes without a word.
    """
    files = [path.relative_to(three) for path in sorted((three / "3").rglob("*")) if path.is_file()]
    noticed = 0
    for number, name in enumerate(files[::4]):
        folder = shutil.copytree(three, tmp_path / str(number) / "checkpoints")
        damage(folder / name, ("overwritten", "cut", "gone")[number % 3])
        with Checkpoints(folder) as checkpoints:
            step, notes = checkpoints.newest_intact()
            restored = checkpoints.restore(step, jax.eval_shape(make))
        jax.tree.map(np.testing.assert_array_equal, plain(restored), plain(make(step)))
        assert (step, len(notes)) in ((3, 0), (2, 1)), name
        assert (folder.parent / "damaged" / "3").exists() == (step == 2)
        noticed += step == 2
    assert noticed > number / 4  # the rest are Orbax's notes to itself


def test_when_all_are_damaged_nothing_is_touched(three, tmp_path):
    folder = shutil.copytree(three, tmp_path / "checkpoints")
    for step in (1, 2, 3):
        damage(folder / str(step) / "training" / "_METADATA", "overwritten")
    before = sorted(tmp_path.rglob("*"))
    refused = pytest.raises(CheckpointError, match="No other checkpoint is left")
    with Checkpoints(folder) as checkpoints, refused:
        checkpoints.newest_intact()
    assert sorted(tmp_path.rglob("*")) == before


def test_a_draft_that_a_killed_process_left_is_removed(three, tmp_path):
    folder = shutil.copytree(three, tmp_path / "checkpoints")
    os.rename(folder / "3", folder / "3.orbax-checkpoint-tmp")
    with Checkpoints(folder) as checkpoints:
        assert checkpoints.newest_intact() == (2, [])
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2"]


@pytest.fixture(scope="module")
def died(tmp_path_factory):
    """Returns a run that was killed in step 8 of 10, and the parameters of a complete run."""
    folder, config = tmp_path_factory.mktemp("runs"), synthetic.config(steps=10)
    synthetic.train(config, folder / "whole")
    with pytest.raises(StopIteration):
        synthetic.train(config, folder / "died", first=7)
    return folder / "died", synthetic.restored(folder / "whole", config)[0].params


HOW = st.sampled_from(["gone", "folder", "cut", "flipped", "overwritten"])


@pytest.mark.slow
@given(data=st.data())
def test_any_damage_to_a_runs_folder_is_said_or_does_no_harm(died, tmp_path, data):
    config, (run, wanted) = synthetic.config(steps=10), died
    folder = shutil.copytree(run, Path(tempfile.mkdtemp(dir=tmp_path)) / "run")
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    for file in data.draw(st.lists(st.sampled_from(sorted(files)), max_size=2, unique=True)):
        damage(file, data.draw(HOW), data.draw(st.floats(0, 1)))
    try:
        synthetic.train(config, folder)
    except UserError as error:
        assert str(error)
    else:
        found = synthetic.restored(folder, config)[0].params
        jax.tree.map(np.testing.assert_array_equal, found, wanted)


# Orbax leaves the write that failed to the collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_is_a_clear_error_and_the_earlier_checkpoints_stay(tmp_path):
    """The limit on the size of a file stands for the disk: Orbax's thread fails in the same way."""
    resource = pytest.importorskip("resource", reason="Windows has no limit on the size of a file")
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(*make(1), 0.5, {})
    (state, stats), big = make(2), {"big": np.arange(100_000.0) ** 1.5}
    usual, limits = signal.getsignal(signal.SIGXFSZ), resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    said = "could not be saved.*Earlier checkpoints are intact"
    try:
        with pytest.raises(CheckpointError, match=said), Checkpoints(tmp_path) as checkpoints:
            checkpoints.save(state.replace(params=big), stats, 0.6, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, usual)
        gc.collect()
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.newest_intact() == (1, [])
