"""The step that chooses a format and a method for every site."""

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from tersor.core.errors import FormatError, InputError
from tersor.formats.contract import Format
from tersor.nn.sites import Site, find_sites
from tersor.schemes.assignment import Assignment
from tersor.schemes.scheme import Scheme
from tersor.steps.preview import Preview
from tersor.tasks.contract import Task


class WeightsStep(Assignment):
    """Choose a format and a method for every site.

    With `bias_correction`, the bias of a linear layer or convolution takes back what its new weight did to the mean of
    its outputs over the calibration data. Layers without a bias stay without, for another tensor would be another
    checkpoint. The bias also stays where the weight is used more than once, and where the method makes up for earlier
    errors itself (`gptq` with upstream_correction): it moves the mean on purpose.

    With `keep_float`, the sites that cost most by measured loss stay float: `auto` chooses how many, a number says it
    (see keep_float.py).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: Literal["weights"] = "weights"
    bias_correction: bool = False
    keep_float: Literal["auto", "none"] | Annotated[int, Field(ge=0, strict=True)] = "none"

    def check(self, preview: Preview) -> None:
        """Before any work: every pattern matches a site, every scheme fits its shape, and leaves pruned weights alone.

        Raises UnknownName, FormatError, and InputError for more float sites than there are, or none without data.
        """
        work = [(site, scheme) for site, scheme in self.assign(find_sites(preview.model)) if scheme is not None]
        preflight(work)
        check_number(self.keep_float, len(work))
        if preview.is_whole and self.keep_float not in ("none", 0):
            check_task(self.keep_float, preview.task)
        for site, scheme in work:
            preview.check_zeros(site, scheme)
        preview.packed |= {site.name for site, _ in work}


def check_task(asked: str | int, task: Task | None) -> Task:
    """The task. Raises InputError without one."""
    if task is None:
        raise InputError(f"keep_float: {asked} measures the loss on calibration data; give a task, or leave it")
    return task


def check_number(asked: str | int, num_sites: int) -> None:
    """Raises InputError where more sites are to be kept than there are."""
    if isinstance(asked, int) and asked > num_sites:
        raise InputError(f"keep_float: {asked} of {num_sites} sites cannot be kept; give a smaller number, or auto")


def preflight(work: list[tuple[Site, Scheme]]) -> None:
    """Every shape fits its format, or one message names what does not."""
    problems = [problem for site, scheme in work if (problem := why_not(site, scheme.format))]
    if problems:
        more = f" (and {len(problems) - 1} more sites)" if len(problems) > 1 else ""
        raise FormatError(problems[0] + more)


def why_not(site: Site, format: Format) -> str | None:
    """A sentence that says why a format cannot hold a site's weight, and what to do."""
    problem = format.why_not(site.shape)
    return problem and f"{format.name}: {site.name} {problem}, or exclude it with --exclude '{site.name}'"
