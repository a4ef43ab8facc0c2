"""Which scheme a recipe's step gives to which site: `scheme`, `rules` and `exclude`."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from pydantic import BaseModel, field_validator

from tersor.errors import TersorError
from tersor.schemes import KEEP, Scheme, parse_rule
from tersor.sites import Site, check_patterns, matches

Result = TypeVar("Result")


class Assignment(BaseModel):
    """The fields of every step that chooses formats.

    A site takes the scheme of the last rule whose pattern matches its name, else `scheme`; `exclude` keeps it as it is
    whatever the rules say. Patterns are shell wildcards over site names; `*.head` matches `head` at the top, too.
    """

    step: str
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
        check_patterns((*self.rules, *self.exclude), sites)
        for site in sites:
            text = self.scheme
            for pattern, scheme in self.rules.items():
                text = scheme if matches(pattern, site.name) else text
            if any(matches(pattern, site.name) for pattern in self.exclude):
                text = KEEP
            yield site, parse_rule(text)


def spelled(text: str) -> str:
    """A scheme's full spelling; raises what `Scheme.parse` raises, as a message pydantic can carry."""
    scheme = as_message(lambda: parse_rule(text))
    return KEEP if scheme is None else str(scheme)


def as_message(parse: Callable[[], Result]) -> Result:
    """What `parse` returns; what it raises on purpose, as a message pydantic can carry."""
    try:
        return parse()
    except TersorError as error:
        raise ValueError(str(error)) from None
