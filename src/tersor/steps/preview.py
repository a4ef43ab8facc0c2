"""A preview of what the steps of a recipe make of a model, before any of them has run.

Each step's `check` looks at a preview, refuses at once what would fail after hours, and notes what it will do.
"""

from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor, nn

from tersor.calibration.moments import shows_inputs
from tersor.core.errors import FormatError, InputError
from tersor.formats.semi_structured import SemiStructured
from tersor.methods.stats import Stats
from tersor.nn.sites import Site
from tersor.schemes.scheme import Scheme
from tersor.tasks.contract import Task

ROWS, COLUMNS = 32, 256  # of the weight on which a scheme is tried
COMMON = (0.0, 3.0)  # standard deviations of what its inputs have in common


@dataclass(frozen=True)
class Pruning:
    """The zeros that a site will have: a fraction of its weights, or those that a pattern such as `2:4` leaves out."""

    sparsity: float
    pattern: SemiStructured | None = None

    def mask(self, num_columns: int) -> Tensor:
        """True where a weight is kept, `[ROWS, num_columns]`, drawn at random."""
        scores = torch.rand(ROWS, num_columns, generator=torch.Generator().manual_seed(0))
        return self.pattern.choose(scores) if self.pattern else scores >= self.sparsity


@dataclass
class Preview:
    """A model on its way through a recipe, as far as that is known beforehand.

    Attributes:
        model: of the right shapes; its weights are not those that steps will have trained.
        task: that calibrates and is trained on; None without one, or where it is not opened yet.
        is_whole: False while the task is not opened yet.
        pruned: the zeros that steps will have put into sites, by name.
        packed: the sites that steps will have packed, by name.
    """

    model: nn.Module
    task: Task | None = None
    is_whole: bool = True
    pruned: dict[str, Pruning] = field(default_factory=dict)
    packed: set[str] = field(default_factory=set)

    def check_float(self, site: Site, way_out: str) -> None:
        """Raises InputError for a site that will be packed by then."""
        if site.name in self.packed:
            raise InputError(f"{site.name} is packed already: {way_out}, or leave it out with exclude: ['{site.name}']")

    def check_zeros(self, site: Site, scheme: Scheme) -> None:
        """Raises FormatError where a scheme would give weights back that an earlier step prunes."""
        pruning = self.pruned.get(site.name)
        if pruning is None:
            return
        seen = (self.task is not None or not self.is_whole) and shows_inputs(self.model, site)
        fitting = [size for size in (COLUMNS, site.shape[1]) if not scheme.format.why_not((ROWS, size))]
        try:
            filled = bool(fitting) and fills_zeros(scheme, pruning, fitting[0], seen)
        except FormatError as problem:
            raise FormatError(f"{site.name}: an earlier step prunes it, and {problem}") from None
        if filled:
            raise FormatError(refilled(site, str(scheme)))


def refilled(site: Site, scheme: str) -> str:
    """The message for a scheme that fills what was pruned."""
    return (
        f"{site.name}: {scheme} fills weights that an earlier step pruned; use a method that leaves zeros as "
        f"they are (mse, nearest, or zero-mask for formats with a mask), or exclude it with --exclude '{site.name}'"
    )


@cache
def fills_zeros(scheme: Scheme, pruning: Pruning, num_columns: int, sees_inputs: bool) -> bool:
    """True if a scheme makes something of zeros, as tried on a weight and inputs drawn at random.

    Raises FormatError where the format cannot hold such zeros.
    """
    generator = torch.Generator().manual_seed(0)
    mask = pruning.mask(num_columns)
    weight = torch.randn(ROWS, num_columns, generator=generator) * mask
    for common in COMMON if sees_inputs else (None,):
        stats = Stats() if common is None else drawn(num_columns, common, generator)
        if scheme.method.compress(weight, scheme.format, stats).decode()[~mask].any():
            return True
    return False


def drawn(num_columns: int, common: float, generator: torch.Generator) -> Stats:
    """Statistics of inputs drawn at random, which go together the more, the larger what they have in common is."""
    x = torch.randn(2 * num_columns, num_columns, generator=generator)
    x = x + x.roll(1, dims=1) + common * torch.randn(len(x), 1, generator=generator)
    moment = x.T @ x / len(x)
    return Stats(
        row_weight=torch.ones(ROWS),
        column_weight=moment.diagonal() / moment.diagonal().mean(),
        second_moment=moment,
        cross_moment=moment,
        mean=x.mean(dim=0),
        largest=x.abs().amax(dim=0),
        sample=x,
        num_tokens=len(x),
    )
