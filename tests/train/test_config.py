import json
from pathlib import Path
from typing import get_args

import numpy as np
import pooch
import pytest
import requests

from bnjax import main, norms
from bnjax.data import datasets
from bnjax.data.datasets import Dataset, Split
from bnjax.errors import ConfigError, UserError
from bnjax.models.convnet import ACTIVATIONS, POOLS, Placement
from bnjax.models.layers import VIEWS, bfloat16_dot_general
from bnjax.models.resnet import RESNETS
from bnjax.train import build, parsing
from bnjax.train.config import KEYS, default_config


def dataset(n=100, shape=(32, 32, 3), fallback_reason=""):
    split = Split(np.zeros((n, *shape), np.uint8), np.zeros(n, np.int32))
    return Dataset("cifar10", "cifar10", None, split, split, tuple("abcdefghij"), fallback_reason)


def make(overrides=(), n=100, **more):
    config = default_config()
    config.train.batch_size, config.train.steps, config.train.epochs = 10, 0, 10.0
    for name, text in overrides:
        parsing.override(config, name, text)
    return build.experiment(config, dataset(n, **more))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("model.strides", "0,1,1"),
        ("model.momentum", "1.5"),
        ("model.dense_product", "float16"),
        ("model.momentum", "1.0"),
        ("model.momentum", "-0.1"),
        ("model.kernels", "3,3,3,3"),
        ("model.kernels", "3,3,33"),
        ("model.filters", "30,-1,60"),
        ("model.filters", "30,0.5,60"),
        ("model.dense", "3500,"),
        ("model.dropout", "0.5,1.0"),
        ("model.dropout", "0.5"),
        ("model.norm_dense", "1,0"),
        ("model.placement", "behind"),
        ("model.pooling", "median"),
        ("model.norm", "bach"),
        ("model.dtype", "float8"),
        ("model.activation", "step"),
        ("model.epsilon", "0"),
        ("train.batch_size", "101"),
        ("train.batch_size", "1"),
        ("train.micro_batches", "0"),
        ("train.micro_batches", "3"),
        ("train.micro_batches", "10"),
        ("train.target_loss", "0"),
        ("train.stop_at_loss", "-1"),
        ("train.steps", "7"),
        ("train.epochs", "0"),
        ("eval.every_epochs", "-1"),
        ("eval.batch_size", "0"),
        ("eval.histograms", "1"),
        ("eval.pictures", "101"),
        ("checkpoint.every_minutes", "-1"),
        ("data.fallback", "mnist"),
        ("data.train_images", "-1"),
        ("model.virtual_batch", "1"),
        ("train.most_skipped", "-1"),
        ("train.on_nonfinite", "wait"),
        ("optimizer.name", "sgdd"),
        ("seed", "-1"),
    ],
)
def test_an_impossible_value_is_refused_by_key(name, text):
    with pytest.raises(ConfigError) as caught:
        make([(name, text)])
    section, _, key = name.partition(".")
    assert f"config.{section}" in str(caught.value)
    assert key in str(caught.value)
    assert "Allowed: " in str(caught.value)


def test_the_defaults_are_allowed_and_have_the_types_of_their_checks():
    assert len({key.name for key in KEYS}) == len(KEYS)
    for key in KEYS:
        assert key.help
        assert key.allowed.words
        assert key.allowed.holds(key.default), key.name


def test_the_names_in_the_table_are_those_that_there_are():
    words = {key.name: key.allowed.words.split(", ") for key in KEYS}
    assert words["model.norm"] == list(norms.NORMS)
    assert words["model.activation"] == list(ACTIVATIONS)
    (views,) = (key.allowed for key in KEYS if key.name == "eval.views")
    assert [*VIEWS] == [n for n in range(10) if views.holds(n)]
    assert {*words["model.name"]} == {"convnet", "speednet", *RESNETS}
    assert words["model.pooling"] == ["none", *POOLS]
    assert words["model.placement"] == list(get_args(Placement))
    assert datasets.DIGITS in words["data.fallback"][0]


def test_a_norm_of_its_own_has_the_default_of_the_table():
    defaults = {key.norm: key.default for key in KEYS if key.norm}
    assert norms.GhostBatchNorm().virtual_batch == defaults["virtual_batch"]
    assert norms.BatchRenorm().renorm_steps == defaults["renorm_steps"]


def test_two_intervals_of_saving_are_refused():
    with pytest.raises(ConfigError, match=r"checkpoint\.every_\w+ = .*at most one of"):
        make([("checkpoint.every_steps", "5"), ("checkpoint.every_minutes", "1")])


def test_images_that_shrink_to_nothing_are_refused():
    with pytest.raises(ConfigError, match="at least one pixel"):
        make(shape=(10, 32, 3))
    make(shape=(11, 32, 3))  # 11 -> 5 -> 3 -> 1


@pytest.mark.parametrize(
    ("name", "text", "wanted"),
    [
        ("model.momentum", "0.9", 0.9),
        ("model.momentum", "0", 0.0),
        ("model.dense", "100", (100,)),
        ("model.filters", "(1, 2)", (1, 2)),
        ("model.filters", "[1,2]", (1, 2)),
        ("model.scale", "false", False),
        ("train.shuffle", "True", True),
        ("data.name", "mnist", "mnist"),
        ("data.dir", "12", "12"),
        ("seed", "3", 3),
    ],
)
def test_overrides_keep_the_type(name, text, wanted):
    config = default_config()
    parsing.override(config, name, text)
    value = config
    for key in name.split("."):
        value = value[key]
    assert value == wanted
    assert type(value) is type(wanted)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("seed", "a"),
        ("seed", "1.5"),
        ("model.scale", "1"),
        ("model.momentum", "x"),
        ("model.dense", "x"),
    ],
)
def test_overrides_of_another_type_are_refused(name, text):
    with pytest.raises(ConfigError, match=name):
        parsing.override(default_config(), name, text)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("model.momentun", r"Did you mean config\.model\.momentum\?"),
        ("modell.momentum", r"Did you mean config\.model\?"),
        ("seed.x", "no keys of its own"),
        ("model", "is a section"),
    ],
)
def test_an_unknown_key_is_named_with_what_there_is(name, said):
    with pytest.raises(UserError, match=said):
        parsing.override(default_config(), name, "1")


def test_a_config_file_and_its_overrides(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from bnjax.train.config import default_config\ndef get_config(): return default_config()\n"
    )
    config = parsing.load(str(file), ["--config.seed=4", "--config.model.momentum", "0.5"])
    assert (config.name, config.seed, config.model.momentum) == ("mine", 4, 0.5)


def test_low_precision_products_are_chosen_and_checked():
    config = default_config()
    config.model.dense_product = "bfloat16"
    assert build.network(config.model, 10, (32, 32, 3)).dense_product is bfloat16_dot_general
    config.model.dtype = "bfloat16"
    with pytest.raises(ConfigError, match=r"dense_product.*float32 with model\.dtype"):
        build.network(config.model, 10, (32, 32, 3))


@pytest.mark.parametrize(
    "content",
    [
        "",
        "1/0",
        "def get_config(): return 1/0",
        "def get_config(:",
        "raise SystemExit(0)",
        "def get_config(): return {'name': 'a'}",
    ],
)
def test_a_broken_config_file_is_a_clear_error(tmp_path, content):
    file = tmp_path / "mine.py"
    file.write_text(content)
    with pytest.raises(UserError, match=r"mine\.py"):
        parsing.load(str(file), [])


@pytest.mark.parametrize("flags", [["--confg.seed=1"], ["seed=1"], ["--config.seed"]])
def test_flags_that_are_no_overrides_are_refused(tmp_path, flags):
    file = tmp_path / "mine.py"
    file.write_text(
        "from bnjax.train.config import default_config\ndef get_config(): return default_config()\n"
    )
    with pytest.raises(UserError, match="Overrides look like"):
        parsing.load(str(file), flags)


def test_durations_become_steps():
    experiment = make([("train.epochs", "3")], n=100)
    assert (experiment.steps, experiment.eval_every, experiment.batch_size) == (30, 20, 10)


def test_what_stands_in_for_the_data_names_the_run_and_sets_its_batch():
    config, digits = default_config(), dataset(1438, fallback_reason="no network")
    config.name = "bn"
    used = build.stand_in(config, digits, [])
    assert (used.name, used.train.batch_size) == ("bn-cifar10", 143)
    assert build.experiment(used, digits).batch_size == 143
    assert (config.name, config.train.batch_size) == ("bn", 5000)
    assert build.stand_in(config, dataset(), []) == config
    config.train.micro_batches = 4
    assert build.experiment(build.stand_in(config, digits, []), digits).batch_size == 140


@pytest.mark.parametrize(
    "words", [["--config.train.batch_size=64"], ["--config.train.batch_size", "64"]]
)
def test_a_batch_size_of_the_command_line_is_kept(words):
    config, digits = default_config(), dataset(1438, fallback_reason="no network")
    for name, text in parsing.pairs(words):
        parsing.override(config, name, text)
    used = build.stand_in(config, digits, words)
    assert build.experiment(used, digits).batch_size == used.train.batch_size == 64


def test_a_run_on_such_data_says_and_saves_what_was_used(tmp_path, monkeypatch, capsys):
    def no_network(*_, **__):
        raise requests.ConnectionError

    monkeypatch.setattr(pooch, "retrieve", no_network)
    words = ["--config.model.filters=2,2,2", "--config.model.dense=4,4", "--config.train.steps=2"]
    few = ["--config.eval.histograms=0", "--config.eval.pictures=0"]
    config, folder = Path(__file__).parents[2] / "configs" / "bn.py", tmp_path / "run"
    command = ["train", "--config", str(config), "--workdir", str(folder), *words, *few]
    assert main.main(command) == 0
    assert "embedded set 'digits' instead, in batches of 143." in capsys.readouterr().err
    saved = json.loads((folder / "config.json").read_text())["config"]
    assert (saved["name"], saved["train"]["batch_size"]) == ("bn-digits", 143)
    assert json.loads((folder / "summary.json").read_text())["batch_size"] == 143
    assert main.main(command) == 0
    assert f"{folder} is finished" in capsys.readouterr().out


def test_an_average_that_keeps_its_starting_value_is_warned_of():
    def warnings(momentum, steps):
        return make(
            [("model.momentum", str(momentum)), ("train.steps", str(steps)), ("train.epochs", "0")]
        ).warnings

    assert warnings(0.99, 459) == ()  # 0.99 ** 459 < 0.01 < 0.99 ** 458
    (text,) = warnings(0.99, 458)
    assert "starting value" in text
    (text,) = warnings(0.99, 100)
    assert "37%" in text  # 0.99 ** 100 = 0.366
    assert warnings(0.75, 100) == ()
    assert make([("model.momentum", "0.99"), ("model.norm", "none")]).warnings == ()


def test_a_config_survives_json():
    config = default_config()
    config.model.dense = (5, 6, 7)
    config.model.dropout = (0.0, 0.1, 0.2)
    assert parsing.from_dict(json.loads(json.dumps(config.to_dict()))).to_dict() == config.to_dict()
