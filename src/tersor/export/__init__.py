"""The table of clients an artifact can be written for. A new one is a file in this folder and a line here."""

from tersor.errors import UnknownName
from tersor.export.awq import Awq
from tersor.export.bitsandbytes import BitsAndBytes
from tersor.export.compressed_tensors import CompressedTensors
from tersor.export.contract import Export
from tersor.export.gguf import Gguf
from tersor.export.gptq import Gptq

ROWS: list[Export] = [Gguf(), CompressedTensors(), Gptq(), Awq(), BitsAndBytes()]
EXPORTS = {export.name: export for export in ROWS}


def export_named(name: str) -> Export:
    """The client that `--to` names."""
    if name not in EXPORTS:
        raise UnknownName("client", name, EXPORTS)
    return EXPORTS[name]
