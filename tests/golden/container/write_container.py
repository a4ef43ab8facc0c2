"""The golden containers: bytes that version 1 of `model.tersor` wrote, to be read forever.

    python tests/golden/container/write_container.py

writes `v1.tersor`, `v1-trellis.tersor` (the codec `trellis`, which came later) and `v1-planes.tersor` (floats whose
mantissas are coded, which came later still) if there are none; it never touches one that exists. What the files hold is
made by whole numbers alone, so that any machine can say what must come out.
"""

from pathlib import Path

import torch
from torch import Tensor

from tersor.checkpoint.container_write import write

GOLDEN = Path(__file__).parent / "v1.tersor"
GOLDEN_TRELLIS = Path(__file__).parent / "v1-trellis.tersor"
GOLDEN_PLANES = Path(__file__).parent / "v1-planes.tersor"
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


# Ungerboeck's codes, in octal as his table I has them: parity-check polynomials of the upper bit and of the lower one.
CHECKS = {4: ("2", "5"), 8: ("04", "13"), 16: ("04", "23"), 32: ("10", "45"), 64: ("024", "103")}
CHECKS |= {128: ("126", "235"), 256: ("362", "515")}


def on_paths(halves: Tensor, num_states: int) -> Tensor:
    """`2 * halves`, plus 1 where the parity check asks for it: over the rows above, of every column by itself, all taps
    of the upper bits and all taps of the lower ones are even in number. A path begins anew in every 512th row."""
    upper_taps, lower_taps = ([i for i in range(9) if int(octal, 8) >> i & 1] for octal in CHECKS[num_states])
    upper, lower = (halves & 1).int(), torch.zeros_like(halves, dtype=torch.int32)
    for first in range(0, len(halves), 512):
        for row in range(first, min(first + 512, len(halves))):
            terms = [upper[row - i] for i in upper_taps if row - i >= first]
            terms += [lower[row - i] for i in lower_taps if i and row - i >= first]
            lower[row] = sum(terms, torch.zeros_like(lower[row])) & 1
    return (2 * halves + lower).to(torch.int16)


def trellis_tensors() -> dict[str, Tensor]:
    """Columns that are paths: of all trellises, with escapes, low bits and several chunks, beside columns that are not,
    with which they share tables."""
    far = on_paths(bell(90, 40, 2), 16)
    far[7, 8], far[60, 3], far[89, 0] = far[7, 8] + 4 * 1000, far[60, 3] - 4 * 5000, far[89, 0] + 4 * 60
    return {
        **{f"trellis{num_states}": on_paths(bell(64, 80, 2), num_states) for num_states in CHECKS},
        "escapes": far,
        "chunks": on_paths(bell(1100, 50, 3), 8),
        "wide": on_paths(bell(600, 40, 900), 64),
        "a little wide": on_paths(bell(70, 40, 80), 32),
        "narrow": on_paths(bell(300, 2, 1), 256),
        "sparse": on_paths(bell(100, 60, 3).clamp(0, 1), 8),
        "no path": bell(64, 80, 3).to(torch.int16),
        "broken path": on_paths(bell(64, 80, 2), 8) + (torch.arange(64 * 80).reshape(64, 80) == 4000),
    }


def plane_tensors() -> dict[str, Tensor]:
    """Mantissas that are far from random: of numbers that came from a narrower type, or that are few."""
    halves = (bell(50, 60, 40) + 2**14).to(torch.int16)
    many = (bell(900, 700, 1).clamp(0, 1) * 1000 + 2**14).to(torch.int16)
    few = (bell(50, 60, 1).clamp(-3, 3) * 1000 + 2**14).to(torch.int16)
    return {
        "fp32 of fp16": halves.view(torch.float16).float(),
        "chunks": many.view(torch.float16).float(),
        "bf16 of few": few.view(torch.bfloat16),
        "fp16 of few": few.view(torch.float16),
        "fp32 of few": few.to(torch.int32).mul(65536).add(few & 3).view(torch.float32),
    }


if __name__ == "__main__":
    written = ((GOLDEN, tensors, PACKING), (GOLDEN_TRELLIS, trellis_tensors, {}), (GOLDEN_PLANES, plane_tensors, {}))
    for path, content, packing in written:
        if not path.exists():
            write(content(), path, packing, {"made": "golden"})
            print(f"wrote {path.name}")
