"""The golden container: bytes that version 1 of `model.tersor` wrote, to be read forever.

    python tests/golden/container/write_container.py

writes `v1.tersor` if there is none; it never touches one that exists. What the file holds is made by whole numbers
alone, so that any machine can say what must come out of it.
"""

from pathlib import Path

import torch
from torch import Tensor

from tersor.checkpoint.container_write import write

GOLDEN = Path(__file__).parent / "v1.tersor"
PACKING = {"packed3": (3, 50), "packed4": (4, 33), "mask": (1, 70)}


def bell(rows: int, columns: int, spread: int) -> Tensor:
    """Whole numbers around 0, spread as sums of dice are, their scale growing with row and column."""
    i, j = torch.arange(rows).unsqueeze(1), torch.arange(columns).unsqueeze(0)
    total = torch.zeros(rows, columns, dtype=torch.int64)
    for die in range(1, 7):
        total += ((i * 7919 + j * 104729 + die * 1299709) * (2654435761 + 2 * die) % 2**32) >> 22
    return ((total - 3069) * spread * (32 + i % 64 + j % 32) // 64) >> 10


def packed(rows: int, columns: int, bits: int) -> Tensor:
    """Codes of a few bits, packed as the page of formats says, without tersor's own packing."""
    codes = (bell(rows, columns, 2) + 2 ** (bits - 1)).clamp(0, 2**bits - 1)
    lines = [sum(code << (bits * place) for place, code in enumerate(row)) for row in codes.tolist()]
    width = -(-columns * bits // 8)
    return torch.tensor([list(line.to_bytes(width, "little")) for line in lines], dtype=torch.uint8)


def tensors() -> dict[str, Tensor]:
    """One of each: all types, all codecs, escapes, low bits, several chunks, shared tables, nothing at all."""
    far = bell(60, 70, 3).to(torch.int16)
    far[3, 4], far[59, 69] = 32767, -32768
    halves = (bell(50, 60, 40) + 2**14).to(torch.int16)
    return {
        "int8": bell(64, 96, 3).to(torch.int8),
        "int16": bell(96, 64, 2).to(torch.int16),
        "int32": bell(40, 30, 2).to(torch.int32),
        "escapes": far,
        "wide": (bell(64, 64, 3000)).to(torch.int32),
        "uint8": (bell(30, 40, 40) + 128).clamp(0, 255).to(torch.uint8),
        "row": bell(1, 300, 4).to(torch.int16),
        "column": bell(300, 1, 4).to(torch.int16),
        "cube": bell(12, 45, 2).to(torch.int8).reshape(12, 5, 9),
        "chunks": bell(900, 700, 1).to(torch.int8),
        "zeros": torch.zeros(100, 100, dtype=torch.int16),
        "packed3": packed(40, 50, 3),
        "packed4": packed(30, 33, 4),
        "mask": packed(64, 70, 1),
        "bf16": halves.view(torch.bfloat16),
        "fp16": halves.view(torch.float16),
        "fp32": (halves.to(torch.int32) * 65536 + bell(50, 60, 900).abs().to(torch.int32)).view(torch.float32),
        "fp32 of bf16": (halves.to(torch.int32) * 65536).view(torch.float32),
        "fp8 e4m3": (halves & 255).to(torch.uint8).view(torch.float8_e4m3fn),
        "fp8 e5m2": (halves & 255).to(torch.uint8).view(torch.float8_e5m2),
        "fp64": torch.arange(600, dtype=torch.float64),
        "int64": torch.arange(-5, 5),
        "bool": torch.arange(9) % 3 == 0,
        "one": torch.tensor(7, dtype=torch.int16),
        "none": torch.empty(0, 4, dtype=torch.bfloat16),
        "größe/ {}": torch.tensor([1, 2, 3], dtype=torch.uint8),
    }


if __name__ == "__main__":
    if not GOLDEN.exists():
        write(tensors(), GOLDEN, PACKING, {"made": "golden"})
        print(f"wrote {GOLDEN.name}")
