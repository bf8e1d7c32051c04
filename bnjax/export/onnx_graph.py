"""An ONNX graph while it is written: nodes, constants, and the fresh names of both."""

from collections import Counter
from typing import Any

import numpy as np
from onnx import NodeProto, TensorProto, helper, numpy_helper

# A value of the program: known now, or the name of what computes it later.
Value = np.ndarray | str


class Graph:
    """Nodes in the order of their computation, and the arrays that they read."""

    def __init__(self, images: str):
        """Begins a graph that is given `images`, whose first axis is the batch."""
        self._images = images
        self._batch: str | None = None
        self.nodes: list[NodeProto] = []
        self.arrays: dict[str, np.ndarray] = {}
        self._names: dict[int, tuple[str, Any]] = {}  # with the array, so that its id stays its own
        self._count: Counter[str] = Counter()

    def add(self, op: str, *inputs: Value, **attributes: Any) -> str:
        """Adds a node, and returns the name of its output."""
        return self.add_many(op, 1, *inputs, **attributes)[0]

    def add_many(self, op: str, outputs: int, *inputs: Value, **attributes: Any) -> list[str]:
        """Adds a node with several outputs, and returns their names."""
        name = self._fresh(op.lower())
        names = [name] if outputs == 1 else [f"{name}_{i}" for i in range(outputs)]
        given = [self.name(value) for value in inputs]
        self.nodes.append(helper.make_node(op, given, names, name=name, **attributes))
        return names

    def name(self, value: Value) -> str:
        """Returns the name of a value; an array becomes a constant of the graph."""
        if isinstance(value, str):
            return value
        if id(value) not in self._names:
            name = self._fresh("constant")
            self._names[id(value)] = name, value
            self.arrays[name] = value
        return self._names[id(value)][0]

    def batch(self) -> str:
        """Returns the name of the number of images, int64 [1]."""
        if self._batch is None:
            self._batch = self.add("Shape", self._images, start=0, end=1)
        return self._batch

    def _fresh(self, stem: str) -> str:
        self._count[stem] += 1
        return f"{stem}_{self._count[stem]}"

    def put_biases_into_convolutions(self) -> None:
        """Makes what is added to each channel of a convolution's output its bias.

        Runtimes do it too, but not across the transposition between the two.
        """
        readers = Counter(name for node in self.nodes for name in node.input)
        makers = {name: node for node in self.nodes for name in node.output}
        kept: list[NodeProto] = []
        renamed: dict[str, str] = {}
        for node in self.nodes:
            node.input[:] = [renamed.get(name, name) for name in node.input]
            found = self._convolution_below(node, makers, readers)
            if found is None:
                kept.append(node)
                continue
            convolution, transposed, bias = found
            convolution.input.append(self.name(bias))
            renamed[node.output[0]] = transposed
        self.nodes = kept

    def _convolution_below(
        self, node: NodeProto, makers: dict[str, NodeProto], readers: Counter[str]
    ) -> tuple[NodeProto, str, np.ndarray] | None:
        """Returns the convolution whose bias a node adds, its transposed output, and the bias."""
        if node.op_type != "Add":
            return None
        for given, other in (tuple(node.input), tuple(reversed(node.input))):
            bias, transpose = self.arrays.get(other), makers.get(given)
            if bias is None or transpose is None or transpose.op_type != "Transpose":
                continue
            convolution = makers.get(transpose.input[0])
            if convolution is None or convolution.op_type != "Conv" or len(convolution.input) > 2:
                continue
            if readers[given] > 1 or readers[convolution.output[0]] > 1:
                continue
            kernel = self.arrays.get(convolution.input[1])
            (order,) = (helper.get_attribute_value(one) for one in transpose.attribute)
            # The channels, axis 1 of the convolution, have to be the only axis of the bias.
            shape = [1] * len(order)
            if kernel is not None:
                shape[list(order).index(1)] = len(kernel)
                if bias.shape == tuple(shape):
                    return convolution, given, bias.reshape(-1)
        return None

    def finish(self, result: Value, name: str) -> None:
        """Gives the result its name."""
        self.nodes.append(helper.make_node("Identity", [self.name(result)], [name], name=name))

    def tensors(self) -> list[TensorProto]:
        """Returns the arrays that nodes read, as ONNX has them."""
        read = {name for node in self.nodes for name in node.input}
        return [
            numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape), name)
            for name, array in self.arrays.items()
            if name in read
        ]
