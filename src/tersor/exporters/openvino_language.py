"""Language models in OpenVINO's operators, with their cache inside the model ("stateful").

The blocks of a trace (onnx/blocks.py) become what its CPU plugin looks for and runs as one kernel each: scaled dot
product attention behind a cache that it appends to in place. The inputs are then `input_ids`, `attention_mask`,
`position_ids` and `beam_idx`, as openvino-genai and optimum-intel feed them; the cache is gone from inputs and outputs.
"""

from typing import Any

import numpy as np

from tersor.exporters.decoder import PAST, PRESENT
from tersor.exporters.onnx.blocks import DOMAIN


def extensions(openvino: Any) -> list[Any]:
    """The extensions by which OpenVINO's ONNX reader translates our blocks."""
    from openvino import opset13 as ops
    from openvino.frontend.onnx import ConversionExtension

    def attention(node: Any) -> list[Any]:
        query, key, value, past_key, past_value, bias = (node.get_input(i) for i in range(6))
        num_shared = node.get_attribute("num_heads") // node.get_attribute("kv_num_heads")
        present = [ops.concat([past, new], axis=2) for past, new in ((past_key, key), (past_value, value))]
        keys, values = (repeated(each, num_shared) for each in present)
        scale = ops.constant(node.get_attribute("scale"), dtype=np.float32)
        softcap, sinks = node.get_attribute("softcap"), node.get_input(6) if node.get_input_size() > 6 else None
        if softcap or sinks is not None:  # for which there is no kernel
            made = ops.matmul(shares(ops.multiply(query, scale), keys, bias, softcap, sinks), values, False, False)
        else:
            made = ops.scaled_dot_product_attention(query, keys, values, bias, scale, causal=False)
        rows = ops.transpose(made, ops.constant([0, 2, 1, 3]))
        rows = ops.reshape(rows, ops.constant([0, 0, -1]), special_zero=True)
        return [rows.output(0), *(each.output(0) for each in present)]

    def shares(query: Any, keys: Any, bias: Any, softcap: float, sinks: Any) -> Any:
        """The attention weights: the share that every token takes of every other."""
        scores = ops.matmul(query, keys, False, True)
        if softcap:
            cap = ops.constant(softcap, dtype=np.float32)
            scores = ops.multiply(ops.tanh(ops.divide(scores, cap)), cap)
        scores = ops.add(scores, bias)
        if sinks is None:
            return ops.softmax(scores, -1)
        one = ops.reduce_max(ops.multiply(scores, ops.constant(0.0, dtype=np.float32)), ops.constant([-1]), True)
        sink = ops.add(one, ops.reshape(sinks, ops.constant([1, -1, 1, 1]), special_zero=False))
        shared = ops.softmax(ops.concat([scores, sink], axis=3), -1)
        return ops.slice(shared, ops.constant([0]), ops.constant([-1]), ops.constant([1]), ops.constant([3]))

    def repeated(each: Any, num_shared: int) -> Any:
        """Keys or values with every head repeated as often as query heads share it."""
        if num_shared == 1:
            return each
        batch, heads, tokens, size = (
            ops.gather(ops.shape_of(each), ops.constant([i]), ops.constant(0)) for i in range(4)
        )
        apart = ops.unsqueeze(each, ops.constant(2))
        wanted = ops.concat([batch, heads, ops.constant([num_shared]), tokens, size], axis=0)
        spread = ops.broadcast(apart, wanted, broadcast_spec="BIDIRECTIONAL")
        together = ops.concat([batch, ops.multiply(heads, ops.constant([num_shared])), tokens, size], axis=0)
        return ops.reshape(spread, together, special_zero=False)

    def rotary(node: Any) -> list[Any]:
        """Turn the first columns of every head, as many as there are angles; the others stay as they are."""
        x, cos, sin = (node.get_input(i) for i in range(3))
        size, angles = x.get_partial_shape()[3].get_length(), cos.get_partial_shape()[2]
        width = size if angles.is_dynamic else angles.get_length()
        cos, sin = (ops.unsqueeze(each, ops.constant(1)) for each in (cos, sin))
        lengths = [width // 2, width // 2, *([size - width] if width < size else [])]
        first, second, *rest = ops.variadic_split(x, ops.constant(3), ops.constant(lengths)).outputs()
        straight = ops.concat([first, second], axis=-1) if rest else x
        turned = ops.concat([ops.multiply(second, ops.constant(-1.0, dtype=np.float32)), first], axis=-1)
        made = ops.add(ops.multiply(straight, cos), ops.multiply(turned, sin))
        return [(ops.concat([made, *rest], axis=-1) if rest else made).output(0)]

    def norm(node: Any) -> list[Any]:
        x, weight = node.get_input(0), node.get_input(1)
        mean = ops.reduce_mean(ops.power(x, ops.constant(2.0, dtype=np.float32)), ops.constant([-1]), keep_dims=True)
        length = ops.sqrt(ops.add(mean, ops.constant(node.get_attribute("epsilon"), dtype=np.float32)))
        unit = ops.multiply(x, ops.divide(ops.constant(1.0, dtype=np.float32), length))
        return [ops.multiply(weight, unit).output(0)]

    translate = {"Attention": attention, "Rotary": rotary, "RmsNorm": norm}
    return [ConversionExtension(kind, DOMAIN, function) for kind, function in translate.items()]


def make_stateful(openvino: Any, model: Any) -> None:
    """Take the cache into the model. `beam_idx` says which row of the cache each row goes on with."""
    from openvino import opset13 as ops
    from openvino.passes import MakeStateful, Manager

    past = [port for port in model.inputs if name_of(port).startswith(PAST)]
    order = ops.parameter([-1], dtype=np.int32, name="beam_idx")
    order.output(0).get_tensor().add_names({"beam_idx"})
    model.add_parameters([order])
    for port in past:
        readers = port.get_target_inputs()
        chosen = ops.gather(port, order, ops.constant(0))
        for reader in readers:
            reader.replace_source_output(chosen.output(0))
    model.validate_nodes_and_infer_types()
    manager = Manager()
    manager.register_pass(MakeStateful({name_of(port): name_of(port).replace(PAST, PRESENT, 1) for port in past}))
    manager.run_passes(model)
    ids = next(port for port in model.inputs if "input_ids" in port.get_names())
    batch = ops.gather(ops.shape_of(ids, output_type="i64"), ops.constant([0]), ops.constant(0))
    for node in model.get_ops():
        if node.get_type_name() == "ReadValue":
            _, heads, _, size = node.get_output_partial_shape(0)
            rest = ops.constant([heads.get_length(), 0, size.get_length()])
            zero = ops.constant(0.0, dtype=node.get_output_element_type(0).to_dtype())
            node.set_arguments([ops.broadcast(zero, ops.concat([batch, rest], axis=0))])
    model.validate_nodes_and_infer_types()


def name_of(port: Any) -> str:
    """The name of an input or output."""
    return min(port.get_names(), default="")
