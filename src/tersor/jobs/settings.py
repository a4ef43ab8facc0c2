"""The groups of arguments that jobs share: where the result goes, and how speed is measured.

The others lie with what they are about: which model (`checkpoint/open.py: ModelSpec`), which data (`tasks/data.py:
Data`), what the result may be (`search/choices.py: Budget, Choices`), and callbacks for progress
(`core/progress.py: Events`).
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tersor.core.errors import InputError
from tersor.measure.latency import now
from tersor.measure.scorecard import BATCH_SIZES


@dataclass(frozen=True)
class Output:
    """The folder or file that a job writes, and whether it may replace what tersor wrote there."""

    path: Path
    overwrite: bool = False


@dataclass(frozen=True)
class Timing:
    """Settings of speed measurements.

    Attributes:
        batch_sizes: examples of one call, each timed; None: 1 and 32, and of language models, which read a prompt and
            write, 1 alone.
        threads: CPU threads, each number timed; where one number is needed, the first counts.
        timing_seconds: limit on all timing; None: as long as the rest of the command took, and a minute at most.
        seconds: about how long to time one model at one batch size; None: 4, and a minute in all at most.
        cpu_time: measure CPU seconds of the process rather than elapsed seconds; one thread only.
        memory: also measure memory, in a process of its own.
    """

    batch_sizes: Sequence[int] | None = None
    threads: Sequence[int] = (1,)
    timing_seconds: float | None = None
    seconds: float | None = None
    cpu_time: bool = False
    memory: bool = True

    def __post_init__(self) -> None:
        sizes = BATCH_SIZES if self.batch_sizes is None else self.batch_sizes
        for flag, numbers, of in (("batch", sizes, "batch sizes"), ("threads", self.threads, "threads")):
            if not numbers or min(numbers) < 1:
                given = ",".join(map(str, numbers))
                raise InputError(f"--{flag} '{given}' is not a list of numbers of {of}; write for example 1,2")
        if self.timing_seconds is not None and not 0 < self.timing_seconds < math.inf:
            raise InputError(f"--timing-seconds {self.timing_seconds} is no time; write for example 120")
        if self.cpu_time and max(self.threads) > 1:
            raise InputError("--cpu-time adds up all threads, so it says nothing of several; use it with --threads 1")

    @property
    def clock(self) -> Callable[[], float]:
        """The clock that is read, in seconds."""
        return time.process_time if self.cpu_time else now
