"""The table of clients an artifact can be written for. A new one is a file in this folder and a line here."""

from tersor.core.errors import UnknownName
from tersor.export.awq import AwqExport
from tersor.export.bitsandbytes import BitsAndBytes
from tersor.export.compressed_tensors import CompressedTensors
from tersor.export.contract import Export, Runnable
from tersor.export.executorch import ExecuTorch
from tersor.export.gguf import Gguf
from tersor.export.gptq import GptqExport
from tersor.export.onnx import Onnx
from tersor.export.openvino import OpenVinoIr
from tersor.export.web import Web

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
