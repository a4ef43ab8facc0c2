"""The roofline: what bounds a layer on this machine, the memory it streams or the arithmetic it does.

Williams, Waterman and Patterson 2009, https://doi.org/10.1145/1498765.1498785. A layer of `macs` multiply-accumulates
that moves `num_bytes` bytes takes at least `max(macs / peak, num_bytes / bandwidth)` seconds. Its arithmetic intensity
is `macs / num_bytes`; where that lies below the ridge point `peak / bandwidth`, memory is the bound.

Peaks and bandwidths are measured here, in a process of its own, as the best of a few seconds of large matrix products
and of reading; they are kept in the user's cache folder, by processor, version of torch and number of threads.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from tersor.core.errors import ModelError
from tersor.core.processor import instruction_sets, processor, times_float
from tersor.runtimes.contract import run_clock

SIZE = 512  # of the square matrices that are multiplied
SECONDS = 0.4  # for each number
WORKING_SETS = (2**20, 2**23, 2**24, 2**28)  # bytes read over and over: in caches, and in memory


@dataclass(frozen=True)
class Peaks:
    """The peak rates of this machine.

    Attributes:
        macs: multiply-accumulates per second by precision.
        bandwidth: bytes read per second by working set, in bytes.
    """

    processor: str
    torch: str
    num_threads: int
    macs: dict[str, float]
    bandwidth: dict[int, float]

    def bandwidth_of(self, working_set: int) -> float:
        """Bytes per second of a program that goes through `working_set` bytes again and again."""
        size = next((size for size in sorted(self.bandwidth) if working_set <= size), max(self.bandwidth))
        return self.bandwidth[size]

    def peak_of(self, precision: str) -> float:
        """Multiply-accumulates per second; what was not measured counts as fp32."""
        return self.macs.get(precision, self.macs["fp32"])

    def ridge(self, precision: str, working_set: int) -> float:
        """Multiply-accumulates per byte above which arithmetic is the bound."""
        return self.peak_of(precision) / self.bandwidth_of(working_set)


@dataclass(frozen=True)
class Bound:
    """The least time that a layer takes, in seconds, and what limits it: `memory` or `compute`."""

    seconds: float
    by: str
    intensity: float


def bound_of(macs: int, num_bytes: int, precision: str, working_set: int, peaks: Peaks) -> Bound:
    """The roofline of one layer, in a program that goes through `working_set` bytes again and again.

    >>> peaks = Peaks("", "", 1, {"fp32": 100.0}, {1000: 10.0})
    >>> bound_of(500, 20, "fp32", 20, peaks)
    Bound(seconds=5.0, by='compute', intensity=25.0)
    >>> bound_of(100, 20, "fp32", 20, peaks).by
    'memory'
    """
    compute, memory = macs / peaks.peak_of(precision), num_bytes / peaks.bandwidth_of(working_set)
    return Bound(max(compute, memory), "compute" if compute >= memory else "memory", macs / max(1, num_bytes))


def machine_peaks(num_threads: int = 1, *, remeasure: bool = False) -> Peaks:
    """The peaks of this machine: read from the cache folder, or measured in a process of its own and put there."""
    key = f"{processor()} | {' '.join(instruction_sets())} | torch {torch.__version__} | {num_threads} threads"
    path = cache_folder() / "peaks.json"
    known = read_cache(path)
    if key not in known or remeasure:
        known[key] = measured_apart(num_threads)
        write_cache(path, known)
    bandwidth = {int(size): rate for size, rate in known[key]["bandwidth"].items()}
    return Peaks(**known[key] | {"bandwidth": bandwidth})


def cache_folder() -> Path:
    """The folder that keeps what was measured of this machine."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tersor"


def read_cache(path: Path) -> dict[str, dict]:
    """The peaks measured before, by machine; empty if the file is missing or damaged."""
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        fields, sizes = Peaks.__dataclass_fields__.keys(), {str(size) for size in WORKING_SETS}
        return {key: f for key, f in known.items() if f.keys() == fields and f["bandwidth"].keys() == sizes}
    except (OSError, ValueError, AttributeError):
        return {}


def write_cache(path: Path, known: dict[str, dict]) -> None:
    """Write the cache by one rename; a folder that cannot be written to is ignored."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps(known, indent=1), encoding="utf-8")
        temporary.replace(path)
    except OSError:
        return


def measured_apart(num_threads: int) -> dict:
    """`measure_peaks` in a new process, whose libraries start with this many threads."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    environment = os.environ | dict.fromkeys(names, str(num_threads))
    command = [sys.executable, "-m", "tersor.analysis.roofline", str(num_threads)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ModelError(f"this machine's peaks cannot be measured: {(done.stderr.splitlines() or ['?'])[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure_peaks(num_threads: int) -> Peaks:
    """Time large products and long reads, each for a moment, and keep the best.

    fp32 is the best of torch's product, NumPy's and a convolution: which of them comes near the machine's peak depends
    on the machine. The peaks of bf16 and int8 are what torch's products reach, or what fp32 reaches times the numbers
    that an instruction of this processor multiplies for every float, whichever is more.
    """
    torch.set_num_threads(num_threads)
    clock = run_clock(num_threads)
    a, b = torch.randn(SIZE, SIZE), torch.randn(SIZE, SIZE)
    codes = [torch.randint(-127, 128, (SIZE, SIZE), dtype=torch.int8) for _ in range(2)]
    halves = a.bfloat16(), b.bfloat16()
    image, kernel = torch.randn(1, 64, 66, 66), torch.randn(128, 64, 3, 3)
    products: list[tuple[str, int, Callable[[], object]]] = [
        ("fp32", SIZE**3, lambda: a @ b),
        ("fp32", SIZE**3, lambda: a.numpy() @ b.numpy()),
        ("fp32", 64 * 64 * kernel.numel(), lambda: F.conv2d(image, kernel)),
        ("bf16", SIZE**3, lambda: halves[0] @ halves[1]),
        ("int8", SIZE**3, lambda: torch._int_mm(codes[0], codes[1].t())),
    ]
    macs: dict[str, float] = {}
    with torch.inference_mode():
        for precision, num_macs, call in products:
            if runs(call):
                macs[precision] = max(macs.get(precision, 0.0), num_macs / fastest(call, clock))
    for precision in ("bf16", "int8"):  # a slow kernel is no bound of the processor
        macs[precision] = max(macs.get(precision, 0.0), times_float(precision) * macs["fp32"])
    bandwidth = {}
    for size in WORKING_SETS:
        values = np.ones(size // 4, np.float32)
        tensor = torch.from_numpy(values)
        bandwidth[size] = size / min(fastest(tensor.sum, clock), fastest(lambda v=values: v @ v, clock))  # type: ignore[misc]
    return Peaks(processor(), torch.__version__, num_threads, macs, bandwidth)


def fastest(call: Callable[[], object], clock: Callable[[], float]) -> float:
    """The least seconds of one call, over a moment of calling it."""
    call()
    best, until = float("inf"), time.perf_counter() + SECONDS
    while time.perf_counter() < until:
        started = clock()
        call()
        best = min(best, clock() - started)
    return best


def runs(call: Callable[[], object]) -> bool:
    """True if this build of torch has such a product."""
    try:
        call()
    except RuntimeError:
        return False
    return True


if __name__ == "__main__":
    print(json.dumps(asdict(measure_peaks(int(sys.argv[1])))))
