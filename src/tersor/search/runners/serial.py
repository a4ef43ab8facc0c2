"""Trials one after another, in this process."""

from collections.abc import Iterable, Iterator, Sequence

from tersor.core.progress import Events
from tersor.pipeline import Compressed
from tersor.search.runners.contract import TrialResult, TrialSpec, Workbench


class SerialRunner:
    """Runs trials in this process. What they share is opened once, and the model made last is kept.

    Args:
        benches: what is open already, each with its `TrialSpec.bench`.
        events: `on_progress` is called.
    """

    def __init__(self, benches: Sequence[tuple[TrialSpec, Workbench]] = (), events: Events = Events()):
        self.benches, self.events = list(benches), events
        self.latest: tuple[TrialSpec, Compressed] | None = None

    def run(self, specs: Iterable[TrialSpec], what: str = "evaluating a trial") -> Iterator[TrialResult]:
        for spec in specs:
            self.latest = None  # the old model goes before the new one comes
            result, made = self.bench(spec).trial(spec, what, self.events)
            self.latest = spec, made
            yield result

    def bench(self, spec: TrialSpec) -> Workbench:
        """The workbench of a trial: that of the latest original, or opened now."""
        for known, bench in self.benches:
            if known == spec.bench:
                return bench
        self.benches = [(spec.bench, Workbench.of(spec, self.events))]
        return self.benches[0][1]

    def model_of(self, spec: TrialSpec) -> Compressed | None:
        return self.latest[1] if self.latest is not None and self.latest[0] == spec else None
