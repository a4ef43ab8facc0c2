"""Peak memory of running a model: its tensors plus the most that one forward pass added.

Read from the kernel's high-water mark (Linux: /proc/self/status VmHWM, reset through /proc/self/clear_refs), so it
counts everything the pass allocated, decoded weights included. None where the kernel does not tell.
"""

import contextlib
import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

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


def resident(field: str) -> int:
    """One field of /proc/self/status, in bytes."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def return_free_memory() -> None:
    """Ask the C library to give freed memory back, so that reuse of it shows up again."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
