"""From the command to the model: how many functions a reader has to go through."""

import traceback

import flax.linen as nn
import pytest

from bnjax import main
from bnjax.train import network


class Reached(Exception):
    pass


class Raising(nn.Module):
    """Raises in the forward pass of training."""

    @nn.compact
    def __call__(self, x, train):
        if train:
            raise Reached
        return nn.Dense(10)(x.reshape(len(x), -1))


def test_at_most_six_functions_lie_between_the_command_and_the_model(tmp_path, monkeypatch):
    monkeypatch.setattr(network, "ConvNet", lambda **options: Raising())
    config = "configs/digits.py"
    words = ["train", "--config", config, "--workdir", str(tmp_path / "run")]
    with pytest.raises(Reached) as reached:
        main.main(words)
    frames = [frame.name for frame in traceback.extract_tb(reached.value.__traceback__)]
    files = [frame.filename for frame in traceback.extract_tb(reached.value.__traceback__)]
    ours = [name for name, file in zip(frames, files, strict=True) if "/bnjax/" in file]
    first, last = ours.index("train"), ours.index("forward")
    assert ours[first + 1 : last + 1] == ["train", "_train", "one", "train_step", "loss", "forward"]
