"""Small ONNX files, and what they compute."""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def save(path: Path, nodes, inputs, outputs, weights) -> Path:
    """An ONNX file; weights are arrays by name, inputs and outputs `(name, type, shape)`."""
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(*each) for each in inputs],
        [helper.make_tensor_value_info(*each) for each in outputs],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


def mlp(path: Path, width: int = 64, hidden: int = 32) -> tuple[Path, np.ndarray]:
    """`relu(x W)`, any batch; the weight is `[width, hidden]`."""
    weight = np.random.default_rng(0).standard_normal((width, hidden)).astype(np.float32)
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"], name="first"), helper.make_node("Relu", ["h"], ["y"])]
    inputs, outputs = [("x", TensorProto.FLOAT, ["batch", width])], [("y", TensorProto.FLOAT, ["batch", hidden])]
    return save(path, nodes, inputs, outputs, {"w": weight}), weight


def integer_mlp(path: Path) -> Path:
    """A product whose input is quantized when it runs, with scales of one for the weight."""
    codes = np.random.default_rng(0).integers(-127, 128, (256, 128)).astype(np.int8)
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"], name="quantizer"),
        helper.make_node("MatMulInteger", ["q", "w", "z"], ["i"], name="product"),
        helper.make_node("Cast", ["i"], ["f"], to=TensorProto.FLOAT, name="cast"),
        helper.make_node("Mul", ["f", "s"], ["y"], name="scales"),
    ]
    inputs, outputs = [("x", TensorProto.FLOAT, ["batch", 256])], [("y", TensorProto.FLOAT, ["batch", 128])]
    return save(path, nodes, inputs, outputs, {"w": codes})


def convolution(path: Path) -> Path:
    """3x3, 16 to 32 channels in 2 groups, on 3-D images of any size."""
    weight = np.random.default_rng(0).standard_normal((32, 8, 3, 3)).astype(np.float32)
    nodes = [helper.make_node("Conv", ["x", "w"], ["y"], name="conv", group=2, pads=[1, 1, 1, 1])]
    sizes = ["batch", 16, "height", "width"]
    inputs = [("x", TensorProto.FLOAT, sizes)]
    return save(path, nodes, inputs, [("y", TensorProto.FLOAT, ["batch", 32, "h", "w"])], {"w": weight})
