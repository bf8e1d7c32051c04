"""The graph of a model, against graphs drawn by hand."""

import flax.linen as nn
import jax.numpy as jnp
import pytest

from bnjax.models.convnet import ConvNet
from bnjax.train.graph import graph_def, nodes


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


def test_layers_and_what_lies_between_are_joined_as_the_data_flow():
    found = nodes(Net(), (6, 2, 2, 1), jnp.float32)
    assert [(node.name, node.op, node.inputs) for node in found] == [
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
    assert {node.shape for node in found[1:]} == {(6, 4)}


def test_shapes_and_parameters_of_the_article_network():
    found = {node.name: node for node in nodes(ConvNet(norm=nn.BatchNorm), (50, 32, 32, 3))}
    shapes = {
        name: found[name].shape
        for name in ("conv0", "conv1", "conv2", "reshape", "dense0", "dense1", "logits")
    }
    assert shapes == {
        "conv0": (50, 15, 15, 30),
        "conv1": (50, 13, 13, 50),
        "conv2": (50, 11, 11, 60),
        "reshape": (50, 7260),
        "dense0": (50, 3500),
        "dense1": (50, 700),
        "logits": (50, 10),
    }
    assert found["conv1"].parameters == {"kernel": (3, 3, 30, 50), "bias": (50,)}
    assert found["conv1_norm"].parameters == {
        "scale": (30,),
        "bias": (30,),
        "mean": (30,),
        "var": (30,),
    }
    assert found["conv1_norm"].shape == (
        50,
        15,
        15,
        30,
    )  # of its output, not of the statistics that it computes last


@pytest.mark.parametrize("model", [nn.Sequential([nn.Dense(3)]), nn.Dense(3)])
def test_a_model_without_the_argument_train_is_no_model_here(model):
    with pytest.raises(TypeError):
        nodes(model, (2, 2, 2, 1))


def test_a_model_that_is_one_layer_is_one_node():
    class Alone(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return x.mean((1, 2)) @ self.param("kernel", nn.initializers.ones, (1, 3))

    assert [(node.name, node.op) for node in nodes(Alone(), (2, 2, 2, 1), jnp.float32)] == [
        ("images", "Placeholder"),
        ("Alone", "Alone"),
    ]


def test_the_graph_def_has_the_same_nodes_edges_and_shapes():
    found = nodes(Net(), (6, 2, 2, 1), jnp.float32)
    written = {node.name: node for node in graph_def(found).node}
    assert list(written) == [node.name for node in found]
    assert list(written["block/add"].input) == ["twice_1", "block/relu"]
    assert [dim.size for dim in written["twice"].attr["_output_shapes"].list.shape[0].dim] == [6, 4]
    assert written["twice"].attr["kernel"].s == b"4x4"
