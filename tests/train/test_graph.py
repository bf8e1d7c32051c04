"""The graph of a model, against graphs drawn by hand."""

import flax.linen as nn
import jax.numpy as jnp

from bnjax.models.convnet import ConvNet
from bnjax.train.graph import graph_def


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        y = nn.BatchNorm(use_running_average=not train)(x)
        return x + nn.relu(nn.Dense(4)(y))


class Net(nn.Module):
    """A residual block, plain and rematerialised, a layer called twice, and one for nothing."""

    @nn.compact
    def __call__(self, x, train):
        x = x.reshape(x.shape[0], -1)
        twice = nn.Dense(4, name="twice")
        nn.Dense(7, name="nowhere")(x)
        x = twice(twice(x))
        x = Block(name="block")(x, train)
        x = nn.remat(Block, static_argnums=(2,))(name="again")(x, train)
        return nn.Dropout(0.5, deterministic=not train, name="drop")(x) + jnp.ones((1, 4))


def shape(node):
    return tuple(dim.size for dim in node.attr["_output_shapes"].list.shape[0].dim)


def parameters(node):
    return {name: value.s for name, value in node.attr.items() if name != "_output_shapes"}


def test_layers_and_what_lies_between_are_joined_as_the_data_flow():
    found = graph_def(Net(), (6, 2, 2, 1), jnp.float32).node
    assert [(node.name, node.op, [*node.input]) for node in found] == [
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
        ("drop", "Dropout", ["again/add"]),
        ("add", "add", ["drop"]),
    ]
    assert {shape(node) for node in found[1:]} == {(6, 4)}


def test_shapes_and_parameters_of_the_article_network():
    model = ConvNet(norm=nn.BatchNorm)
    found = {node.name: node for node in graph_def(model, (50, 32, 32, 3)).node}
    assert shape(found["conv1"]) == (50, 13, 13, 50)
    assert shape(found["reshape"]) == (50, 7260)
    assert shape(found["logits"]) == (50, 10)
    assert parameters(found["conv1"]) == {"kernel": b"3x3x30x50", "bias": b"50"}
    statistics = dict.fromkeys(("scale", "bias", "mean", "var"), b"30")
    assert parameters(found["conv1_norm"]) == statistics
    # Of its output, not of the statistics that it computes last.
    assert shape(found["conv1_norm"]) == (50, 15, 15, 30)


class Loop(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        def body(module, x, _):
            return nn.Dense(4, name="dense")(x), None

        x, _ = nn.scan(body, {"params": 0}, length=2, split_rngs={"params": True})(
            self, x.mean((1, 2)), None
        )
        return x


def test_a_loop_is_an_operation_before_and_one_after_its_body():
    found = graph_def(Loop(), (2, 2, 2, 4), jnp.float32).node
    assert [(node.name, [*node.input]) for node in found[-3:]] == [
        ("scan", ["div"]),
        ("dense", ["scan"]),
        ("scan_1", ["dense"]),
    ]
