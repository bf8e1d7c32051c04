"""Config files, overrides, and which values are refused."""

import ast
import dataclasses
import functools
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import get_args

import jax
import numpy as np
import optax
import pooch
import pytest
import small_digits
import synthetic
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import VALUES

from bnjax import main, norms
from bnjax.data.datasets import Dataset, Split
from bnjax.errors import ConfigError, UserError
from bnjax.models.convnet import ACTIVATIONS, POOLS, ConvNet, Placement
from bnjax.models.layers import VIEWS, bfloat16_dot_general
from bnjax.models.resnet import RESNETS
from bnjax.train import build, parsing
from bnjax.train.config import KEYS, default_config
from bnjax.train_step import init_state, train_step

ROOT = Path(__file__).parents[2]
DATA = synthetic.dataset()
FILES = sorted((ROOT / "configs").glob("*.py"))


def dataset(n=100, shape=(32, 32, 3), fallback_reason=""):
    split = Split(np.zeros((n, *shape), np.uint8), np.zeros(n, np.int32))
    return Dataset("cifar10", "cifar10", None, split, split, tuple("abcdefghij"), fallback_reason)


def loaded(*words, file="bn"):
    """A shipped config with overrides, given as they are on a command line but for their start."""
    return parsing.load(file, [f"--config.{word}" for word in words])


def network(*words):
    return build.network(loaded(*words).model, 10, (32, 32, 3))


def made(*words, file="bn", n=100, **more):
    return build.experiment(loaded("train.batch_size=10", *words, file=file), dataset(n, **more))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_config_builds_and_its_docstring_gives_command_time_and_result(path):
    config = parsing.load(str(path), [])
    assert build.experiment(config, dataset(50_000)).steps > 0
    doc = ast.get_docstring(ast.parse(path.read_text())) or ""
    assert f"python -m bnjax.main --config configs/{path.name}" in doc
    assert "Time: " in doc
    assert "Expected: " in doc


def test_the_default_network_is_the_default_of_its_class():
    model = build.network(default_config().model, 10, (32, 32, 3))
    for field in dataclasses.fields(ConvNet()):
        if field.init and field.name not in ("norm", "dtype", "parent", "name"):
            assert getattr(model, field.name) == getattr(ConvNet(), field.name), field.name


def test_the_tutorials_schedule():
    found = build.experiment(loaded(), dataset(50_000))
    assert (found.steps, found.eval_every) == (100, 20)
    assert (found.batch_size, found.shuffle) == (5000, False)
    without = build.experiment(loaded(file="no_bn"), dataset(50_000))
    assert (without.steps, without.model.norm) == (400, None)


RESNET, SPEED = ("model.name=resnet18",), ("model.name=speednet",)
REFUSED = """
model.strides=0,1,1 | model.momentum=1.5 | model.momentum=1.0 | model.momentum=-0.1
model.dense_product=float16 | model.kernels=3,3,3,3 | model.kernels=3,3,33
model.filters=30,-1,60 | model.filters=30,0.5,60 | model.dropout=0.5,1.0 | model.dropout=0.5
model.dropout=0.5,0.5,0.5 | model.norm_dense=1,0 | model.placement=input
model.pooling=median | model.norm=bach
model.dtype=float8 | model.activation=step | model.epsilon=0 | model.mean=0.5 | model.variance=n
model.virtual_batch=1 | model.renorm_steps=1 | train.batch_size=101 | train.batch_size=1
train.micro_batches=0 | train.micro_batches=3 | train.micro_batches=10 | train.target_loss=0
train.stop_at_loss=-1 | train.steps=7 train.epochs=2 | train.steps=0 | train.epochs=-2
train.most_skipped=-1 | train.on_nonfinite=wait | eval.every_epochs=-1 | eval.batch_size=0
eval.histograms=1 | eval.gap_images=1 | eval.pictures=101 | eval.views=3 | eval.views_share=0
checkpoint.every_minutes=-1 | checkpoint.every_minutes=1 checkpoint.every_steps=5 | seed=-1
data.fallback=mnist | data.train_images=-1 | data.crop=random data.pipeline=stream
data.pipeline=memory data.name=records | data.image_size=8
data.shorter_side=7 data.image_size=8 data.pipeline=stream
optimizer.drops=0.5 | optimizer.drops=0.5,1.5 optimizer.schedule=steps
optimizer.name=sgdd | optimizer.schedule=step | optimizer.learning_rate=0 | optimizer.b1=1.0
optimizer.eps=0 | optimizer.momentum=-0.1 | optimizer.momentum=0.9 | optimizer.average_decay=0.5
optimizer.b1=0.5 optimizer.name=sgd | muon.rescale_every=0,1 | augment.flip=always
model.groups=4 model.norm=group model.placement=before
model.placement=pre model.norm=group model.groups=1
model.norm_dense=true,false model.norm=instance model.placement=before
model.placement=pre model.norm=instance model.norm_dense=false,false
model.placement=after model.norm=frn model.norm_dense=false,false
model.kernels=5,5,5 model.name=speednet | model.dense=10 model.name=speednet
model.std=0.5 model.mean=0.5,0.5,0.5 model.name=speednet | model.norm=frn model.name=speednet
model.groups=7 model.norm=group model.name=speednet | model.filters=8,8,8,8 model.name=speednet
model.filters=8,12,20 model.name=resnet18 | model.placement=after model.name=resnet18
model.groups=7 model.name=resnet18 model.placement=before model.norm=group
model.dense_product=bfloat16 model.dtype=bfloat16
"""


@pytest.mark.parametrize("words", REFUSED.strip().replace("\n", "|").split("|"))
def test_an_impossible_value_is_refused_by_key(words):
    words = words.strip()
    section, key = words.partition("=")[0].partition(".")[::2]
    with pytest.raises(ConfigError, match=rf"config\.{section}.*{key}.* Allowed: "):
        made(*words.split())


NAMES = st.sampled_from([key.name for key in KEYS]) | st.text(max_size=12)


@settings(max_examples=40)
@given(st.lists(st.tuples(NAMES, VALUES), min_size=1, max_size=4))
def test_any_overrides_build_or_are_refused(overrides):
    config = synthetic.config()
    try:
        for name, text in overrides:
            parsing.override(config, name, text)
        experiment = build.experiment(config, DATA)
    except UserError as error:
        assert str(error)
    else:
        assert experiment.steps >= 1


def test_the_table_of_keys_is_consistent_with_what_there_is():
    assert len({key.name for key in KEYS}) == len(KEYS)
    assert all(key.help and key.allowed.holds(key.default) for key in KEYS)
    words = {key.name: key.allowed.words.split(", ") for key in KEYS}
    assert words["model.norm"] == [*norms.NORMS, "none"]
    assert words["model.activation"] == list(ACTIVATIONS)
    assert {*words["model.name"]} == {"convnet", "speednet", *RESNETS}
    assert words["model.pooling"] == ["none", *POOLS]
    assert words["model.placement"] == list(get_args(Placement))
    (views,) = (key.allowed for key in KEYS if key.name == "eval.views")
    assert [*VIEWS] == [n for n in range(10) if views.holds(n)]


def test_images_that_shrink_to_nothing_are_refused():
    with pytest.raises(ConfigError, match="at least one pixel"):
        made(shape=(10, 32, 3))
    made(shape=(11, 32, 3))  # 11 -> 5 -> 3 -> 1


START = "from bnjax.train.config import default_config as d\ndef get_config():\n    c = d(); "


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        ("--config.seed=a", r"config\.seed = 'a'"),
        ("--config.model.use_scale=1", r"config\.model\.use_scale = 1"),
        ("--config.model.momentun=1", r"Did you mean config\.model\.momentum\?"),
        ("--config.groups=1", r"Did you mean config\.model\.groups\?"),
        ("--config.momentum=1", r"mean config\.model\.momentum or config\.optimizer"),
        ("--config.modell.momentum=1", r"Did you mean config\.model\?"),
        ("--config.seed.x=1", "seed has: no keys"),
        ("--config.model=1", "is a section"),
        ("--config.optimizer.loss=sum", r"renamed to config\.optimizer\.reduction"),
        ("--confg.seed=1", "Overrides look like"),
        ("--config.seed", "Overrides look like"),
        ("c.model.momentun = 1; return c", r"Did you mean config\.model\.momentum"),
        ("c.model.scale = False; return c", r"renamed to config\.model\.use_scale"),
        ("return None", r"mine\.py returned no config"),
        ("raise SystemExit(0)", r"mine\.py raised SystemExit"),
        ("return (", r"mine\.py raised SyntaxError"),
    ],
)
def test_a_mistake_in_a_config_file_or_an_override_is_one_sentence(tmp_path, mistake, said):
    body, words = ("return c", [mistake]) if mistake.startswith("--") else (mistake, [])
    (tmp_path / "mine.py").write_text(f"{START}{body}\n")
    with pytest.raises(UserError, match=said):
        parsing.load(str(tmp_path / "mine.py"), words)


def test_overrides_and_json_keep_the_types(tmp_path):
    (tmp_path / "mine.py").write_text(f"{START}return c\n")
    given = {"seed": 4, "model.momentum": 0.5, "model.dense": "100", "model.use_scale": "false"}
    given |= {"data.dir": 12, "model.epsilon": 1}
    words = [f"--config.{key}={value}" for key, value in given.items()]
    config = parsing.load(str(tmp_path / "mine.py"), words)
    found = [config[key] for key in given]
    assert (config.name, *map(repr, found)) == (
        "mine",
        "4",
        "0.5",
        "(100,)",
        "False",
        "'12'",
        "1.0",
    )
    values = config.to_dict()
    assert parsing.from_dict(json.loads(json.dumps(values))) == config
    values["model"]["shift"] = values["model"].pop("use_bias")
    with pytest.raises(UserError, match=r"renamed to config\.model\.use_bias"):
        parsing.from_dict(values)


def test_a_duration_in_one_unit_replaces_the_other():
    assert made("train.epochs=3").steps == 30
    assert made("train.epochs=3", "eval.every_steps=7").eval_every == 7
    assert made("train.steps=7", file="digits").steps == 7
    assert made("train.steps=0", "train.epochs=0.001").steps == 1  # at least


def test_shipped_files_are_found_by_name_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parsing.find("bn", "config").samefile(ROOT / "configs/bn.py")
    assert parsing.find("momentum", "claim").samefile(ROOT / "configs/claims/momentum.py")
    (own := tmp_path / "bn").write_text("")
    assert parsing.find("bn", "config").samefile(own)
    with pytest.raises(UserError, match=r"no config file configs/bn\.py.*: airbench94, bn,"):
        parsing.find("configs/bn.py", "config")


@pytest.mark.slow
def test_an_installed_package_has_the_configs(tmp_path):
    build_wheel = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-q", "-w", tmp_path, ROOT]
    subprocess.run(build_wheel, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    code = "from bnjax.train.parsing import find; print(find('bn', 'config'))"
    options = {"env": {"PYTHONPATH": str(tmp_path / "installed")}, "cwd": tmp_path, "text": True}
    command = [sys.executable, "-P", "-c", code]
    found = subprocess.run(command, check=True, capture_output=True, **options).stdout.strip()
    assert found == str(tmp_path / "installed/bnjax/configs/bn.py")


def test_the_options_reach_the_layers():
    options = {"use_scale": False, "use_bias": False}
    averages = options | {"momentum": 0.6, "debias": True, "variance": "unbiased"}
    ghost, renorm = averages | {"virtual_batch": 7}, averages | {"renorm_steps": 16}
    for name, wanted in {"ghost": ghost, "renorm": renorm, "layer": options}.items():
        words = (f"model.{key}={value}" for key, value in wanted.items())
        layer = network(f"model.norm={name}", *words).norm(name="x")
        assert {key: getattr(layer, key) for key in wanted} == wanted
    assert network("model.weight_standardization=true").conv is norms.StandardizedConv
    assert network("model.dense_product=bfloat16").dense_product is bfloat16_dot_general


# Options for norms that do not work with the options above.
WORKING = {
    "ghost": ("virtual_batch=4",),
    "group": ("placement=before", "groups=2"),
    "instance": ("placement=after", "norm_dense=false"),
    "frn": ("placement=before", "norm_dense=false"),
}


@pytest.mark.parametrize("name", [*norms.NORMS, "none"])
def test_a_step_of_every_norm_has_its_statistics_and_its_activation(name):
    words = ["filters=6", "kernels=3", "strides=2", "dense=8", "dropout=0", "norm_dense=true"]
    words += [f"norm={name}", *WORKING.get(name, ())]
    model, tx = network(*(f"model.{word}" for word in words)), optax.sgd(0.1)
    batch = {"image": np.zeros((16, 32, 32, 3)), "label": np.zeros(16, int)}
    batch["mask"] = batch["label"] == 0
    init = functools.partial(init_state, model, tx)
    state, stats = jax.eval_shape(init, jax.random.key(0), batch["image"])
    step = functools.partial(train_step, model=model, tx=tx)
    assert jax.eval_shape(step, state, stats, batch)[:2] == (state, stats)
    assert bool(stats) == (name in norms.BATCH_NORMS)
    # Only the thresholded unit has parameters.
    units = {layer for layer in state.params if layer.endswith("activation")}
    assert units == ({"conv0_activation"} if name == "frn" else set())


def test_an_average_that_keeps_its_starting_value_is_warned_of():
    def warnings(*words):
        return made("model.momentum=0.99", *words).warnings

    assert warnings("train.steps=459") == ()  # 0.99 ** 459 < 0.01 < 0.99 ** 458
    for steps, said in (
        (458, "initial values"),
        (220, "0.97 or less"),  # 0.98 ** 220 = 0.012 is above 1 %
        (100, "37%"),  # 0.99 ** 100 = 0.366
    ):
        assert said in warnings(f"train.steps={steps}")[0]
    for word in ("model.norm=none", "model.debias=true", "eval.statistics=precise"):
        assert warnings(word) == ()


def test_data_that_stand_in_name_the_run_and_set_its_batch():
    digits = dataset(1438, fallback_reason="no network")

    def used(*words, of=digits):
        overrides = [f"--config.{word}" for word in words]
        config = build.stand_in(parsing.load("bn", overrides), of, overrides)
        return config.name, build.experiment(config, digits).batch_size

    assert used() == ("bn-cifar10", 143)
    assert used("train.micro_batches=4") == ("bn-cifar10", 140)
    assert used("train.batch_size=64") == ("bn-cifar10", 64)
    assert used("train.batch_size=64", of=dataset()) == ("bn", 64)


@pytest.mark.slow
def test_a_run_on_such_data_says_and_saves_what_was_used(tmp_path, monkeypatch, capsys):
    def no_network(*_, **__):
        raise ConnectionError

    monkeypatch.setattr(pooch, "retrieve", no_network)
    command = ["train", "--config", "bn", "--workdir", str(tmp_path / "run"), *small_digits.TINY]
    assert main.main(command) == 0
    assert "embedded data set 'digits' instead, in batches of 143." in capsys.readouterr().err
    saved = json.loads((tmp_path / "run/config.json").read_text())["config"]
    assert (saved["name"], saved["train"]["batch_size"]) == ("bn-digits", 143)
    assert main.main(command) == 0
    assert f"{tmp_path / 'run'} is finished" in capsys.readouterr().out
