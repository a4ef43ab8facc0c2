"""The user's choices of budget and recipe, and the check that they go together."""

from collections.abc import Sequence
from dataclasses import dataclass

from tersor.core.errors import InputError
from tersor.formats.trellis import POLYNOMIALS
from tersor.recipe import Recipe
from tersor.schemes.scheme import KEEP

NUM_STATES = 64  # of a trellis: more take longer to choose, and gain a hundredth of a bit


@dataclass(frozen=True)
class Budget:
    """What the user allows; each field is a flag. Without size, ratio and bits, `drop` is searched. With `coded`, one
    noise level for the whole model meets the budget, and weights are entropy-coded (search/noise_level.py) along the
    paths of a trellis of `num_states`; where nothing is said, of 64."""

    size: str | None = None
    ratio: str | None = None
    bits: float | None = None
    drop: str | None = None
    coded: bool = False
    num_states: int | None = None

    @property
    def trellis(self) -> int:
        """Its number of states, 0 for none."""
        return NUM_STATES if self.num_states is None else self.num_states


def check_choices(
    budget: Budget,
    recipe: Recipe | None,
    formats: Sequence[str],
    rules: dict[str, str] | None,
    exclude: Sequence[str],
    transforms: Sequence[str],
    seed: int,
    bias_correction: bool = False,
    keep_float: str | int = "none",
) -> Recipe | None:
    """The recipe that flags spell out; None when a budget or a recipe file decides. Contradictions are refused."""
    sized = budget.size or budget.ratio or budget.bits
    if recipe is not None:
        trellis = budget.num_states is not None
        flags = any((sized, budget.coded, trellis, formats, rules, exclude, transforms, bias_correction))
        if flags or keep_float != "none":
            raise InputError(
                "--recipe says everything already; leave out the budget, --format, --rule, --exclude, --transform, "
                "--bias-correction and --keep-float"
            )
        return None
    for text in formats:
        Recipe.of(text)
    Recipe.of(KEEP, rules, exclude)
    if budget.coded and (formats or not (sized or budget.drop)):
        raise InputError("--coded needs a budget and no --format: --size 8MB, --ratio 8x, --bits 3 or --drop 1%")
    if budget.num_states is not None and not budget.coded:
        raise InputError(f"--num-states {budget.num_states} is the trellis of coded weights; add --coded")
    if budget.trellis not in (0, *POLYNOMIALS):
        raise InputError(f"--num-states {budget.num_states}: it can be 0, {', '.join(map(str, POLYNOMIALS))}")
    if sized or (budget.drop and len(formats) != 1):
        if transforms or bias_correction or keep_float != "none":
            raise InputError(
                "--transform, --bias-correction and --keep-float go with one --format; a search measures the model as "
                "it is"
            )
        return None
    if len(formats) > 1:
        raise InputError(
            "several --format are candidates for a budget; add --size, --ratio or --bits, or give one format"
        )
    if not formats and not rules:
        raise InputError(
            "say what you want: --size 8MB, --ratio 4x, --bits 4.2, --drop 1%, --format int4-g64 or --recipe FILE"
        )
    return Recipe.of(formats[0] if formats else KEEP, rules, exclude, seed, transforms, bias_correction, keep_float)
