"""What the running statistics cost, recorded at each evaluation: figures, files, and no more."""

import functools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import synthetic
from events import read_values

from bnjax.errors import UserError
from bnjax.norms import BatchNorm
from bnjax.stats.gap import Drift, drift, gap
from bnjax.stats.layers import norm_layers
from bnjax.stats.precise import put
from bnjax.train import build
from bnjax.train.checkpoint import Checkpoints
from bnjax.train.interrupt import StopRequest
from bnjax.train.loop import Trainer, train_and_evaluate
from bnjax.train.records import RunWriter, read_metrics
from bnjax.train_step import eval_step, init_variables

IMAGES = 20  # of 48 training images
NORMS = ["conv0_norm", "dense0_norm", "logits_norm"]


def config():
    config = synthetic.config()
    config.eval.gap_images = IMAGES
    config.model.dropout = (0.0,)
    return config


def without():
    found = config()
    found.eval.gap_images = 0
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    train_and_evaluate(config(), folder, synthetic.dataset())
    return folder


def lines_of(folder, *splits):
    return [line for line in read_metrics(folder / "metrics.jsonl") if line["split"] in splits]


def checkpoint(folder, step):
    model = build.experiment(config(), synthetic.dataset()).model
    like = jax.eval_shape(
        lambda: init_variables(model, jax.random.key(0), synthetic.dataset().train.image[:1])
    )
    with Checkpoints(folder / "checkpoints", read_only=True) as checkpoints:
        return model, *checkpoints.restore_variables(step, like)


def test_each_evaluation_leaves_what_flax_says_of_the_same_images(finished):
    lines = lines_of(finished, "gap")
    assert [line["step"] for line in lines] == [5, 10, 12]
    split = synthetic.dataset().train
    rows = np.arange(IMAGES) * 48 // IMAGES  # at equal distances
    image, label = split.image[rows].astype(np.float32) / 255, split.label[rows]
    for line in lines[1:]:
        model, params, stats = checkpoint(finished, line["step"])
        variables = {"params": params, "batch_stats": stats}
        # A step with momentum 0.75: a quarter of the batch's statistics is in the new averages.
        by_batch, written = model.apply(variables, image, train=True, mutable=["batch_stats"])
        stored = model.apply(variables, image, train=False)
        for prefix, logits in (("", stored), ("batch_", by_batch)):
            of_each = jax.nn.logsumexp(logits, -1) - logits[np.arange(IMAGES), label]
            np.testing.assert_allclose(line[f"{prefix}loss"], of_each.mean(), rtol=1e-5)
            assert line[f"{prefix}accuracy"] == float((logits.argmax(-1) == label).mean())
        assert line["loss"] != line["batch_loss"]
        assert line["count"] == IMAGES
        assert list(line["drift_mean"]) == list(line["drift_variance"]) == NORMS
        for name in NORMS:
            old, new = (
                {k: np.float64(v) for k, v in of[name].items()}
                for of in (stats, written["batch_stats"])
            )
            true = {key: 4 * new[key] - 3 * old[key] for key in old}
            apart = (old["mean"] - true["mean"]) / np.sqrt(true["var"] + 1e-3)
            ratio = np.log((old["var"] + 1e-3) / (true["var"] + 1e-3))
            assert line["drift_mean"][name] == pytest.approx(np.sqrt((apart**2).mean()), rel=1e-3)
            assert line["drift_variance"][name] == pytest.approx(ratio.mean(), abs=1e-4)


def test_averages_that_were_never_updated_are_far_off():
    x = np.random.default_rng(0).normal(3, 0.1, (64, 1, 1, 2)).astype(np.float32)
    model = _Norm()
    params, stats = init_variables(model, jax.random.key(0), x)
    batch = {"image": x, "label": np.zeros(64, np.int32)}
    found = gap(params, stats, batch, model=model)
    layers = norm_layers(model, params, stats, batch, train=False)
    (drifted,) = drift(stats, put(stats, found.seen, layers), layers).values()
    values = x.astype(np.float64)[:, 0, 0]
    mean, var = values.mean(0), values.var(0) + 1e-2
    assert drifted.mean == pytest.approx(np.sqrt((mean**2 / var).mean()), rel=1e-5)
    assert drifted.variance == pytest.approx(np.log(1.01 / var).mean(), rel=1e-4)
    assert drifted.variance > 3  # a stored variance of 1 where 0.01 is right


def test_padding_counts_for_nothing_and_what_is_true_has_no_drift():
    rng = np.random.default_rng(1)
    model = _Norm()
    x, label = rng.normal(1, 2, (9, 2, 2, 2)).astype(np.float32), np.arange(9, dtype=np.int32) % 2
    params, stats = init_variables(model, jax.random.key(0), x)
    padded = {
        "image": np.concatenate([x, np.full((3, 2, 2, 2), np.nan, np.float32)]),
        "label": np.concatenate([label, np.zeros(3, np.int32)]),
        "mask": np.arange(12) < 9,
    }
    compiled = jax.jit(functools.partial(gap, model=model))
    whole, masked = (compiled(params, stats, b) for b in ({"image": x, "label": label}, padded))
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(masked), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)
    layers = norm_layers(model, params, stats, padded, train=False)
    true = put(stats, masked.seen, layers)
    assert drift(true, true, layers) == {"BatchNorm_0": (0.0, 0.0)}
    under_own = eval_step(params, true, padded, model=model)
    np.testing.assert_allclose(masked.batch.loss, under_own.loss, rtol=1e-5)
    assert int(masked.stored.count) == int(masked.batch.count) == 9


class _Norm(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return BatchNorm(use_running_average=not train, epsilon=1e-2)(x).mean((1, 2))


def test_tensorboard_gets_the_same_numbers(finished):
    values = read_values(finished / "tensorboard")
    for number, line in enumerate(lines_of(finished, "gap")):
        wanted = {f"gap/{key}": line[key] for key in ("loss", "accuracy", "batch_loss")}
        for of in ("drift_mean", "drift_variance"):
            wanted |= {f"{of}/{name}": line[of][name] for name in NORMS}
        for tag, value in wanted.items():
            step, found = values[tag][number]
            assert (step, found.simple_value) == (line["step"], pytest.approx(value))


def test_nothing_else_changes(finished, tmp_path):
    train_and_evaluate(without(), tmp_path / "run", synthetic.dataset())
    assert lines_of(tmp_path / "run", "gap") == []
    assert lines_of(tmp_path / "run", "train", "test") == lines_of(finished, "train", "test")
    for mine, its in zip(
        jax.tree.leaves(checkpoint(tmp_path / "run", 12)[1:]),
        jax.tree.leaves(checkpoint(finished, 12)[1:]),
        strict=True,
    ):
        np.testing.assert_array_equal(mine, its)


def test_a_run_that_died_and_goes_on_has_every_line_once(finished, tmp_path):
    feed = synthetic.feed(config(), first=7)
    with pytest.raises(StopIteration):
        train_and_evaluate(config(), tmp_path / "run", synthetic.dataset(), feed)
    train_and_evaluate(config(), tmp_path / "run", synthetic.dataset())
    metrics = [folder / "metrics.jsonl" for folder in (tmp_path / "run", finished)]
    assert metrics[0].read_bytes() == metrics[1].read_bytes()


def test_several_seeds_in_one_program(finished, tmp_path):
    folders = {seed: tmp_path / str(seed) for seed in (0, 1)}
    with StopRequest() as stop:
        Trainer(config(), synthetic.dataset()).train(folders, stop)
    mine, its = (lines_of(folder, "gap")[0] for folder in (folders[0], finished))
    assert mine["batch_loss"] == pytest.approx(its["batch_loss"], rel=1e-3)
    assert mine["drift_mean"] == pytest.approx(its["drift_mean"], rel=1e-2)
    assert lines_of(folders[1], "gap")[0]["drift_mean"] != pytest.approx(mine["drift_mean"])


@pytest.mark.parametrize("norm", ["layer", "none"])
def test_a_network_without_running_statistics_has_no_gap(norm, tmp_path):
    plain = config()
    plain.model.norm, plain.train.steps = norm, 1
    train_and_evaluate(plain, tmp_path / "run", synthetic.dataset())
    assert lines_of(tmp_path / "run", "gap") == []


@pytest.mark.parametrize(
    "change",
    [
        {"batch_loss": "low"},
        {"batch_accuracy": None},
        {"drift_mean": [1.0]},
        {"drift_variance": {"norm": "far"}},
        {"split": "valid"},
    ],
)
def test_a_damaged_line_is_told(finished, tmp_path, change):
    line = lines_of(finished, "gap")[0]
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    assert read_metrics(tmp_path / "metrics.jsonl") == [line]
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line | change) + "\n")
    with pytest.raises(UserError, match="step 5"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_what_is_not_finite_is_null(tmp_path):
    x, model = np.ones((4, 1, 1, 1), np.float32), _Norm()
    params, true = init_variables(model, jax.random.key(0), x)
    layers = norm_layers(model, params, true, {"image": x}, train=False)
    bad = {"BatchNorm_0": {"mean": jnp.array([jnp.inf]), "var": jnp.array([-5.0])}}
    drifts = drift(bad, true, layers)
    means = {key: float("nan") for key in ("loss", "batch_loss")}
    with RunWriter(tmp_path, start=0) as writer:
        writer.gap(
            1,
            means | {"accuracy": 0.0, "batch_accuracy": 0.0},
            4,
            {f"drift_{of}": {n: getattr(d, of) for n, d in drifts.items()} for of in Drift._fields},
        )
    (line,) = read_metrics(tmp_path / "metrics.jsonl")
    nothing = {"BatchNorm_0": None}
    assert (line["loss"], line["drift_mean"], line["drift_variance"]) == (None, nothing, nothing)
