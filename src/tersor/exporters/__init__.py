"""The table of clients an artifact can be written for. A new one is a file in this folder and a line here."""

from tersor.core.errors import UnknownName
from tersor.exporters.awq import AwqExport
from tersor.exporters.bitsandbytes import BitsAndBytes
from tersor.exporters.compressed_tensors import CompressedTensors
from tersor.exporters.contract import Export, Runnable
from tersor.exporters.executorch import ExecuTorch
from tersor.exporters.gguf import Gguf
from tersor.exporters.gptq import GptqExport
from tersor.exporters.onnx import Onnx
from tersor.exporters.openvino import OpenVinoIr
from tersor.exporters.web import Web

ROWS: list[Export | Runnable] = [
    Gguf(),
    CompressedTensors(),
    GptqExport(),
    AwqExport(),
    BitsAndBytes(),
    Onnx(),
    OpenVinoIr(),
    ExecuTorch(),
    Web(),
]
EXPORTS = {export.name: export for export in ROWS}


def export_named(name: str) -> Export | Runnable:
    """The client that `--to` names."""
    if name not in EXPORTS:
        raise UnknownName("client", name, EXPORTS)
    return EXPORTS[name]
