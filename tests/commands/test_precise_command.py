"""The command `bnjax precise`, on a run of real digits whose averages are not ready."""

import functools
import json

import jax
import numpy as np
import pytest
from digit_runs import STEPS

from bnjax.data.batches import evenly_spaced
from bnjax.train.jsonl import read_lines
from bnjax.train.trained import Trained
from bnjax.train_step import eval_step, forward

IMAGES, MOMENTUM = 50, 0.99


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_recomputed_statistics_pass_the_audit(bnjax, unready, tmp_path):
    words = ("--images", 512, "--workdir")
    assert bnjax("audit", *words, unready)[0] == 1
    assert bnjax("precise", *words, unready, "--out", tmp_path / "new")[0] == 0
    code, out, _ = bnjax("audit", *words, tmp_path / "new")
    assert code == 0, out


def test_statistics_are_those_of_the_batch_and_the_run_stays(bnjax, unready, tmp_path):
    before = contents(unready)
    words = ("--workdir", unready, "--images", IMAGES, "--out", tmp_path / "new", "--json")
    code, out, err = bnjax("precise", *words)
    assert code == 0, err
    assert contents(unready) == before
    result, tested = json.loads(out), read_lines(unready / "metrics.jsonl")[-1]
    assert (result["step"], result["images"], result["by"]) == (STEPS, IMAGES, "batch")
    for key in ("loss", "accuracy"):
        assert result["stored"][key] == pytest.approx(tested[key], rel=1e-5)
    # Fewer images than a batch: what one step with them would put into the averages.
    run, written = Trained(unready, "last"), Trained(tmp_path / "new", "last")
    data = run.dataset(None)
    once = jax.jit(functools.partial(forward, model=run.model, train=True))
    image = evenly_spaced(data.train, IMAGES).image
    after = once(run.params, run.batch_stats, {"image": image})[1]["batch_stats"]
    true = jax.tree.map(
        lambda old, new: (np.float64(new) - MOMENTUM * np.float64(old)) / (1 - MOMENTUM),
        run.batch_stats,
        after,
    )
    # What is divided by 0.01 has a hundred times the rounding of the average.
    close = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4)
    jax.tree.map(close, written.batch_stats, true)
    jax.tree.map(np.testing.assert_array_equal, written.params, run.params)
    test = {"image": data.test.image, "label": data.test.label}
    tested = jax.jit(functools.partial(eval_step, model=run.model))
    means = tested(run.params, written.batch_stats, test).means()
    assert result["precise"] == pytest.approx(means, rel=1e-5)
    assert result["precise"]["accuracy"] > result["stored"]["accuracy"] + 0.05


def test_the_table_says_what_was_done(bnjax, unready):
    code, out, err = bnjax("precise", "--workdir", unready, "--images", 50, "--by", "population")
    assert code == 0, err
    assert f"checkpoint of step {STEPS}" in out
    assert "of 50 training images" in out
    assert "the precise statistics" in out.splitlines()[-1]
