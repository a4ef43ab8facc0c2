"""Golden files: the bytes every format wrote when it was added, to be decoded forever.

    python tests/golden/write.py

writes the file of each format that has none yet. It never touches one that exists: bytes in the field do not change
either. To give up a layout on purpose, delete its file, say so in the changelog, and keep a reader for the old one.
"""

from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from tersor.formats import FORMATS
from tersor.formats.contract import Encoded, Format
from tersor.formats.lowrank import Corrected, LowRank
from tersor.methods.magnitude import Magnitude
from tersor.methods.nearest import Nearest
from tersor.methods.stats import Stats

HOME = Path(__file__).parent
PARTS, DECODED = "part.", "decoded"


def make_weight() -> Tensor:
    """Four rows: as trained, with outliers, all positive, and one that is zero in two groups of 32 columns."""
    weight = torch.randn(4, 128, generator=torch.Generator().manual_seed(2024)) * 0.05
    weight[1, [5, 70, 100]] = torch.tensor([1.5, -2.25, 0.875])
    weight[2] = weight[2].abs() + 0.01
    weight[3, 32:96] = 0.0
    return weight


def stored_weight(format: Format) -> Tensor:
    """Two rows side by side where a format wants 256 columns."""
    weight = safetensors.torch.load_file(HOME / "weight.safetensors")["weight"]
    return weight.view(2, 256) if format.why_not((4, 128)) else weight


def encode(name: str) -> Encoded:
    """Half of the weights pruned where a format holds a mask, a correction of rank 2 where it holds one, rounded to
    nearest elsewhere."""
    format, magnitude = FORMATS[name], Magnitude(sparsity=0.5)
    weight = stored_weight(format)
    if isinstance(format, Corrected):
        base = Nearest().compress(weight, format.base, Stats())
        return format.join(base, LowRank().fit(weight - base.decode(), rank=2))
    method = Nearest() if magnitude.accepts(format) else magnitude
    return method.compress(weight, format, Stats())


def golden(name: str) -> Path:
    """A format's file. No file system minds its name: `2:4` is `2of4`."""
    return HOME / f"{name.replace(':', 'of')}.safetensors"


def read(name: str) -> tuple[dict[str, Tensor], Tensor]:
    """The parts in a golden file, and the weight they decoded to when they were written."""
    tensors = safetensors.torch.load_file(golden(name))
    decoded = tensors.pop(DECODED)
    return {key.removeprefix(PARTS): part for key, part in tensors.items()}, decoded


def write(path: Path, tensors: dict[str, Tensor]) -> None:
    """Refuses to overwrite."""
    data = safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()})
    with path.open("xb") as file:
        file.write(data)


if __name__ == "__main__":
    if not (HOME / "weight.safetensors").exists():
        write(HOME / "weight.safetensors", {"weight": make_weight()})
    for name in FORMATS:
        path = golden(name)
        if not path.exists():
            encoded = encode(name)
            parts = {PARTS + key: part for key, part in encoded.parts.items()}
            write(path, {**parts, DECODED: encoded.decode()})
            print(f"wrote {path.name}")
