"""How far from the bound codes of normal weights are along the paths of a trellis: by states, bits and rows.

    python benchmarks/trellis.py [--write]

Normal numbers are rounded in steps, or in columns along paths. Bits are those of an ideal entropy code that knows their
deviation (the entropy of the codes, given whether each is even or odd where a trellis tells that); the bound is
`log2(deviation / error) / 2` (Shannon 1959). Steps are chosen so that `3`, `2` or `1` bits come out. Seconds are of the
CPU, for the choice of the codes alone. `--write` makes trellis.md.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
from numpy import ndarray

from tersor.formats.trellis import PATH, POLYNOMIALS, parities
from tersor.measure.scorecard import machine
from tersor.methods.viterbi import best_paths, parity_bits, predecessors

BITS = (3, 2, 1)
ROWS = (24, 48, 96, PATH)
NUM_WEIGHTS = 2**18


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    weights = np.random.default_rng(0).standard_normal(NUM_WEIGHTS).astype(np.float32)
    round_to_paths(weights[:PATH], 4, PATH)  # compiled and cached
    by_bits = {n: [gap_at(weights, n, bits, PATH)[0] for bits in BITS] for n in (0, *POLYNOMIALS)}
    by_rows = {n: [gap_at(weights, n, 3, rows)[0] for rows in ROWS] for n in POLYNOMIALS}
    seconds = {n: gap_at(weights, n, 3, PATH)[1] for n in POLYNOMIALS}
    text = page(by_bits, by_rows, seconds)
    print(text)
    if args.write:
        Path(__file__).with_suffix(".md").write_text(text)
    return 0


def gap_at(weights: ndarray, num_states: int, bits: float, rows: int) -> tuple[float, float]:
    """Bits above the bound where codes take `bits`, by bisection of the step, and seconds for a weight."""
    low, high = 0.02, 8.0
    for _ in range(12):
        step = (low * high) ** 0.5
        began = time.process_time()
        codes = round_to_paths(weights / step, num_states, rows) if num_states else np.rint(weights / step)
        seconds = (time.process_time() - began) / len(weights)
        taken = entropy(codes, num_states > 0)
        low, high = (step, high) if taken > bits else (low, step)
    scale = (weights / step) @ codes / (codes @ codes)  # what a code stands for on average
    error = np.square(weights / step - scale * codes).mean() * step**2
    return taken - np.log2(weights.std() ** 2 / error) / 2, seconds


def round_to_paths(values: ndarray, num_states: int, rows: int) -> ndarray:
    """One column, its paths beginning anew every so many rows."""
    nothing = np.empty(0, np.bool_), np.empty(0, np.int32)
    codes = best_paths(values, *nothing, parity_bits(), 0.0, *predecessors(num_states), rows)
    first = codes[:rows, None].astype(np.int64)
    assert np.array_equal(parities(first >> 1, num_states), first & 1)
    return codes


def entropy(codes: ndarray, by_parity: bool) -> float:
    """Bits of a code, given its parity if that is known."""
    codes, total = codes.astype(np.int16), 0.0
    groups = [codes[codes % 2 == 0], codes[codes % 2 == 1]] if by_parity else [codes]
    for group in groups:
        share = np.unique(group, return_counts=True)[1] / max(1, len(group))
        total -= len(group) / len(codes) * (share * np.log2(share)).sum()
    return float(total)


def page(by_bits: dict[int, list[float]], by_rows: dict[int, list[float]], seconds: dict[int, float]) -> str:
    """trellis.md."""
    about, steps = machine(), by_bits[0]
    lines = [
        "# Trellises and the bound",
        "",
        f"`python benchmarks/trellis.py --write`; tersor {about['tersor']}, {about['processor']}. "
        f"{NUM_WEIGHTS:,} normal numbers, steps alone against paths (`waterfill(num_states=...)`).",
        "",
        f"Bits above the rate-distortion bound, paths of {PATH} rows; in brackets what that is less than steps alone:",
        "",
        f"| states | {' | '.join(f'{bits} bits' for bits in BITS)} | ns a weight to choose |",
        "|---|---|---|---|---|",
        f"| none | {' | '.join(f'{gap:.3f}' for gap in steps)} | |",
    ]
    for n in POLYNOMIALS:
        gaps = [f"{gap:.3f} ({alone - gap:.3f})" for gap, alone in zip(by_bits[n], steps, strict=True)]
        lines.append(f"| {n} | {' | '.join(gaps)} | {1e9 * seconds[n]:.0f} |")
    lines += [
        "",
        f"Bits less than steps alone at 3 bits, by the rows of a path (fewer than {PATH} where a matrix has fewer):",
        "",
        f"| states | {' | '.join(map(str, ROWS))} |",
        "|---|" + "---|" * len(ROWS),
    ]
    lines += [f"| {n} | {' | '.join(f'{steps[0] - gap:.3f}' for gap in by_rows[n])} |" for n in POLYNOMIALS]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
