"""Peak memory of running a model: its tensors plus the most that one forward pass added.

Read from the kernel's high-water mark (Linux: /proc/self/status VmHWM, reset through /proc/self/clear_refs), so it
counts everything the pass allocated, decoded weights included. None where the kernel does not tell.

A file in a runtime is opened and run in a process of its own, which is this module run as a program.
"""

import contextlib
import ctypes
import gc
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tersor.core.errors import ModelError
from tersor.core.scratch import scratch_folder
from tersor.measure.size import measure_size
from tersor.runtimes import open_decoder, open_session

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def measure_peak_memory(model: nn.Module, run: Callable[[nn.Module], object], num_bytes: int) -> int | None:
    """Bytes: `num_bytes` of the model's own tensors plus the peak a single `run(model)` adds to the process."""
    try:
        gc.collect()
        return_free_memory()
        with torch.inference_mode():
            run(model)  # buffers that stay for good are not this pass's
            return_free_memory()
            before = resident("VmRSS")
            RESET.write_text("5")
            run(model)
        return num_bytes + max(0, resident("VmHWM") - before)
    except OSError:
        return None


@dataclass(frozen=True)
class Memory:
    """Bytes of a process that are there because of a model: what goes when the model is dropped again.

    Attributes:
        loaded: what it holds between calls, once it has run: files are mapped, and their pages come when they are
            touched. A model so small that the system's pages do not show it takes the bytes of its tensors, or of its
            file.
        peak: at most, while it was opened and run.
    """

    loaded: int
    peak: int


def measure_opened(
    model: str,
    runtime: str,
    feeds: Mapping[str, np.ndarray],
    *,
    weights: Path | None = None,
    dtype: torch.dtype | None = None,
    num_threads: int = 1,
    decode: bool = False,
) -> Memory | None:
    """Open `model` in `runtime` and run it twice on `feeds`, in a process of its own; None where the kernel does not
    tell. To `decode` is to read the tokens `input_ids` and then one more. Raises ModelError where the process fails."""
    with scratch_folder() as folder:
        np.savez(folder / "feeds.npz", **feeds)  # type: ignore[arg-type]
        asked = {"model": model, "runtime": runtime, "num_threads": num_threads, "feeds": f"{folder}/feeds.npz"}
        asked |= {"weights": weights and str(weights), "decode": decode}
        asked["dtype"] = dtype and str(dtype).removeprefix("torch.")
        command = [sys.executable, "-m", "tersor.measure.memory", json.dumps(asked)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["it was stopped"])[-1]
        raise ModelError(f"{model}: its memory cannot be measured, a process of its own failed: {reason}")
    found = json.loads(done.stdout.splitlines()[-1])
    return None if found is None else Memory(**found)


def measure_this_process(
    model: str, runtime: str, feeds: str, weights: str | None, num_threads: int, decode: bool, dtype: str | None
) -> dict[str, int] | None:
    """Measure this process for `measure_opened`, which starts it: `Memory` as a dictionary."""
    with np.load(feeds) as file:
        arrays = dict(file)
    kind: dict[str, Any] = {"dtype": dtype and getattr(torch, dtype)}
    try:
        RESET.write_text("5")
        opened: Any
        if decode:
            opened, ids = open_decoder(model, runtime, num_threads=num_threads, **kind), arrays["input_ids"]
            runs = [partial(opened.feed, ids), partial(opened.feed, ids[:, -1:])]
        else:
            kind |= {"weights": Path(weights) if weights else None}
            opened = open_session(model, runtime, num_threads=num_threads, **kind)
            runs = [partial(opened.run, arrays)] * 2
        for run in runs:
            run()
        peak = resident("VmHWM")
        gc.collect()
        return_free_memory()
        loaded, least = resident("VmRSS"), least_bytes(opened, model)
        del opened, runs, run
        gc.collect()
        return_free_memory()
        left = resident("VmRSS")  # the libraries
    except OSError:
        return None
    loaded = max(least, loaded - left)
    return {"loaded": loaded, "peak": max(loaded, peak - left)}


def least_bytes(opened: object, path: str) -> int:
    """Bytes that a model takes at least: of its tensors in PyTorch, of its file in another runtime."""
    module = getattr(opened, "model", None)
    if isinstance(module, nn.Module):
        return measure_size(module).num_bytes
    return Path(path).stat().st_size if Path(path).is_file() else 0


def resident(field: str) -> int:
    """One field of /proc/self/status, such as VmHWM, in bytes."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def return_free_memory() -> None:
    """Ask the C library to give freed memory back, so that reuse of it shows up again."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


if __name__ == "__main__":
    print(json.dumps(measure_this_process(**json.loads(sys.argv[1]))))
