"""A recipe: the ordered steps, YAML in and YAML out. Field = YAML key = command-line flag.

    tersor: 1
    seed: 0
    steps:
    - step: transform
      transform: smooth(alpha=0.5)
    - step: weights
      scheme: mse:int4-g64
      rules:
        '*.embeddings.*': int8-g32
      exclude: ['*.pooler.*']

The kinds of step are the table `STEPS`; those that train are in training/.
"""

from collections.abc import Iterable
from dataclasses import replace
from functools import reduce
from operator import or_
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, field_validator

from tersor.core.errors import InputError
from tersor.core.messages import first_mistake
from tersor.formats.contract import Grid
from tersor.schemes.assignment import Assignment, Cpu, as_message, one_or_more
from tersor.schemes.scheme import KEEP, parse_options, parse_rule, spell_options
from tersor.steps.preview import Preview
from tersor.steps.weights import WeightsStep
from tersor.training import TRAINING_STEPS, StudentStep, TrainingStep
from tersor.transforms import TRANSFORMS
from tersor.transforms.contract import Transform


class TransformStep(BaseModel):
    """Rewrite the model without changing what it computes, so that the steps that follow cost less."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: Literal["transform"] = "transform"
    transform: str

    def check(self, preview: Preview) -> None:
        """Nothing can be said before the statistics are there that a transform reads."""

    @field_validator("transform")
    @classmethod
    def transform_exists(cls, text: str) -> str:
        return as_message(lambda: spell_options(parse_transform(text)))


def kind_of(step: Any) -> str:
    """The kind of a step: the value of `step`, else weights."""
    return step.get("step", "weights") if isinstance(step, dict) else getattr(step, "step", "weights")


STEPS: dict[str, type[BaseModel]] = {
    "weights": WeightsStep,
    "transform": TransformStep,
    "student": StudentStep,
    **TRAINING_STEPS,
}
KINDS = tuple(STEPS)
if TYPE_CHECKING:
    Step = WeightsStep | TransformStep | StudentStep | TrainingStep
else:
    Step = Annotated[reduce(or_, (Annotated[k, Tag(name)] for name, k in STEPS.items())), Discriminator(kind_of)]


class Recipe(BaseModel):
    """Steps in the order they run, and the seed of everything random.

    >>> recipe = Recipe.from_yaml("steps: [{step: weights, scheme: int4-g64}]")
    >>> recipe.steps[0].scheme
    'int4-g64'
    >>> Recipe.from_yaml(recipe.to_yaml()) == recipe
    True
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    tersor: Literal[1] = 1
    seed: int = Field(default=0, ge=0, lt=2**63)
    steps: tuple[Step, ...]

    @classmethod
    def of(
        cls,
        scheme: str = KEEP,
        rules: dict[str, str] | None = None,
        exclude: str | Iterable[str] = (),
        seed: int = 0,
        transforms: str | Iterable[str] = (),
        bias_correction: bool = False,
        keep_float: str | int = "none",
    ) -> "Recipe":
        """A recipe of some transforms and one weights step."""
        weights: dict[str, Any] = {"scheme": scheme, "rules": rules or {}, "exclude": tuple(one_or_more(exclude))}
        weights |= {"bias_correction": bias_correction, "keep_float": keep_float}
        steps = [*({"step": "transform", "transform": text} for text in one_or_more(transforms)), weights]
        return cls.validated({"seed": seed, "steps": steps}, "the recipe")

    def for_cpu(self, cpu: Cpu) -> "Recipe":
        """The recipe with int8 products that are exact on these processors: `any`, or those with `vnni` alone."""
        steps = (s.model_copy(update={"cpu": cpu}) if isinstance(s, Assignment) else s for s in self.steps)
        return self.model_copy(update={"steps": tuple(steps)})

    @property
    def trains(self) -> bool:
        """True if any step trains."""
        return any(isinstance(step, TrainingStep) for step in self.steps)

    @property
    def weights(self) -> tuple[WeightsStep, ...]:
        """The steps that choose formats."""
        return tuple(step for step in self.steps if isinstance(step, WeightsStep))

    def transform_of(self, number: int) -> Transform:
        """The transform of the step of this number. One that rounds weights to judge itself, and names no format, takes
        the format that the next weights step gives to most sites."""
        step = self.steps[number]
        assert isinstance(step, TransformStep)
        transform = parse_transform(step.transform)
        if getattr(transform, "format", "none") is None:
            schemes = (parse_rule(s.scheme) for s in self.steps[number + 1 :] if isinstance(s, Assignment))
            scheme = next(filter(None, schemes), None)
            if scheme is not None and isinstance(scheme.format, Grid):
                return replace(transform, format=scheme.format.name)  # type: ignore[type-var]
        return transform

    @classmethod
    def validated(cls, data: Any, place: str) -> "Recipe":
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise InputError(f"{place}: {first_mistake(error, KINDS)}") from None

    @classmethod
    def from_yaml(cls, text: str, place: str = "the recipe") -> "Recipe":
        """Raises InputError naming the place of the first mistake."""
        try:
            data = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise InputError(f"{place}: not YAML: {error}") from None
        if not isinstance(data, dict) or "steps" not in data:
            raise InputError(f"{place}: a recipe is a mapping with a list of `steps`; see docs/concepts.md")
        return cls.validated(data, place)

    @classmethod
    def from_file(cls, path: Path) -> "Recipe":
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: cannot read the recipe: {error}") from None
        return cls.from_yaml(text, str(path))

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, width=120)


def parse_transform(text: str) -> Transform:
    """Parse `smooth` or `smooth(alpha=0.5)` into a transform."""
    return parse_options("transform", TRANSFORMS, text.strip())
