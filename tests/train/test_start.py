"""Runs that start from other networks, and what they freeze."""

import json
from functools import partial

import jax
import numpy as np
import optax
import pytest
import synthetic
from flax.traverse_util import flatten_dict

from bnjax.errors import ConfigError, UserError
from bnjax.export.stablehlo import export_run
from bnjax.train import build
from bnjax.train.loop import Stopped
from bnjax.train.start import take_over
from bnjax.train.steps import key_of
from bnjax.train.trained import Trained
from bnjax.train_step import init_state

DATA = synthetic.dataset()


def config(steps=4, **train):
    made = synthetic.config(steps)
    made.train.update(train)
    made.eval.every_steps = steps
    return made


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "run"
    synthetic.train(config(12), folder)
    return folder


def variables(folder):
    trained = Trained(folder, "last")
    return trained.params, trained.batch_stats


def leaves(folder):
    params, stats = variables(folder)
    return flatten_dict({"params": params, "batch_stats": stats}, sep=".")


def unchanged(before, after):
    return {name for name in before if np.array_equal(before[name], after[name])}


NORMS = ("conv0_norm", "dense0_norm", "logits_norm")
STATISTICS = {f"batch_stats.{name}" for name in NORMS}
FROZEN = {  # what each word or pattern keeps of the network of `synthetic`
    "none": ({}, set()),
    "statistics": ({"freeze": "statistics"}, STATISTICS),
    "norms": ({"freeze": "norms"}, STATISTICS | {f"params.{name}" for name in NORMS}),
    "backbone": (
        {"freeze": "backbone"},
        STATISTICS | {f"params.{name}" for name in ("conv0", "dense0", *NORMS)},
    ),
    "patterns": (
        {"freeze_params": ("conv0", "dense0.kern*"), "freeze_statistics": ("logits*",)},
        {"params.conv0", "params.dense0.kernel", "batch_stats.logits_norm"},
    ),
}
DECAYING = {"name": "adam", "weight_decay": 0.1, "weight_decay_mask": "all", "average": "ema"}


ALL = [(case, optimizer) for case in FROZEN for optimizer in ("adam", "decay, average, parts")]
QUICK = [("backbone", "adam"), ("patterns", "adam"), ("norms", "decay, average, parts")]


@pytest.mark.parametrize(
    ("case", "optimizer"),
    [one if one in QUICK else pytest.param(*one, marks=pytest.mark.slow) for one in ALL],
)
def test_exactly_what_is_frozen_keeps_its_bits(source, tmp_path, case, optimizer):
    train, kept = FROZEN[case]
    made = config(**train)
    made.train["from"] = str(source)
    if optimizer != "adam":
        made.train.micro_batches = 2
        made.optimizer.update(DECAYING)
    summary = synthetic.train(made, tmp_path / "run")
    before = leaves(source)
    training = Trained(tmp_path / "run", "last")
    after = leaves(tmp_path / "run")
    if optimizer != "adam":  # what is evaluated has precise statistics; those of training are apart
        after = {name: leaf for name, leaf in after.items() if name.startswith("params.")}
        before = {name: before[name] for name in after}
    found = unchanged(before, after)
    assert found == {name for name in before if name in kept or name.rpartition(".")[0] in kept}
    if case != "none":
        assert summary["frozen_leaves_that_moved"] == []
    assert training.step == 4


def test_frozen_norms_normalise_by_what_is_stored_in_training(source, tmp_path):
    made = config(1, freeze="statistics")
    made.train["from"], made.model.dropout = str(source), (0.0,)
    synthetic.train(made, tmp_path / "run")
    line = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[0])
    experiment = build.experiment(made, DATA)
    params, stats = variables(source)
    first = next(iter(build_items(experiment)))
    logits = experiment.model.apply(
        {"params": params, "batch_stats": stats}, first["image"] / np.float32(255), train=False
    )
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, first["label"])
    np.testing.assert_allclose(line["loss"], losses.mean(), rtol=1e-5)


def build_items(experiment):
    """The batches of a run, from its own feed."""
    from bnjax.train.dispatch import default_feed

    feed = default_feed(experiment, DATA.train)
    for item in feed.items(0, 0):
        yield jax.device_get(feed.batch(feed.resident, item))


def test_a_head_of_another_size_is_new_and_all_is_listed(source, tmp_path, capsys):
    made = config()
    made.train["from"] = str(source)
    made.model.dense = (9,)
    synthetic.train(made, tmp_path / "run")
    listed = json.loads((tmp_path / "run/start.json").read_text())
    assert "params.conv0.kernel" in listed["taken"]
    assert "params.dense0.kernel [36, 9], there [36, 8]" in listed["new"]
    said = capsys.readouterr().out
    assert "taken: " in said
    assert "left: nothing" in said


def test_an_exported_network_and_a_run_give_the_same_start(source, tmp_path):
    export_run(Trained(source, "best"), tmp_path / "exported", folded=False, platforms=("cpu",))
    for name, folder in (("a", source), ("b", tmp_path / "exported")):
        made = config()
        made.train["from"] = str(folder)
        synthetic.train(made, tmp_path / name)
    one, other = ((tmp_path / name / "metrics.jsonl").read_text() for name in "ab")
    assert one == other


def test_a_resumed_run_goes_on_from_its_checkpoint_and_not_from_the_source(source, tmp_path):
    made = config(6, freeze="statistics")
    made.train["from"], made.eval.every_steps = str(source), 2
    with pytest.raises(Stopped):
        synthetic.train(made, tmp_path / "cut", each=synthetic.interrupting(3))
    synthetic.train(made, tmp_path / "cut")
    synthetic.train(made, tmp_path / "whole")
    cut, whole = (tmp_path / name / "metrics.jsonl" for name in ("cut", "whole"))
    assert cut.read_text() == whole.read_text()


def test_what_does_not_fit_is_one_sentence(source, tmp_path):
    model = build.experiment(config(), DATA).model
    tx = optax.sgd(0.1)
    state, stats = init_state(model, tx, key_of(0), DATA.train.image[:1])
    with pytest.raises(UserError, match="no parameter with the same name and shape"):
        take_over(state, stats, ({"other": {"kernel": np.ones((2, 2))}}, {}), tx)
    made = config()
    made.train["from"] = str(tmp_path)
    with pytest.raises(UserError, match="neither a run nor an exported"):
        synthetic.train(made, tmp_path / "run")
    for key, pattern in (("freeze_statistics", "conv0"), ("freeze_params", "head")):
        with pytest.raises(ConfigError, match="patterns for the names"):
            build.experiment(config(**{key: (pattern,)}), DATA)
    with pytest.raises(ConfigError, match="at least one parameter"):
        build.experiment(config(freeze_params=("*",)), DATA)


def test_the_function_takes_by_name_and_keeps_the_dtype():
    model, tx = build.experiment(config(), DATA).model, optax.adam(0.1)
    state, stats = jax.jit(partial(init_state, model, tx))(key_of(0), DATA.train.image[:1])
    source = jax.tree.map(lambda leaf: np.full(leaf.shape, 2.0, np.float64), (state.params, stats))
    state, stats, taken = take_over(state, stats, source, tx)
    assert {float(leaf.ravel()[0]) for leaf in jax.tree.leaves((state.params, stats))} == {2.0}
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {np.dtype("float32")}
    assert len(taken.taken) == len(jax.tree.leaves((state.params, stats)))
    assert (taken.new, taken.left) == ((), ())
