"""The rows of a benchmark: kept in a file of JSON lines, so that a run that was stopped goes on where it was; each in a
process of its own, and what is compared timed in turn."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


class Results(dict[str, dict[str, Any]]):
    """What was measured, by row; of a row measured twice, the later."""

    def __init__(self, path: Path):
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        super().__init__((result["row"], result) for result in map(json.loads, lines))

    def add(self, row: str, result: Mapping[str, Any]) -> dict[str, Any]:
        """Take it in, and write it down at once."""
        self[row] = {"row": row, **result}
        with self.path.open("a") as file:
            file.write(json.dumps(self[row]) + "\n")
        return self[row]

    def among(self, rows: Iterable[str]) -> list[dict[str, Any]]:
        """Those of `rows` that were measured, in that order."""
        return [self[row] for row in rows if row in self]

    def joined(self, rows: Iterable[str], parts: Iterable[str]) -> list[dict[str, Any]]:
        """As `among`, of rows measured in parts, `row: part`: those that have all of them, each in one."""
        made = []
        for row in rows:
            found = [self.get(f"{row}: {part}") for part in parts]
            if all(found):
                made.append({key: value for part in found if part for key, value in part.items()} | {"row": row})
        return made


def run_rows(
    rows: Iterable[str],
    results: Results,
    options: Iterable[object] = (),
    *,
    show: Callable[[dict[str, Any]], str] = json.dumps,
    num_threads: int = 1,
    environment: Mapping[str, str] | None = None,
) -> bool:
    """Measure what is missing, each row in a process of its own: this very script, with `options --run ROW`.

    The last line such a process prints is its result, as JSON. Returns whether all rows are there; those that failed
    say why on stderr.
    """
    complete = True
    for row in rows:
        if row in results:
            continue
        command = [sys.executable, sys.argv[0], *map(str, options), "--run", row]
        child = subprocess.run(command, env=child_environment(num_threads) | (environment or {}), capture_output=True)
        if child.returncode:
            print(f"{row}: exit {child.returncode}: {last_line(child.stderr)}", file=sys.stderr, flush=True)
            complete = False
            continue
        print(show(results.add(row, json.loads(child.stdout.splitlines()[-1]))), flush=True)
    return complete


def in_turn(
    calls: Mapping[str, Callable[[], object]], seconds: float, *, least: int, most: int, num_warm: int
) -> dict[str, np.ndarray]:
    """CPU seconds of every call in each of `least` to `most` rounds, for about so many seconds by the clock. The order
    within a round is drawn anew each time."""
    import numpy as np

    for call in [*calls.values()] * num_warm:
        call()
    rounds: list[list[float]] = []
    started, generator = time.perf_counter(), np.random.default_rng(0)
    while len(rounds) < most and (len(rounds) < least or time.perf_counter() - started < seconds):
        spent = dict.fromkeys(calls, 0.0)
        for name in generator.permutation(list(calls)):
            before = time.process_time()
            calls[name]()
            spent[name] = time.process_time() - before
        rounds.append(list(spent.values()))
    return dict(zip(calls, np.array(rounds).T, strict=True))


def child_environment(num_threads: int) -> dict[str, str]:
    """For a process that is measured: sleeping OpenMP threads (spinning ones burn CPU seconds), and no network."""
    return os.environ | {
        "OMP_NUM_THREADS": str(num_threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }


def last_line(output: bytes) -> str:
    """Where a failed process says what went wrong."""
    return (output.decode(errors="replace").strip().splitlines() or ["no message"])[-1]
