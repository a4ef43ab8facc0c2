"""A recipe: the ordered steps, YAML in and YAML out. Field = YAML key = command-line flag.

    tersor: 1
    seed: 0
    steps:
    - step: weights
      scheme: mse:int4-g64
      rules:
        '*.embeddings.*': int8-g32
      exclude: ['*.pooler.*']

New kinds of step (training, structure, ...) join the union `Step`.
"""

from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from tersor.errors import InputError, TersorError, UnknownName
from tersor.formats.contract import Format
from tersor.schemes import KEEP, Scheme, parse_rule
from tersor.sites import Site

VERSION = 1


class WeightsStep(BaseModel):
    """Choose a format and a method for every site.

    A site takes the scheme of the last rule whose pattern matches its name, else `scheme`; `exclude` keeps it as it is
    whatever the rules say. Patterns are shell wildcards over site names; `*.head` matches `head` at the top, too.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: Literal["weights"] = "weights"
    scheme: str = KEEP
    rules: dict[str, str] = {}
    exclude: tuple[str, ...] = ()

    @field_validator("scheme")
    @classmethod
    def scheme_exists(cls, text: str) -> str:
        return spelled(text)

    @field_validator("rules")
    @classmethod
    def rules_exist(cls, rules: dict[str, str]) -> dict[str, str]:
        return {pattern: spelled(text) for pattern, text in rules.items()}

    def assign(self, sites: Iterable[Site]) -> Iterator[tuple[Site, Scheme | None]]:
        """Each site with its scheme; None: kept.

        Raises UnknownName for a pattern no site matches, FormatError for a scheme that does not fit a site's shape.
        """
        sites = list(sites)
        for pattern in (*self.rules, *self.exclude):
            if not any(matches(pattern, site.name) for site in sites):
                raise UnknownName("site pattern", pattern, [s.name for s in sites], see="see `tersor inspect MODEL`")
        for site in sites:
            text = self.scheme
            for pattern, scheme in self.rules.items():
                text = scheme if matches(pattern, site.name) else text
            if any(matches(pattern, site.name) for pattern in self.exclude):
                text = KEEP
            yield site, parse_rule(text)


Step = WeightsStep  # becomes a union told apart by `step` when other kinds join


class Recipe(BaseModel):
    """Steps in the order they run, and the seed of everything random.

    >>> recipe = Recipe.from_yaml("steps: [{step: weights, scheme: int4-g64}]")
    >>> recipe.steps[0].scheme
    'mse:int4-g64'
    >>> Recipe.from_yaml(recipe.to_yaml()) == recipe
    True
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    tersor: Literal[1] = 1
    seed: int = Field(default=0, ge=0, lt=2**63)
    steps: tuple[Step, ...]

    @classmethod
    def of(
        cls, scheme: str = KEEP, rules: dict[str, str] | None = None, exclude: Iterable[str] = (), seed: int = 0
    ) -> "Recipe":
        """A recipe of one weights step."""
        return cls.validated(
            {"seed": seed, "steps": [{"scheme": scheme, "rules": rules or {}, "exclude": tuple(exclude)}]}, "the recipe"
        )

    @classmethod
    def validated(cls, data: Any, place: str) -> "Recipe":
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise InputError(f"{place}: {first_mistake(error)}") from None

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


def spelled(text: str) -> str:
    """A scheme's full spelling; raises what `Scheme.parse` raises, as a message pydantic can carry."""
    try:
        scheme = parse_rule(text)
    except TersorError as error:
        raise ValueError(str(error)) from None
    return KEEP if scheme is None else str(scheme)


def first_mistake(error: ValidationError) -> str:
    """Where pydantic found the first mistake, and what it is."""
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"])) or "top level"
    return f"{where}: {first['msg'].removeprefix('Value error, ')}"


def matches(pattern: str, name: str) -> bool:
    """Shell wildcards; a leading `*.` also matches a name at the top.

    >>> matches("*.embeddings.*", "embeddings.word"), matches("*.word", "embeddings.word"), matches("word", "a.word")
    (True, True, False)
    """
    return fnmatchcase(name, pattern) or fnmatchcase("." + name, pattern)


def misfit(site: Site, format: Format) -> str | None:
    """Why a format cannot hold a site, in one line with the way out."""
    problem = format.misfit(site.shape)
    if not site.places[0].module and site.kind in ("linear", "conv", "embedding"):
        return f"{site.name}: the model is a single layer; wrap it in nn.Sequential so that its weight can be replaced"
    return problem and f"{format.name}: {site.name} {problem}, or exclude it with --exclude '{site.name}'"
