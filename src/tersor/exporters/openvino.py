"""OpenVINO's own files (https://docs.openvino.ai): `--to openvino` writes OUT.xml, and OUT.bin beside it.

OpenVINO reads our ONNX graph and keeps every code and scale; nothing is quantized by its tools. int8-static sites run
on its int8 kernels. It quantizes the inputs of int8 and int4 weights itself when the model runs, each token in groups
of columns; the file says how large these are:

    128     where sites are int8-dynamic; no coarser than the scale per token of the artifact
    32      where only weights are quantized; set DYNAMIC_QUANTIZATION_GROUP_SIZE to 0 for float inputs
"""

import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tersor.core.errors import ArtifactError
from tersor.core.files import sha256
from tersor.exporters.contract import UNMARKED, Checkpoint, Misfit, PackedSite, Written
from tersor.exporters.decoder import PAST
from tersor.exporters.onnx import nearby, require
from tersor.exporters.openvino_language import extensions, make_stateful, name_of
from tersor.exporters.rescaled import check_cpu
from tersor.runtimes.openvino import library

SETTING = "DYNAMIC_QUANTIZATION_GROUP_SIZE"
WRITER, UNKNOWN = "tersor", "0" * 64  # where the file says who wrote it: the hash of its weights
DYNAMIC, WEIGHT_ONLY, FLOAT = 128, 32, 0  # columns that share a scale


@dataclass(frozen=True)
class OpenVinoIr:
    """An `.xml` file with its `.bin`.

    Attributes:
        float_outputs: leave what lies between int8 convolutions float, as in the artifact, where nothing quantizes it.
        decode: write weights in formats that it has no operators for as fp16, instead of refusing them.
        cache: let a language model keep its keys and values inside, where it keeps such; without it, the file reads
            whole texts.
        cpu: where the file shall compute the same: on `any` processor, for which weights that overflow are scaled and
            rounded again (rescaled.py), or on those with `vnni` instructions alone, which takes them as they are.
    """

    float_outputs: bool = False
    decode: bool = False
    cache: bool = True
    cpu: str = "any"
    name = "openvino"
    suffix = ".xml"
    readers = "OpenVINO"
    runtime = "openvino"
    extra = "openvino"
    holds = (
        "integer grids of any bits, by row or group, in any layer; int8 with int8-dynamic or int8-static inputs; "
        "16-bit formats; models that are not quantized"
    )

    def foreign(self, output: Path) -> str | None:
        """A sentence if tersor did not write the file, or the weights beside it lack the hash it holds; else None."""
        found = re.search(rf'<{WRITER}>\s*<weights value="([0-9a-f]{{64}})"', output.read_text(errors="replace"))
        if found is None:
            return UNMARKED
        weights = output.with_suffix(".bin")
        if weights.exists() and sha256(weights) != found[1]:
            return f"{weights.name} beside it was not written with it"
        return None

    def beside(self, output: Path) -> tuple[str, ...]:
        return (output.with_suffix(".bin").name,)

    def why_not(self, packed: PackedSite) -> Misfit | None:
        from tersor.exporters.onnx.layers import holds

        return None if self.decode or holds(packed) else Misfit(self.holds, nearby(packed))

    def check(self, checkpoint: Checkpoint) -> None:
        """Raises InputError for an unknown cpu, MissingExtra if openvino is not installed."""
        check_cpu(self.cpu)
        library("writing OpenVINO files")
        require()

    def write(self, checkpoint: Checkpoint, output: Path, scratch: Path) -> Written:
        """Raises ModelError for what ONNX cannot express, with the layer."""
        import torch

        from tersor.exporters.onnx.convolutions import measured, quantize_outputs
        from tersor.exporters.onnx.file import describe, save
        from tersor.exporters.onnx.layers import Lowering
        from tersor.exporters.onnx.model import TracedModel

        traced = TracedModel.of(checkpoint, torch.float32)
        cached = checkpoint.need_examples().cached
        choice = Lowering(rounds_inputs=True, keep_blocks=cached)
        dynamic = any(p.activation and p.activation.format == "int8-dynamic" for p in traced.sites.values())
        group_size = DYNAMIC if dynamic else WEIGHT_ONLY
        lowered = traced.lower(choice)
        rounded = 0
        if not self.float_outputs:
            rounded = quantize_outputs(lowered, measured(lowered, checkpoint.need_examples(), scratch))
        save(lowered, scratch / "model.onnx")
        kernels = convert(scratch / "model.onnx", output, group_size)
        as_float = scratch / "float.onnx"
        save(traced.as_float(choice), as_float)
        if cached:  # what OpenVINO reads of that file is not all ONNX
            as_float = scratch / "float.xml"
            convert(scratch / "float.onnx", as_float, FLOAT)
        notes, exact = [describe(lowered).replace("ONNX", "from ONNX", 1), *traced.notes], None
        products = ", ".join(f"{number} products in {kind}" for kind, number in kernels.items())
        notes.append(f"OpenVINO runs {products} on this machine")
        if rounded:
            notes.append(f"{rounded} values between convolutions are int8 too (--float-outputs leaves them)")
        own = any(weights_alone(packed) for packed in traced.sites.values())
        if own:
            notes.append(f"OpenVINO rounds their inputs to int8, {group_size} columns at a time ({SETTING})")
        if own or rounded:
            exact = scratch / "exact.xml"
            save(traced.lower(replace(choice, rounds_inputs=False, per_token=True)), scratch / "exact.onnx")
            convert(scratch / "exact.onnx", exact, FLOAT)
        if cached:
            notes.append(CACHED)
        return Written(tuple(notes), as_float, exact)


CACHED = "a language model that keeps its cache inside: input_ids, attention_mask, position_ids and beam_idx in"


def weights_alone(packed: PackedSite) -> bool:
    """True if a linear site's inputs have no static scale."""
    is_static = packed.activation is not None and packed.activation.format == "int8-static"
    return packed.site.kind == "linear" and not packed.is_plain and not is_static


def convert(graph: Path, output: Path, group_size: int) -> dict[str, int]:
    """Write the IR of an ONNX file; which types its matrix products run in on this machine."""
    openvino = library("writing OpenVINO files")
    try:
        model = openvino.convert_model(str(graph), extension=extensions(openvino))
        if any(name_of(port).startswith(PAST) for port in model.inputs):
            make_stateful(openvino, model)
        narrow_scales(model)
        model.set_rt_info(str(group_size), ["runtime_options", SETTING])
        model.set_rt_info(UNKNOWN, [WRITER, "weights"])
        openvino.save_model(model, str(output), compress_to_fp16=False)
        text = output.read_text(encoding="utf-8")
        output.write_text(text.replace(UNKNOWN, sha256(output.with_suffix(".bin")), 1), encoding="utf-8")
    except Exception as error:  # its errors have no common base of their own
        raise ArtifactError(f"{output}: OpenVINO cannot convert the model: {error}") from None
    return products(openvino, output, group_size)


def narrow_scales(model: Any) -> None:
    """Keep scales of packed weights as fp16 where that holds them exactly, as the artifact does."""
    from openvino import opset13 as ops

    for node in model.get_ordered_ops():
        if node.get_type_name() != "Constant" or node.get_element_type().get_type_name() != "f32":
            continue
        readers = [target.get_node() for target in node.output(0).get_target_inputs()]
        others = {each.get_type_name() for reader in readers for each in operands(reader) if each != node}
        multiplied = all(reader.get_type_name() == "Multiply" for reader in readers)
        scales = node.get_data()
        with np.errstate(over="ignore"):
            half = scales.astype(np.float16)
        exact = scales.size > 1 and np.array_equal(half.astype(np.float32), scales)
        if multiplied and others <= {"Convert", "Subtract"} and exact:
            wide = ops.convert(ops.constant(half), "f32")
            for target in list(node.output(0).get_target_inputs()):
                target.replace_source_output(wide.output(0))


def operands(node: Any) -> list[Any]:
    """The nodes that it reads."""
    return [each.get_source_output().get_node() for each in node.inputs()]


def products(openvino: Any, path: Path, group_size: int) -> dict[str, int]:
    """The number of matrix products and convolutions by type, as the compiled model reports them."""
    compiled = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    counts: Counter[str] = Counter()
    for node in compiled.get_runtime_model().get_ops():
        about = {key: node.get_rt_info()[key].value for key in ("layerType", "runtimePrecision", "primitiveType")}
        if about["layerType"] in ("FullyConnected", "Convolution", "MatMul"):
            counts[kind_of(about["runtimePrecision"], about["primitiveType"], group_size)] += 1
    return dict(counts)


def kind_of(precision: str, primitive: str, group_size: int) -> str:
    """`int8`, `int8 weights with inputs rounded by group`, ..."""
    if precision in ("u8", "i8") and primitive.lower().endswith("i8"):  # signed where the zero point is 128
        return "int8"
    weights = {"i8": "int8", "u8": "int8", "u4": "int4", "i4": "int4", "u2": "int2"}.get(precision)
    if weights:
        return f"{weights} weights and {'int8' if group_size else 'float'} inputs"
    return {"f32": "fp32", "bf16": "bf16", "f16": "fp16"}.get(precision, precision)
