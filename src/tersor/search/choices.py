"""The user's choices of budget and recipe, and the check that they go together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tersor.core.errors import InputError
from tersor.formats.trellis import POLYNOMIALS
from tersor.recipe import Recipe
from tersor.schemes.assignment import Cpu
from tersor.schemes.scheme import KEEP

NUM_STATES = 64  # of a trellis: more take longer to choose, and gain a hundredth of a bit


@dataclass(frozen=True)
class Budget:
    """The limits that the user sets; each field is a flag. Without size, ratio and bits, `drop` is searched.

    With `coded`, one noise level for the whole model meets the budget, and weights are entropy-coded
    (search/noise_level.py) along the paths of a trellis of `num_states`, 64 by default.
    """

    size: str | None = None
    ratio: str | None = None
    bits: float | None = None
    drop: str | None = None
    coded: bool = False
    num_states: int | None = None

    @property
    def is_size(self) -> bool:
        """True if the size of the file is limited."""
        return any(each is not None for each in (self.size, self.ratio, self.bits))

    @property
    def trellis(self) -> int:
        """The number of states of the trellis, 0 for none."""
        return NUM_STATES if self.num_states is None else self.num_states


@dataclass(frozen=True)
class Choices:
    """The user's wishes for the result; each field is a flag.

    Attributes:
        budget: the size it may have, or the score it may lose.
        recipe: all steps, in place of every other field.
        formats: the scheme of every site; with a budget, the candidates.
        rules: pattern of site names to scheme; the last one that matches counts.
        exclude: patterns of sites that stay as they are.
        transforms: rewrites of the model before all else.
        bias_correction: change biases so that the mean of each output stays what it was.
        float_layers: `auto`, `none`, or how many of the sites that cost most stay float.
        seed: seed of all random numbers.
        cpu: where int8 products are exact: on `any` processor, or on those with `vnni` instructions alone.
    """

    budget: Budget = Budget()
    recipe: Recipe | None = None
    formats: Sequence[str] = ()
    rules: Mapping[str, str] = field(default_factory=dict)
    exclude: Sequence[str] = ()
    transforms: Sequence[str] = ()
    bias_correction: bool = False
    float_layers: str | int = "none"
    seed: int = 0
    cpu: Cpu = "any"

    @property
    def spelled_out(self) -> Recipe | None:
        """The recipe, where a file or flags say it; None where a budget decides. Contradictions raise InputError."""
        return check_choices(self) if self.recipe is None else check_recipe_alone(self)


def check_recipe_alone(choices: Choices) -> Recipe | None:
    """The recipe that was given. Raises InputError for anything that it says already."""
    budget = choices.budget
    trellis = budget.num_states is not None
    flags = (choices.formats, choices.rules, choices.exclude, choices.transforms, choices.bias_correction)
    if any((budget.is_size, budget.coded, trellis, *flags)) or choices.float_layers != "none" or choices.cpu != "any":
        raise InputError(
            "--recipe says everything already; leave out the budget, --format, --rule, --exclude, --transform, "
            "--bias-correction, --keep-float and --cpu"
        )
    return choices.recipe


def check_choices(choices: Choices) -> Recipe | None:
    """The recipe that flags spell out; None when a budget decides. Contradictions raise InputError."""
    budget, formats, rules = choices.budget, choices.formats, dict(choices.rules)
    for text in formats:
        Recipe.of(text)
    Recipe.of(KEEP, rules, choices.exclude)
    if budget.coded and (formats or not (budget.is_size or budget.drop)):
        raise InputError("--coded needs a budget and no --format: --size 8MB, --ratio 8x, --bits 3 or --drop 1%")
    if budget.num_states is not None and not budget.coded:
        raise InputError(f"--num-states {budget.num_states} is the trellis of coded weights; add --coded")
    if budget.trellis not in (0, *POLYNOMIALS):
        raise InputError(f"--num-states {budget.num_states}: it can be 0, {', '.join(map(str, POLYNOMIALS))}")
    if budget.is_size or (budget.drop and len(formats) != 1):
        if choices.transforms or choices.bias_correction or choices.float_layers != "none" or choices.cpu != "any":
            raise InputError(
                "--transform, --bias-correction, --keep-float and --cpu go with one --format; a search measures the "
                "model as it is"
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
    scheme, transforms = (formats[0] if formats else KEEP), choices.transforms
    recipe = Recipe.of(
        scheme, rules, choices.exclude, choices.seed, transforms, choices.bias_correction, choices.float_layers
    )
    return recipe.for_cpu(choices.cpu)
