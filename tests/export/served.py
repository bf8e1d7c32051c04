"""A network to serve, its scores in NumPy, and a server in a thread."""

import contextlib
import io
import threading
import time
from types import SimpleNamespace

import flax.linen as nn
import jax
import numpy as np
import requests
import uvicorn
from PIL import Image

from bnjax.commands.serve import listen
from bnjax.export.app import application
from bnjax.export.network import STORED, About, Answer, RunNetwork
from bnjax.export.uploads import Limits
from bnjax.train.trained import Trained

CLASSES = ("cat", "dog", "owl")
SHAPE = (6, 5, 3)
EPSILON = 1e-5


class Net(nn.Module):
    """Small enough to be written down in NumPy; with a norm over positions, and one over none."""

    @nn.compact
    def __call__(self, x, *, train):
        x = nn.BatchNorm(use_running_average=not train, epsilon=EPSILON, name="norm_in")(x)
        x = nn.Dense(4, name="dense")(x.mean((1, 2)))
        x = nn.BatchNorm(use_running_average=not train, epsilon=EPSILON, name="dense_norm")(x)
        return nn.Dense(len(CLASSES), name="logits")(nn.relu(x))


def trained(seed=0):
    """What `Trained` reads from a run's folder, with weights and statistics that are random."""
    rng, model = np.random.default_rng(seed), Net()
    variables = model.init(jax.random.key(0), np.zeros((2, *SHAPE), np.float32), train=False)
    random = jax.tree.map(
        lambda leaf: rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32), dict(variables)
    )
    random["params"]["logits"]["kernel"] *= 2 * rng.normal(size=(4, 3)).astype(np.float32)
    random["params"]["dense"]["kernel"] = rng.normal(size=(3, 4)).astype(np.float32)
    network = object.__new__(Trained)
    vars(network).update(
        model=model,
        params=random["params"],
        batch_stats=random["batch_stats"],
        step=7,
        config=SimpleNamespace(name="small"),
        data=SimpleNamespace(label="noise", classes=CLASSES, image_shape=SHAPE),
    )
    return network


def scores(network, images, statistics):
    """Scores, and the moments that both norms are given, in NumPy and float64."""
    given = {}
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), network.params)

    def norm(name, x):
        axes = tuple(range(x.ndim - 1))
        given[name] = x.mean(axes), x.var(axes)
        stored = (network.batch_stats[name][leaf] for leaf in ("mean", "var"))
        mean, var = {"stored": stored, "batch": given[name], "none": (0, 1)}[statistics]
        y = (x - mean) / np.sqrt(np.asarray(var, np.float64) + EPSILON)
        return y * params[name]["scale"] + params[name]["bias"]

    x = norm("norm_in", np.asarray(images, np.float64) / 255)
    x = x.mean((1, 2)) @ params["dense"]["kernel"] + params["dense"]["bias"]
    x = np.maximum(norm("dense_norm", x), 0)
    logits = x @ params["logits"]["kernel"] + params["logits"]["bias"]
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True), given


class Stub:
    """A network without any, for what does not depend on one."""

    stored = ()
    about = About("run", "stub", 1, "nothing", CLASSES, SHAPE, (STORED,), {})

    def __init__(self, score=(0.5, 0.25, 0.25)):
        self.score = score

    def predict(self, images, statistics):
        score = np.tile(np.array(self.score, np.float32), (len(images), 1))
        return Answer({"class": score.argmax(-1), "score": score}, [])


def small_network():
    return RunNetwork(trained())


@contextlib.contextmanager
def server(network, hosts=None, **limits):
    """Yields the address of a server, in a thread, for a network."""
    with listen("127.0.0.1", 0) as listener:
        config = uvicorn.Config(
            application(network, Limits(**limits), hosts),
            loop="asyncio",
            http="h11",
            ws="none",
            log_level="critical",
            timeout_graceful_shutdown=1,
        )
        running = uvicorn.Server(config)
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            while not running.started and thread.is_alive():
                time.sleep(0.01)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            running.should_exit = True
            thread.join()


def png(pixels, kind="PNG"):
    """The bytes of a file of an image uint8 [h, w] or [h, w, c]."""
    with io.BytesIO() as file:
        Image.fromarray(pixels).save(file, kind)
        return file.getvalue()


def noise(count, seed=0, shape=SHAPE):
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), np.uint8)


def post(url, files, **fields):
    """Sends files, each bytes, or a name and bytes, to /predict."""
    named = [one if isinstance(one, tuple) else (f"{i}.png", one) for i, one in enumerate(files)]
    parts = [("image", one) for one in named]
    return requests.post(f"{url}/predict", files=parts, data=fields, timeout=60)
