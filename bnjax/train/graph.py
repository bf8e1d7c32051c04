"""Builds the graph of a linen module for TensorBoard, with the inputs of each layer."""

import itertools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax.traverse_util import flatten_dict
from tensorboardX.proto.attr_value_pb2 import AttrValue
from tensorboardX.proto.graph_pb2 import GraphDef
from tensorboardX.proto.node_def_pb2 import NodeDef
from tensorboardX.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboardX.proto.versions_pb2 import VersionDef

from bnjax.clinic.jaxpr import Node, layers
from bnjax.clinic.linen import linen
from bnjax.train_step import init_variables


def graph_def(model: nn.Module, shape: Sequence[int], dtype: Any = np.uint8) -> GraphDef:
    """Returns the graph of the forward pass of a training step, without computing it.

    Each innermost module is one node, with the shapes of its parameters; each operation between
    modules is a node too. The names of nodes are paths separated by "/".

    Args:
        model: any linen module with `__call__(x, train=...)`.
        shape: the shape of a batch of images, (n, h, w, c).
        dtype: the dtype of the images.
    """
    key = jax.random.key(0)
    images = jax.ShapeDtypeStruct(tuple(shape), dtype)
    variables: Any = jax.eval_shape(lambda image: init_variables(model, key, image), images)
    network = linen(model, *variables)
    leaves = [item for tree in variables for item in flatten_dict(tree).items()]
    names: dict[Node, str] = {}
    found = []
    for node in layers(network, {"image": images}, train=True, dropout=key)[:-1]:
        path = name = "/".join(node.path) or node.kind
        count = itertools.count(1)
        while name in names.values():
            name = f"{path}_{next(count)}"
        names[node] = name
        shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=size) for size in node.shape])
        attributes = {"_output_shapes": AttrValue(list=AttrValue.ListValue(shape=[shape]))}
        for (*own, leaf_name), leaf in leaves if node.call is not None else ():
            if (*own,) == node.path:
                attributes[leaf_name] = AttrValue(s="x".join(map(str, leaf.shape)).encode())
        inputs = [names[one] for one in node.inputs]
        found.append(NodeDef(name=name, op=node.kind, input=inputs, attr=attributes))
    return GraphDef(node=found, versions=VersionDef(producer=22))
