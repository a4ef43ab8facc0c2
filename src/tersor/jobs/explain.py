"""The job of `tersor explain`: profiles a model and says which layers take its time, and what limits them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tersor.analysis.explain import SECONDS, Explanation
from tersor.analysis.explain import explain as explain_session
from tersor.analysis.roofline import Peaks, machine_peaks
from tersor.core.progress import Events
from tersor.jobs.bench import Candidate, MadeUp
from tersor.jobs.settings import Timing
from tersor.runtimes import Feeds

ONE_RUN = Timing(batch_sizes=(1,))


@dataclass(frozen=True)
class Explained:
    """The profile of each candidate, beside the peak rates of this machine.

    Attributes:
        explanations: one for each candidate.
        peaks: the peak rates of this machine.
        shapes: shapes of the inputs, in words.
    """

    candidates: Sequence[Candidate]
    explanations: list[Explanation]
    peaks: Peaks
    shapes: str

    def to_dict(self) -> dict[str, Any]:
        first, *rest = [each.to_dict() for each in self.explanations]
        return {"explanation": first, "against": rest[0] if rest else None, "peaks": self.peaks.__dict__}


def explain(
    candidates: Sequence[Candidate],
    inputs: MadeUp = MadeUp(),
    timing: Timing = ONE_RUN,
    seed: int = 0,
    remeasure: bool = False,
    events: Events = Events(),
) -> Explained:
    """Profile the candidates at the first batch size.

    Args:
        remeasure: measure the peaks of this machine again, rather than take those that are kept.

    Raises as `open_session` does.
    """
    found: list[Explanation] = []
    shapes, num_threads, whole = "", timing.threads[0], 1 + len(candidates)
    seconds = SECONDS if timing.seconds is None else timing.seconds
    events.on_progress("profiling", 0, whole)
    peaks = machine_peaks(num_threads, remeasure=remeasure)
    for done, candidate in enumerate(candidates, start=1):
        events.on_progress("profiling", done, whole)
        session = candidate.open(num_threads)
        feeds = inputs.feeds(session, (timing.batch_sizes or (1,))[0], seed)
        shapes = shapes or shapes_of(feeds)
        found.append(
            explain_session(
                session,
                feeds,
                peaks,
                runtime=candidate.runtime,
                seconds=seconds,
            )
        )
    events.on_progress("profiling", whole, whole)
    return Explained(candidates, found, peaks, shapes)


def shapes_of(feeds: Feeds) -> str:
    """The names and shapes of all inputs; of a cache, which has many alike, the first.

    >>> import numpy as np
    >>> cache = {f"past_key_values.{n}.key": np.zeros((1, 2, 9, 4)) for n in range(3)}
    >>> shapes_of({"input_ids": np.zeros((1, 1)), **cache})
    'input_ids [1, 1], past_key_values.0.key [1, 2, 9, 4] and 2 more like it'
    """
    past = [name for name in feeds if name.startswith("past_key_values")]
    shapes = [f"{name} {list(array.shape)}" for name, array in feeds.items() if name not in past[1:]]
    return ", ".join(shapes) + (f" and {len(past) - 1} more like it" if past else "")
