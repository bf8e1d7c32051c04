"""The graph of a model, against a graph drawn by hand."""

import flax.linen as nn
import jax.numpy as jnp

from bnjax.train.graph import graph_def


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        y = nn.BatchNorm(use_running_average=not train)(x)
        return x + nn.relu(nn.Dense(4)(y))


class Loop(nn.Module):
    @nn.compact
    def __call__(self, x):
        def body(module, x, _):
            return nn.Dense(4, name="dense")(x), None

        loop = nn.scan(body, {"params": 0}, length=2, split_rngs={"params": True})
        return loop(self, x, None)[0]


class Net(nn.Module):
    """A layer that is called twice, an unused layer, a block with and without remat, and a loop."""

    @nn.compact
    def __call__(self, x, train):
        x = x.reshape(x.shape[0], -1)
        twice = nn.Dense(4, name="twice")
        nn.Dense(7, name="nowhere")(x)
        x = twice(twice(x))
        x = Block(name="block")(x, train)
        x = nn.remat(Block, static_argnums=(2,))(name="again")(x, train)
        x = Loop(name="loop")(x)
        return nn.Dropout(0.5, deterministic=not train, name="drop")(x) + jnp.ones((1, 4))


def test_layers_and_what_lies_between_are_joined_as_the_data_flow():
    found = {node.name: node for node in graph_def(Net(), (6, 2, 2, 1), jnp.float32).node}
    assert [(name, node.op, [*node.input]) for name, node in found.items()] == [
        ("images", "Placeholder", []),
        ("reshape", "reshape", ["images"]),
        ("twice", "Dense", ["reshape"]),
        ("twice_1", "Dense", ["twice"]),
        ("block/BatchNorm_0", "BatchNorm", ["twice_1"]),
        ("block/Dense_0", "Dense", ["block/BatchNorm_0"]),
        ("block/relu", "relu", ["block/Dense_0"]),
        ("block/add", "add", ["twice_1", "block/relu"]),
        ("again/BatchNorm_0", "BatchNorm", ["block/add"]),
        ("again/Dense_0", "Dense", ["again/BatchNorm_0"]),
        ("again/relu", "relu", ["again/Dense_0"]),
        ("again/add", "add", ["block/add", "again/relu"]),
        ("loop/scan", "scan", ["again/add"]),
        ("loop/dense", "Dense", ["loop/scan"]),
        ("loop/scan_1", "scan", ["loop/dense"]),
        ("drop", "Dropout", ["loop/scan_1"]),
        ("add", "add", ["drop"]),
    ]
    attributes = {name: dict(node.attr) for name, node in found.items()}
    shapes = {name: attr.pop("_output_shapes").list.shape[0] for name, attr in attributes.items()}
    sizes = {name: tuple(dim.size for dim in shape.dim) for name, shape in shapes.items()}
    assert sizes == dict.fromkeys(found, (6, 4)) | {"images": (6, 2, 2, 1)}
    leaves = {
        name: {leaf: one.s for leaf, one in attr.items()} for name, attr in attributes.items()
    }
    assert leaves["twice"] == {"kernel": b"4x4", "bias": b"4"}
    assert leaves["block/BatchNorm_0"] == dict.fromkeys(("scale", "bias", "mean", "var"), b"4")
