"""Trials in several processes at once, each of which opens the original for itself."""

import multiprocessing
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from types import TracebackType

import torch

from tersor.pipeline import Compressed
from tersor.search.runners.contract import TrialResult, TrialSpec
from tersor.search.runners.serial import SerialRunner


class ProcessRunner:
    """Runs trials in processes of their own; use it in a `with` block, at whose end they are gone.

    Args:
        num_processes: that run at once. Each holds the original, and the model of its trial.
        num_threads: that PyTorch uses in each.
    """

    def __init__(self, num_processes: int = 2, num_threads: int = 1):
        context = multiprocessing.get_context("spawn")  # a fork would copy threads in the midst of their work
        self.pool = ProcessPoolExecutor(num_processes, context, initializer=begin, initargs=(num_threads,))

    def __enter__(self) -> "ProcessRunner":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.pool.shutdown(cancel_futures=True)

    def run(self, specs: Iterable[TrialSpec], what: str = "evaluating a trial") -> Iterator[TrialResult]:
        specs = list(specs)
        for spec in specs:
            spec.check_portable()
        futures = [self.pool.submit(work, spec) for spec in specs]
        try:
            for future in futures:
                yield future.result()
        finally:
            for future in futures:
                future.cancel()

    def model_of(self, spec: TrialSpec) -> Compressed | None:
        return None


here = SerialRunner()  # of a worker process: what its trials share stays open


def begin(num_threads: int) -> None:
    """Set up a worker process."""
    torch.set_num_threads(num_threads)


def work(spec: TrialSpec) -> TrialResult:
    """Run one trial in a worker process."""
    (result,) = here.run([spec])
    here.latest = None
    return result
