"""Tests if this processor computes a file's int8 products exactly.

A runtime may add two int8 products in 16 bits (formats/overflow.py), by the instructions that it finds on a processor.
So the answer has two halves: whether any weights of the file can overflow, read from the file, and whether this runtime
overflows here, tried once on the largest products that there are.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tersor.core.errors import TersorError
from tersor.core.scratch import scratch_folder
from tersor.formats.overflow import Neighbours, num_overflowing
from tersor.runtimes.contract import Runtime
from tersor.runtimes.onnx import OnnxRuntime
from tersor.runtimes.openvino import OpenVino, library

RUNTIMES: dict[str, Runtime] = {".onnx": OnnxRuntime(), ".xml": OpenVino()}
PRODUCTS = ("MatMul", "Convolution", "GroupConvolution")  # as OpenVINO names them
NUM_COLUMNS, NUM_OUTPUTS = 64, 16  # of the trial


@dataclass(frozen=True)
class Exactness:
    """The exactness of a file's int8 products on this processor.

    Attributes:
        runtime: name and version.
        overflowing: rows with a pair that can overflow 16 bits, by layer; empty where none can.
        exact_here: True if the runtime adds the largest products exactly on this processor; None where that could not
            be tried.
    """

    runtime: str
    overflowing: Mapping[str, int]
    exact_here: bool | None

    @property
    def is_exact(self) -> bool:
        """True if the file's products are exact on this processor, as far as is known."""
        return not self.overflowing or self.exact_here is True

    def __str__(self) -> str:
        if not self.overflowing:
            return "its int8 products are exact on every processor: no pair of them overflows 16 bits"
        worst = max(self.overflowing, key=self.overflowing.__getitem__)
        num = len(self.overflowing)
        held = (
            f"{num} {'layer has' if num == 1 else 'layers have'} weights whose products overflow 16 bits, "
            f"most of all {worst} in {self.overflowing[worst]} rows"
        )
        if self.exact_here is None:
            return f"{held}: it is exact on processors with VNNI instructions, or ARM's, alone"
        if self.exact_here:
            return f"{self.runtime} multiplies it exactly on this processor; without VNNI instructions, {held}"
        return (
            f"{self.runtime} does not multiply it exactly on this processor, which has no VNNI instructions: {held}; "
            f"export it again without --cpu vnni"
        )


def exactness(file: Path) -> Exactness | None:
    """The exactness of an ONNX or OpenVINO file's int8 products; None for a file without any.

    None also for other kinds of files, whose runtimes add in 32 bits. Raises MissingExtra if the runtime is not
    installed.
    """
    if file.suffix not in RUNTIMES:
        return None
    weights = dict(products_in_onnx(file) if file.suffix == ".onnx" else products_in_openvino(file))
    if not weights:
        return None
    rows = {name: num_overflowing(codes, neighbours) for name, (codes, neighbours) in weights.items()}
    return Exactness(
        RUNTIMES[file.suffix].version(), {name: num for name, num in rows.items() if num}, adds_exactly(file.suffix)
    )


Product = tuple[str, tuple[torch.Tensor, Neighbours]]  # a layer's name, its codes [out, in], and who is added to whom


def products_in_onnx(file: Path) -> Iterator[Product]:
    """The weights of all int8 products of an ONNX file."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(file).graph
    constants = {each.name: each for each in graph.initializer if each.data_type == onnx.TensorProto.INT8}
    makers = {output: node for node in graph.node for output in node.output}
    for node in graph.node:
        if node.op_type == "MatMulInteger":
            weight = node.input[1]
        elif node.op_type in ("MatMul", "Conv"):
            both = [makers.get(name) for name in node.input[:2]]
            if any(each is None or each.op_type != "DequantizeLinear" for each in both):
                continue
            weight = both[1].input[0]  # type: ignore[union-attr]
        else:
            continue
        if weight in constants:
            groups = next((each.i for each in node.attribute if each.name == "group"), 1)
            yield from product_of(weight, numpy_helper.to_array(constants[weight]), node.op_type == "Conv", groups)


def products_in_openvino(file: Path) -> Iterator[Product]:
    """The weights of all int8 products of an IR file."""
    for node in library().Core().read_model(str(file)).get_ordered_ops():
        kind = node.get_type_name()
        if kind not in PRODUCTS or not is_quantized(node.input_value(0).get_node()):
            continue
        weight = behind(node.input_value(1).get_node(), ("Convert", "Multiply", "Subtract", "Reshape"))
        if weight.get_type_name() != "Constant" or weight.get_element_type().get_type_name() != "i8":
            continue
        codes, groups = np.array(weight.get_data()), 1
        if kind == "GroupConvolution":
            shape = tuple(node.input_value(1).get_shape())
            groups, codes = shape[0], codes.reshape(-1, *shape[2:])
        elif kind == "MatMul" and node.get_attributes()["transpose_b"]:
            codes = codes.T
        yield from product_of(weight.get_friendly_name(), codes, kind != "MatMul", groups)


def product_of(name: str, codes: np.ndarray, is_conv: bool, groups: int) -> Iterator[Product]:
    """One weight, `[in, out]` of a matrix product and `[out, in, ...]` of a convolution; nothing if it is depthwise."""
    matrix = torch.from_numpy(np.array(codes if is_conv else codes.T, order="C"))
    if is_conv and matrix.shape[1] == 1 and groups == len(matrix) > 1:
        return
    neighbours = Neighbours(matrix.shape[1], prod(matrix.shape[2:]))
    yield name.removesuffix(".codes"), (matrix.flatten(1), neighbours)


def is_quantized(node: Any) -> bool:
    """True if what OpenVINO's node gives is dequantized, or rounded to levels."""
    node = behind(node, ("Multiply", "Subtract"))
    if node.get_type_name() == "Convert":
        return node.input_value(0).get_element_type().get_type_name() in ("u8", "i8")
    return node.get_type_name() == "FakeQuantize"


def behind(node: Any, kinds: tuple[str, ...]) -> Any:
    """The node that the first inputs lead back to through nodes of these kinds."""
    while node.get_type_name() in kinds:
        node = node.input_value(0).get_node()
    return node


@cache
def adds_exactly(suffix: str) -> bool | None:
    """True if the runtime of such files adds the largest products of uint8 inputs and int8 weights exactly here.

    None if the packages that the trial needs are not installed.
    """
    weights = np.full((NUM_COLUMNS, NUM_OUTPUTS), 127, dtype=np.int8)
    weights[:, ::2] *= -1
    inputs = np.full((8, NUM_COLUMNS), 255, dtype=np.float32)
    try:
        with scratch_folder() as folder:
            write_product(folder / "trial.onnx", weights)
            session = RUNTIMES[suffix].open(folder / "trial.onnx")
            (found,) = session.run({"x": inputs}).values()
    except (ImportError, TersorError):
        return None
    return bool(np.array_equal(found, inputs @ weights.astype(np.float32)))


def write_product(file: Path, weights: np.ndarray) -> None:
    """An ONNX file of one int8 product, as our exports write it: `x` times weights `[in, out]`."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    num_in, num_out = weights.shape
    constants: dict[str, np.ndarray] = {
        "steps": np.array(1, np.float32),
        "zero": np.array(0, np.uint8),
        "codes": weights,
        "scale": np.ones(num_out, np.float32),
        "zeros": np.zeros(num_out, np.int8),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "steps", "zero"], ["bytes"]),
        helper.make_node("DequantizeLinear", ["bytes", "steps", "zero"], ["input"]),
        helper.make_node("DequantizeLinear", ["codes", "scale", "zeros"], ["weight"], axis=1),
        helper.make_node("MatMul", ["input", "weight"], ["y"]),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["row", num_in])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["row", num_out])
    held = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "trial", [x], [y], held)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), file)
