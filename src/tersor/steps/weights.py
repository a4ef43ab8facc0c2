"""The step that chooses a format and a method for every site."""

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from tersor.core.errors import FormatError
from tersor.formats.contract import Format
from tersor.nn.sites import Site
from tersor.schemes.assignment import Assignment
from tersor.schemes.scheme import Scheme


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


def preflight(work: list[tuple[Site, Scheme]]) -> None:
    """Every shape fits its format, or one message names what does not."""
    problems = [problem for site, scheme in work if (problem := why_not(site, scheme.format))]
    if problems:
        more = f" (and {len(problems) - 1} more sites)" if len(problems) > 1 else ""
        raise FormatError(problems[0] + more)


def why_not(site: Site, format: Format) -> str | None:
    """Why a format cannot hold a site, in one line with the way out."""
    problem = format.why_not(site.shape)
    return problem and f"{format.name}: {site.name} {problem}, or exclude it with --exclude '{site.name}'"
