"""Runs that start from other networks, and what they freeze."""

import json
from functools import partial

import jax
import numpy as np
import optax
import pytest
import synthetic
from flax.traverse_util import flatten_dict
from synthetic import assert_same_metrics

from bnjax.errors import ConfigError, UserError
from bnjax.export.stablehlo import export_run
from bnjax.train import build
from bnjax.train.interrupt import Stopped
from bnjax.train.steps import key_of
from bnjax.train.trained import Trained
from bnjax.train.warm_start import take_over
from bnjax.train_step import forward, init_state

DATA = synthetic.dataset()


def config(steps=4, source="", **train):
    made = synthetic.config(steps)
    made.train.update(train)
    made.train["from"], made.eval.every_steps = str(source), steps
    return made


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "run"
    synthetic.train(config(12), folder)
    return folder


def leaves(folder):
    trained = Trained(folder, "last")
    return flatten_dict({"params": trained.params, "batch_stats": trained.batch_stats}, sep=".")


NORMS = ("conv0_norm", "dense0_norm", "logits_norm")
STATISTICS = {f"batch_stats.{name}" for name in NORMS}
SCALES = {f"params.{name}" for name in NORMS}
FROZEN = {  # what each word or pattern keeps of the network of `synthetic`
    "none": ({}, set()),
    "statistics": ({"freeze": "statistics"}, STATISTICS),
    "norms": ({"freeze": "norms"}, STATISTICS | SCALES),
    "backbone": ({"freeze": "backbone"}, STATISTICS | SCALES | {"params.conv0", "params.dense0"}),
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
    made, before = config(source=source, **train), leaves(source)
    if optimizer != "adam":
        made.train.micro_batches = 2
        made.optimizer.update(DECAYING)
        # What is evaluated has precise statistics; those of training are apart.
        before = {name: leaf for name, leaf in before.items() if name.startswith("params.")}
    summary, after = synthetic.train(made, tmp_path), leaves(tmp_path)
    found = {name for name in before if np.array_equal(before[name], after[name])}
    assert found == {name for name in before if {name, name.rpartition(".")[0]} & kept}
    assert summary.get("frozen_leaves_that_moved") == (None if case == "none" else [])


def test_frozen_norms_normalise_by_what_is_stored_in_training(source, tmp_path):
    made, items = config(1, source, freeze="statistics"), []
    made.model.dropout = (0.0,)
    synthetic.train(made, tmp_path, each=lambda step, item, seed: items.append(item) or item)
    (line,), start = synthetic.lines(tmp_path, "train"), Trained(source, "last")
    logits, _ = forward(start.params, start.batch_stats, items[0], model=start.model, train=False)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, items[0]["label"])
    np.testing.assert_allclose(line["loss"], losses.mean(), rtol=1e-5)


def test_a_head_of_another_size_is_new_and_all_is_listed(source, tmp_path, capsys):
    made = config(source=source)
    made.model.dense = (9,)
    synthetic.train(made, tmp_path)
    listed = json.loads((tmp_path / "start.json").read_text())
    assert "params.conv0.kernel" in listed["taken"]
    assert "params.dense0.kernel [36, 9], there [36, 8]" in listed["new"]
    said = capsys.readouterr().out
    assert ("taken: " in said, "left: nothing" in said) == (True, True)


def test_an_exported_network_and_a_run_give_the_same_start(source, tmp_path):
    export_run(Trained(source, "best"), tmp_path / "exported", folded=False, platforms=("cpu",))
    for name, folder in (("a", source), ("b", tmp_path / "exported")):
        synthetic.train(config(source=folder), tmp_path / name)
    assert_same_metrics(tmp_path / "a", tmp_path / "b")


def test_a_resumed_run_goes_on_from_its_checkpoint_and_not_from_the_source(source, tmp_path):
    made, (cut, whole) = (
        config(6, source, freeze="statistics"),
        (tmp_path / "cut", tmp_path / "all"),
    )
    made.eval.every_steps = 2
    with pytest.raises(Stopped):
        synthetic.train(made, cut, each=synthetic.interrupting(3))
    for folder in (cut, whole):
        synthetic.train(made, folder)
    assert_same_metrics(cut, whole)


def untrained(tx):
    model = build.experiment(config(), DATA).model
    return jax.jit(partial(init_state, model, tx))(key_of(0), DATA.train.image[:1])


def test_what_does_not_fit_is_one_sentence(tmp_path):
    tx, other = optax.sgd(0.1), ({"other": {"kernel": np.ones((2, 2))}}, {})
    with pytest.raises(UserError, match="no parameter with the same name and shape"):
        take_over(*untrained(tx), other, tx)
    with pytest.raises(UserError, match="neither a run nor an exported"):
        synthetic.train(config(source=tmp_path), tmp_path / "run")
    unknown, all_of_it = "patterns for the names", "at least one parameter"
    for key, pattern, said in (
        ("freeze_statistics", "conv0", unknown),
        ("freeze_params", "head", unknown),
        ("freeze_params", "*", all_of_it),
    ):
        with pytest.raises(ConfigError, match=said):
            build.experiment(config(**{key: (pattern,)}), DATA)


def test_the_function_takes_by_name_and_keeps_the_dtype():
    state, stats = untrained(optax.adam(0.1))
    source = jax.tree.map(lambda leaf: np.full(leaf.shape, 2.0), (state.params, stats))
    state, stats, taken = take_over(state, stats, source, optax.adam(0.1))
    found = jax.tree.leaves((state.params, stats))
    assert {(float(leaf.ravel()[0]), leaf.dtype.name) for leaf in found} == {(2.0, "float32")}
    assert tuple(map(len, taken)) == (len(found), 0, 0)
