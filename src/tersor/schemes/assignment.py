"""Assignment of a scheme to every site by a recipe's step: `scheme`, `rules` and `exclude`."""

from collections.abc import Callable, Iterable, Iterator
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, field_validator

from tersor.core.errors import TersorError
from tersor.nn.sites import Site, check_patterns, escape, matches
from tersor.schemes.scheme import KEEP, Scheme, as_written, in_full, parse_rule

Result = TypeVar("Result")


def one_or_more(patterns: Any) -> Any:
    """A single pattern is a list of one, and not one of letters."""
    return (patterns,) if isinstance(patterns, str) else patterns


Cpu = Literal["any", "vnni"]
Patterns = Annotated[tuple[str, ...], BeforeValidator(one_or_more)]


class Assignment(BaseModel):
    """The fields of every step that chooses formats.

    A site takes the scheme of the last rule whose pattern matches its name, else `scheme`; `exclude` keeps it as it is
    whatever the rules say. Patterns are shell wildcards over site names; `*.head` matches `head` at the top, too.

    A scheme that names no method gets the usual one of its format when the step runs (`with_methods`).

    `cpu` says where int8 weights with int8 inputs shall multiply exactly: on `any` processor, for which no pair of them
    may overflow 16 bits (formats/overflow.py), or on those with `vnni` instructions, or ARM's, alone, which leaves the
    whole range to every weight.
    """

    step: str
    scheme: str = KEEP
    rules: dict[str, str] = {}
    exclude: Patterns = ()
    cpu: Cpu = "any"

    @field_validator("scheme")
    @classmethod
    def scheme_exists(cls, text: str) -> str:
        return as_message(lambda: as_written(text))

    @field_validator("rules")
    @classmethod
    def rules_exist(cls, rules: dict[str, str]) -> dict[str, str]:
        return {pattern: as_message(lambda text=text: as_written(text)) for pattern, text in rules.items()}  # type: ignore[misc]

    def texts(self, sites: Iterable[Site]) -> Iterator[tuple[Site, str]]:
        """Each site with its scheme as the step spells it. Raises UnknownName for a pattern no site matches."""
        sites = list(sites)
        check_patterns((*self.rules, *self.exclude), sites)
        for site in sites:
            text = self.scheme
            for pattern, scheme in self.rules.items():
                text = scheme if matches(pattern, site.name) else text
            if any(matches(pattern, site.name) for pattern in self.exclude):
                text = KEEP
            yield site, text

    def assign(self, sites: Iterable[Site]) -> Iterator[tuple[Site, Scheme | None]]:
        """Each site with its scheme; None: kept. Raises UnknownName for a pattern no site matches."""
        for site, text in self.texts(sites):
            yield site, parse_rule(text)

    def with_methods(self, sites: Iterable[Site], sees_inputs: Callable[[Site], bool]) -> Self:
        """The same step with every method by name: where it names none, the usual one of the format, which is another
        where calibration shows the inputs of a site. The sites that differ from others of the same scheme get rules of
        their own.
        """
        seen: dict[str, bool] = {}  # whether any site of a scheme shows its inputs
        unseen: dict[Site, str] = {}
        for site, text in self.texts(sites):
            seen[text] = seen.get(text, False) or sees_inputs(site)
            if not sees_inputs(site):
                unseen[site] = text
        own = {
            escape(site.name): in_full(text)
            for site, text in unseen.items()
            if in_full(text) != in_full(text, sees_inputs=seen[text])
        }
        rules = {pattern: in_full(text, seen.get(text, False)) for pattern, text in self.rules.items()}
        kept = {pattern: scheme for pattern, scheme in rules.items() if pattern not in own}
        scheme = in_full(self.scheme, seen.get(self.scheme, False))
        return self.model_copy(update={"scheme": scheme, "rules": kept | own})


def canonical_name(text: str) -> str:
    """A scheme's full spelling; raises what `Scheme.parse` raises, as a message pydantic can carry."""
    return as_message(lambda: in_full(text))


def as_message(parse: Callable[[], Result]) -> Result:
    """The result of `parse`; errors raised on purpose become messages that pydantic can carry."""
    try:
        return parse()
    except TersorError as error:
        raise ValueError(str(error)) from None
